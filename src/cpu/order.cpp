#include "cpu/order.h"

#include <cstring>

#include "cpu/layout.h"

namespace kv4::cpu {
namespace {

template <class At>
void gather(const std::uint8_t* codes, int dim, std::uint8_t* canonical, At at) {
  for (int j = 0; j < kPageTokens; ++j) {
    for (int c = 0; c < dim; c += 2) {
      const Nibble even = at(j, c), odd = at(j, c + 1);
      *canonical++ = static_cast<std::uint8_t>((codes[even.byte] >> even.shift & 15) |
                                               (codes[odd.byte] >> odd.shift & 15) << 4);
    }
  }
}

template <class At>
void scatter(const std::uint8_t* canonical, int dim, std::uint8_t* codes, std::size_t bytes, At at) {
  std::memset(codes, 0, bytes);
  for (int j = 0; j < kPageTokens; ++j) {
    for (int c = 0; c < dim; c += 2) {
      const Nibble even = at(j, c), odd = at(j, c + 1);
      const std::uint8_t pair = *canonical++;
      codes[even.byte] |= static_cast<std::uint8_t>((pair & 15) << even.shift);
      codes[odd.byte] |= static_cast<std::uint8_t>((pair >> 4) << odd.shift);
    }
  }
}

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  const int padded = pad_channels(spec.key.dim);
  if (k != nullptr)
    gather(slice + spec.layout.k_codes, spec.key.dim, k, [=](int j, int c) { return key_nibble(j, c, padded); });
  if (v != nullptr) gather(slice + spec.layout.v_codes, spec.value.dim, v, value_nibble);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  const int padded = pad_channels(spec.key.dim);
  if (k != nullptr)
    scatter(k, spec.key.dim, slice + spec.layout.k_codes, spec.layout.k_code_bytes,
            [=](int j, int c) { return key_nibble(j, c, padded); });
  if (v != nullptr)
    scatter(v, spec.value.dim, slice + spec.layout.v_codes, spec.layout.v_code_bytes, value_nibble);
}

}  // namespace kv4::cpu
