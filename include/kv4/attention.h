// Attention over a cache: what a call says, and the partial state (o, m, l) it may answer with.
//
// Positions count the tokens of a sequence from 0, padding included. Query row t of a call
// with T rows stands at position length - T + t. A mask's column j is position j + offset.
#pragma once

#include <array>
#include <cstdint>

#include "kv4/export.h"
#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4 {

// Which columns a query may see. All conditions must hold.
struct Mask {
  bool causal = true;                   // column position <= query position
  std::int64_t offset = 0;              // position of column 0 of `start` and `general`
  const std::int32_t* start = nullptr;  // [batch] in host memory: first visible column (left padding), or null
  const std::int32_t* window =
      nullptr;  // [batch] in host memory: see only the newest `window` columns up to the query's own; 0 = all; or null

  enum class General : std::uint8_t { none, boolean, additive };
  General kind = General::none;
  const void* general = nullptr;     // [batch or 1, q_heads or 1, T or 1, columns]: bool (1 byte, true = visible) or a
                                     // number added to the score
  DType general_dtype = DType::f32;  // of an additive mask
  std::array<std::int64_t, 4> general_stride{};  // elements; 0 broadcasts
  std::int64_t columns = 0;                      // columns of the general mask; positions beyond them are hidden
  // A copy of `general` in host memory, where that is device memory, for what the cache remembers of masks: without it
  // tokens that the mask hides enter means and scales as if they were seen.
  const void* host_general = nullptr;
  std::array<std::int64_t, 4> host_general_stride{};
};

struct AttendArgs {
  TensorView q;                  // [batch, q_heads, T, head_dim_k]; q_heads a multiple of kv_heads
  float scale = 0.0f;            // multiplies q.k; 0 means head_dim_k^-0.5
  float softcap = 0.0f;          // > 0: score = softcap * tanh(score / softcap), before the mask
  const float* sinks = nullptr;  // [q_heads] logits that join the softmax's denominator only, or null
  Mask mask;
};

// The partial attention state over a set of tokens, contiguous float arrays the caller owns:
//   o [batch, q_heads, T, head_dim_v]  sum_j exp(s_j - m) v_j, not normalised
//   m [batch, q_heads, T]              max_j s_j (natural log); -infinity over no tokens
//   l [batch, q_heads, T]              sum_j exp(s_j - m); 0 over no tokens
// States over disjoint token sets merge in any order; the empty state is neutral.
struct PartialState {
  float* o = nullptr;
  float* m = nullptr;
  float* l = nullptr;
};

// into <- into (+) from, for `rows` rows of `dim` channels.
KV4_API void merge(const PartialState& into, const PartialState& from, std::int64_t rows, int dim);

// out = o / (l + exp(sink - m)); a row over no tokens is 0. State rows are [batch, q_heads, T];
// sinks [q_heads] or null; out is [batch, q_heads, T, dim] by its strides.
KV4_API void finish(const PartialState& state, const float* sinks, const MutableTensorView& out);

}  // namespace kv4
