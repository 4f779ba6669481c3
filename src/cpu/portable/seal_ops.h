// Operations of sealing beyond primitives.h, on plain vector extensions.
#pragma once

#include "cpu/vec.h"

namespace kv4::cpu::portable {

struct SealOps {
  using F = VecTypes<4>::F;
  using I = VecTypes<4>::I;
  typedef double D __attribute__((vector_size(16)));  // half of F's lanes
  typedef std::uint8_t B __attribute__((vector_size(16)));

  // Byte i of the result is table[index byte i], index bytes < 16; table holds its 16 bytes in every 128 bits.
  static KV4_INLINE I lookup16(I table, I index) {
    const B t = (B)table, n = (B)index;
    B out{};
    for (int i = 0; i < 16; ++i) out[i] = t[n[i] & 15];
    return (I)out;
  }

  // Byte k of lane i is v[k][i], 0 <= v < 2^31, at most 255.
  static KV4_INLINE I gather_bytes(const I (&v)[4]) {
    I out{};
    for (int k = 0; k < 4; ++k) out |= (v[k] < 255 ? v[k] : I{} + 255) << (8 * k);
    return out;
  }
  // The top bit of byte k of lane i is the sign of v[k][i].
  static KV4_INLINE I gather_signs(const F (&v)[4]) {
    I out{};
    for (int k = 0; k < 4; ++k) out |= ((I)v[k] >> 31) & static_cast<std::int32_t>(0x80u << (8 * k));
    return out;
  }

  static KV4_INLINE void widen(F v, D& low, D& high) {
    typedef float Half __attribute__((vector_size(8)));
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    low = __builtin_convertvector(half[0], D);
    high = __builtin_convertvector(half[1], D);
  }
};

}  // namespace kv4::cpu::portable
