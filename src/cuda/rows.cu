// Storing, moving and converting exact rows: a few kilobytes a decode step, so what counts is the launch. One
// token of a sequence is one CTA, a warp for a row of one head and side: 512 bytes a head and token at d = 128, read
// and written once. H100, 8 KV heads, d = 128, in a graph of 32 such launches (bench/cuda/bench_cache.cpp): 2.1 us a
// layer at batch 1, 2.4 at 16.
#include "cuda/rows.h"

#include <algorithm>
#include <cstring>

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

// Row `token` of a sequence, of a head's keys (side 2 * head) or values (2 * head + 1). first: where row 0 of the call
// goes, behind row 0 of exact[1]. One warp.
__device__ __forceinline__ void store_row(const StoreParams& p, const SequenceView& sequence, std::int64_t first,
                                          long long token, int side) {
  const ExactRows& rows = sequence.exact[1];
  const int lane = threadIdx.x % kLanes, head = side / 2;
  const bool value = side % 2 != 0;
  const std::int64_t* stride = value ? p.v_stride : p.k_stride;
  const long long row = sequence.input_row + token;
  const auto* from = static_cast<const unsigned short*>(value ? p.v : p.k) + sequence.input * stride[0] +
                     head * stride[1] + row * stride[2];
  auto* to = p.skip != nullptr ? nullptr
                               : static_cast<unsigned short*>(const_cast<void*>(value ? rows.v : rows.k)) +
                                     row_offset(rows, !value, head, first + token);
  const uint32_t exponents = p.bf16 ? 0x7f80u : 0x7c00u;
  const bool wide = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 7) == 0 && p.dim % 4 == 0;
  const bool bad = wide ? copy_row<uint2>(from, to, p.dim, exponents, lane)
                        : copy_row<unsigned short>(from, to, p.dim, exponents, lane);
  if (bad && lane == 0 && p.skip != nullptr) p.skip[sequence.input * p.rows + row] = 1;
  if (bad && lane == 0 && sequence.note != nullptr)
    atomicMax(
        reinterpret_cast<long long*>(const_cast<std::int64_t*>(value ? &sequence.note->value : &sequence.note->key)),
        static_cast<long long>(rows.position + first + token + 1));
}

