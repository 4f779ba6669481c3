// kv4 on memory that a host owns: the operations of a cache without the cache. A server keeps its own pool of blocks,
// its own tables and its own sequences, which come and go; kv4 gets pointers to them and quantises, packs and attends.
// No call but create and learn_lambda allocates (a CPU thread keeps some kilobytes of scratch from its first call on),
// none remembers anything; on a device none waits. All of it is checked before anything is written.
//
//   PageFormat::create   what a layer's pages look like, and how many bytes of memory they take
//   store                rows of keys and values of new tokens into their blocks of exact rows
//   attend               queries over pages and exact rows, of any number of sequences at once
//   seal                 exact rows into pages
//   dequantise           pages into exact rows
//   step                 store, attend and seal in one call, in fewer launches on a device
//   learn_lambda         what keys are scaled by before they are quantised, once for a model's layer or for a sequence
//
// Tokens of a sequence lie in pages (packed, kPageTokens each) and in blocks of exact rows (kPageTokens each, in the
// model's dtype). Page i and block i both hold positions 64 i ... 64 i + 63, so that a page takes a block's place where
// a host shares blocks by prefix. Tokens below `sealed` are read from pages, the others from blocks; a block whose page
// is sealed is the host's again. With sinks, the first tokens of a sequence are read from a block always, and page 0
// leaves them out.
//
// Which tokens are to be sealed is the host's decision; what kv4's own cache does: the newest 64 to 127 stay exact, and
// nothing is sealed that can be taken back (rejected drafts). A page's bytes follow from its rows and from lambda
// alone.
//
// Memory and tables are the backend's: host memory on "cpu", the device's on "cuda". What stands in tables on a device
// is read when the kernels run: calls may be captured into a CUDA graph and replayed with other tables, lengths and
// pages, within the limits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kv4/attention.h"
#include "kv4/cache.h"
#include "kv4/export.h"
#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4 {

namespace cpu {
class Executor;
}

// Where pages lie: page `id` at data + id * page_stride; or, where memory grows by chunks, at
// chunks[id >> chunk_shift] + (id & (1 << chunk_shift) - 1) * page_stride. Every head slice on a multiple of 64 bytes.
struct PageMemory {
  std::uint8_t* data = nullptr;
  std::uint8_t* const* chunks = nullptr;  // null: `data` holds them all
  std::int64_t page_stride = 0;           // bytes; at least PageFormat::page_bytes() where heads follow one another
  std::int64_t head_stride = 0;           // bytes between the head slices of a page; PageFormat::head_bytes() or more
  std::int64_t chunk_shift = 0;
};

// Where exact rows lie, in blocks of kPageTokens: row r of block `id`, KV head h at k + id * k_block_stride + h *
// k_head_stride + r * k_stride elements. Channels follow one another.
struct RowMemory {
  void* k = nullptr;
  void* v = nullptr;
  std::int64_t k_block_stride = 0, v_block_stride = 0;
  std::int64_t k_head_stride = 0, v_head_stride = 0;
  std::int64_t k_stride = 0, v_stride = 0;
};

// The sequences of a call. Arrays are memory that kernels read; nothing is read of them by the host on a device.
struct PagedBatch {
  int size = 0;  // sequences
  const std::int32_t* queries =
      nullptr;  // [size + 1]: sequence b has the call's rows queries[b] ... queries[b + 1] - 1, maybe none
  const std::int32_t* lengths = nullptr;  // [size] tokens, those of the call included
  const std::int32_t* sealed =
      nullptr;  // [size] tokens that are read from pages: a multiple of kPageTokens, at most the length
  const std::int32_t* pages =
      nullptr;  // [size, pages_stride] ids of pages by position; those that nothing reads may be anything
  std::int64_t pages_stride = 0;
  const std::int32_t* blocks = nullptr;  // [size, blocks_stride] ids of blocks of exact rows, likewise
  std::int64_t blocks_stride = 0;
  const std::int32_t* sinks =
      nullptr;  // [size] the block with the first sink_tokens tokens once page 0 is sealed; null: no sinks
  std::int32_t sink_tokens = 0;  // 0 to kPageTokens
  std::int32_t window = 0;  // queries see so many newest tokens, their own included; 0 = all. Older pages are not read
  PageMemory page_memory;
  RowMemory row_memory;
  std::int32_t page_count = 0, block_count = 0;  // ids are below these
  // [size, 2], by store alone: 1 + the newest position of a key, of a value, that held NaN or infinity; only ever
  // raised. Or null
  std::int64_t* non_finite = nullptr;
  const float* lambda_k = nullptr;                        // [kv_heads, head_dim_k] or null for 1
  const float* lambda_v = nullptr;                        // [kv_heads, head_dim_v] or null for 1
  std::int64_t lambda_k_stride = 0, lambda_v_stride = 0;  // floats between the lambda of sequences; 0: one for all
  // Limits of what the arrays hold, of this call and of every replay of it. On a device they are all that the host
  // knows; where the host reads the arrays, 0 stands for what they say.
  std::int64_t most_queries = 0;  // rows of one sequence
  std::int64_t longest = 0;       // tokens of one sequence
  std::int64_t all = 0;           // tokens of all sequences
};

