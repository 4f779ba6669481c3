// Sealing any page: one CTA per page slice and side, its 64 tokens as float in shared memory, multiplied by
// the rotation's matrix, quantised by one warp per token. Pages that seal_pages.cuh takes, the common ones, go there.
//
// Count for d = 128 and one vector: 256 bytes read, 68 written; 16,384 multiply-adds, that is 128 cycles of a
// multiprocessor's 128 lanes, where the bytes take 25 of them at 3 TB/s; the matrix is read from L2 for every 8 tokens.
#include "cuda/seal.h"

#include <algorithm>
#include <cstdint>

#include "cuda/codes.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/seal_pages.cuh"

namespace kv4::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kTokensAtOnce = 8;  // rows that share a read of the matrix
constexpr int kMostDim = 256;
constexpr int shared_bytes(int dim) {
  return kPageTokens * (dim + 1) * 4 + 8 + dim * 12 + kPageTokens * pad_channels(dim);
}

// y[r][i] = sum over c of matrix_transpose[c][i] x[r][c] for kTokensAtOnce rows; x and y [.., pitch] in shared memory,
// they may be the same rows. All threads.
__device__ void multiply(const float* matrix_transpose, int dim, const float* x, float* y, int pitch, int rows) {
  float sum[2][kTokensAtOnce];  // channels threadIdx and threadIdx + kThreads
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = threadIdx.x + half * kThreads;
#pragma unroll
    for (int r = 0; r < kTokensAtOnce; ++r) sum[half][r] = 0;
    if (i >= dim) continue;
    for (int c = 0; c < dim; ++c) {
      const float m = matrix_transpose[static_cast<std::size_t>(c) * dim + i];
#pragma unroll
      for (int r = 0; r < kTokensAtOnce; ++r) sum[half][r] = fmaf(m, x[r * pitch + c], sum[half][r]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = threadIdx.x + half * kThreads;
    if (i >= dim) continue;
#pragma unroll
    for (int r = 0; r < kTokensAtOnce; ++r)
      if (r < rows) y[r * pitch + i] = sum[half][r];
  }
  __syncthreads();
}

// Sums as float pairs (Knuth's two-sum): scale and mean are then correct to the last place of fp16.
struct Precise {
  float high = 0, low = 0;
  __device__ void add(float x) {
    const float s = high + x, z = s - high;
    low += (high - (s - z)) + (x - z);
    high = s;
  }
  __device__ void add_product(float a, float b) {
    const float p = a * b;
    add(p);
    low += fmaf(a, b, -p);
  }
};
__device__ float warp_sum(Precise x) {
  for (int step = 16; step > 0; step /= 2) {
    const float high = __shfl_xor_sync(kAll, x.high, step), low = __shfl_xor_sync(kAll, x.low, step);
    x.add(high);
    x.low += low;
  }
  return x.high + x.low;
}

extern __shared__ __align__(16) unsigned char shared[];

__global__ void __launch_bounds__(kThreads) seal_kernel(const __grid_constant__ SealParams p) {
  const SealJob& job = p.jobs[blockIdx.x / 2 / p.heads];
  if (job.page < 0) return;
  const bool values = blockIdx.x % 2 == 1;
  const int head = blockIdx.x / 2 % p.heads, first = job.first, count = static_cast<int>(job.count);
  const SideParams& side = values ? p.value : p.key;
  const int dim = side.dim, pitch = dim + 1, padded = pad_channels(dim);
  float* x = reinterpret_cast<float*>(shared);                          // [64][pitch]
  float* offset = x + kPageTokens * pitch + (kPageTokens * pitch) % 2;  // [dim]: what the stored mean leaves out
  double* mu = reinterpret_cast<double*>(offset + dim);                 // [dim]: lambda times the mean
  unsigned char* codes = reinterpret_cast<unsigned char*>(mu + dim);    // [64][padded] stored nibbles
  const void* rows = values ? job.v : job.k;
  const long long stride = values ? job.v_stride : job.k_stride,
                  begin = head * (values ? job.v_head_stride : job.k_head_stride);
  const float* lambda = values ? job.lambda_v : job.lambda_k;
  if (lambda != nullptr) lambda += head * dim;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const auto masked = [&](int j) { return j < job.hidden || (job.skip != nullptr && job.skip[j] != 0); };
  unsigned char* slice = slice_at(p.pages, job.page, head);

  for (int i = threadIdx.x; i < count * dim; i += kThreads) {
    const int j = i / dim, c = i % dim;
    x[j * pitch + c] = masked(j) ? 0.0f : load_element(rows, job.dtype, begin + j * stride + c);
  }
  __syncthreads();
  if (side.mean) {
    int used = 0;
    for (int j = 0; j < count; ++j) used += !masked(j);
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      Precise sum;
      for (int j = 0; j < count; ++j) sum.add(x[j * pitch + c]);
      const double mean = used > 0 ? (static_cast<double>(sum.high) + sum.low) / used : 0.0;
      const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
      mu[c] = (lambda != nullptr ? lambda[c] : 1.0f) * mean;
      for (int j = 0; j < count; ++j)
        if (!masked(j)) x[j * pitch + c] = (x[j * pitch + c] - high) - low;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < dim; i += kThreads) {
      double rotated = mu[i];
      if (side.rotation_transpose_f64 != nullptr) {
        rotated = 0;
        for (int c = 0; c < dim; ++c)
          rotated = fma(side.rotation_transpose_f64[static_cast<std::size_t>(c) * dim + i], mu[c], rotated);
      }
      const unsigned short stored = to_half(static_cast<float>(rotated));
      reinterpret_cast<unsigned short*>(slice + side.mean_at)[i] = stored;
      offset[i] = static_cast<float>(rotated - static_cast<double>(from_half(stored)));
    }
  }
  if (lambda != nullptr)
    for (int i = threadIdx.x; i < count * dim; i += kThreads) x[i / dim * pitch + i % dim] *= lambda[i % dim];
  __syncthreads();
  if (side.rotation_transpose != nullptr)
    for (int j = 0; j < count; j += kTokensAtOnce)
      multiply(side.rotation_transpose, dim, x + j * pitch, x + j * pitch, pitch, min(kTokensAtOnce, count - j));

  for (int j = warp; j < count; j += kWarps) {
    for (int g = 0; g < side.groups; ++g) {
      const int channel0 = g * side.group;
      Precise squares;
      float largest = 0;
      for (int c = lane; c < side.group; c += kLanes) {
        float& value = x[j * pitch + channel0 + c];
        if (masked(j)) value = 0;
        else if (side.mean) value += offset[channel0 + c];
        squares.add_product(value, value);
        largest = fmaxf(largest, fabsf(value));
      }
      const float step = side.step.factor *
                         (side.step.by_largest ? warp_max(largest) : sqrtf(warp_sum(squares) / side.group));
      Precise xl, ll;
      for (int c = lane; c < side.group; c += kLanes) {
        const float value = x[j * pitch + channel0 + c], y = step > 0 ? value / step : 0.0f, size = fabsf(y);
        int index = 0;
#pragma unroll
        for (int i = 0; i < 7; ++i) index += size >= side.thresholds[i];
        const int code = y < 0 ? side.negative_base - index : 8 + index;
        const float level = side.levels[code];
        xl.add_product(value, level);
        ll.add_product(level, level);
        codes[j * padded + channel0 + c] = static_cast<unsigned char>(to_stored(static_cast<uint32_t>(code)));
      }
      const float top = warp_sum(xl), bottom = warp_sum(ll);
      const float scale = !(step > 0) ? 0.0f : side.abs_max ? step : bottom > 0 ? top / bottom : 0.0f;
      if (lane == 0)
        reinterpret_cast<unsigned short*>(slice + side.scales)[g * kPageTokens + first + j] = to_half(scale);
    }
    for (int c = dim + lane; c < padded; c += kLanes) codes[j * padded + c] = static_cast<unsigned char>(to_stored(0));
  }
  __syncthreads();

  // Words of 8 codes, four of a lane at once. Tokens outside [first, first + count) keep what the slice holds.
  const int fragments = values ? padded / 8 * 2 : kPageTokens / 8 * (padded / 32);
  for (int i = threadIdx.x; i < fragments / 4 * kLanes; i += kThreads) {
    const int group = i / kLanes, g = i % kLanes / 4, t = i % 4;
    uint32_t word[4] = {}, keep[4] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int place = group * 4 + e;
      const int fragment = values || !is_narrow(side.bits) ? place : narrow_key_at(place, padded);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int token = values ? value_token(fragment, t, n) : fragment / (padded / 32) * 8 + g;
        const int channel = values ? fragment / 2 * 8 + g : fragment % (padded / 32) * 32 + 4 * t + n % 4 + n / 4 * 16;
        const int j = token - first;
        if (j < 0 || j >= count) keep[e] |= 15u << 4 * n;
        else word[e] |= static_cast<uint32_t>(codes[j * padded + channel]) << 4 * n;
      }
    }
    if (is_narrow(side.bits)) {
      put_narrow(slice + side.codes, side.bits, group, i % kLanes, {word[0], word[1], word[2], word[3]},
                 {keep[0], keep[1], keep[2], keep[3]});
      continue;
    }
    auto* to = reinterpret_cast<uint32_t*>(slice + side.codes) + word_index(group * 4, i % kLanes);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = keep[e] == 0 ? word[e] : (to[e] & keep[e]) | word[e];
  }
}

