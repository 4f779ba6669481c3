// Queries to matrix operands, and the items before each sequence. CTA (x, y): block of kBlockRows query rows of a KV
// head x, part y of its channels; the parts of a block form a cluster and exchange their largest values.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attend.h"
#include "cuda/attend_rotate.cuh"
#include "cuda/device.cuh"

namespace kv4::cuda {

constexpr int kMostParts = 8;

template <int D>
__global__ void __launch_bounds__(kRotateThreads) attend_prepare(const __grid_constant__ AttendParams p) {
  constexpr int kPadded = pad_channels(D);
  __shared__ __align__(16) float x[kBlockRows * D];
  __shared__ uint4 operands[RowRotation<D>::kOperands];
  __shared__ __align__(16) float plain[kBlockRows][kPadded], y[kBlockRows][kPadded], largest[kMostParts][kBlockRows];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x % p.blocks, head = blockIdx.x / p.blocks % p.kv_heads,
            b = blockIdx.x / p.blocks / p.kv_heads;
  const int parts = gridDim.y, part = blockIdx.y;
  if (parts > 1) cluster_arrive();
  wait_for_previous();
  let_next_begin();
  const SequenceView& s = p.sequences[b];
  const float* of_keys = s.lambda_k;
  const int valid = min(kBlockRows, p.group * static_cast<int>(s.query_count) - block * kBlockRows);
  constexpr int kTiles = operand_bytes_tiles(D), kMeanSteps = operand_mean_steps(D),
                kExactSteps = operand_exact_steps(D);
  const int first_tile = kTiles * part / parts, behind_tile = kTiles * (part + 1) / parts;  // of 32 channels
  RowRotation<D> rotation(first_tile * 4, min(behind_tile * 4, D / 8));
  if (p.dual.words != nullptr) rotation.prefetch(p.dual);
  if (blockIdx.x == 0 && part == 0 && warp == static_cast<int>(blockDim.x) / kLanes - 1)
    sum_items(p, lane, p.item_offsets);
  if (valid <= 0) {  // a sequence with fewer rows; the same for all parts
    if (parts > 1) cluster_wait();
    return;
  }
  QueryRow<D> row;
  if (warp < kBlockRows) {
    row.load(p, s, head, block * kBlockRows + warp, lane);
    row.load_lambda(of_keys, head, lane);
  }

  if (warp < kBlockRows) {
#pragma unroll
    for (int i = 0; i < QueryRow<D>::kPairs; ++i) {
      const int c = 2 * (lane + i * kLanes);
      if (c >= kPadded) continue;
      const float2 value = row(p, i);
      *reinterpret_cast<float2*>(&plain[warp][c]) = value;
      *reinterpret_cast<float2*>(&y[warp][c]) = {0, 0};
      if (c < D) *reinterpret_cast<float2*>(x + warp * D + c) = {value.x / row.lambda[i].x, value.y / row.lambda[i].y};
    }
  }
  __syncthreads();
  if (p.dual.words != nullptr) rotation.apply(p.dual, x, operands, x, valid);
  for (int i = threadIdx.x; i < kBlockRows * D; i += blockDim.x) y[i / D][i % D] = x[i];
  if (parts > 1) cluster_wait();
  __syncthreads();
  if (warp < kBlockRows) {
    float top = 0;
    for (int c = first_tile * 32 + lane; c < min(behind_tile * 32, D); c += kLanes) top = fmaxf(top, fabsf(y[warp][c]));
    top = warp_max(top);
    if (parts == 1) largest[0][warp] = top;
    else if (lane < parts) put_in_cluster(&largest[part][warp], lane, top);
  }
  if (parts > 1) cluster_barrier();
  else __syncthreads();
  float top = 0;
  for (int i = 0; i < parts; ++i) top = fmaxf(top, largest[i][g]);
  if (part == 0 && warp == 0 && t == 0) {
    float* scale = p.row_scale + static_cast<std::size_t>(blockIdx.x) * 2 * kBlockRows;
    scale[g] = top / 32512.0f * p.factor;
    scale[kBlockRows + g] = top * p.factor;
  }
  const float to_units = top > 0 ? 32512.0f / top : 0.0f, to_one = top > 0 ? 1.0f / top : 0.0f;
  uint4* block_operands = p.operands + static_cast<std::size_t>(blockIdx.x) * operand_words(D);
  // Of 32 channels each: a tile of bytes, two steps for means, two for exact rows.
  for (int i = warp; i < (behind_tile - first_tile) * 5; i += blockDim.x / kLanes) {
    const int tile = first_tile + i / 5, kind = i % 5;
    const int k = kind == 0  ? tile
                  : kind < 3 ? kTiles + tile * 2 + kind - 1
                             : kTiles + kMeanSteps + tile * 2 + kind - 3;
    if (k >= kTiles + kMeanSteps + kExactSteps) continue;
    uint4 a;
    if (k >= kTiles && k < kTiles + kMeanSteps) {
      const int s = k - kTiles, c = s / 2 * 32 + t * 8 + s % 2 * 4;
      put_mean<D>(block_operands, g, c,
                  {y[g][c] * to_one, y[g][c + 1] * to_one, y[g][c + 2] * to_one, y[g][c + 3] * to_one});
      continue;
    }
    if (k < kTiles) {
      uint32_t high[2] = {}, low[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int n = __float2int_rn(y[g][k * 32 + h * 16 + t * 4 + j] * to_units);
          high[h] |= (static_cast<uint32_t>((n + 128) >> 8) & 255) << 8 * j;
          low[h] |= (static_cast<uint32_t>(n) & 255) << 8 * j;
        }
      a = {high[0], low[0], high[1], low[1]};
    } else {
      const int c = (k - kTiles - kMeanSteps) * 16 + t * 2;
      a = two_halves(p.bf16, plain[g][c], plain[g][c + 1], plain[g][c + 8], plain[g][c + 9]);
    }
    block_operands[k * kLanes + lane] = a;
  }
}

}  // namespace kv4::cuda
