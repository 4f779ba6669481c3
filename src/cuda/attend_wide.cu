// Attention of many query rows a KV head over sealed pages, as a chunk of a prefill has them, or many drafted tokens:
// tiles of 128 rows, of which a CTA reads its part of the sequence's pages. On compute capability 9.0, compiled as
// sm_90a.
//
// Two groups of four warps turn codes into operands (attend_wide_operands.cuh), one those of keys, one those of values:
// a level is a 16-bit float below the normal ones, its magnitude in the lowest bits, so that an element costs 1.4
// instructions and no arithmetic; the factor 2^24 goes into the scales. Channels and tokens lie in the order in which
// the codes do: products do not mind. Two more groups have 64 rows each (attend_wide_rows.cuh): their products with
// keys run while the weights of the page before are multiplied with its values.
//
// A value's scale becomes part of the weight: the running maximum is of scores plus log2 of the scale, weights fill 16
// bits whatever the scales are, and the weights' sum divides them again.
//
// Means: q'.m' for the means of eight pages at once, one product with the queries' first halves, one with their second.
//
// Count for d = 128, a page and a tile (16,384 codes, 2 x 1,048,576 multiply-adds):
//   products        1,024 cycles of the matrix unit
//   instructions    8 x 330 of rows, 8 x 230 of operands: 1,120 of each scheduler
//   exponentials    8,704: 544 cycles
//   shared memory   1,020 wavefronts, half of them the products'
//   measured        2,440 cycles. What binds is how long a group of rows takes from one page to the next, some 2,000
//                   where it is alone: docs/notes/cuda.md has where they go, and the versions
#include "cuda/attend_wide.h"

#include <cmath>
#include <cstdint>

#include "cuda/attend_items.cuh"
#include "cuda/attend_wide_operands.cuh"
#include "cuda/attend_wide_rows.cuh"
#include "cuda/launch.cuh"

namespace kv4::cuda {
namespace {

template <int D>
__global__ void __launch_bounds__(kWideThreads, 1) attend_wide(const __grid_constant__ AttendParams p) {
  using S = WideShape<D>;
  extern __shared__ __align__(1024) unsigned char wide_memory[];
  __shared__ float tops[kGroupThreads / kLanes];
  wait_for_previous();
  let_next_begin();
  const int head = static_cast<int>(blockIdx.y) / p.wide_splits, split = static_cast<int>(blockIdx.y) % p.wide_splits,
            b = static_cast<int>(blockIdx.z), row0 = static_cast<int>(blockIdx.x) * kWideRows;
  const SequenceView& s = p.sequences[b];
  const int rows = p.group * static_cast<int>(s.query_count);  // of the head
  if (row0 >= rows || s.page_count == 0 || !is_wide(p, s)) return;
  const int its_rows = min(kWideRows, rows - row0), groups = its_rows > kGroupRows ? 2 : 1;
  const WideRange range(p, s, b, head, row0, its_rows, split);

  unsigned char* memory = wide_memory + (1024 - shared_address(wide_memory) % 1024) % 1024;
  const WideBarriers barriers{shared_address(memory) + S::kBarriersAt};
  const int block0 = (b * p.kv_heads + head) * p.blocks;
  if (threadIdx.x < kGroupThreads) {
    const int row = row0 + static_cast<int>(threadIdx.x);
    const float top = row < rows ? p.row_scale[static_cast<std::size_t>(block0 + row / kBlockRows) * 2 * kBlockRows +
                                               kBlockRows + row % kBlockRows]
                                 : 0.0f;
    // A row with infinity is NaN, and is no measure of the others.
    const float largest = warp_max(fabsf(top) < INFINITY ? fabsf(top) : 0.0f);
    if (threadIdx.x % kLanes == 0) tops[threadIdx.x / kLanes] = largest;
  } else if (threadIdx.x == kGroupThreads) {
    barriers.prepare(groups);
  }
  __syncthreads();
  // Queries as products take them: the largest of the tile's is in [2^13, 2^14).
  const float top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
  const uint32_t exponent = top > 0 ? min(max(__float_as_uint(top) >> 23, 20u), 250u) : 127;
  const float unit = __uint_as_float((exponent - 13) << 23), to_units = __uint_as_float((254 - exponent + 13) << 23);

  const int group = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group >= kRowGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (range.count == 0) return;
    const std::uint32_t slice = static_cast<std::uint32_t>(head) * p.pages.head_stride;
    if (group == kRowGroups) {
      WideKeys<D> keys(p, s, memory);
      if (p.even_levels) keys.template run<true>(range, barriers, slice, unit * 0x1p24f);
      else keys.template run<false>(range, barriers, slice, unit * 0x1p24f);
    } else {
      if (p.even_levels) WideValues<D>::template run<true>(p, range, s.pages, memory, barriers, slice);
      else WideValues<D>::template run<false>(p, range, s.pages, memory, barriers, slice);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
  if (group >= groups) return;
  WideRows<D> of(p, memory, barriers);
  const int first_row = row0 + group * kGroupRows + static_cast<int>(threadIdx.x) % kGroupThreads / kLanes * 16 + of.g;
  if (range.count > 0) {
    unsigned char* rest = memory + S::kRestAt + group * S::kHalves * S::kRestHalf;
    of.load(block0, row0 + group * kGroupRows, rows, to_units, rest);
    fence_shared_writes();
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
    of.run(range, Sight(p, b, head), s, first_row, unit, shared_address(rest));
  }
  const int segment_rows = p.segment_blocks * kBlockRows, segments = p.kv_heads * (p.blocks / p.segment_blocks);
  const int before = b * segments + head * segments_per_head(p, s);
  of.put(first_row, rows, segment_rows, [&](int segment) {
    return p.states + (p.wide_slot + static_cast<std::size_t>(before + segment) * p.wide_splits + split) *
                          (segment_rows * (D + 2));
  });
}

template <int D>
cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  static SharedMost most;
  if (const cudaError_t e = most.allow(attend_wide<D>, WideShape<D>::kShared); e != cudaSuccess) return e;
  const int tiles = (p.group * p.queries + kWideRows - 1) / kWideRows;
  return queue_early(true, attend_wide<D>,
                     dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.kv_heads * p.wide_splits),
                          static_cast<unsigned>(p.batch)),
                     kWideThreads, WideShape<D>::kShared, stream, p);
}

}  // namespace

cudaError_t launch_wide(const AttendParams& p, cudaStream_t stream) {
  switch (p.dim) {
    case 64: return launch<64>(p, stream);
    case 80: return launch<80>(p, stream);
    case 96: return launch<96>(p, stream);
    case 128: return launch<128>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace kv4::cuda
