// One CTA per slice and side, 8 tokens at a time: codes to levels in shared memory, times the inverse rotation's
// matrix. Bound by reading that matrix from L2 for every 8 tokens; for crops and for models that read keys themselves,
// not for decoding.
#include "cuda/dequantise.h"

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace kv4::cuda {
namespace {

constexpr int kThreads = 256, kTokensAtOnce = 8;

__global__ void __launch_bounds__(kThreads) dequantise_jobs(const __grid_constant__ DequantiseJobs p) {
  extern __shared__ float x[];  // [kTokensAtOnce][dim]
  const DequantiseJob& job = p.jobs[blockIdx.x / p.heads];
  const bool values = blockIdx.y == 1;
  const SideParams& side = values ? p.value : p.key;
  void* out = values ? job.v : job.k;
  if (job.page < 0 || out == nullptr) return;
  const int dim = side.dim, padded = pad_channels(dim), head = blockIdx.x % p.heads,
            count = static_cast<int>(job.count);
  const std::uint8_t* slice = slice_at(p.pages, job.page, head);
  const float* lambda = values ? job.lambda_v : job.lambda_k;
  if (lambda != nullptr) lambda += head * dim;
  const std::int64_t begin = head * (values ? job.v_head_stride : job.k_head_stride);
  const float* inverse = values ? p.inverse_v : p.inverse_k;
  const std::int64_t stride = values ? job.v_stride : job.k_stride;
  for (int j = 0; j < count; j += kTokensAtOnce) {
    const int rows = min(kTokensAtOnce, count - j);
    for (int i = threadIdx.x; i < kTokensAtOnce * dim; i += kThreads) {
      const int r = i / dim, c = i % dim, token = job.first + j + r;
      float value = 0;
      if (r < rows) {
        const Nibble at = values ? value_nibble(token, c) : key_nibble(token, c, padded);
        const uint32_t code =
            from_stored(reinterpret_cast<const uint32_t*>(slice + side.codes)[at.word] >> at.shift & 15);
        value = from_half(reinterpret_cast<const unsigned short*>(slice +
                                                                  side.scales)[c / side.group * kPageTokens + token]) *
                side.levels[code];
        if (side.mean) value += from_half(reinterpret_cast<const unsigned short*>(slice + side.mean_at)[c]);
      }
      x[i] = value;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < dim; i += kThreads) {
      float sum[kTokensAtOnce];
#pragma unroll
      for (int r = 0; r < kTokensAtOnce; ++r) sum[r] = inverse == nullptr ? x[r * dim + i] : 0.0f;
      if (inverse != nullptr) {
        for (int c = 0; c < dim; ++c) {
          const float m = inverse[static_cast<std::size_t>(c) * dim + i];
#pragma unroll
          for (int r = 0; r < kTokensAtOnce; ++r) sum[r] = fmaf(m, x[r * dim + c], sum[r]);
        }
      }
      const float weight = lambda != nullptr ? lambda[i] : 1.0f;
#pragma unroll
      for (int r = 0; r < kTokensAtOnce; ++r)
        if (r < rows) put_element(out, job.dtype, begin + (j + r) * stride + i, sum[r] / weight);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_dequantise_jobs(const DequantiseJobs& p, cudaStream_t stream) {
  const int dim = p.key.dim > p.value.dim ? p.key.dim : p.value.dim;
  if (p.count == 0) return cudaSuccess;
  return queue(dequantise_jobs, dim3(static_cast<unsigned>(p.count), 2), kThreads,
               static_cast<std::size_t>(kTokensAtOnce) * dim * sizeof(float), stream, p);
}

}  // namespace kv4::cuda
