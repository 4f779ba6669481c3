// Rows of a tensor as floats and back, four channels at a time on plain vector extensions. Results
// equal those of format/convert.h.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/vec.h"
#include "format/convert.h"
#include "kv4/types.h"

namespace kv4::cpu {

using Float4 = VecTypes<4>::F;
using Int4 = VecTypes<4>::I;
typedef std::uint16_t Half4 __attribute__((vector_size(8)));

inline Float4 widen_f16(Half4 h) {
  const Int4 bits = __builtin_convertvector(h, Int4), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const Int4 normal = (magnitude << 13) + 0x38000000, special = (magnitude << 13) | 0x7f800000;
  const Int4 subnormal = (Int4)(__builtin_convertvector(magnitude, Float4) * 0x1p-24f);
  const Int4 value = magnitude >= 0x7c00 ? special : (magnitude >= 0x400 ? normal : subnormal);
  return (Float4)(sign | value);
}

inline Float4 widen_bf16(Half4 h) { return (Float4)(__builtin_convertvector(h, Int4) << 16); }

inline Half4 narrow_f16(Float4 x) {
  const Int4 bits = (Int4)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Int4 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const Int4 subnormal = (Int4)((Float4)magnitude + 0.5f) - 0x3f000000;
  Int4 value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x477fe000 ? Int4{} + 0x7bff : value;
  value = magnitude > 0x7f800000 ? Int4{} + 0x7e00 : value;
  return __builtin_convertvector(sign | value, Half4);
}

inline Half4 narrow_bf16(Float4 x) {
  const Int4 bits = (Int4)x;
  const Int4 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Int4 value = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  return __builtin_convertvector(value, Half4);
}

inline void widen_row(DType dtype, const void* from, int count, float* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * 4);
    return;
  }
  const std::uint16_t* h = static_cast<const std::uint16_t*>(from);
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    Half4 four;
    std::memcpy(&four, h + i, sizeof four);
    const Float4 x = dtype == DType::f16 ? widen_f16(four) : widen_bf16(four);
    std::memcpy(to + i, &x, sizeof x);
  }
  for (; i < count; ++i) to[i] = dtype == DType::f16 ? f16_to_f32(h[i]) : bf16_to_f32(h[i]);
}

inline void narrow_row(DType dtype, const float* from, int count, void* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * 4);
    return;
  }
  std::uint16_t* h = static_cast<std::uint16_t*>(to);
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    Float4 x;
    std::memcpy(&x, from + i, sizeof x);
    const Half4 four = dtype == DType::f16 ? narrow_f16(x) : narrow_bf16(x);
    std::memcpy(h + i, &four, sizeof four);
  }
  for (; i < count; ++i) h[i] = dtype == DType::f16 ? f32_to_f16(from[i]) : f32_to_bf16(from[i]);
}

inline bool all_finite(const float* x, int count) {
  Int4 largest{};
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    Int4 bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  std::int32_t top = 0;
  for (int lane = 0; lane < 4; ++lane) top = largest[lane] > top ? largest[lane] : top;
  for (; i < count; ++i) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(x[i]) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  return top < 0x7f800000;
}

}  // namespace kv4::cpu
