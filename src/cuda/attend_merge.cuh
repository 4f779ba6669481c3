// Merges the partial states of segments, rotates the part over pages back into the model's basis, and writes the output
// or the call's own partial state. CTA (x, y): merge_segments segments from x * merge_segments on (a sequence, a KV
// head and some row blocks each), merge_rows rows of each and one of merge_columns(D) parts of their channels.
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

// The slots of a segment's states over exact rows and over pages: the first, and how many.
struct MergeSlots {
  int first[2], count[2];
};

// A row that a CTA merges: where it is in the call.
struct MergeRow {
  const SequenceView* s;
  int head, row;       // row: of the head's rows
  bool there, packed;  // packed: there are pages

  // Row `row_of_it` of segment `at` of the call. `there` is false where it has no such row.
  __device__ __forceinline__ MergeSlots find(const AttendParams& p, const Shares& shares, int at, int segment_rows,
                                             int row_of_it) {
    const int per_head = p.blocks * kBlockRows / segment_rows, segments = p.kv_heads * per_head;  // at most
    const int b = at / segments, part = at % per_head;
    head = at % segments / per_head;
    row = part * segment_rows + row_of_it;
    packed = false;
    there = b < p.batch && row_of_it < segment_rows;
    s = p.sequences + (there ? b : 0);
    there = there && row < p.group * static_cast<int>(s->query_count);
    MergeSlots of = {};
    if (!there) return of;
    const int segment = head * segments_per_head(p, *s) + part,
              items[2] = {items_of(s->exact[0]) + items_of(s->exact[1]), page_items(p, *s)};
    packed = s->page_count > 0;
    int item = __ldcg(p.item_offsets + b) + segment * (items[0] + items[1]);
    for (int kind = 0; kind < 2; item += items[kind++]) {
      if (items[kind] == 0) continue;
      const int reader = shares.owner(item);
      of.first[kind] = reader + 2 * (b * segments + segment) + kind;
      of.count[kind] = shares.owner(item + items[kind] - 1) - reader + 1;
    }
    if (packed && is_wide(p, *s)) {
      of.first[1] = static_cast<int>(p.wide_slot) + (b * segments + segment) * p.wide_splits;
      of.count[1] = p.wide_splits;
    }
    return of;
  }
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
  __shared__ float m_all[kUnits], l_all[kUnits], ls[kUnits];
  __shared__ MergeRow row_of[kUnits];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  // Rows of a segment that this CTA takes, from `first_row` of it on.
  constexpr int kColumns = merge_columns(D), kWidth = D / kColumns;
  const int first_row = blockIdx.y / kColumns * p.merge_rows, first_channel = blockIdx.y % kColumns * kWidth;

  RowRotation<D> rotation(first_channel / 8, (first_channel + kWidth) / 8);
  if (p.inverse_transpose.words != nullptr) rotation.prefetch(p.inverse_transpose);
  // The addresses of the states are known before they are written: this kernel begins once every CTA of attend_main has
  // read the item counts.
  const Shares shares(__ldcg(p.item_offsets + p.batch), p.readers);
  const int at = static_cast<int>(blockIdx.x) * p.merge_segments;
  int rows = p.merge_segments * p.merge_rows;
  if (p.merge_segments == 1) {
    const SequenceView& s = p.sequences[at / (p.kv_heads * (p.blocks / kBlocks))];
    const int row0 = at % (p.blocks / kBlocks) * kRows + first_row;
    rows = min(min(rows, kRows - first_row), p.group * static_cast<int>(s.query_count) - row0);
    if (rows <= 0) return wait_for_previous();  // keeps the next kernel behind the previous ones
  }
  const int share = rows < warps ? warps / rows : 1;
  MergeSlots of;
  const auto find = [&](int r) {
    MergeRow row;
    of = row.find(p, shares, at + r / p.merge_rows, kRows, first_row + r % p.merge_rows);
    if (lane == 0) row_of[r] = row;
  };
  find(min(warp / share, rows - 1));

  wait_for_previous();
  let_next_begin();

  // Sums: a warp per row, or several that divide a row's slots. Several states are loaded at once, the first before
  // the maximum is known; past the end, the last state again with a weight of 0.
  for (int unit = warp; unit < rows * share; unit += warps) {
    const int r = unit / share, part = unit % share;
    if (unit != warp) find(r);
    const int all = of.count[0] + of.count[1], row_of_it = first_row + r % p.merge_rows;
    const auto slot = [&](int i) {
      return p.states + (i < of.count[0] ? of.first[0] + i : of.first[1] + i - of.count[0]) * kSlot;
    };
    float4 o[kAtOnce][kQuads];
    float m_of[kAtOnce], l_of[kAtOnce];
    const auto load = [&](int i0) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float* from = slot(min(i0 + j * share, all - 1));
        m_of[j] = from[kRows * D + row_of_it];
        l_of[j] = from[kRows * (D + 1) + row_of_it];
#pragma unroll
        for (int k = 0; k < kQuads; ++k)
          o[j][k] = reinterpret_cast<const float4*>(from + row_of_it * D)[min(lane + k * kLanes, kWide - 1)];
      }
    };
    if (all > 0) load(part);
    float m = -INFINITY, l = 0;
    for (int i = lane; i < all; i += kLanes) m = fmaxf(m, slot(i)[kRows * D + row_of_it]);
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
          if ((i < of.count[0]) != (kind == 0)) continue;
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
  const bool rotated = __syncthreads_or(threadIdx.x < rows && row_of[threadIdx.x].packed) != 0 &&
                       p.inverse_transpose.words != nullptr;

  // out = R^-1 y / lambda + z, eight rows at a time.
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  for (int r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int valid = min(kBlockRows, rows - r0);
    for (int i = threadIdx.x; i < valid * D; i += blockDim.x)
      x[i] = reinterpret_cast<const float*>(sums[1][(r0 + i / D) * share])[i % D];
    __syncthreads();
    if (rotated) {
      if (r0 > 0) rotation.prefetch(p.inverse_transpose);
      rotation.apply(p.inverse_transpose, x, operands, x, valid);
    }
    for (int i = threadIdx.x; i < valid * kWidth; i += blockDim.x) {
      const int r = r0 + i / kWidth, c = first_channel + i % kWidth;
      const MergeRow& its = row_of[r];
      if (!its.there) continue;
      const SequenceView& s = *its.s;
      const int query = its.row / p.group, q_head = its.head * p.group + its.row % p.group;
      const float lambda = s.lambda_v != nullptr ? s.lambda_v[its.head * D + c] : 1.0f;
      const float o = x[(r - r0) * D + c] / lambda + reinterpret_cast<const float*>(sums[0][r * share])[c];
      const float m = m_all[r], l = l_all[r];
      if (p.out != nullptr) {
        const float denominator = p.sinks != nullptr && l != 0 ? l + exp2f(p.sinks[q_head] * kLog2e - m) : l;
        store_element(
            p.out, p.out_dtype,
            s.input * p.out_stride[0] + q_head * p.out_stride[1] + (s.input_row + query) * p.out_stride[2] + c,
            l == 0 ? 0.0f : o / denominator);
      } else {
        const long long to = (static_cast<long long>(s.input) * p.kv_heads * p.group + q_head) * p.rows + s.input_row +
                             query;
        p.partial.o[to * D + c] = l == 0 ? 0.0f : o;
        if (c == 0) {
          p.partial.m[to] = m * kLn2;
          p.partial.l[to] = l;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace kv4::cuda
