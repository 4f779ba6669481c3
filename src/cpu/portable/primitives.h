// Portable primitives: 4-lane vector extensions, which compile to SSE2, NEON or scalar code.
// Every other instruction set offers the same names (see docs/adding_an_isa.md).
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace kv4::cpu::portable {

struct Isa : Quads {
  using I = VecTypes<kLanes>::I;

  static KV4_INLINE F load_f16(const std::uint16_t* p) {
    return F{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
  }
  static KV4_INLINE F load_bf16(const std::uint16_t* p) {
    return F{bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
  }
  static KV4_INLINE void store_f16(std::uint16_t* p, F v) {
    for (int i = 0; i < kLanes; ++i) p[i] = f32_to_f16(v[i]);
  }
  static KV4_INLINE F max(F a, F b) { return a > b ? a : b; }
  static KV4_INLINE F min(F a, F b) { return a < b ? a : b; }
  static KV4_INLINE F abs(F a) { return (F)((I)a & 0x7fffffff); }
  static KV4_INLINE F sqrt(F a) {
    for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
    return a;
  }
  static KV4_INLINE I truncate(F a) {  // toward zero; 0 of NaN, which C++ leaves open
    return __builtin_convertvector((F)((I)a & (I)(a == a)), I);
  }
  static KV4_INLINE I round(F a) {  // to nearest
    return truncate(a + (a < 0 ? set1(-0.5f) : set1(0.5f)));
  }
  static KV4_INLINE F to_float(I a) { return __builtin_convertvector(a, F); }
  static KV4_INLINE float reduce_add(F a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static KV4_INLINE float reduce_max(F a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }
};

inline bool isa_supported() { return true; }

}  // namespace kv4::cpu::portable
