// The moments that lambda is made of, and lambda: once in the life of a sequence, so in double and without haste.
#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.h"
#include "moments/lambda.h"

namespace kv4::cuda {
namespace {

constexpr int kThreads = 256;

// A CTA per job and KV head, each channel by one thread.
__global__ void __launch_bounds__(kThreads) energies_kernel(const __grid_constant__ EnergyParams p) {
  const EnergyJob& job = p.job[blockIdx.x / p.kv_heads];
  const int head = blockIdx.x % p.kv_heads;
  for (int c = threadIdx.x; c < p.dim; c += kThreads) {
    float sum = 0;
    for (int g = 0; g < p.group; ++g) {
      const float x = load_element(
          p.q, p.dtype, job.sequence * p.stride[0] + (head * p.group + g) * p.stride[1] + job.query * p.stride[2] + c);
      sum += x * x;
    }
    job.energies[head * p.dim + c] = sum;
  }
}

// The sum of x over the threads, in every thread.
__device__ double sum_of_all(double x, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  return shared[0];
}

// lambda_from_energies: what a channel's energy counts as; 0 where there is none at all. `all`: [dim], a thread's own
// in x.
__device__ double shrunk(double x, const double* all, int dim, int c, double* shared) {
  const double floor = kLambdaFloor * sum_of_all(c < dim ? x : 0.0, shared) / dim;
  if (!(floor > 0)) return 0;
  if (c < dim / 2 * 2) {
    const double pair = (all[c] + all[(c + dim / 2) % (dim / 2 * 2)]) / 2;
    x += kLambdaPairShrinkage * (pair - x);
  }
  return fmax(x, floor);
}

// A CTA per KV head, a thread per channel.
__global__ void __launch_bounds__(kThreads) lambda_kernel(const __grid_constant__ LambdaParams p) {
  __shared__ double shared[kThreads], keys[kThreads], queries[kThreads];
  const int head = blockIdx.x, c = threadIdx.x;
  double key = 0, query = 0;
  if (c < p.dim) {
    for (int b = 0; b < p.blocks; ++b) {
      const std::int64_t first = static_cast<std::int64_t>(b) * kPageTokens;
      const auto row = [&](int j) {
        return static_cast<double>(load_element(p.k, p.bf16 ? DType::bf16 : DType::f16,
                                                head * p.k_head_stride + (first + j) * p.k_stride + c));
      };
      double mean = 0;
      int used = 0;
      for (int j = 0; j < kPageTokens; ++j) {
        if (p.skip[first + j] != 0) continue;
        mean += row(j);
        ++used;
      }
      if (used == 0) continue;
      mean /= used;
      for (int j = 0; j < kPageTokens; ++j)
        if (p.skip[first + j] == 0) key += (row(j) - mean) * (row(j) - mean);
    }
    for (int t = 0; t < p.queries; ++t) {
      const float energy = p.energies[t][head * p.dim + c];
      if (isfinite(energy)) query += energy;
    }
  }
  keys[c] = key;
  queries[c] = query;
  __syncthreads();
  const double k = shrunk(key, keys, p.dim, c, shared), q = shrunk(query, queries, p.dim, c, shared);
  const bool any = k > 0 && q > 0;  // the same for every channel
  const double log_lambda = any ? kLambdaExponent * log(q / k) : 0.0;
  const double mean = sum_of_all(c < p.dim ? log_lambda : 0.0, shared) / p.dim;
  if (c < p.dim) p.lambda[head * p.dim + c] = any ? static_cast<float>(exp(log_lambda - mean)) : 1.0f;
}

}  // namespace

cudaError_t launch_energies(const EnergyParams& p, cudaStream_t stream) {
  return queue(energies_kernel, dim3(static_cast<unsigned>(p.jobs * p.kv_heads)), kThreads, 0, stream, p);
}

cudaError_t launch_lambda(const LambdaParams& p, cudaStream_t stream) {
  return queue(lambda_kernel, dim3(static_cast<unsigned>(p.kv_heads)), kThreads, 0, stream, p);
}

}  // namespace kv4::cuda
