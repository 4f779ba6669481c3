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

 private:
  // In every 128 bits: four runs of four bytes to four words of one byte of each.
  static KV4_INLINE I interleave(__m512i v) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (I)_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order));
  }
};

}  // namespace kv4::cpu::avx512
