// How kernels walk through the planes of layout.h: an octet of positions at a time where 4-bit codes lie in 64 bytes
// (kOne), else 16 positions. Included in a target region.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/layout.h"
#include "cpu/target.h"

namespace kv4::cpu {

// Where prefetching goes: x86 has too few line buffers in L1 for what a page of memory latency takes.
#if defined(__x86_64__)
inline constexpr int kPrefetchTo = 2;
#else
inline constexpr int kPrefetchTo = 3;
#endif

// kAlone: widths that lie in 64 bytes are taken an octet at a time.
template <int B, bool kAlone>
struct Steps {
  static constexpr bool kOne = kAlone && bits_of(B) == 4;
  static constexpr int kOctets = kOne ? 1 : 2;
  static constexpr int kFirst = step_bytes(first_plane(B)) * kOctets / 2;
  static constexpr int kSecond = step_bytes(later_plane(B)) * kOctets / 2;

  static KV4_INLINE const std::uint8_t* first(const std::uint8_t* codes, int octet) {
    return codes + octet / kOctets * kFirst;
  }
  static KV4_INLINE const std::uint8_t* second(const std::uint8_t* more, int octet) {
    return more + octet / kOctets * kSecond;
  }
  // The same step of the page at `next`, whose second plane is `distance` on.
  static KV4_INLINE void prefetch(const std::uint8_t* next, std::ptrdiff_t distance, int octet) {
    for (int b = 0; b < kFirst; b += 64) __builtin_prefetch(first(next, octet) + b, 0, kPrefetchTo);
    if constexpr (kSecond > 0) __builtin_prefetch(second(next + distance, octet), 0, kPrefetchTo);
  }
};

}  // namespace kv4::cpu
