// Queries to matrix operands, and the items before each sequence. CTA (x, y): prepare_blocks blocks of
// query rows of a KV head from x * prepare_blocks on, part y of their channels; the parts form a cluster and exchange
// their largest values.
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
  const int parts = gridDim.y, part = blockIdx.y, all_blocks = p.batch * p.kv_heads * p.blocks;
  if (parts > 1) cluster_arrive();
  wait_for_previous();
  let_next_begin();
  constexpr int kTiles = operand_bytes_tiles(D), kMeanSteps = operand_mean_steps(D),
                kExactSteps = operand_exact_steps(D);
  const int first_tile = kTiles * part / parts, behind_tile = kTiles * (part + 1) / parts;  // of 32 channels
  RowRotation<D> rotation(first_tile * 4, min(behind_tile * 4, D / 8));
  if (p.dual.words != nullptr) rotation.prefetch(p.dual);
  if (blockIdx.x == 0 && part == 0 && warp == static_cast<int>(blockDim.x) / kLanes - 1)
    sum_items(p, lane, p.item_offsets);
  // Row r of the CTA's is row r % each of block first + r / each.
  const int each = kBlockRows / p.prepare_blocks, first = static_cast<int>(blockIdx.x) * p.prepare_blocks;
  const auto view_of_block = [&](int index) -> const SequenceView& {
    return p.sequences[index / p.blocks / p.kv_heads];
  };
  int valid = kBlockRows;
  if (p.prepare_blocks == 1) {
    const int queries = static_cast<int>(view_of_block(first).query_count);
    valid = min(kBlockRows, p.group * queries - first % p.blocks * kBlockRows);
    if (valid <= 0) {  // a sequence with fewer rows; the same for all parts
      if (parts > 1) cluster_wait();
      return;
    }
  }
  if (warp < kBlockRows) {
    const int index = min(first + warp / each, all_blocks - 1), head = index / p.blocks % p.kv_heads;
    const SequenceView& s = view_of_block(index);
    QueryRow<D> row;
    row.load(p, s, head, index % p.blocks * kBlockRows + warp % each, lane);
    row.load_lambda(s.lambda_k, head, lane);
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
    for (int c = first_tile * 32 + lane; c < min(behind_tile * 32, D); c += kLanes)
      top = max_or_nan(top, fabsf(y[warp][c]));
    top = warp_max_or_nan(top);
    if (parts == 1) largest[0][warp] = top;
    else if (lane < parts) put_in_cluster(&largest[part][warp], lane, top);
  }
  if (parts > 1) cluster_barrier();
  else __syncthreads();

  // Of 32 channels each: a tile of bytes, two steps for means, two for exact rows.
  const int steps = (behind_tile - first_tile) * 5;
  for (int i = warp; i < p.prepare_blocks * steps; i += blockDim.x / kLanes) {
    const int its = i / steps, index = first + its, step = i % steps;
    if (index >= all_blocks) break;
    // Row g of the block is row r of those above; a block of fewer rows has zeros for the rest.
    const int r = its * each + min(g, each - 1);
    const bool used = g < each;
    const auto rotated = [&](int c) { return used ? y[r][c] : 0.0f; };
    float top = 0;
    for (int k = 0; k < parts && used; ++k) top = max_or_nan(top, largest[k][r]);
    if (part == 0 && step == 0 && t == 0) {
      float* scale = p.row_scale + static_cast<std::size_t>(index) * 2 * kBlockRows;
      scale[g] = top / 32512.0f * p.factor;
      scale[kBlockRows + g] = top * p.factor;
    }
    const float to_units = top > 0 ? 32512.0f / top : 0.0f, to_one = top > 0 ? 1.0f / top : 0.0f;
    uint4* block_operands = p.operands + static_cast<std::size_t>(index) * operand_words(D);
    const int tile = first_tile + step / 5, kind = step % 5;
    const int k = kind == 0  ? tile
                  : kind < 3 ? kTiles + tile * 2 + kind - 1
                             : kTiles + kMeanSteps + tile * 2 + kind - 3;
    if (k >= kTiles + kMeanSteps + kExactSteps) continue;
    uint4 a = {};
    if (k >= kTiles && k < kTiles + kMeanSteps) {
      const int s = k - kTiles, c = s / 2 * 32 + t * 8 + s % 2 * 4;
      put_mean<D>(block_operands, g, c,
                  {rotated(c) * to_one, rotated(c + 1) * to_one, rotated(c + 2) * to_one, rotated(c + 3) * to_one});
      continue;
    }
    if (k < kTiles) {
      uint32_t high[2] = {}, low[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int n = __float2int_rn(rotated(k * 32 + h * 16 + t * 4 + j) * to_units);
          high[h] |= (static_cast<uint32_t>((n + 128) >> 8) & 255) << 8 * j;
          low[h] |= (static_cast<uint32_t>(n) & 255) << 8 * j;
        }
      a = {high[0], low[0], high[1], low[1]};
    } else if (used) {
      const int c = (k - kTiles - kMeanSteps) * 16 + t * 2;
      a = two_halves(p.bf16, plain[r][c], plain[r][c + 1], plain[r][c + 8], plain[r][c + 9]);
    }
    block_operands[k * kLanes + lane] = a;
  }
}

}  // namespace kv4::cuda
