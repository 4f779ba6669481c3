// Merges the partial states of one segment, rotates the part over pages back into the model's basis, and writes the
// output or the call's own partial state. CTA (x, y): sequence, KV head and segment of row blocks x, merge_rows of its
// rows and one of merge_columns(D) parts of their channels.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/attend_items.cuh"
#include "cuda/attend_prepare.cuh"
#include "cuda/attend_tuning.h"

namespace kv4::cuda {

__device__ __forceinline__ void store_element(void* data, DType dtype, long long i, float x) {
  if (dtype == DType::f32) static_cast<float*>(data)[i] = x;
  else if (dtype == DType::f16) static_cast<__half*>(data)[i] = __float2half_rn(x);
  else static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
}

template <int D, int kBlocks>
struct MergeShape {
  static constexpr int kWarps = kRotateThreads / kLanes, kRows = kBlocks * kBlockRows;
  static constexpr int kUnits = kWarps > kRows ? kWarps : kRows;
  static constexpr int kShared = (2 * kUnits * D + RowRotation<D>::kOperands * 4 + kBlockRows * D) * 4;
};

template <int D, int kBlocks>
__global__ void __launch_bounds__(kRotateThreads) attend_merge(const __grid_constant__ AttendParams p) {
  constexpr int kRows = kBlocks * kBlockRows;
  constexpr int kWide = D / 4, kQuads = (kWide + kLanes - 1) / kLanes;  // float4 of a row, of each lane
  constexpr int kAtOnce = kQuads > 1 ? 3 : 4;
  constexpr long long kSlot = static_cast<long long>(kRows) * (D + 2);
  constexpr int kUnits = MergeShape<D, kBlocks>::kUnits;
  extern __shared__ __align__(128) unsigned char memory[];                          // as attend_main declares it
  auto(*sums)[kUnits][kWide] = reinterpret_cast<float4(*)[kUnits][kWide]>(memory);  // [2]: over exact rows, over pages
  uint4* operands = reinterpret_cast<uint4*>(sums + 2);
  float* x = reinterpret_cast<float*>(operands + RowRotation<D>::kOperands);
  __shared__ float m_all[kRows], l_all[kRows];
  __shared__ float ls[kUnits];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int most_per_head = p.blocks / kBlocks, segments = p.kv_heads * most_per_head;  // at most, of a sequence
  const int b = blockIdx.x / segments, head = blockIdx.x % segments / most_per_head,
            its_part = blockIdx.x % most_per_head;
  // Rows of the segment that this CTA takes, from `first_row` of it on.
  constexpr int kColumns = merge_columns(D), kWidth = D / kColumns;
  const int first_row = blockIdx.y / kColumns * p.merge_rows, first_channel = blockIdx.y % kColumns * kWidth;
  const int row0 = its_part * kRows + first_row;

  RowRotation<D> rotation(first_channel / 8, (first_channel + kWidth) / 8);
  if (p.inverse_transpose.words != nullptr) rotation.prefetch(p.inverse_transpose);
  // The addresses of the states are known before they are written: this kernel begins once every CTA of attend_main has
  // read the item counts.
  const SequenceView& s = p.sequences[b];
  const int rows = min(min(p.merge_rows, kRows - first_row), p.group * static_cast<int>(s.query_count) - row0);
  if (rows <= 0) return wait_for_previous();  // keeps the next kernel behind the previous ones
  const int segment = head * segments_per_head(p, s) + its_part;
  // lambda of this thread's first element, loaded early.
  const float first_lambda = s.lambda_v != nullptr ? s.lambda_v[head * D + first_channel + threadIdx.x % kWidth] : 1.0f;
  const Shares shares(__ldcg(p.item_offsets + p.batch), p.readers);
  const int exact_items = items_of(s.exact[0]) + items_of(s.exact[1]);
  const int base = __ldcg(p.item_offsets + b) + segment * (exact_items + s.page_count);
  int first[2] = {0, 0}, count[2] = {0, 0};  // slots of each kind: first, and how many
  if (exact_items > 0) {
    const int w0 = shares.owner(base), w1 = shares.owner(base + exact_items - 1);
    first[0] = w0 + 2 * (b * segments + segment);
    count[0] = w1 - w0 + 1;
  }
  if (s.page_count > 0) {
    const int w0 = shares.owner(base + exact_items), w1 = shares.owner(base + exact_items + s.page_count - 1);
    first[1] = w0 + 2 * (b * segments + segment) + 1;
    count[1] = w1 - w0 + 1;
  }

  wait_for_previous();
  let_next_begin();

  // Sums: a warp per row, or several that divide a row's slots. Several states are loaded at once, the first before the
  // maximum is known; past the end, the last state again with a weight of 0.
  const int share = rows < warps ? warps / rows : 1, all = count[0] + count[1];
  for (int unit = warp; unit < rows * share; unit += warps) {
    const int r = unit / share, part = unit % share;
    const auto slot = [&](int i) { return p.states + (i < count[0] ? first[0] + i : first[1] + i - count[0]) * kSlot; };
    float4 o[kAtOnce][kQuads];
    float m_of[kAtOnce], l_of[kAtOnce];
    const auto load = [&](int i0) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float* from = slot(min(i0 + j * share, all - 1));
        m_of[j] = from[kRows * D + first_row + r];
        l_of[j] = from[kRows * (D + 1) + first_row + r];
#pragma unroll
        for (int k = 0; k < kQuads; ++k)
          o[j][k] = reinterpret_cast<const float4*>(from + (first_row + r) * D)[min(lane + k * kLanes, kWide - 1)];
      }
    };
    if (all > 0) load(part);
    float m = -INFINITY, l = 0;
    for (int i = lane; i < all; i += kLanes) m = fmaxf(m, slot(i)[kRows * D + first_row + r]);
    m = warp_max(m);
    float4 sum[2][kQuads] = {};
#pragma unroll 1
    for (int i0 = part; i0 < all; i0 += kAtOnce * share) {
      if (i0 != part) load(i0);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = i0 + j * share;
        const float weight = m == -INFINITY || i >= all ? 0.0f : exp2_fast(m_of[j] - m);
        l = fmaf(l_of[j], weight, l);
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) {
          if ((i < count[0]) != (kind == 0)) continue;
#pragma unroll
          for (int k = 0; k < kQuads; ++k) {
            sum[kind][k].x = fmaf(o[j][k].x, weight, sum[kind][k].x);
            sum[kind][k].y = fmaf(o[j][k].y, weight, sum[kind][k].y);
            sum[kind][k].z = fmaf(o[j][k].z, weight, sum[kind][k].z);
            sum[kind][k].w = fmaf(o[j][k].w, weight, sum[kind][k].w);
          }
        }
      }
    }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)
