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

  static KV4_INLINE void widen(F v, D& low, D& high) {
    low = (D)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    high = (D)_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
  }
};

}  // namespace kv4::cpu::avx512
