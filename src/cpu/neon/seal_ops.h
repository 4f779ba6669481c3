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

  static KV4_INLINE I gather_bytes(const I (&v)[4]) {
    const uint16x8_t low = vcombine_u16(vqmovun_s32((int32x4_t)v[0]), vqmovun_s32((int32x4_t)v[1]));
    const uint16x8_t high = vcombine_u16(vqmovun_s32((int32x4_t)v[2]), vqmovun_s32((int32x4_t)v[3]));
    return (I)interleave(vcombine_u8(vqmovn_u16(low), vqmovn_u16(high)));
  }
  static KV4_INLINE I gather_signs(const F (&v)[4]) {
    const int16x8_t low = vcombine_s16(vqmovn_s32((int32x4_t)v[0]), vqmovn_s32((int32x4_t)v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32((int32x4_t)v[2]), vqmovn_s32((int32x4_t)v[3]));
    return (I)interleave(vreinterpretq_u8_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high))));
  }

  static KV4_INLINE void widen(F v, D& low, D& high) {
    low = (D)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
    high = (D)vcvt_high_f64_f32((float32x4_t)v);
  }

 private:
  // Four runs of four bytes to four words of one byte of each.
  static KV4_INLINE uint8x16_t interleave(uint8x16_t v) {
    alignas(16) static constexpr std::uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vqtbl1q_u8(v, vld1q_u8(kOrder));
  }
};

}  // namespace kv4::cpu::neon