#pragma unroll
      for (int k = 0; k < kQuads; ++k)
        if (lane + k * kLanes < kWide) sums[kind][unit][lane + k * kLanes] = sum[kind][k];
    if (lane == 0) {
      ls[unit] = l;
      if (part == 0) m_all[r] = m;
    }
  }
  __syncthreads();
  if (share > 1) {
    for (int i = threadIdx.x; i < rows * kWide * 2; i += blockDim.x) {
      const int kind = i / (rows * kWide), r = i / kWide % rows, c = i % kWide;
      float4 sum = sums[kind][r * share][c];
      for (int part = 1; part < share; ++part) {
        const float4 o = sums[kind][r * share + part][c];
        sum.x += o.x;
        sum.y += o.y;
        sum.z += o.z;
        sum.w += o.w;
      }
      sums[kind][r * share][c] = sum;
    }
  }
  if (threadIdx.x < rows) {
    float l = 0;
    for (int part = 0; part < share; ++part) l += ls[threadIdx.x * share + part];
    l_all[threadIdx.x] = l;
  }
  __syncthreads();

  // out = R^-1 y / lambda + z, eight rows at a time.
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  const bool rotated = s.page_count > 0 && p.inverse_transpose.words != nullptr;
  for (int r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int valid = min(kBlockRows, rows - r0);
    for (int i = threadIdx.x; i < valid * D; i += blockDim.x)
      x[i] = s.page_count > 0 ? reinterpret_cast<const float*>(sums[1][(r0 + i / D) * share])[i % D] : 0.0f;
    __syncthreads();
    if (rotated) {
      if (r0 > 0) rotation.prefetch(p.inverse_transpose);
      rotation.apply(p.inverse_transpose, x, operands, x, valid);
    }
    for (int i = threadIdx.x; i < valid * kWidth; i += blockDim.x) {
      const int r = r0 + i / kWidth, c = first_channel + i % kWidth, row = row0 + r, query = row / p.group,
                q_head = head * p.group + row % p.group;
      const float lambda = (r0 == 0 && i == static_cast<int>(threadIdx.x)) || s.lambda_v == nullptr
                               ? first_lambda
                               : s.lambda_v[head * D + c];
      const float o = x[(r - r0) * D + c] / lambda + reinterpret_cast<const float*>(sums[0][r * share])[c];
      const float m = m_all[r], l = l_all[r];
      if (p.out != nullptr) {
        const float denominator = p.sinks != nullptr && l > 0 ? l + exp2f(p.sinks[q_head] * kLog2e - m) : l;
        store_element(
            p.out, p.out_dtype,
            s.input * p.out_stride[0] + q_head * p.out_stride[1] + (s.input_row + query) * p.out_stride[2] + c,
            l > 0 ? o / denominator : 0.0f);
      } else {
        const long long at = (static_cast<long long>(s.input) * p.kv_heads * p.group + q_head) * p.rows + s.input_row +
                             query;
        p.partial.o[at * D + c] = l > 0 ? o : 0.0f;
        if (c == 0) {
          p.partial.m[at] = m * kLn2;
          p.partial.l[at] = l;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace kv4::cuda
