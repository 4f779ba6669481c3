// Rows times a rotation's matrix, for the few rows of a query block. Bound by the latency of reading the matrix, so every
// thread asks for its share before the rows are there; the products are the matrix unit's, both factors in two 16-bit
// floats (22 bits), which takes a fifth of the instructions that float multiply-adds take.
//
// The packed matrix (pack_matrix) holds for rows 16 k ... 16 k + 15 and columns 8 n ... 8 n + 7 and each lane 4g + t column
// 8 n + g, rows 16 k + {2t, 2t+1} and + {8 + 2t, 9 + 2t}: high halves, then low halves: word (n * D / 16 + k) * 32 + lane.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend.h"
#include "cuda/device.cuh"

namespace kv4::cuda {

constexpr int kTurnThreads = 512;

// y[r][i] = sum over c of x[r][c] matrix[c][i], for kBlockRows rows; a CTA of kTurnThreads.
template <int D>
class Turn {
 public:
  static constexpr int kSteps = D / 16, kTiles = D / 8, kWarps = kTurnThreads / kLanes;
  static constexpr int kOperands = kSteps * kLanes;  // uint4 of shared memory that apply works in

  __device__ __forceinline__ void prefetch(const PackedMatrix& matrix) { load(matrix, threadIdx.x / kLanes); }

  // x, y: [kBlockRows][D] in shared memory; they may be the same. Rows from `valid` on are 0.
  __device__ void apply(const PackedMatrix& matrix, const float* x, uint4* operands, float* y, int valid) {
    __shared__ float largest[kBlockRows];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
    float top = 0;
    if (warp < valid)
      for (int c = lane; c < D; c += kLanes) top = fmaxf(top, fabsf(x[warp * D + c]));
    top = warp_max(top);
    if (lane == 0 && warp < kBlockRows) largest[warp] = top;
    __syncthreads();
    const float scale = largest[g], inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int k = warp; k < kSteps; k += kWarps) {
      float2 a = {}, b = {};
      if (g < valid) {
        a = *reinterpret_cast<const float2*>(x + g * D + k * 16 + 2 * t);
        b = *reinterpret_cast<const float2*>(x + g * D + k * 16 + 8 + 2 * t);
      }
      operands[k * kLanes + lane] = two_halves(false, a.x * inverse, a.y * inverse, b.x * inverse, b.y * inverse);
    }
    __syncthreads();
    for (int n = warp; n < kTiles; n += kWarps) {
      if (n != warp) load(matrix, n);
      float c[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint4 a = operands[k * kLanes + lane];
        mma_halves(false, c, a, m_[k].x, m_[k].y);
        mma_halves(false, c, a, m_[k].z, m_[k].w);
      }
      const float back = scale * matrix.scale;
      *reinterpret_cast<float2*>(y + g * D + n * 8 + 2 * t) = {(c[0] + c[2]) * back, (c[1] + c[3]) * back};
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void load(const PackedMatrix& matrix, int n) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      if (n < kTiles) m_[k] = __ldg(matrix.words + (n * kSteps + k) * kLanes + threadIdx.x % kLanes);
  }

  uint4 m_[kSteps];
};

}  // namespace kv4::cuda
