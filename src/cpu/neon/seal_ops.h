// Operations of sealing beyond primitives.h for NEON (AArch64).
#pragma once

#include <arm_neon.h>

#include "cpu/vec.h"

namespace kv4::cpu::neon {

struct SealOps {
  using F = VecTypes<4>::F;
  using I = VecTypes<4>::I;
  typedef double D __attribute__((vector_size(16)));  // half of F's lanes

  // Byte i of the result is table[index byte i], index bytes < 16; table holds its 16 bytes in every 128 bits.
  static KV4_INLINE I lookup16(I table, I index) { return (I)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }

  static KV4_INLINE void widen(F v, D& low, D& high) {
    low = (D)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
    high = (D)vcvt_high_f64_f32((float32x4_t)v);
  }
};

}  // namespace kv4::cpu::neon
