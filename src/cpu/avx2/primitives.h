// AVX2 + FMA + F16C primitives (Haswell 2013, Zen 2017 and later). Included in a target region.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace kv4::cpu::avx2 {

struct Isa {
  static constexpr int kLanes = 8;
  using F = VecTypes<kLanes>::F;
  using I = VecTypes<kLanes>::I;

  static KV4_INLINE F set1(float x) { return (F)_mm256_set1_ps(x); }
  static KV4_INLINE F load(const float* p) { return (F)_mm256_loadu_ps(p); }
  static KV4_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, (__m256)v); }
  static KV4_INLINE F load_f16(const std::uint16_t* p) {
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static KV4_INLINE F load_bf16(const std::uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (F)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  // Saturates at +-65504 as f32_to_f16 does; this order of operands keeps NaN.
  static KV4_INLINE void store_f16(std::uint16_t* p, F v) {
    v = max(set1(-65504.0f), min(set1(65504.0f), v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
  static KV4_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static KV4_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
  static KV4_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
  static KV4_INLINE F abs(F a) { return (F)((I)a & 0x7fffffff); }
  static KV4_INLINE F sqrt(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
  static KV4_INLINE I truncate(F a) { return (I)_mm256_cvttps_epi32((__m256)a); }
  static KV4_INLINE I round(F a) { return (I)_mm256_cvtps_epi32((__m256)a); }
  static KV4_INLINE F to_float(I a) { return (F)_mm256_cvtepi32_ps((__m256i)a); }
  static KV4_INLINE float reduce_add(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static KV4_INLINE float reduce_max(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static KV4_INLINE void transpose(F (&r)[kLanes]) {
    __m256 t[8], u[8];
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
    KV4_UNROLL
    for (int i = 0; i < 2; ++i) {
      u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      r[i] = (F)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      r[i + 4] = (F)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }
};

}  // namespace kv4::cpu::avx2
