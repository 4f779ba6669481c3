// Queries to matrix operands, and the line of items. One CTA per block of kBlockRows query rows of a KV head.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attend.h"
#include "cuda/attend_turn.cuh"
#include "cuda/device.cuh"

namespace kv4::cuda {

template <int D>
__global__ void __launch_bounds__(kTurnThreads) attend_prepare(const __grid_constant__ AttendParams p) {
  constexpr int kPadded = pad_channels(D);
  __shared__ __align__(16) float x[kBlockRows * D];
  __shared__ uint4 operands[Turn<D>::kOperands];
  __shared__ float plain[kBlockRows][kPadded], y[kBlockRows][kPadded], largest[kBlockRows];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x % p.blocks, head = blockIdx.x / p.blocks % p.kv_heads, b = blockIdx.x / p.blocks / p.kv_heads;
  Turn<D> turn;
  if (p.dual.words != nullptr) turn.prefetch(p.dual);
  wait_for_previous();
  let_next_begin();
  if (blockIdx.x == 0 && warp == 0) lay_line(p, lane, p.line);

  const float* lambda = p.sequences[b].lambda_k;
  const int rows = p.group * p.queries, valid = min(kBlockRows, rows - block * kBlockRows);
  if (warp < kBlockRows) {
    const int row = block * kBlockRows + warp, query = row / p.group;
    const long long from = b * p.q_stride[0] + (head * p.group + row - query * p.group) * p.q_stride[1] + query * p.q_stride[2];
#pragma unroll
    for (int c = lane; c < kPadded; c += kLanes) {
      const float value = warp < valid && c < D ? load_element(p.q, p.q_dtype, from + c) : 0.0f;
      plain[warp][c] = value;
      y[warp][c] = 0;
      if (c < D) x[warp * D + c] = lambda != nullptr ? value / lambda[head * D + c] : value;
    }
  }
  __syncthreads();
  if (p.dual.words != nullptr) turn.apply(p.dual, x, operands, x, valid);
  for (int i = threadIdx.x; i < kBlockRows * D; i += blockDim.x) y[i / D][i % D] = x[i];
  __syncthreads();
  if (warp < kBlockRows) {
    float top = 0;
    for (int c = lane; c < D; c += kLanes) top = fmaxf(top, fabsf(y[warp][c]));
    top = warp_max(top);
    if (lane == 0) {
      largest[warp] = top;
      float* scale = p.row_scale + static_cast<std::size_t>(blockIdx.x) * 2 * kBlockRows;
      scale[warp] = top / 32512.0f * p.factor;
      scale[kBlockRows + warp] = top * p.factor;
    }
  }
  __syncthreads();
  const float top = largest[g];
  const float to_units = top > 0 ? 32512.0f / top : 0.0f, to_one = top > 0 ? 1.0f / top : 0.0f;
  uint4* out = p.operands + static_cast<std::size_t>(blockIdx.x) * operand_words(D) + lane;
  constexpr int kTiles = operand_bytes_tiles(D), kMeanSteps = operand_mean_steps(D), kExactSteps = operand_exact_steps(D);
  for (int k = warp; k < kTiles + kMeanSteps + kExactSteps; k += blockDim.x / kLanes) {
    uint4 a;
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
    } else if (k < kTiles + kMeanSteps) {
      const int s = k - kTiles, c = s / 2 * 32 + t * 8 + s % 2 * 4;
      float n[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) n[j] = y[g][c + j] * to_one;
      a = two_halves(false, n[0], n[1], n[2], n[3]);
    } else {
      const int c = (k - kTiles - kMeanSteps) * 16 + t * 2;
      a = two_halves(p.bf16, plain[g][c], plain[g][c + 1], plain[g][c + 8], plain[g][c + 9]);
    }
    out[k * kLanes] = a;
  }
}

}  // namespace kv4::cuda
