// The softmax state of a run: sums of weighted values, the scores' maximum, the weights' sum.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/attend.h"
#include "cuda/attend_tuning.h"
#include "cuda/device.cuh"

namespace kv4::cuda {

// Sums of weighted values over kTiles tiles of 8 channels of each block's rows, their weights' maximum and sum.
template <int kTiles, int kBlocks>
struct Accumulators {
  float o[kBlocks][kTiles][2];
  float m[kBlocks], l[kBlocks];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      m[r] = -INFINITY;
      l[r] = 0;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) o[r][i][0] = o[r][i][1] = 0;
    }
  }
  // Raises the maximum of block r to at least `largest`, which all lanes of a row share; returns what to subtract.
  __device__ __forceinline__ float raise(int r, float largest) {
    const float m_new = fmaxf(m[r], largest);
    if (__any_sync(kAll, m_new > m[r])) {
      const float shrink = m_new == -INFINITY ? 1.0f : exp2_fast(m[r] - m_new);
      l[r] *= shrink;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        o[r][i][0] *= shrink;
        o[r][i][1] *= shrink;
      }
      m[r] = m_new;
    }
    return m_new == -INFINITY ? 0.0f : m_new;
  }
};

template <int D, int kBlocks>
struct State : Accumulators<D / 8, kBlocks> {
  using Base = Accumulators<D / 8, kBlocks>;
  using Base::o, Base::m, Base::l;

  // As a partial state: o [kRows][kPitch], m [kRows], l [kRows], of the first `rows` rows.
  template <int kRows, int kPitch>
  __device__ __forceinline__ void put(float* out, int rows, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      const float sum = quad_sum(l[r]);
      const int row = r * kBlockRows + g;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(out + row * kPitch + n * 8 + 2 * t) = {o[r][n][0], o[r][n][1]};
      if (t == 0) {
        out[kRows * kPitch + row] = m[r];
        out[kRows * (kPitch + 1) + row] = sum;
      }
    }
  }
};

}  // namespace kv4::cuda
