// Portable primitives: 4-lane vector extensions, which compile to SSE2, NEON or scalar code.
// Every other instruction set offers the same names (see docs/adding_an_isa.md).
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace kv4::cpu::portable {

struct Isa {
  static constexpr int kLanes = 4;
  using F = VecTypes<kLanes>::F;
  using I = VecTypes<kLanes>::I;

  static KV4_INLINE F set1(float x) { return F{} + x; }
  static KV4_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static KV4_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  static KV4_INLINE F load_f16(const std::uint16_t* p) {
    return F{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
  }
  static KV4_INLINE F load_bf16(const std::uint16_t* p) {
    return F{bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
  }
  static KV4_INLINE void store_f16(std::uint16_t* p, F v) {
    for (int i = 0; i < kLanes; ++i) p[i] = f32_to_f16(v[i]);
  }
  // a * b + c
  static KV4_INLINE F fma(F a, F b, F c) { return a * b + c; }
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
  // rows[i][j] <-> rows[j][i], kLanes x kLanes
  static KV4_INLINE void transpose(F (&r)[kLanes]) {
    const F a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const F c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  }
};

inline bool isa_supported() { return true; }

}  // namespace kv4::cpu::portable
