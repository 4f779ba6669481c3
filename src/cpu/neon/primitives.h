// NEON primitives (AArch64).
#pragma once

#include <arm_neon.h>

#include "cpu/vec.h"

namespace kv4::cpu::neon {

struct Isa {
  static constexpr int kLanes = 4;
  using F = VecTypes<kLanes>::F;
  using I = VecTypes<kLanes>::I;

  static KV4_INLINE F set1(float x) { return (F)vdupq_n_f32(x); }
  static KV4_INLINE F load(const float* p) { return (F)vld1q_f32(p); }
  static KV4_INLINE void store(float* p, F v) { vst1q_f32(p, (float32x4_t)v); }
  static KV4_INLINE F load_f16(const std::uint16_t* p) { return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static KV4_INLINE F load_bf16(const std::uint16_t* p) { return (F)vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16); }
  // Saturates at +-65504 as f32_to_f16 does.
  static KV4_INLINE void store_f16(std::uint16_t* p, F v) {
    v = max(set1(-65504.0f), min(set1(65504.0f), v));
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
  }
  static KV4_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
  static KV4_INLINE F max(F a, F b) { return (F)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
  static KV4_INLINE F min(F a, F b) { return (F)vminq_f32((float32x4_t)a, (float32x4_t)b); }
  static KV4_INLINE F abs(F a) { return (F)vabsq_f32((float32x4_t)a); }
  static KV4_INLINE F sqrt(F a) { return (F)vsqrtq_f32((float32x4_t)a); }
  static KV4_INLINE I truncate(F a) { return (I)vcvtq_s32_f32((float32x4_t)a); }
  static KV4_INLINE I round(F a) { return (I)vcvtnq_s32_f32((float32x4_t)a); }
  static KV4_INLINE F to_float(I a) { return (F)vcvtq_f32_s32((int32x4_t)a); }
  static KV4_INLINE float reduce_add(F a) { return vaddvq_f32((float32x4_t)a); }
  static KV4_INLINE float reduce_max(F a) { return vmaxvq_f32((float32x4_t)a); }
  static KV4_INLINE void transpose(F (&r)[kLanes]) {
    const float32x4_t a = vzip1q_f32((float32x4_t)r[0], (float32x4_t)r[2]);
    const float32x4_t b = vzip2q_f32((float32x4_t)r[0], (float32x4_t)r[2]);
    const float32x4_t c = vzip1q_f32((float32x4_t)r[1], (float32x4_t)r[3]);
    const float32x4_t d = vzip2q_f32((float32x4_t)r[1], (float32x4_t)r[3]);
    r[0] = (F)vzip1q_f32(a, c);
    r[1] = (F)vzip2q_f32(a, c);
    r[2] = (F)vzip1q_f32(b, d);
    r[3] = (F)vzip2q_f32(b, d);
  }
};

}  // namespace kv4::cpu::neon
