// Operations on single rows (rows.h). At d = 128 in AVX2 a row of fp16 takes 16 steps of 4 (load), 2
// (scale), 3 (add) and 4 (store) instructions: a query costs about as much as a cached token does.
#pragma once

#include "cpu/rows.h"

namespace kv4::cpu::KV4_ISA {

// Bytes that streaming fetches ahead of its reads.
constexpr std::int64_t kStreamAhead = 2048;

// to[i] = from[i] for i < count, widened.
template <class V>
inline void widen_row(DType dtype, const void* from, int count, float* to) {
  constexpr int kStep = 4 * V::kLanes;
  const float* f = static_cast<const float*>(from);
  const std::uint16_t* h = static_cast<const std::uint16_t*>(from);
  int i = 0;
  if (dtype == DType::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof *f);
  } else if (dtype == DType::f16) {
    for (; i + kStep <= count; i += kStep) {
      KV4_UNROLL
      for (int c = 0; c < kStep; c += V::kLanes) V::store(to + i + c, V::load_f16(h + i + c));
    }
    for (; i + V::kLanes <= count; i += V::kLanes) V::store(to + i, V::load_f16(h + i));
    for (; i < count; ++i) to[i] = f16_to_f32(h[i]);
  } else {
    for (; i + kStep <= count; i += kStep) {
      KV4_UNROLL
      for (int c = 0; c < kStep; c += V::kLanes) V::store(to + i + c, V::load_bf16(h + i + c));
    }
    for (; i + V::kLanes <= count; i += V::kLanes) V::store(to + i, V::load_bf16(h + i));
    for (; i < count; ++i) to[i] = bf16_to_f32(h[i]);
  }
}

template <class V>
bool load_row(DType dtype, const void* from, int count, float* to) {
  using I = typename V::I;
  constexpr std::int32_t kExponent = 0x7f800000;
  widen_row<V>(dtype, from, count, to);
  I found{};
  int i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) found |= (I)(((I)V::load(to + i) & kExponent) == kExponent);
  std::int32_t lanes[V::kLanes], any = 0;
  std::memcpy(lanes, &found, sizeof lanes);
  for (std::int32_t lane : lanes) any |= lane;
  for (; i < count; ++i) any |= (std::bit_cast<std::int32_t>(to[i]) & kExponent) == kExponent;
  return any == 0;
}

template <class V>
void scale_row(const float* from, int count, float factor, float* to) {
  int i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::store(to + i, V::load(from + i) * V::set1(factor));
  for (; i < count; ++i) to[i] = from[i] * factor;
}

template <class V>
void add_row(const float* from, int count, float factor, float* to) {
  int i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes)
    V::store(to + i, V::fma(V::load(from + i), V::set1(factor), V::load(to + i)));
  for (; i < count; ++i) to[i] += from[i] * factor;
}

// Round to nearest even, as f32_to_bf16.
template <class V>
KV4_INLINE void store_bf16(std::uint16_t* to, typename V::F x) {
  using I = typename V::I;
  typedef std::uint16_t Half __attribute__((vector_size(2 * V::kLanes)));
  const I bits = (I)x;
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const I nan = (I)((bits & 0x7fffffff) > 0x7f800000);
  const Half half = __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), Half);
  std::memcpy(to, &half, sizeof half);
}

template <class V>
void store_row(const float* from, int count, float factor, DType dtype, void* to) {
  if (dtype == DType::f32) return scale_row<V>(from, count, factor, static_cast<float*>(to));
  std::uint16_t* h = static_cast<std::uint16_t*>(to);
  int i = 0;
  if (dtype == DType::f16) {
    for (; i + V::kLanes <= count; i += V::kLanes) V::store_f16(h + i, V::load(from + i) * V::set1(factor));
    for (; i < count; ++i) h[i] = f32_to_f16(from[i] * factor);
  } else {
    for (; i + V::kLanes <= count; i += V::kLanes) store_bf16<V>(h + i, V::load(from + i) * V::set1(factor));
    for (; i < count; ++i) h[i] = f32_to_bf16(from[i] * factor);
  }
}

// Eight sums, so that loads bind and not the latency of additions.
template <class V>
float sum_rows(const float* from, std::int64_t count) {
  using F = typename V::F;
  constexpr int kStep = 8 * V::kLanes;
  F part[8] = {};
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int b = 0; b < kStep * 4; b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from + i) + kStreamAhead + b);
    KV4_UNROLL
    for (int p = 0; p < 8; ++p) part[p] += V::load(from + i + p * V::kLanes);
  }
  float rest = 0;
  for (; i < count; ++i) rest += from[i];
  KV4_UNROLL
  for (int step = 4; step > 0; step /= 2) {
    KV4_UNROLL
    for (int p = 0; p < step; ++p) part[p] += part[p + step];
  }
  return V::reduce_add(part[0]) + rest;
}

const RowKernels row_kernels = {
    .load = load_row<Isa>, .scale = scale_row<Isa>, .add = add_row<Isa>, .store = store_row<Isa>, .sum = sum_rows<Isa>};

}  // namespace kv4::cpu::KV4_ISA
