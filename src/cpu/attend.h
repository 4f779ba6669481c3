// Tasks of the attention kernels: some query rows of one KV head against some pages or exact
// rows of one sequence. Plain data only: kernels.inl includes this inside a target region.
//
// Row r of a task is query r / mask.heads, query head r % mask.heads of the KV head's group.
// Both kernels continue the partial states they are given, so that a caller may run them over
// token sets in any order. Scores are in units of log2: weights are 2^score.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "cpu/layout.h"

namespace kv4::cpu {

// Most rows that share one unpacking of a page.
constexpr int kTileRows = 8;
// Most pages whose scales and means are at hand at once.
constexpr int kPagesAtOnce = 4;
// Exact rows converted to float at a time; a multiple of every instruction set's lanes.
constexpr int kBlockRows = 32;

// Which positions the rows see: the conditions of kv4::Mask, for one sequence and KV head.
struct RowMask {
  int heads = 1;  // query heads per KV head
  bool causal = false;
  std::int64_t query_position = 0;  // of row 0
  std::int64_t start = 0;           // first visible position
  std::int64_t window = 0;          // newest positions that are visible, the query's own included; 0 = all
  Mask::General kind = Mask::General::none;
  DType dtype = DType::f32;                                           // of an additive mask
  const void* general = nullptr;                                      // at row 0 and column 0
  std::int64_t head_stride = 0, query_stride = 0, column_stride = 0;  // elements
  std::int64_t offset = 0;                                            // position of column 0
  std::int64_t columns = 0;
};

// Partial states of the rows: sum 2^(s - m) v, max s, sum 2^(s - m); m = -infinity, o = l = 0 over no tokens.
struct RowStates {
  float* o = nullptr;  // [rows, o_stride], o_stride = head_dim_v rounded up to 16; the padding is scratch
  float* m = nullptr;  // [rows]
  float* l = nullptr;  // [rows]
  std::int64_t o_stride = 0;
};

struct PagesTask {
  const PageSpec* spec = nullptr;
  const std::int32_t* pages = nullptr;  // [page_count] ids
  PageMemory memory;
  int head = 0;             // the KV head
  int first = 0, last = 0;  // pages [first, last) are attended to
  int page_count = 0;
  int last_page_tokens = kPageTokens;  // tokens in page page_count - 1
  std::int64_t position = 0;           // of page 0's first token
  int rows = 0;
  const float* q = nullptr;   // [rows, q_stride] R^-T(q / lambda) * factor, zero from head_dim_k on
  std::int64_t q_stride = 0;  // head_dim_k rounded up to 16
  float cap = 0;              // 0: score = q.k; else score = cap * tanh(q.k)
  RowMask mask;
  RowStates states;    // o in the rotated basis
  bool bytes = false;  // queries and weights may be bytes where the instruction set has products of them
  // Scratch, 64-byte aligned.
  std::uint8_t* q_codes = nullptr;  // [rows, q_stride * operand_bytes] bytes
  float* q_scale = nullptr;         // [rows, groups_k]
  std::int32_t* q_start = nullptr;  // [rows, groups_k]
  float* k_scale = nullptr;         // [kPagesAtOnce, groups_k, 64]
  float* v_scale = nullptr;         // [kPagesAtOnce, groups_v, 64]
  float* v_unit = nullptr;          // [kPagesAtOnce, groups_v]
  float* mean = nullptr;            // [kPagesAtOnce, q_stride]
  float* second = nullptr;          // [kPagesAtOnce, refined keys, q_stride]
  void* tiles = nullptr;            // Kernels::tiles_scratch
};

struct ExactTask {
  DType dtype = DType::f32;
  const void* k = nullptr;  // row 0 of the KV head
  const void* v = nullptr;
  std::int64_t k_stride = 0, v_stride = 0;  // elements between rows
  int head_dim_k = 0, head_dim_v = 0;
  std::int64_t first = 0, last = 0;  // rows [first, last) are attended to
  std::int64_t position = 0;         // of row 0
  int rows = 0;
  const float* q = nullptr;   // [rows, q_stride] q * factor, zero from head_dim_k on
  std::int64_t q_stride = 0;  // head_dim_k rounded up to 16
  float cap = 0;              // as in PagesTask
  RowMask mask;
  RowStates states;  // o in the model's basis
  // Scratch, 64-byte aligned.
  float* k_tile = nullptr;  // [kBlockRows, q_stride]
  float* v_tile = nullptr;  // [kBlockRows, states.o_stride]
};

}  // namespace kv4::cpu
