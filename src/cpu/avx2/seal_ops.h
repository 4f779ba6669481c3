// Operations of sealing beyond primitives.h for AVX2. Included in a target region.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace kv4::cpu::avx2 {

struct SealOps {
  using F = VecTypes<8>::F;
  using I = VecTypes<8>::I;
  typedef double D __attribute__((vector_size(32)));  // half of F's lanes

  // Byte i of the result is table[index byte i], index bytes < 16; table holds its 16 bytes in every 128 bits.
  static KV4_INLINE I lookup16(I table, I index) { return (I)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }

  // Saturation keeps what is beyond a byte at 255, and the sign of a float's bits.
  static KV4_INLINE I gather_bytes(const I (&v)[4]) {
    return interleave(_mm256_packus_epi16(_mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]),
                                          _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3])));
  }
  static KV4_INLINE I gather_signs(const F (&v)[4]) {
    return interleave(_mm256_packs_epi16(_mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]),
                                         _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3])));
  }

  static KV4_INLINE void widen(F v, D& low, D& high) {
    low = (D)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    high = (D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
  }

 private:
  // In every 128 bits: four runs of four bytes to four words of one byte of each.
  static KV4_INLINE I interleave(__m256i v) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (I)_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
  }
};

}  // namespace kv4::cpu::avx2
