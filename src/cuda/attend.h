// One call of attention on a CUDA device, queued on a stream: one kernel where its segments are few (attend_fused.cuh),
// else three.
//
//   prepare  writes the queries as matrix operands for the other kernels: divided by lambda, rotated and quantised for
//            pages; unchanged for exact rows.
//   main     reads the cache once. A work item is a page or 16 exact rows, in one global order; every warp takes an
//            equal range and writes one partial state per (sequence, KV head, row block) of its range.
//   merge    merges the partial states, rotates those over pages back into the model's basis and writes the output.
//
// Everything that changes from step to step (page tables, counts, positions) is read from device memory, nothing is
// allocated and nothing waits, so that a captured call can be replayed on a cache that has grown. Each sequence has
// segments, items and outputs for its own query rows only; launches and scratch are sized for the longest.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "cuda/layout.h"

namespace kv4::cuda {

// Rows of the MMA's 16 x 8: 8 query rows in two halves of their precision.
constexpr int kBlockRows = 8;
constexpr int kExactTokens = 16;  // exact rows of an item

// A rotation's matrix as attend_rotate.cuh multiplies by it, entries divided by `scale`, the largest magnitude. Null
// words: none.
struct PackedMatrix {
  const uint4* words = nullptr;
  float scale = 1;
};

// PageMemory in the widths that kernels count in; shift 31 without chunks.
struct PagesAt {
  const std::uint8_t* data = nullptr;
  const std::uint8_t* const* chunks = nullptr;
  std::uint32_t page_stride = 0, head_stride = 0, shift = 31;
};

struct AttendParams {
  const SequenceView* sequences = nullptr;  // [batch] in device memory, every pointer in it too
  int batch = 0, kv_heads = 0, group = 0;   // group: query heads per KV head
  int queries = 0;                          // largest number of queries of a sequence
  int dim = 0;
  int blocks = 0;     // blocks of kBlockRows of so many rows per KV head, rounded up to whole segments
  bool bf16 = false;  // exact rows: bfloat16, else float16
  bool mean = false;  // whether pages hold means
  PagesAt pages;
  std::uint32_t k_copy_bytes = 0, v_copy_bytes = 0;
  std::uint32_t v_codes = 0;       // offset in a head slice
  std::uint32_t value_scales = 0;  // from v_codes
  Tables key, value;               // make_tables or, of narrow codes, make_narrow_tables
  float factor = 0;                // of q.k, to scores in units of log2 (or, with a cap, to the argument of tanh)
  float cap = 0;                   // > 0: score = cap * tanh(factor q.k), log2 units
  Mask mask;                       // start, window, general: device memory
  int window = 0;                  // of every sequence, where mask.window is null

  // Queries [inputs, kv_heads * group, rows, dim] and the output alike.
  const void* q = nullptr;
  DType q_dtype = DType::f32;
  std::int64_t q_stride[3] = {};
  void* out = nullptr;  // or null, where `partial` is wanted
  DType out_dtype = DType::f32;
  std::int64_t out_stride[3] = {};
  PartialState partial;  // [inputs, kv_heads * group, rows]
  std::int64_t rows = 0;
  const float* sinks = nullptr;

  PackedMatrix dual;               // keys: R^-1, so that rows q / lambda times it are q' = (R^-1)^T (q / lambda)
  PackedMatrix inverse_transpose;  // values: (R^-1)^T, which rotates rows of outputs back

  // Scratch.
  int* arrived = nullptr;       // [kMostFused], fused kernel: CTAs of each segment that are done; 0 between calls
  int* item_offsets = nullptr;  // [batch + 1] items before each sequence
  uint4* operands = nullptr;    // per block: bytes, halves of q', halves of q (see operand_* below)
  float* row_scale = nullptr;   // per block: [kBlockRows] of bytes times factor, then of the halves of q'
  float* states =
      nullptr;      // per slot: o [rows][dim], m [rows], l [rows]; per CTA of a segment: twice fused_state_floats
  int readers = 0;  // warps that the items are divided among
  int segment_blocks = 0;  // blocks of a segment: 1 or 2
  int merge_rows = 0;      // rows of a segment that one CTA merges
  // Where tiles of many rows read the pages of sequences that have as many (attend_wide.h), which are no items then:
  // each of so many parts of a segment's pages leaves a state, from slot wide_slot on. 0: no tiles.
  int wide_splits = 0;
  std::size_t wide_slot = 0;
  bool even_levels = false;  // both sides' levels of both signs have the same magnitudes
  // Where there are many: what one CTA rotates in one product, of no more than kBlockRows rows together.
  int prepare_blocks = 1, merge_segments = 1;

