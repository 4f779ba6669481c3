// The interface of a backend: what the cache and the paged operations ask of a device. Plain structs go in: pages by id
// and stride, exact rows, sequences as a call finds them. A backend knows no reference counts and no policy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "format/finite.h"
#include "format/page.h"
#include "kv4/attention.h"
#include "kv4/paged.h"
#include "kv4/recipe.h"
#include "kv4/status.h"
#include "kv4/types.h"
#include "recipe/levels.h"
#include "rotation/rotation.h"

// Functions that kernels run too. Never a symbol of their own where they are compiled for several instruction sets: a
// linker would choose one for all.
#if defined(__CUDACC__)
#define KV4_DEVICE __host__ __device__
#elif defined(__GNUC__)
#define KV4_DEVICE __attribute__((always_inline))
#else
#define KV4_DEVICE
#endif

namespace kv4 {

// One side (keys or values) of a page.
struct SideSpec {
  int dim = 0;     // channels of a head
  int group = 0;   // channels per scale (= dim for one scale per vector)
  int groups = 0;  // dim / group
  std::shared_ptr<const Rotation> rotation;
  Levels levels{};
  ScaleRule scale = ScaleRule::least_squares;
  bool mean = false;
  bool values = false;  // which of the two it is: the chains of a trellis run through tokens, else through channels
};

struct PageSpec {
  SideSpec key, value;
  kv4_page_layout layout{};
  kv4_second_layout second{};  // of refined keys
  Levels second_levels{};      // of 4 bits, of the kind of the keys'; lloyd_max beside a trellis
};

// Page `id`, and its slice of one head, as their reader sees them: kernels, or the host where it is host memory.
KV4_DEVICE inline std::uint8_t* page_at(const PageMemory& memory, std::int32_t id) {
  if (memory.chunks == nullptr) return memory.data + id * memory.page_stride;
  const std::int32_t within = id & ((std::int32_t{1} << memory.chunk_shift) - 1);
  return memory.chunks[id >> memory.chunk_shift] + within * memory.page_stride;
}
KV4_DEVICE inline std::uint8_t* slice_at(const PageMemory& memory, std::int32_t id, int head) {
  return page_at(memory, id) + head * memory.head_stride;
}

// Seals tokens [first, first + count) of a page, all its heads. Exact rows are [token, channel] with channel stride 1;
// row `first` of the page is row 0 of k and v. With a mean or a trellis, first = 0 and count =
// kPageTokens.
struct SealJob {
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t k_head_stride = 0, v_head_stride = 0;  // elements between heads
  std::int64_t k_stride = 0, v_stride = 0;            // elements between tokens
  const std::uint8_t* skip = nullptr;  // [count], where kernels read it: nonzero rows are masked: they stay out of the
                                       // mean and get scale 0 (they dequantise to mean and to 0)
  const float* lambda_k = nullptr;     // [kv_heads, head_dim_k] or null for 1
  const float* lambda_v = nullptr;     // [kv_heads, head_dim_v] or null for 1
  std::int32_t page = 0;               // below 0: nothing to do
  DType dtype = DType::f32;
  std::uint8_t hidden = 0;  // the first rows that are masked, beside those of skip
  std::int16_t first = 0;
  std::int64_t count = kPageTokens;
};

// What a backend that queues its work reports later, in host memory: 1 + the newest position whose key (value) held NaN
// or infinity in some head, 0 while none did.
struct LateNote {
  volatile std::int64_t key = 0, value = 0;
};

// Exact tokens of one sequence, all KV heads, channel stride 1, values finite. Row r follows row 0 by r strides; with a
// table of blocks it is row r % kPageTokens of block blocks[r / kPageTokens].
struct ExactRows {
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t k_head_stride = 0, v_head_stride = 0;  // elements between heads
  std::int64_t k_stride = 0, v_stride = 0;            // elements between tokens
  const std::int32_t* blocks = nullptr;
  std::int64_t k_block_stride = 0, v_block_stride = 0;  // elements between blocks
  std::int64_t position = 0;                            // of row 0
  std::int64_t count = 0;
};

// Elements from k (or v) to row `row` of KV head `head`.
KV4_DEVICE inline std::int64_t row_offset(const ExactRows& x, bool keys, std::int64_t head, std::int64_t row) {
  const std::int64_t within = keys ? x.k_stride : x.v_stride, at = head * (keys ? x.k_head_stride : x.v_head_stride);
  if (x.blocks == nullptr) return at + row * within;
  return at + x.blocks[row / kPageTokens] * (keys ? x.k_block_stride : x.v_block_stride) + row % kPageTokens * within;
}

// One sequence as a call finds it. Every pointer but `note` is memory that kernels read. No padding: compared as bytes.
struct SequenceView {
  const std::int32_t* pages = nullptr;  // [page_count] ids, in order of position
  std::int32_t page_count = 0;
  std::int32_t last_page_tokens = kPageTokens;  // tokens in the last page, 1 ... kPageTokens
  std::int64_t pages_position = 0;              // of the first page's first token
  std::int32_t pages_hidden = 0;                // the first page's first tokens, which lie exact beside it
  std::int32_t input = 0;                       // the call's tensors: index of axis 0
  std::int64_t input_row = 0;                   // ... and of axis 2, of this sequence's first row
  std::int64_t query_count = 0;                 // rows of this sequence
  std::int64_t query_position = 0;              // of the first of them
  const float* lambda_k = nullptr;              // [kv_heads, head_dim_k] or null for 1
  const float* lambda_v = nullptr;              // [kv_heads, head_dim_v] or null for 1
  LateNote* note = nullptr;                     // where a backend with alloc_note reports NaN and infinity
  ExactRows exact[2];                           // sinks and window; disjoint; count 0 where absent
};

// Sequences of a call. `views` is host memory that is read before the call returns, or memory that kernels read
// (resident), where the host knows no more of them than what stands beside it.
struct Sequences {
  std::span<const SequenceView> views;
  bool resident = false;
  std::int64_t most_queries = 0;      // of one sequence; 0: that of the views
  std::int64_t longest = 0, all = 0;  // tokens at most: of one sequence, of all together; for sharing out the work
};

// What a backend keeps on its device for one cache: its sequences, brought in line where they changed.
class DeviceTables {
 public:
  virtual ~DeviceTables() = default;
  // Room for `batch` sequences, so that no later call allocates.
  virtual Status reserve(std::size_t batch) = 0;
  virtual std::size_t bytes() const = 0;
};

// Rows that go behind the rows of exact[1] of each sequence, whose memory has room for them: query_count of them, from
// rows input_row on of k[input] and v[input]. A row of one head with NaN or infinity is stored as zeros. With `skip`
// nothing is stored, but found as it would be: for rows that are sealed as they arrive.
struct StoreJob {
  TensorView k, v;
  Sequences sequences;  // as before the call; query_position: that of the last row but query_count
  std::vector<NonFinite>* const* found =
      nullptr;  // [batch] or null: filled within the call where the backend is synchronous, ascending
  std::uint8_t* skip =
      nullptr;  // [inputs, rows], zeros, where kernels write it: 1 where a row holds NaN or infinity in some head
  DeviceTables* tables = nullptr;
  bool in_order = false;  // the rows of the sequences follow one another on axis 2, and axis 0 has one element
};

// Rows from one place to another, all heads, channel stride 1: to[h][j] = from[h][j], or 0 where from is null.
struct ConvertJob {
  const void* from = nullptr;
  DType from_dtype = DType::f32;
  std::int64_t from_head_stride = 0, from_stride = 0;  // elements
  void* to = nullptr;
  DType to_dtype = DType::f32;
  std::int64_t to_head_stride = 0, to_stride = 0;
  int heads = 0, dim = 0;
  std::int64_t rows = 0;
};

// Tokens [first, first + count) of a page, all its heads, as rows in the model's own basis: k = R^-1(s L + mean') /
// lambda, v = R^-1(s L) / lambda_v. Either output may be null.
struct DequantiseJob {
  std::int32_t page = 0;     // below 0: nothing to do
  DType dtype = DType::f32;  // of the rows
  std::int16_t first = 0;
  std::int64_t count = 0;
  const float* lambda_k = nullptr;  // [kv_heads, head_dim_k] or null for 1
  const float* lambda_v = nullptr;
  void* k = nullptr;
  void* v = nullptr;
  std::int64_t k_head_stride = 0, v_head_stride = 0;  // elements between heads
  std::int64_t k_stride = 0, v_stride = 0;            // elements between rows
};

// One query of one sequence: its energies q_c^2, summed over the query heads of each KV head.
struct EnergyJob {
  int sequence = 0;
  std::int64_t query = 0;     // row of q
  float* energies = nullptr;  // [kv_heads][head_dim_k]
};

// The automatic lambda of one sequence (moments/lambda.h): from the energies of queries and those of the keys about the
// mean of each 64.
struct LambdaJob {
  const void* k = nullptr;  // [blocks * kPageTokens] rows of every head
  DType dtype = DType::f32;
  std::int64_t k_head_stride = 0, k_stride = 0;
  int kv_heads = 0, dim = 0;
  int blocks = 0;
  std::span<const std::uint8_t> skip;  // [blocks * kPageTokens] in host memory: nonzero rows stay out
  std::span<const float* const>
      energies;             // in host memory: of each query [kv_heads][dim]; what is not finite counts as 0
  float* lambda = nullptr;  // [kv_heads, dim]
};

// Attention of the query rows that each sequence names.
struct AttendJob {
  AttendArgs args;                 // q [inputs, q_heads, rows, head_dim_k]: a sequence's rows are its own input's
  const PageSpec* spec = nullptr;  // null where nothing is sealed
  PageMemory pages;
  DType dtype = DType::f32;  // of the exact rows
  int kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  // With tables, the mask's start and window are host memory; without, memory that the kernels read.
  Sequences sequences;
  DeviceTables* tables = nullptr;
  std::int32_t window = 0;  // as mask.window, of every sequence, where that is null
  // What the kernels need besides, as workspace() says; empty: the backend's own.
  std::span<std::byte> workspace;
  // Exactly one of the two: finished output, [inputs, q_heads, rows, head_dim_v] by strides, or
  // the partial state of the same rows ([inputs, q_heads, rows] contiguous), sinks left out.
  MutableTensorView out;
  PartialState partial;
};

// Memory is the backend's own wherever kernels read it: pages, rows, lambda, tensors of a call. Jobs, sequences, page
// tables and what is said to be host memory is read before a call returns. A backend may queue its work on the calling
// thread's stream; what it queued is in order.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  // Whether its memory is the host's, and what it does is done when a call returns.
  virtual bool host_memory() const { return true; }
  // The stream of this thread's calls from now on, as the device's library has it; null is its default.
  virtual void set_stream(void* /*stream*/) {}
  // Waits until what was queued there is done, so that work on any stream may use it.
  virtual Status wait() { return {}; }
  // Whether the stream is being captured: store and attend then only queue kernels, which read what is in the tables
  // when they run.
  virtual bool capturing() const { return false; }

