// Operations of sealing beyond primitives.h for AVX-512BW. Included in a target region.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace kv4::cpu::avx512 {

struct SealOps {
  using F = VecTypes<16>::F;
  using I = VecTypes<16>::I;
  typedef double D __attribute__((vector_size(64)));  // half of F's lanes

  // Byte i of the result is table[index byte i], index bytes < 16; table holds its 16 bytes in every 128 bits.
  static KV4_INLINE I lookup16(I table, I index) { return (I)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }

  // Saturation keeps what is beyond a byte at 255, and the sign of a float's bits.
  static KV4_INLINE I gather_bytes(const I (&v)[4]) {
    return interleave(_mm512_packus_epi16(_mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]),
                                          _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3])));
  }
  static KV4_INLINE I gather_signs(const F (&v)[4]) {
    return interleave(_mm512_packs_epi16(_mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]),
                                         _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3])));
  }

  static KV4_INLINE void widen(F v, D& low, D& high) {
    low = (D)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    high = (D)_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
  }

  // x * factor + c, rounded to nearest or down, as bits.
  static KV4_INLINE I sum_nearest(const float* x, F factor, float c) {
    return (I)_mm512_fmadd_ps(_mm512_loadu_ps(x), (__m512)factor, _mm512_set1_ps(c));
  }
  static KV4_INLINE I sum_below(const float* x, F factor, float c) {
    return (I)_mm512_fmadd_round_ps(_mm512_loadu_ps(x), (__m512)factor, _mm512_set1_ps(c),
                                    _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  // Bits of a where the mask has them, else of b.
  static KV4_INLINE I choose(int mask, I a, I b) {
    return (I)_mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), (__m512i)a, (__m512i)b, 0xca);
  }
  // Whole numbers next below those of v, of four vectors: bytes of what they, or ~ of a negative one, are, to 255, and
  // of their signs; transpose_bytes makes words of four.
  static KV4_INLINE void split_signs(const F (&v)[4], I& sizes, I& signs) {
    __m512i z[4];
    KV4_UNROLL
    for (int k = 0; k < 4; ++k) {
      const __m512 within = _mm512_range_ps((__m512)v[k], _mm512_set1_ps(1024.0f), 0x02);  // the smaller, v's sign
      z[k] = _mm512_cvt_roundps_epi32(within, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    }
    const __m512i a = _mm512_packs_epi32(z[0], z[1]), b = _mm512_packs_epi32(z[2], z[3]);
    const __m512i below_a = _mm512_srai_epi16(a, 15), below_b = _mm512_srai_epi16(b, 15);
    sizes = (I)_mm512_packus_epi16(_mm512_xor_si512(a, below_a), _mm512_xor_si512(b, below_b));
    signs = (I)_mm512_packs_epi16(below_a, below_b);
  }
  // Numbers of a table of 16, by the low four bits of each index.
  static KV4_INLINE F lookup_f32(F table, I index) { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
  // sum + the four squares of bytes below 128 in each word
  static KV4_INLINE I add_squares(I sum, I bytes) {
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)bytes);
  }
  static KV4_INLINE I transpose_bytes(I v) { return interleave((__m512i)v); }

 private:
  // In every 128 bits: four runs of four bytes to four words of one byte of each.
  static KV4_INLINE I interleave(__m512i v) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (I)_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order));
  }
};

}  // namespace kv4::cpu::avx512
