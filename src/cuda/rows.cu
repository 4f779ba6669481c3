// Storing, moving and converting exact rows: a few kilobytes a decode step, so what counts is the launch. One
// token of a sequence is one CTA, a warp for a row of one head and side: 512 bytes a head and token at d = 128, read
// and written once. H100, 8 KV heads, d = 128, in a graph of 32 such launches (bench/cuda/bench_cache.cpp): 2.1 us a
// layer at batch 1, 2.4 at 16.
#include "cuda/rows.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace kv4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxDim = 256;

// Copies one row of 16-bit floats by one warp; writes zeros and returns true where some element is NaN or infinity.
// Writes nothing where `to` is null.
template <class Word>
__device__ __forceinline__ bool copy_row(const void* from, void* to, int dim, uint32_t exponents, int lane) {
  constexpr int kPer = sizeof(Word) / 2, kWords = (kMaxDim / kPer + kLanes - 1) / kLanes;
  Word x[kWords];
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = lane + i * kLanes;
    if (at * kPer >= dim) continue;
    x[i] = static_cast<const Word*>(from)[at];
    const auto* halves = reinterpret_cast<const unsigned short*>(&x[i]);
#pragma unroll
    for (int j = 0; j < kPer; ++j) bad = bad || (halves[j] & exponents) == exponents;
  }
  bad = __any_sync(kAll, bad);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = lane + i * kLanes;
    if (to != nullptr && at * kPer < dim) static_cast<Word*>(to)[at] = bad ? Word{} : x[i];
  }
  return bad;
}

// The rows of one sequence, of which this CTA takes every gridDim.y-th. first: where the first of them goes, behind row
// 0 of exact[1].
__device__ __forceinline__ void store_rows(const StoreParams& p, const SequenceView& sequence, std::int64_t first) {
  const ExactRows& rows = sequence.exact[1];
  const int lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
  const long long items = 2ll * p.heads * sequence.query_count;
  for (long long i = blockIdx.y * warps + threadIdx.x / kLanes; i < items;
       i += static_cast<long long>(gridDim.y) * warps) {
    const bool value = i % 2 != 0;
    const int head = static_cast<int>(i / 2 % p.heads);
    const long long token = i / 2 / p.heads;
    const std::int64_t* stride = value ? p.v_stride : p.k_stride;
    const long long row = sequence.input_row + token;
    const auto* from = static_cast<const unsigned short*>(value ? p.v : p.k) + sequence.input * stride[0] +
                       head * stride[1] + row * stride[2];
    auto* to = p.skip != nullptr ? nullptr
                                 : static_cast<unsigned short*>(const_cast<void*>(value ? rows.v : rows.k)) +
                                       row_offset(rows, !value, head, first + token);
    const uint32_t exponents = p.bf16 ? 0x7f80u : 0x7c00u;
    const bool wide = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 7) == 0 &&
                      p.dim % 4 == 0;
    const bool bad = wide ? copy_row<uint2>(from, to, p.dim, exponents, lane)
                          : copy_row<unsigned short>(from, to, p.dim, exponents, lane);
    if (bad && lane == 0 && p.skip != nullptr) p.skip[sequence.input * p.rows + row] = 1;
    if (bad && lane == 0 && sequence.note != nullptr)
      atomicMax(
          reinterpret_cast<long long*>(const_cast<std::int64_t*>(value ? &sequence.note->value : &sequence.note->key)),
          static_cast<long long>(rows.position + first + token + 1));
  }
}

__global__ void store_kernel(const __grid_constant__ StoreParams p) {
  wait_for_previous();
  let_next_begin();
  SequenceView& sequence = p.sequences[blockIdx.x];
  const std::int64_t held = sequence.exact[1].count, count = sequence.query_count;
  store_rows(p, sequence, held);
  if (!p.count) return;
  __syncthreads();  // every warp has read the count
  if (threadIdx.x == 0) {
    sequence.exact[1].count = held + count;
    sequence.query_position += count;
  }
}

