// Rows times a rotation's matrix, for the few rows of a query block. Bound by the latency of reading the matrix, so
// every thread loads its part before the rows arrive; a matrix that does not fit in registers (d = 256) is divided by
// columns. The products use the matrix unit, both factors as two 16-bit floats (22 bits), which takes a fifth of the
// instructions of float multiply-adds.
//
// The packed matrix (pack_matrix) holds for rows 16 k ... 16 k + 15 and columns 8 n ... 8 n + 7 and each lane 4g + t
// column 8 n + g, rows 16 k + {2t, 2t+1} and + {8 + 2t, 9 + 2t}: high halves, then low halves: word (n * D / 16 + k) *
// 32 + lane.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend.h"
#include "cuda/device.cuh"

namespace kv4::cuda {

// Operands of products with means: those of tile `tile` of four rows and 32 channels 32 k ... are B, at operand + lane.
// Column 2r is row r's high halves, 2r + 1 its low ones; a lane has of its column channels 32 k + 8t + {0, 1}, {4, 5},
// {2, 3}, {6, 7}.
template <int D>
__device__ __forceinline__ int mean_operand(int tile, int k) {
  return (operand_bytes_tiles(D) + 2 * k + tile) * kLanes;
}
// Channels c ... c + 3 of a row of a block, c a multiple of 4.
template <int D>
__device__ __forceinline__ void put_mean(uint4* block, int row, int c, const float (&x)[4]) {
  const uint4 halves = two_halves(false, x[0], x[1], x[2], x[3]);
  auto* to = reinterpret_cast<uint32_t*>(block + mean_operand<D>(row / 4, c / 32) + row % 4 * 8 + c % 32 / 8) +
             c % 8 / 4;
  to[0] = halves.x;
  to[2] = halves.z;
  to[16] = halves.y;
  to[18] = halves.w;
}

constexpr int kRotateThreads = 512;  // at most; fewer where many CTAs take part

// A row of queries and its lambda, as loaded: pairs of channels 2 (lane + 32 i).
template <int D>
struct QueryRow {
  static constexpr int kPairs = (D / 2 + kLanes - 1) / kLanes;
  uint2 raw[kPairs];  // widened at their use, so that the load is not waited for here
  float2 lambda[kPairs];

  __device__ __forceinline__ void load_lambda(const float* of_keys, int head, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * (lane + i * kLanes);
      lambda[i] = {1, 1};
      if (of_keys != nullptr && c < D) lambda[i] = {of_keys[head * D + c], of_keys[head * D + c + 1]};
    }
  }

  __device__ __forceinline__ void load(const AttendParams& p, const SequenceView& s, int head, int row, int lane) {
    const int query = row / p.group;
    const long long from = s.input * p.q_stride[0] + (head * p.group + row - query * p.group) * p.q_stride[1] +
                           (s.input_row + query) * p.q_stride[2];
    const bool there = query < s.query_count;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * (lane + i * kLanes);
      raw[i] = {0, 0};
      if (c >= D || !there) continue;
      if (p.q_dtype == DType::f32)
        raw[i] = {static_cast<const uint32_t*>(p.q)[from + c], static_cast<const uint32_t*>(p.q)[from + c + 1]};
      else raw[i] = {static_cast<const uint16_t*>(p.q)[from + c], static_cast<const uint16_t*>(p.q)[from + c + 1]};
    }
  }
  __device__ __forceinline__ float2 operator()(const AttendParams& p, int i) const {
    if (p.q_dtype == DType::f32) return {__uint_as_float(raw[i].x), __uint_as_float(raw[i].y)};
    if (p.q_dtype == DType::bf16) return {__uint_as_float(raw[i].x << 16), __uint_as_float(raw[i].y << 16)};
    return unpack_halves(false, raw[i].x | raw[i].y << 16);
  }
};

// y[r][i] = sum over c of x[r][c] matrix[c][i], for kBlockRows rows; all threads of a CTA.
template <int D>
class RowRotation {
 public:
  static constexpr int kSteps = D / 16, kTiles = D / 8;
  static constexpr int kOperands = kSteps * kLanes;  // uint4 of shared memory that apply works in

  // Of the columns the tiles from `first` on, before `behind`.
  __device__ RowRotation(int first, int behind) : first_(first), behind_(behind) {}
  __device__ __forceinline__ void prefetch(const PackedMatrix& matrix) { load(matrix, first_ + threadIdx.x / kLanes); }

  // x, y: [kBlockRows][D] in shared memory; they may be the same. Rows from `valid` on are 0, other columns of y as
  // they were.
  __device__ void apply(const PackedMatrix& matrix, const float* x, uint4* operands, float* y, int valid) {
    __shared__ float largest[kBlockRows];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, g = lane / 4,
              t = lane % 4;
    for (int r = warp; r < kBlockRows; r += warps) {
      float top = 0;
      if (r < valid)
        for (int c = lane; c < D; c += kLanes) top = fmaxf(top, fabsf(x[r * D + c]));
      top = warp_max(top);
      if (lane == 0) largest[r] = top;
    }
    __syncthreads();
    const float scale = largest[g], inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int k = warp; k < kSteps; k += warps) {
      float2 a = {}, b = {};
      if (g < valid) {
        a = *reinterpret_cast<const float2*>(x + g * D + k * 16 + 2 * t);
        b = *reinterpret_cast<const float2*>(x + g * D + k * 16 + 8 + 2 * t);
      }
      operands[k * kLanes + lane] = two_halves(false, a.x * inverse, a.y * inverse, b.x * inverse, b.y * inverse);
    }
    __syncthreads();
    for (int n = first_ + warp; n < behind_; n += warps) {
      if (n != first_ + warp) load(matrix, n);
      float high[4] = {}, low[4] = {};  // separate sums: a dependency chain half as long
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint4 a = operands[k * kLanes + lane];
        mma_halves(false, high, a, m_[k].x, m_[k].y);
        mma_halves(false, low, a, m_[k].z, m_[k].w);
      }
      const float back = scale * matrix.scale;
      *reinterpret_cast<float2*>(y + g * D + n * 8 + 2 * t) = {(high[0] + high[2] + (low[0] + low[2])) * back,
                                                               (high[1] + high[3] + (low[1] + low[3])) * back};
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void load(const PackedMatrix& matrix, int n) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      if (n < behind_) m_[k] = __ldg(matrix.words + (n * kSteps + k) * kLanes + threadIdx.x % kLanes);
  }

  int first_, behind_;
  uint4 m_[kSteps];
};

}  // namespace kv4::cuda
