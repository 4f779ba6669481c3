// AVX-512 F, BW, DQ, VL and VNNI primitives (Ice Lake 2019, Zen 4 2022 and later). Included in a target region.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace kv4::cpu::avx512 {

struct Isa {
  static constexpr int kLanes = 16;
  using F = VecTypes<kLanes>::F;
  using I = VecTypes<kLanes>::I;

  static KV4_INLINE F set1(float x) { return (F)_mm512_set1_ps(x); }
  static KV4_INLINE F load(const float* p) { return (F)_mm512_loadu_ps(p); }
  static KV4_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, (__m512)v); }
  static KV4_INLINE F load_f16(const std::uint16_t* p) {
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static KV4_INLINE F load_bf16(const std::uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
  }
  // Saturates at +-65504 as f32_to_f16 does; this order of operands keeps NaN.
  static KV4_INLINE void store_f16(std::uint16_t* p, F v) {
    v = max(set1(-65504.0f), min(set1(65504.0f), v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
  static KV4_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static KV4_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
  static KV4_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
  static KV4_INLINE F abs(F a) { return (F)((I)a & 0x7fffffff); }
  // The larger of |a| and |b|
  static KV4_INLINE F max_abs(F a, F b) { return (F)_mm512_range_ps((__m512)a, (__m512)b, 0x0b); }
  static KV4_INLINE F sqrt(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
  static KV4_INLINE I truncate(F a) { return (I)_mm512_cvttps_epi32((__m512)a); }
  static KV4_INLINE I round(F a) { return (I)_mm512_cvtps_epi32((__m512)a); }
  static KV4_INLINE F to_float(I a) { return (F)_mm512_cvtepi32_ps((__m512i)a); }
  static KV4_INLINE float reduce_add(F a) { return _mm512_reduce_add_ps((__m512)a); }
  static KV4_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps((__m512)a); }
  static KV4_INLINE void transpose(F (&r)[kLanes]) {
    __m512 t[16], u[16];
    KV4_UNROLL
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
    }
    // Quarter q of u[4 i + j]: column 4 q + j of rows 4 i ... 4 i + 3.
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
      const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
      u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
      u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
    // For each j a 4 x 4 transpose of quarters.
    KV4_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x44), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xee);
      const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x44);
      const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xee);
      r[j] = (F)_mm512_shuffle_f32x4(a, c, 0x88);
      r[4 + j] = (F)_mm512_shuffle_f32x4(a, c, 0xdd);
      r[8 + j] = (F)_mm512_shuffle_f32x4(b, d, 0x88);
      r[12 + j] = (F)_mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

  // Eight numbers of each of two rows, a's first.
  static KV4_INLINE F load_halves(const float* a, const float* b) {
    return (F)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
  }
  static KV4_INLINE F load_halves_f16(const std::uint16_t* a, const std::uint16_t* b) {
    return (F)_mm512_cvtph_ps(join_eights(a, b));
  }
  static KV4_INLINE F load_halves_bf16(const std::uint16_t* a, const std::uint16_t* b) {
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(join_eights(a, b)), 16);
  }
  // r[i], halves of rows i and i + 4 for i < 4, i + 4 and i + 8 from there: channel i of 16 rows. Three steps for eight
  // channels where transpose has four: what joined the halves was a load.
  static KV4_INLINE void transpose_halves(F (&r)[8]) {
    __m512 u[2][4];
    KV4_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m512 a = (__m512)r[4 * i], b = (__m512)r[4 * i + 1], c = (__m512)r[4 * i + 2], d = (__m512)r[4 * i + 3];
      const __m512d t0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), t1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
      const __m512d t2 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), t3 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
      u[i][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t2));
      u[i][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t2));
      u[i][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t1, t3));
      u[i][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t1, t3));
    }
    KV4_UNROLL
    for (int j = 0; j < 4; ++j) {
      r[j] = (F)_mm512_shuffle_f32x4(u[0][j], u[1][j], 0x88);
      r[4 + j] = (F)_mm512_shuffle_f32x4(u[0][j], u[1][j], 0xdd);
    }
  }

 private:
  static KV4_INLINE __m256i join_eights(const std::uint16_t* a, const std::uint16_t* b) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)),
                                   1);
  }
};

}  // namespace kv4::cpu::avx512