  int key_bits = 4, value_bits = 4;  // of a code
  std::uint32_t key_scales = 0;      // in a head slice
};

// Whether pages have codes of fewer than 4 bits.
inline bool has_narrow(const AttendParams& p) { return is_narrow(p.key_bits) || is_narrow(p.value_bits); }

// uint4 per block of operands: [k-tile of 32][lane] bytes, [k-tile of 32][tile of 4 rows][lane] of q'
// (attend_rotate.cuh), [k-step of 16][lane] of q.
constexpr int operand_bytes_tiles(int dim) { return pad_channels(dim) / 32; }
constexpr int operand_mean_steps(int dim) { return pad_channels(dim) / 16; }
constexpr int operand_exact_steps(int dim) { return (dim + 15) / 16; }
constexpr int page_operand_words(int dim) { return (operand_bytes_tiles(dim) + operand_mean_steps(dim)) * kLanes; }
constexpr int operand_words(int dim) { return page_operand_words(dim) + operand_exact_steps(dim) * kLanes; }

// The properties of a device that a call's plan depends on.
struct Chip {
  int multiprocessors = 1;
  int shared = 0;      // bytes of shared memory that a CTA may ask for
  int code = 0;        // the compute capability that the kernels it runs were compiled for: 80, 89, 90, ...
  bool wgmma = false;  // whether it has wgmma, and this build code for it
};
Chip chip_of(
    int device);  // `device` is the current one; shared and code are 0 where this build has no code that it can run

// What attend_main is compiled for, by a CTA's shared memory and by how its queues are filled (attend_tuning.h).
enum class Room { none, small, middle, large };

// Items of the sequences of a call: what its plan depends on beside the device. A captured call is replayed with more
// of them.
struct Load {
  long long longest = 0, all = 0;  // of one sequence; of all: of one KV head
};
// From the views or, where the host cannot read them, from their upper bounds of tokens: all but one page's worth are
// taken to be in pages, or none if not `sealed`.
Load load_of(const Sequences& sequences, bool sealed);
long long most_queries(const Sequences& sequences);

constexpr int kMostFused = 1024;  // segments of a call that one kernel does

// The launch configuration of one call and the scratch it needs, in bytes; its first kMostFused ints are 0 before the
// first call that uses it.
struct AttendPlan {
  Room room = Room::none;
  int most_sequences = 0;  // for which item counts fit in shared memory beside the queues
  int segment_blocks = 1;
  int ctas = 0, readers_per_cta = 0;
  int fused_ctas = 0;   // of each segment, where one kernel does all (attend_fused.cuh); 0: three kernels
  int wide_splits = 0;  // where tiles of many rows read the pages (attend_wide.h)
  bool teams = false;   // teams of warps read together (attend_team.cuh)
  bool early = false;   // kernels may begin before the previous one has ended (sm_90)
  std::size_t scratch = 0;
};
AttendPlan plan_attend(const AttendParams& p, const Chip& chip, const Load& load);
// Scratch that suffices for every call with at most as many sequences, queries per sequence and tokens.
std::size_t most_scratch(const AttendParams& p, const Chip& chip);
// Fills in the scratch pointers from `scratch` and queues the kernels. cudaErrorNoKernelImageForDevice: the plan has no
// room.
cudaError_t launch_attend(AttendParams& p, const AttendPlan& plan, void* scratch, cudaStream_t stream);

}  // namespace kv4::cuda
