// The interface of a backend: what the cache asks of a device. Plain structs of pointers go in;
// a backend knows pages and exact rows, never page tables, reference counts or policy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "format/page.h"
#include "kv4/attention.h"
#include "kv4/recipe.h"
#include "kv4/rotation.h"
#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4 {

// One side (keys or values) of a page.
struct SideSpec {
  int dim = 0;       // channels of a head
  int group = 0;     // channels per scale (= dim for one scale per vector)
  int groups = 0;    // dim / group
  std::shared_ptr<const Rotation> rotation;
  Levels levels{};
  ScaleRule scale = ScaleRule::least_squares;
  bool mean = false;
};

struct PageSpec {
  SideSpec key, value;
  kv4_page_layout layout{};
};

// Seals tokens [first, first + count) of one head slice of one page. Exact rows are
// [token, channel] with channel stride 1; row `first` of the page is row 0 of k and v.
// With a mean, first = 0 and count = kPageTokens.
struct SealJob {
  const void* k = nullptr;
  const void* v = nullptr;
  DType dtype = DType::f32;
  std::int64_t k_stride = 0;            // elements between tokens
  std::int64_t v_stride = 0;
  const std::uint8_t* skip = nullptr;   // [count]: nonzero rows are masked: they stay out of the
                                        // mean and get scale 0 (they dequantise to mean and to 0)
  const float* lambda_k = nullptr;      // [head_dim_k] or null for 1
  const float* lambda_v = nullptr;      // [head_dim_v] or null for 1
  std::uint8_t* slice = nullptr;        // the head slice
  int first = 0;
  int count = kPageTokens;
};

// Exact tokens of one sequence, all KV heads, channel stride 1, values finite.
struct ExactRows {
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t k_head_stride = 0, v_head_stride = 0;  // elements between heads
  std::int64_t k_stride = 0, v_stride = 0;            // elements between tokens
  std::int64_t position = 0;                          // of row 0
  std::int64_t count = 0;
};

struct SequenceView {
  const std::uint8_t* const* pages = nullptr;  // [page_count], in order of position
  int page_count = 0;
  int last_page_tokens = kPageTokens;          // tokens in the last page, 1 ... kPageTokens
  std::int64_t pages_position = 0;             // of the first page's first token
  ExactRows exact[2];                          // sinks and window; disjoint; count 0 where absent
  const float* lambda_k = nullptr;             // [kv_heads, head_dim_k] or null for 1
  const float* lambda_v = nullptr;             // [kv_heads, head_dim_v] or null for 1
  std::int64_t query_position = 0;             // position of the call's query row `query_begin`
};

// Attention of query rows [query_begin, query_begin + query_count) of `args.q`.
struct AttendJob {
  AttendArgs args;
  const PageSpec* spec = nullptr;   // null where nothing is sealed
  DType dtype = DType::f32;         // of the exact rows
  int kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  std::span<const SequenceView> sequences;  // [batch]
  std::int64_t query_begin = 0, query_count = 0;
  // Exactly one of the two: finished output, [batch, q_heads, T, head_dim_v] by strides, or
  // the partial state of the same rows ([batch, q_heads, T] contiguous), sinks left out.
  MutableTensorView out;
  PartialState partial;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;

  // Channels stored per token for a head of `dim` channels (kernel padding).
  virtual int code_channels(int dim) const = 0;
  // ok, or unsupported with the reason why no kernel serves this page.
  virtual Status supports(const PageSpec& spec) const = 0;

  // Memory that the kernels read, 64-byte aligned; null when there is none left.
  virtual void* alloc(std::size_t bytes) = 0;
  virtual void free(void* p, std::size_t bytes) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual void clear(void* p, std::size_t bytes) = 0;  // zero bytes

  virtual Status seal(const PageSpec& spec, std::span<const SealJob> jobs) = 0;
  // non_finite where a query that sees some column holds NaN or infinity.
  virtual Status attend(const AttendJob& job) = 0;

  // Codes of a head slice between the backend's order and the canonical one
  // (format/page.h: [64][d/2] bytes per side).
  virtual void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice,
                                  std::uint8_t* k, std::uint8_t* v) const = 0;
  virtual void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k,
                                    const std::uint8_t* v, std::uint8_t* slice) const = 0;
  // Tokens [first, first + count) of a slice as float rows [count, dim], in the model's own
  // basis: k = R^-1(s L + mean') / lambda, v = R^-1(s L) / lambda_v. Either output may be null.
  virtual void dequantise(const PageSpec& spec, const std::uint8_t* slice, const float* lambda_k,
                          const float* lambda_v, int first, int count, float* k,
                          float* v) const = 0;
};

// The registry: one line per backend in registry.cpp.
Backend* find_backend(const std::string& name);  // null if there is none of that name
std::vector<std::string> backend_names();

}  // namespace kv4
