// The contents of a saved cache, independent of the memory that holds it. The owner of the memory (a Cache, or a host
// with memory of its own) is read through a SaveSource and filled through a LoadTarget; which block holds what, and
// what a file may say, is decided here alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "blob/blob.h"
#include "format/finite.h"
#include "ledger/ledger.h"
#include "ledger/queries.h"

namespace kv4::blob {

// Of one layer's caches: the numbers that a file begins with, and what follows from them for what comes then.
struct Format {
  std::vector<Field> fields;
  ledger::Policy policy;
  DType dtype = DType::f32;
  int kv_heads = 0, head_dim_k = 0, head_dim_v = 0;
  SliceLayout slice{};      // of a head of a page: no channel padded, codes in canonical order
  std::size_t queries = 0;  // before the first page is due, from the first unmasked one on

  // spec: any where nothing is sealed.
  static Format of(const CacheConfig& config, const PageSpec& spec);

  std::size_t channels() const { return static_cast<std::size_t>(kv_heads) * static_cast<std::size_t>(head_dim_k); }
  // One exact row of one head.
  std::size_t row_bytes(bool key) const {
    return static_cast<std::size_t>(key ? head_dim_k : head_dim_v) * size_of(dtype);
  }
  // Exact rows of `tokens`: keys [kv_heads][tokens], then values alike.
  std::size_t rows_bytes(std::int64_t tokens) const {
    return static_cast<std::size_t>(kv_heads * tokens) * (row_bytes(true) + row_bytes(false));
  }
  std::size_t page_bytes() const { return static_cast<std::size_t>(kv_heads) * slice.head_bytes; }
};

// Copies scales and means of a head slice between a layout and the file's: copy(to, from, bytes) -> Status.
template <class Copy>
Status copy_scales(std::uint8_t* to, const kv4_page_layout& there, const std::uint8_t* from,
                   const kv4_page_layout& here, Copy copy) {
  KV4_RETURN_IF_ERROR(copy(to + there.k_scales, from + here.k_scales, key_scale_bytes(here)));
  return copy(to + there.v_scales, from + here.v_scales, value_scale_bytes(here));
}

// The same of its second rows.
template <class Copy>
Status copy_second_rows(std::uint8_t* to, const kv4_second_layout& there, const std::uint8_t* from,
                        const kv4_second_layout& here, const SideSpec& key, Copy copy) {
  if (here.rows == 0) return {};
  for (std::uint32_t row = 0; row < here.rows; ++row)
    KV4_RETURN_IF_ERROR(copy(to + there.codes + row * there.row_bytes, from + here.codes + row * here.row_bytes,
                             static_cast<std::size_t>(key.dim) / 2));
  KV4_RETURN_IF_ERROR(
      copy(to + there.scales, from + here.scales, std::size_t{here.rows} * static_cast<std::size_t>(key.groups) * 2));
  return copy(to + there.places, from + here.places, std::size_t{here.rows});
}

// What a sequence has learnt of its queries.
struct Learnt {
  std::vector<float> lambda;  // [kv_heads * head_dim_k], where there is one
  ledger::Queries queries;
  std::vector<std::vector<float>> energies;  // alike, of queries.row; empty: masked or not asked
};

class SaveSource {
 public:
  virtual ~SaveSource() = default;
  virtual const ledger::Ledger& ledger(std::size_t sequence) const = 0;
  virtual Status learnt(std::size_t sequence, Learnt* out) const = 0;
  // Rows [first, first + tokens) of the sinks or of the window, as rows_bytes has them.
  virtual Status rows(std::size_t sequence, bool sinks, std::int64_t first, std::int64_t tokens,
                      std::span<std::byte> out) const = 0;
  virtual Status page(ledger::PageId id, std::span<std::byte> out) const = 0;
  // Rows with NaN or infinity that the ledger does not have yet. Called last: a device reports them late, and its
  // queued work has run once rows and pages have been copied.
  virtual void pending_non_finite(std::size_t /*sequence*/, std::vector<NonFinite>* /*found*/) const {}
};

class LoadTarget {
 public:
  virtual ~LoadTarget() = default;
  // The next `tokens` of the `total` sinks or window rows of a sequence, which comes behind those before it.
  virtual Status rows(std::size_t sequence, bool sinks, std::int64_t first, std::int64_t tokens, std::int64_t total,
                      std::span<const std::byte> block) = 0;
  // Pages come in order, `count` in all.
  virtual Status page(std::int64_t number, std::int64_t count, std::span<const std::byte> block) = 0;
};

struct Contents {
  struct Sequence {
    ledger::Ledger ledger;  // its pages by their numbers in the file
    Learnt learnt;
  };
  std::vector<Sequence> sequences;
  bool recording = false;
};

// Pages that several sequences have are written once.
Status write(const Format& format, std::size_t batch, bool recording, const SaveSource& from, const Sink& sink);
// A file may say anything: what it says is held against what append, seal, crop and eviction can leave behind, so that
// no later call indexes outside of what is there. Errors: what source and taker say; invalid_argument naming the field
// of another configuration; data_loss.
Status read(const Format& format, const Source& source, LoadTarget& to, Contents* out);

}  // namespace kv4::blob
