// The bytes of a saved cache, as write.cpp and read.cpp have them (docs/format.md): a magic, a version, then blocks
//
//   u32 kind, u64 bytes, payload, u32 CRC-32C of all that
//
// What a block holds follows from the blocks before it, so that a reader knows its size before it comes and allocates
// for nothing that it has not been given.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "backend/backend.h"
#include "blob/checksum.h"
#include "format/page.h"
#include "kv4/cache.h"

namespace kv4::blob {

static_assert(std::endian::native == std::endian::little,
              "numbers are saved as they lie in memory, which has to be little-endian");

inline constexpr char kMagic[] = {'k', 'v', '4', 'c', 'a', 'c', 'h', 'e'};
// Written; earlier ones are read as well. 1 has a record of every query before the first page is due.
inline constexpr std::uint32_t kVersion = 2;
inline constexpr std::uint32_t kRagged = 3;   // written where lengths differ: from here on they follow the state
inline constexpr std::uint32_t kWidths = 4;   // written where a code has other than 4 bits: fields() goes on with them
inline constexpr std::uint32_t kRefined = 5;  // written where keys are refined: fields() ends with how many
inline constexpr std::size_t kArrayBytes = 64 << 10;  // of one block of an array

enum class Kind : std::uint32_t {
  config = 1,              // u64 per field of fields()
  state = 2,               // State
  sequence = 3,            // Sequence; then its table, sinks, window, seen, lambda, filled and energies
  table = 4,               // u64 per page: its number
  rows = 5,                // up to kPageTokens exact tokens: keys [kv_heads][tokens][head_dim_k], then values alike
  seen = 6,                // u8 per row of the window
  lambda = 7,              // float [kv_heads][head_dim_k]
  filled = 8,              // u8 per query of Format::queries that counts
  energies = 9,            // one filled row: float [kv_heads][head_dim_k]
  page = 10,               // [kv_heads] head slices in slice_layout()
  non_finite_counts = 11,  // u64 per sequence: how many rows held NaN or infinity
  non_finite = 12,         // u64 per such row: 4 * position + 2 * (in its value) + (in its key)
  lengths = 13             // u64 per sequence, from version kRagged on
};
const char* name_of(Kind kind);

struct State {
  std::uint64_t batch, length, pages, recording;  // length: of the longest; pages: distinct ones
};
struct Sequence {
  std::int64_t start, anchored, first_page, pages, last_page_tokens, sinks, window, window_position, evicted;
  std::int64_t lambda, energies, energy_position;  // lambda, energies: whether there are any
};
static_assert(sizeof(State) == 4 * 8 && sizeof(Sequence) == 12 * 8, "the structs are part of the format");

// One number of the configuration, and how a message calls it.
struct Field {
  const char* name;
  std::uint64_t value;
  std::string (*text)(std::uint64_t);
};
std::vector<Field> fields(const CacheConfig& config, const PageSpec& spec);
// The last of them, of which earlier versions leave some out: what they are there.
inline constexpr std::array<std::uint64_t, 3> kUnsaid = {4, 4, 0};
constexpr std::size_t unsaid(std::uint32_t version) { return version < kWidths ? 3 : version < kRefined ? 1 : 0; }
// invalid_argument naming the first field whose value is another in `theirs`.
Status expect_same(std::span<const Field> mine, std::span<const std::uint64_t> theirs);

// A head slice as format/page.h lays it out where no channel is padded, its codes in canonical order.
struct SliceLayout : kv4_page_layout {
  kv4_second_layout second{};
};
inline SliceLayout slice_layout(const PageSpec& spec) {
  const kv4_page_layout& l = spec.layout;
  SliceLayout slice;
  static_cast<kv4_page_layout&>(slice) =
      kv4_make_page_layout(l.head_dim_k, l.head_dim_v, l.groups_k, l.groups_v, l.k_mean != l.v_codes, l.head_dim_k,
                           l.head_dim_v, static_cast<std::uint32_t>(spec.key.levels.bits),
                           static_cast<std::uint32_t>(spec.value.levels.bits), spec.second.rows);
  slice.second = kv4_make_second_layout(slice, l.head_dim_k, spec.second.rows);
  return slice;
}
inline std::size_t key_scale_bytes(const kv4_page_layout& l) {  // and the mean, which lies behind them
  return l.groups_k * KV4_PAGE_TOKENS * 2 + (l.k_mean != l.v_codes ? l.head_dim_k * 2 : 0);
}
inline std::size_t value_scale_bytes(const kv4_page_layout& l) { return l.groups_v * KV4_PAGE_TOKENS * 2; }

template <class T>
std::span<const std::byte> bytes_of(const T& x) {
  return std::as_bytes(std::span<const T, 1>(&x, 1));
}

class Writer {
 public:
  explicit Writer(const Sink& sink) : sink_(sink) {}
  Status begin(std::uint32_t version);
  Status write(Kind kind, std::span<const std::byte> payload);
  template <class T>
  Status write_array(Kind kind, std::span<const T> x) {
    constexpr std::size_t kCount = kArrayBytes / sizeof(T);
    for (std::size_t i = 0; i < x.size(); i += kCount)
      KV4_RETURN_IF_ERROR(write(kind, std::as_bytes(x.subspan(i, std::min(kCount, x.size() - i)))));
    return {};
  }

 private:
  const Sink& sink_;
  std::vector<std::byte> block_;
};

// Errors: what the source says, data_loss.
class Reader {
 public:
  explicit Reader(const Source& source) : source_(source) {}
  Status begin();
  std::uint32_t version() const { return version_; }
  // A block of this kind and just this size; what it held is not to be used where it is refused.
  Status read(Kind kind, std::span<std::byte> payload);
  // Grows as blocks come in.
  template <class T>
  Status read_array(Kind kind, std::uint64_t count, std::vector<T>* out) {
    static_assert(std::is_trivially_copyable_v<T>);
    constexpr std::uint64_t kCount = kArrayBytes / sizeof(T);
    out->clear();
    while (out->size() < count) {
      const std::size_t had = out->size();
      out->resize(had + static_cast<std::size_t>(std::min<std::uint64_t>(kCount, count - had)));
      KV4_RETURN_IF_ERROR(read(kind, std::as_writable_bytes(std::span<T>(*out).subspan(had))));
    }
    return {};
  }

 private:
  const Source& source_;
  std::uint32_t version_ = kVersion;
};

// data_loss naming what the blob says, where it is not within [low, high].
Status expect_within(const char* name, std::int64_t value, std::int64_t low, std::int64_t high);

}  // namespace kv4::blob
