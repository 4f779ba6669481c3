// Rows times a rotation's matrix, for the few rows of a query block: bound by the latency of reading the matrix, so every
// thread asks for all of its share at once, and before the rows are there.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend.h"

namespace kv4::cuda {

constexpr int kTurnThreads = 256;

// y[r][i] = sum over c of x[r][c] matrix[c][i], for kBlockRows rows. A CTA of kTurnThreads; thread part * (D / 4) + i / 4 takes
// four columns i and a stretch of the c's.
template <int D>
class Turn {
 public:
  static constexpr int kWide = D / 4, kParts = kTurnThreads / kWide, kEach = (D + kParts - 1) / kParts;
  static constexpr int kBatch = kEach < 16 ? kEach : 16;
  static constexpr int kTogether = 4;                            // rows
  static constexpr int kPartialFloats = kParts * kTogether * D;  // of shared memory, at most 16 KiB

  // Asks for the first rows of the share.
  __device__ __forceinline__ void prefetch(const float* matrix) { load(matrix, 0); }

  // x, y: [kBlockRows][D] in shared memory, 16-byte aligned; they may be the same. Rows from `valid` on are left alone.
  __device__ void apply(const float* matrix, const float* x, float* partial, float* y, int valid) {
    const int part = threadIdx.x / kWide, wide = threadIdx.x % kWide;
    for (int row = 0; row < valid; row += kTogether) {
      if (part < kParts) {
        float4 sum[kTogether] = {};
        for (int first = 0; first < kEach; first += kBatch) {
          if (first > 0 || (row > 0 && kBatch < kEach)) load(matrix, first);
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int c = part * kEach + first + j;
            if (first + j >= kEach || c >= D) break;
#pragma unroll
            for (int r = 0; r < kTogether; ++r) {
              const float value = x[(row + r) * D + c];
              sum[r].x = fmaf(value, m_[j].x, sum[r].x);
              sum[r].y = fmaf(value, m_[j].y, sum[r].y);
              sum[r].z = fmaf(value, m_[j].z, sum[r].z);
              sum[r].w = fmaf(value, m_[j].w, sum[r].w);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kTogether; ++r) reinterpret_cast<float4*>(partial)[(part * kTogether + r) * kWide + wide] = sum[r];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < min(kTogether, valid - row) * D; i += kTurnThreads) {
        float total = 0;
#pragma unroll
        for (int k = 0; k < kParts; ++k) total += partial[k * kTogether * D + i];
        y[row * D + i] = total;
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void load(const float* matrix, int first) {
    const int part = threadIdx.x / kWide, wide = threadIdx.x % kWide;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = part * kEach + first + j;
      if (part < kParts && first + j < kEach && c < D) m_[j] = __ldg(reinterpret_cast<const float4*>(matrix + static_cast<std::size_t>(c) * D) + wide);
    }
  }

  float4 m_[kBatch];
};

}  // namespace kv4::cuda
