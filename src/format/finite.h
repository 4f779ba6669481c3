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

// NaN and infinity have all exponent bits set.
inline bool finite(const void* row, DType dtype, int channels) {
  bool ok = true;
  if (dtype == DType::f32) {
    const auto* bits = static_cast<const std::uint32_t*>(row);
    for (int c = 0; c < channels; ++c) ok &= (bits[c] & 0x7f800000u) != 0x7f800000u;
  } else {
    const std::uint16_t exponent = dtype == DType::f16 ? 0x7c00u : 0x7f80u;
    const auto* bits = static_cast<const std::uint16_t*>(row);
    for (int c = 0; c < channels; ++c) ok &= (bits[c] & exponent) != exponent;
  }
  return ok;
}

}  // namespace kv4
