// NaN and infinity in rows of any element type.
#pragma once

#include <cstdint>

#include "kv4/types.h"

namespace kv4 {

// A token whose row held NaN or infinity: stored as zeros, refused once a query sees it.
struct NonFinite {
  std::int64_t position = 0;
  bool key = false, value = false;
};

// NaN and infinity have all exponent bits set. Counted, not joined by a condition: compilers make vectors of that, 4
// instructions for 16 bytes, and of the other 8 an element.
template <class Bits>
inline bool finite_bits(const void* row, Bits exponent, int channels) {
  const auto* bits = static_cast<const Bits*>(row);
  Bits found = 0;  // wraps at more channels than there are
  for (int c = 0; c < channels; ++c) found = static_cast<Bits>(found + ((bits[c] & exponent) == exponent ? 1 : 0));
  return found == 0;
}
inline bool finite(const void* row, DType dtype, int channels) {
  if (dtype == DType::f32) return finite_bits<std::uint32_t>(row, 0x7f800000u, channels);
  return finite_bits<std::uint16_t>(row, dtype == DType::f16 ? 0x7c00 : 0x7f80, channels);
}

}  // namespace kv4