// Positions begin[b] ... end[b] - 1 of each sequence, multiples of kPageTokens, in at most `most` pages of each.
struct PageRange {
  const std::int32_t* begin = nullptr;  // [size]
  const std::int32_t* end = nullptr;    // [size]
  int most = 0;
};

// Where a call runs.
struct Place {
  void* stream = nullptr;             // CUDA: a cudaStream_t; null: the device's default
  cpu::Executor* executor = nullptr;  // CPU: the host's threads (kv4/cpu.h); null: those of the process
};

class KV4_API PageFormat {
 public:
  // Of a layer: config.recipe (sealing whole pages; its sinks and window are the host's to keep; lambda is
  // PagedBatch's, whatever the recipe's mode), dtype (of exact rows), kv_heads, head dims, matrices and backend count.
  // Errors: as Cache::create.
  static Status create(const CacheConfig& config, std::unique_ptr<PageFormat>* out);
  ~PageFormat();
  PageFormat(const PageFormat&) = delete;
  PageFormat& operator=(const PageFormat&) = delete;

  std::size_t head_bytes() const;   // of a head slice, a multiple of 64
  std::size_t page_bytes() const;   // kv_heads head slices
  std::size_t block_bytes() const;  // of kPageTokens exact rows of keys and values, all KV heads
  // Bytes of the workspace that serves calls of up to `sequences` sequences, most_queries rows of one, `longest` tokens
  // of one and `all` together, q_heads query heads, and PageRange::most of `most_pages`. On the CPU for as many threads
  // as num_threads() or the place's executor has now. Errors: invalid_argument naming the limit.
  struct Limits {
    int sequences = 1, q_heads = 1, most_pages = 1;
    std::int64_t most_queries = 1, longest = 0, all = 0;
  };
  Status workspace_bytes(const Limits& limits, std::size_t* out, const Place& place = {}) const;
  // Prepares a workspace for its first use, as a device wants it: zeros it, on the place's stream. A device's workspace
  // begins on a multiple of 16 bytes.
  Status prepare(std::span<std::byte> workspace, const Place& place = {}) const;

  // k [1, kv_heads, rows, head_dim_k] and v alike, of the format's dtype: row queries[b] + t goes to position
  // lengths[b] - count + t of sequence b, count being the rows of b. A head's row with NaN or infinity is stored as
  // zeros (PagedBatch::non_finite).
  Status store(const PagedBatch& batch, const TensorView& k, const TensorView& v, std::span<std::byte> workspace,
               const Place& place = {}) const;
  // Seals the range from the blocks into the pages. Reads `sealed` nowhere: whether they count as sealed is what the
  // next call says.
  Status seal(const PagedBatch& batch, const PageRange& range, std::span<std::byte> workspace,
              const Place& place = {}) const;
  // The range's pages as exact rows into the blocks; what sinks hold is not in them.
  Status dequantise(const PagedBatch& batch, const PageRange& range, std::span<std::byte> workspace,
                    const Place& place = {}) const;
  // args.q [1, q_heads, rows, head_dim_k]: row queries[b] + t is sequence b's query at position lengths[b] - count + t.
  // The mask as in kv4/attention.h, its arrays ([size] of start and window; a general mask [1, q_heads or 1, rows,
  // columns]) in memory that kernels read. out [1, q_heads, rows, head_dim_v]; of a partial state the same rows,
  // contiguous. Rows of no sequence stay as they are.
  // Errors: invalid_argument; on the CPU out_of_range for tables that lead out of memory, and non_finite for a query
  // with NaN or infinity that sees a token, after which `out` holds anything; on a device NaN comes out.
  Status attend(const PagedBatch& batch, const AttendArgs& args, const MutableTensorView& out,
                std::span<std::byte> workspace, const Place& place = {}) const;
  Status attend_partial(const PagedBatch& batch, const AttendArgs& args, const PartialState& out,
                        std::span<std::byte> workspace, const Place& place = {}) const;

  // A step of a layer: stores k and v, attends, then seals the range, of whose pages no query of the call reads any:
  // sealed[b] <= range.begin[b] where there are such pages. range.most = 0: nothing is sealed, its arrays may be null.
  // Errors: those of store, attend and seal, before anything is written but for a query that is not finite.
  Status step(const PagedBatch& batch, const TensorView& k, const TensorView& v, const PageRange& range,
              const AttendArgs& args, const MutableTensorView& out, std::span<std::byte> workspace,
              const Place& place = {}) const;

  // lambda [kv_heads, head_dim_k], in memory that kernels read, of queries q [1, q_heads, any, head_dim_k] and keys k
  // [1, kv_heads, n * kPageTokens, head_dim_k]: (E q^2 / E (k - mean of its page)^2)^(0.9/4), of geometric mean 1, each
  // moment drawn a little towards that of its rotary pair. On a device it waits.
  Status learn_lambda(const TensorView& q, const TensorView& k, float* lambda, const Place& place = {}) const;

 private:
  struct KV4_LOCAL State;
  explicit PageFormat(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kv4
