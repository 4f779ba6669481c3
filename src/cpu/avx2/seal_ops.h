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

  static KV4_INLINE void widen(F v, D& low, D& high) {
    low = (D)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    high = (D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
  }
};

}  // namespace kv4::cpu::avx2