// The rows of one sequence, of which this CTA takes every gridDim.y-th.
__device__ __forceinline__ void store_rows(const StoreParams& p, const SequenceView& sequence, std::int64_t first) {
  const int warps = blockDim.x / kLanes, sides = 2 * p.heads;
  const long long items = sides * sequence.query_count;
  for (long long i = blockIdx.y * warps + threadIdx.x / kLanes; i < items;
       i += static_cast<long long>(gridDim.y) * warps)
    store_row(p, sequence, first, i / sides, static_cast<int>(i % sides));
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

// The last sequence that begins at or before `row` of the call, -1 if none does. One warp, 32 sequences a look.
__device__ __forceinline__ int sequence_of(const StoreParams& p, long long row, int lane) {
  int step = 1, b = 0;
  while (step * kLanes < p.batch) step *= kLanes;
  for (;; step /= kLanes) {
    const int i = b + lane * step;
    const unsigned begun = __ballot_sync(kAll, i < p.batch && p.sequences[i].input_row <= row);
    if (begun == 0) return -1;
    b += (31 - __clz(begun)) * step;
    if (step == 1) return b;
  }
}

// Rows of sequences that follow one another, however uneven: a warp takes some sides of one row.
constexpr int kSidesEach = 4;
__global__ void __launch_bounds__(kThreads) store_in_order_kernel(const __grid_constant__ StoreParams p) {
  wait_for_previous();
  let_next_begin();
  const int lane = threadIdx.x % kLanes, sides = 2 * p.heads, parts = (sides + kSidesEach - 1) / kSidesEach;
  const long long i = blockIdx.x * static_cast<long long>(kThreads / kLanes) + threadIdx.x / kLanes, row = i / parts;
  if (row >= p.rows) return;
  const int b = sequence_of(p, row, lane);
  if (b < 0) return;
  const SequenceView& sequence = p.sequences[b];
  const long long token = row - sequence.input_row;
  if (token >= sequence.query_count) return;
  const int begin = static_cast<int>(i % parts) * kSidesEach, end = min(begin + kSidesEach, sides);
  for (int side = begin; side < end; ++side) store_row(p, sequence, sequence.exact[1].count, token, side);
}

// Prefetches all that attention looks up first, ids of pages and of blocks. One warp.
__device__ __forceinline__ void prefetch_ids(const std::int32_t* ids, std::int64_t count, int lane) {
  for (std::int64_t i = lane * kIdsPerLine; i < count; i += kLanes * kIdsPerLine) prefetch_l2(ids + i);
}
__device__ __forceinline__ void prefetch_tables(const SequenceView& view, int lane) {
  prefetch_ids(view.pages, view.page_count, lane);
  for (const ExactRows& x : view.exact) prefetch_ids(x.blocks, (x.count + kPageTokens - 1) / kPageTokens, lane);
}

// The list of a range's jobs, by CTA `cta` of `ctas`, each of which sums over as many sequences at a time as it has
// threads and writes every ctas-th part of the list, a thread for each job.
constexpr int kMostThreads = 1024;
template <class Job>
__device__ __forceinline__ void list_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, Job* out,
                                          int cta, int ctas) {
  __shared__ int behind[kMostThreads];  // pages of the sequences at hand up to each one
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % kLanes;
  int used = 0;
  for (int first = 0; first < batch.size; first += threads) {
    int sum = first + thread < batch.size ? pages_of(range, first + thread) : 0;
    for (int step = 1; step < kLanes; step *= 2) {
      const int other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    behind[thread] = sum;
    __syncthreads();
    for (int w = kLanes - 1; w < thread - lane; w += kLanes) sum += behind[w];
    __syncthreads();
    behind[thread] = sum;
    __syncthreads();
    const int all = behind[threads - 1];
    for (int i = cta * threads + thread; i < all; i += ctas * threads) {
      int low = 0, high = threads - 1;  // the first with more than i behind it
      while (low < high) {
        const int middle = (low + high) / 2;
        if (behind[middle] > i) high = middle;
        else low = middle + 1;
      }
      out[used + i] = job_of<Job>(batch, dtype, range, first + low, low > 0 ? i - behind[low - 1] : i);
    }
    used += all;
    __syncthreads();
  }
  for (int i = used + cta * threads + thread; i < batch.size * range.most; i += ctas * threads) out[i].page = -1;
}

__global__ void step_kernel(const __grid_constant__ StepParams p) {
  wait_for_previous();
  let_next_begin();
  const int b = static_cast<int>(blockIdx.x) - (p.range.most > 0 ? 1 : 0);  // one more CTA lists the jobs
  if (b < 0) {
    if (blockIdx.y == 0) list_jobs(p.batch, p.dtype, p.range, p.jobs, 0, 1);
    return;
  }
  const SequenceView view = view_of(p.batch, b, true);
  if (blockIdx.y == 0) {
    if (threadIdx.x == 0) p.views[b] = view;
    if (threadIdx.x < kLanes) prefetch_tables(view, threadIdx.x);
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
__global__ void __launch_bounds__(kMostThreads) jobs_kernel(const __grid_constant__ PagedBatch batch, DType dtype,
                                                            const __grid_constant__ PageRange range, Job* out) {
  wait_for_previous();
  let_next_begin();
  list_jobs(batch, dtype, range, out, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
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
  const int ctas = std::min((batch.size * range.most + kMostThreads - 1) / kMostThreads, 64);
  return queue_early(early, jobs_kernel<Job>, dim3(static_cast<unsigned>(ctas)), kMostThreads, 0, stream, batch, dtype,
                     range, out);
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
  if (p.in_order && p.most > 1) {
    const long long warps = p.rows * ((2 * p.heads + kSidesEach - 1) / kSidesEach), each = kThreads / kLanes;
    return queue_early(p.early, store_in_order_kernel, dim3(static_cast<unsigned>((warps + each - 1) / each)), kThreads,
                       0, stream, p);
  }
  const StoreGrid grid(p);
  return queue_early(p.early, store_kernel, grid.ctas, grid.threads, 0, stream, p);
}
cudaError_t launch_step(const StepParams& p, cudaStream_t stream) {
  if (p.store.batch == 0) return cudaSuccess;
  StoreGrid grid(p.store);
  if (p.range.most > 0) ++grid.ctas.x;
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