// Prefetches all that attention looks up first, ids of pages and of blocks. One warp.
__device__ __forceinline__ void prefetch_ids(const std::int32_t* ids, std::int64_t count, int lane) {
  for (std::int64_t i = lane * kIdsPerLine; i < count; i += kLanes * kIdsPerLine) prefetch_l2(ids + i);
}
__device__ __forceinline__ void prefetch_tables(const SequenceView& view, int lane) {
  prefetch_ids(view.pages, view.page_count, lane);
  for (const ExactRows& x : view.exact) prefetch_ids(x.blocks, (x.count + kPageTokens - 1) / kPageTokens, lane);
}

__global__ void step_kernel(const __grid_constant__ StepParams p) {
  wait_for_previous();
  let_next_begin();
  const int b = blockIdx.x;
  const SequenceView view = view_of(p.batch, b, true);
  if (blockIdx.y == 0) {
    if (threadIdx.x == 0) p.views[b] = view;
    if (threadIdx.x < kLanes) prefetch_tables(view, threadIdx.x);
    for (int n = threadIdx.x; n < p.range.most; n += blockDim.x)
      p.jobs[b * p.range.most + n] = seal_job_of(p.batch, p.dtype, p.range, b, n);
  }
  store_rows(p.store, view, view.query_position - view.exact[1].position);
}

struct Payload {
  unsigned char bytes[kPutBytes];
};
__global__ void put_kernel(unsigned char* to, int bytes, const __grid_constant__ Payload from) {
  if (((reinterpret_cast<uintptr_t>(to) | bytes) & 3) == 0) {
    for (int i = threadIdx.x * 4; i < bytes; i += blockDim.x * 4)
      *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(from.bytes + i);
  } else {
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from.bytes[i];
  }
}

// One CTA per move. Each chunk is read by all threads before any of it is written; later chunks lie above what it
// overwrites.
template <class Word>
__device__ void move_line(unsigned char* to, const unsigned char* from, std::size_t bytes) {
  constexpr int kEach = 4;
  const std::size_t words = bytes / sizeof(Word);
  for (std::size_t first = 0; first < words; first += kThreads * kEach) {
    Word x[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const std::size_t at = first + i * kThreads + threadIdx.x;
      if (at < words) x[i] = reinterpret_cast<const Word*>(from)[at];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const std::size_t at = first + i * kThreads + threadIdx.x;
      if (at < words) reinterpret_cast<Word*>(to)[at] = x[i];
    }
    __syncthreads();
  }
}
__global__ void __launch_bounds__(kThreads)
    move_lines_kernel(unsigned char* to, std::size_t to_pitch, const unsigned char* from, std::size_t from_pitch,
                      std::size_t bytes) {
  to += blockIdx.x * to_pitch;
  from += blockIdx.x * from_pitch;
  if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) & 15) == 0)
    move_line<uint4>(to, from, bytes);
  else move_line<unsigned short>(to, from, bytes);
}

__global__ void convert_kernel(const __grid_constant__ ConvertJob job) {
  const long long all = static_cast<long long>(job.heads) * job.rows * job.dim;
  for (long long i = blockIdx.x * static_cast<long long>(kThreads) + threadIdx.x; i < all;
       i += static_cast<long long>(gridDim.x) * kThreads) {
    const long long c = i % job.dim, j = i / job.dim % job.rows, h = i / job.dim / job.rows;
    const float x = job.from == nullptr
                        ? 0.0f
                        : load_element(job.from, job.from_dtype, h * job.from_head_stride + j * job.from_stride + c);
    put_element(job.to, job.to_dtype, h * job.to_head_stride + j * job.to_stride + c, x);
  }
}