  // Channels stored per token for a head of `dim` channels (kernel padding).
  virtual int code_channels(int dim) const = 0;
  // ok, or unsupported naming the field: the widths of codes and the refined keys that its kernels take. Where not
  // said, those of expect_plain_pages.
  virtual Status supports_codes(const Recipe& recipe) const;
  // ok, or unsupported with the reason why no kernel serves this page.
  virtual Status supports(const PageSpec& spec) const = 0;
  // The same of exact rows, and of sealing them as they arrive.
  virtual Status supports_rows(int head_dim_k, int head_dim_v, DType dtype, SealMode seal) const = 0;

  // Memory that the kernels read, 64-byte aligned; null when there is none left.
  virtual void* alloc(std::size_t bytes) = 0;
  virtual void free(void* p, std::size_t bytes) = 0;
  // To, from or within the backend's memory. On return a host source may be reused and a host destination is complete.
  // Callers return a failure to theirs: after a fault of the device its memory is undefined.
  virtual Status copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual Status clear(void* p, std::size_t bytes) = 0;  // zero bytes
  // The same from host memory, without waiting for the device: the source may be reused on return.
  virtual Status upload(void* to, const void* from, std::size_t bytes) { return copy(to, from, bytes); }
  // A 2-D copy: `lines` rows of `bytes`, a pitch apart. A row may overlap its own source where it lies below it.
  virtual Status copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes,
                            int lines) = 0;
  // A note for store to write to, or null where store reports within the call.
  virtual Status alloc_note(LateNote** out) {
    *out = nullptr;
    return {};
  }
  virtual void free_note(LateNote* /*note*/) {}
  // What it keeps on its device of a rotation that it has used; null where that is nothing.
  virtual const RotationTable* table_of(const Rotation& /*rotation*/) const { return nullptr; }
  // Null where it keeps none; a cache then cannot be captured.
  virtual Status make_tables(std::unique_ptr<DeviceTables>* out) {
    out->reset();
    return {};
  }
  // Brings tables in line with the sequences that a captured store of `tokens` rows will find, and counts on it.
  virtual Status foresee(DeviceTables* /*tables*/, std::span<const SequenceView> /*sequences*/, int /*tokens*/) {
    return error(StatusCode::unsupported, "backend", "one whose steps can be captured", name());
  }

  virtual Status store(const StoreJob& job) = 0;
  virtual Status convert(const ConvertJob& job) = 0;
  virtual Status query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) = 0;
  virtual Status fix_lambda(const LambdaJob& job) = 0;
  // resident: the jobs lie where kernels read them, in make_jobs' order, and how many there are at most is all that the
  // host knows.
  virtual Status seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs,
                      bool resident) = 0;
  virtual Status dequantise(const PageSpec& spec, const PageMemory& pages, int kv_heads,
                            std::span<const DequantiseJob> jobs, bool resident) const = 0;
  // Bytes of workspace for a call like this one, whose sequences' limits are those of all calls that it will serve.
  // Nothing is read through the job's pointers.
  virtual std::size_t attend_workspace(const AttendJob& job) const = 0;
  // What a batch of a host that owns its memory is as sequences and jobs (batch.h), written to `out`, which kernels
  // read. Jobs of the sequences follow one another; the rest of the batch.size * range.most have page < 0.
  virtual Status make_views(const PagedBatch& batch, bool stored, SequenceView* out);
  virtual Status make_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, SealJob* out);
  virtual Status make_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, DequantiseJob* out);

  // The beginning of a step: the call's rows k and v stored, then the views that attention takes and the jobs of a
  // range, none where range.most is 0.
  struct Step {
    TensorView k, v;
    DType dtype = DType::f32;
    PageRange range;
    SequenceView* views = nullptr;  // [batch.size]
    SealJob* jobs = nullptr;        // [batch.size * range.most]
  };
  virtual Status begin_step(const PagedBatch& batch, const Step& step);
  // Its end: seals the jobs that begin_step made. Attention was queued between the two, and reads none of these pages.
  virtual Status end_step(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs) {
    return seal(spec, pages, kv_heads, jobs, true);
  }

  // non_finite where a query that sees some column holds NaN or infinity, if the backend works at once; else NaN comes
  // out.
  virtual Status attend(const AttendJob& job) = 0;

  // Codes of a head slice between the backend's order and the canonical one
  // (format/page.h: [64][d/2] bytes per side, in host memory).
  virtual Status codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k,
                                    std::uint8_t* v) const = 0;
  virtual Status codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v,
                                      std::uint8_t* slice) const = 0;
};

// The registry: one line per backend in registry.cpp. `name` may end in ":" and the number of a device.
// Null if there is none of that name, or no such device.
Backend* find_backend(const std::string& name);

}  // namespace kv4