int larger_dim(const SideParams& a, const SideParams& b) { return a.dim > b.dim ? a.dim : b.dim; }

bool for_pages(const SideParams& side) { return side.groups == 1 && side.rotation_transpose != nullptr; }

// Whether a CTA may have as much shared memory.
bool has_shared(int device, int bytes) {
  int most = 0;
  return cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && bytes <= most;
}

template <int D>
cudaError_t launch_pages(const SealParams& p, int device, cudaStream_t stream) {
  static SharedMost most;
  int multiprocessors = 1;
  if (const cudaError_t e = prepare_persistent(most, seal_pages<D>, SealShape<D>::kShared, device, &multiprocessors);
      e != cudaSuccess)
    return e;
  // A slice of keys with means takes longer than one of values.
  const int ctas = std::min(multiprocessors, 2 * p.count);
  const int keys = p.key.mean && ctas < 2 * p.count ? std::max(1, ctas * 5 / 8) : ctas / 2;
  return queue(seal_pages<D>, dim3(static_cast<unsigned>(ctas)), SealShape<D>::kThreads, SealShape<D>::kShared, stream,
               p, keys);
}

}  // namespace

cudaError_t launch_seal(const SealParams& p, cudaStream_t stream) {
  if (p.count <= 0) return cudaSuccess;
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (p.key.dim == p.value.dim && for_pages(p.key) && for_pages(p.value)) {
#ifdef KV4_CUDA_WGMMA
    if (wgmma_takes(p, device)) return launch_seal_wgmma(p, device, stream);
#endif
    switch (has_narrow(p.key, p.value) ? 0 : p.key.dim) {
      case 64: return launch_pages<64>(p, device, stream);
      case 80: return launch_pages<80>(p, device, stream);
      case 96: return launch_pages<96>(p, device, stream);
      case 128:
        if (has_shared(device, SealShape<128>::kShared)) return launch_pages<128>(p, device, stream);
        break;  // 8.6 and 8.9
      default: break;
    }
  }
  const int dim = larger_dim(p.key, p.value);
  static SharedMost most;
  if (const cudaError_t e = most.allow(seal_kernel, shared_bytes(kMostDim)); e != cudaSuccess) return e;
  return queue(seal_kernel, dim3(static_cast<unsigned>(p.count) * 2), kThreads,
               static_cast<std::size_t>(shared_bytes(dim)), stream, p);
}

}  // namespace kv4::cuda