// A warp for each sequence.
__global__ void __launch_bounds__(kThreads)
    views_kernel(const __grid_constant__ PagedBatch batch, bool stored, SequenceView* out) {
  wait_for_previous();
  let_next_begin();
  const int lane = threadIdx.x % kLanes, b = (blockIdx.x * kThreads + static_cast<int>(threadIdx.x)) / kLanes;
  if (b >= batch.size) return;
  const SequenceView view = view_of(batch, b, stored);
  if (lane == 0) out[b] = view;
  prefetch_tables(view, lane);
}
template <class Job>
__global__ void __launch_bounds__(kThreads) jobs_kernel(const __grid_constant__ PagedBatch batch, DType dtype,
                                                        const __grid_constant__ PageRange range, Job* out) {
  wait_for_previous();
  let_next_begin();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= batch.size * range.most) return;
  if constexpr (std::is_same_v<Job, SealJob>) out[i] = seal_job_of(batch, dtype, range, i / range.most, i % range.most);
  else out[i] = page_job_of<Job>(batch, dtype, range, i / range.most, i % range.most);
}

unsigned ctas_for(int threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t launch_views(const PagedBatch& batch, bool stored, SequenceView* out, bool early, cudaStream_t stream) {
  if (batch.size <= 0) return cudaSuccess;
  return queue_early(early, views_kernel, dim3(ctas_for(batch.size * kLanes)), kThreads, 0, stream, batch, stored, out);
}
template <class Job>
cudaError_t launch_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, Job* out, bool early,
                        cudaStream_t stream) {
  if (batch.size * range.most <= 0) return cudaSuccess;
  return queue_early(early, jobs_kernel<Job>, dim3(ctas_for(batch.size * range.most)), kThreads, 0, stream, batch,
                     dtype, range, out);
}
template cudaError_t launch_jobs(const PagedBatch&, DType, const PageRange&, SealJob*, bool, cudaStream_t);
template cudaError_t launch_jobs(const PagedBatch&, DType, const PageRange&, DequantiseJob*, bool, cudaStream_t);

namespace {

// A sequence's share of a grid. One token: one CTA with a warp for a row of a head and side; a warp of a longer call
// takes about 8 rows.
struct StoreGrid {
  dim3 ctas;
  int threads;
  explicit StoreGrid(const StoreParams& p) {
    const long long items = 2ll * p.heads * p.most;
    const bool one = p.most == 1;
    threads = one ? static_cast<int>(std::min(items, 32ll)) * kLanes : kThreads;
    const long long of_each = one ? 1 : std::clamp(items / (kThreads / kLanes) / 8, 1ll, 4096ll);
    ctas = dim3(static_cast<unsigned>(p.batch), static_cast<unsigned>(of_each));
  }
};

}  // namespace

cudaError_t launch_store(const StoreParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0 || p.most == 0) return cudaSuccess;
  const StoreGrid grid(p);
  return queue_early(p.early, store_kernel, grid.ctas, grid.threads, 0, stream, p);
}
cudaError_t launch_step(const StepParams& p, cudaStream_t stream) {
  if (p.store.batch == 0) return cudaSuccess;
  const StoreGrid grid(p.store);
  return queue_early(p.store.early, step_kernel, grid.ctas, grid.threads, 0, stream, p);
}

cudaError_t launch_put(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  Payload payload;
  std::memcpy(payload.bytes, from, bytes);
  return queue(put_kernel, dim3(1), kThreads, 0, stream, static_cast<unsigned char*>(to), static_cast<int>(bytes),
               payload);
}

cudaError_t launch_move_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t bytes, int lines, cudaStream_t stream) {
  return queue(move_lines_kernel, dim3(static_cast<unsigned>(lines)), kThreads, 0, stream,
               static_cast<unsigned char*>(to), to_pitch, static_cast<const unsigned char*>(from), from_pitch, bytes);
}

cudaError_t launch_convert(const ConvertJob& job, cudaStream_t stream) {
  const long long all = static_cast<long long>(job.heads) * job.rows * job.dim;
  if (all == 0) return cudaSuccess;
  return queue(convert_kernel, dim3(static_cast<unsigned>(std::min((all + kThreads - 1) / kThreads, 4096ll))), kThreads,
               0, stream, job);
}

}  // namespace kv4::cuda
