// Attention in one kernel, for calls with no more segments than the device has multiprocessors (attend.cpp decides).
// Each segment, the row blocks of one sequence and KV head, gets the same number of CTAs, which divide its items. A CTA
// rotates the segment's queries while the first pages are being copied and merges its readers' partial states in shared
// memory. The last CTA of a segment to finish merges those of all, rotates the part over pages back and writes.
//
// Compared with prepare, main and merge this saves two launches, the waits between them and most of the partial states
// in device memory. Every CTA reads both rotations' matrices, 4 D^2 bytes each from L2 (64 KB at d = 128, 1.3 us at 13
// bytes a cycle and multiprocessor with all of them reading), which is why calls of more segments keep the three
// kernels. Versions and times: docs/notes/cuda.md.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attend_fused_join.cuh"
#include "cuda/attend_fused_queries.cuh"
#include "cuda/attend_main.cuh"

namespace kv4::cuda {

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_fill(const AttendParams& p, const SharesOf<D, kSegmentRows, kReaders>& shares,
                                           FusedEnd* end, int lane) {
  using S = Shape<D>;
  using F = FusedShape<D, kSegmentRows, kReaders>;
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
  Cursor from;
  if (lane < F::kCount) from.start_within(p, at.b, at.head, at.part, shares.of(blockIdx.x, lane));
  PiecesOf<F::kMembers, kReaders == Readers::warps ? 1 : 2, true> pieces(p, from, at.head);
  Filler<F::kDepth, S::kSlotBytes, S::kExactPitch> filler(memory + min(lane, F::kCount - 1) * F::kQueueBytes);
  fill_all(pieces, filler, lane, [] { F::wait_made(); });
  if (lane == 0) *end = fused_end(shares, blockIdx.x);
  F::filled();
}

template <int D, Rows kSegmentRows, Readers kReaders, Codes kCodes>
__device__ __forceinline__ void fused_read(
    const AttendParams& p, const SharesOf<D, kSegmentRows, kReaders>& shares, QueryRow<D>& first,
    RotationTiles<D, FusedShape<D, kSegmentRows, kReaders>::kAheadFirst>& columns, int warp, int lane) {
  using S = Shape<D>;
  using F = FusedShape<D, kSegmentRows, kReaders>;
  constexpr bool kTeamed = kReaders != Readers::warps;
  __shared__ float scales[F::kBlocks * 2 * kBlockRows];
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
  rotate_queries<D, kSegmentRows, kReaders>(p, at.b, at.head, at.row0, first, columns, at.operands, scales, at.y,
                                            at.fragments, warp, lane);
  const int reader = warp / F::kMembers, member = warp % F::kMembers;
  const ItemRange range = shares.of(blockIdx.x, reader);
  unsigned char* const mine = memory + reader * F::kQueueBytes;
  std::conditional_t<kTeamed, TeamQueue<F::kMembers, F::kDepth, S::kSlotBytes>,
                     Queue<F::kDepth, S::kSlotBytes, S::kExactPitch>>
      queue(mine, lane);
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const bool packed = kind != 0;
    const int run = packed ? range.page_count : range.exact_count;
    if (run == 0) continue;
    Cursor here;
    here.start_within(p, at.b, at.head, at.part, {range.exact, packed ? 0 : run, range.page, packed ? run : 0});
    float* const to = packed || range.page_count == 0 ? reinterpret_cast<float*>(mine)
                                                      : at.carried;  // at most one reader has both kinds
    if constexpr (kTeamed) {
      TeamState<D, F::kMembers, F::kBlocks> state;
      state.clear();
      auto& exchange = at.exchanges[reader];
      if (packed)
        team_pages<D, kSegmentRows, operand_words(D), kCodes>(p, queue, state, exchange, at.operands, scales, here,
                                                              at.head, at.row0, run, reader, member, lane);
      else team_exact<D>(p, queue, state, exchange, at.operands, here, at.head, at.row0, run, reader, member, lane);
      state.template share_sums<kSegmentRows == Rows::four>(exchange, packed, member, lane);
      meet_team<F::kMembers>(reader);  // no warp reads the queue any more
      state.template put<kSegmentRows == Rows::four, F::kPitch>(to, exchange, packed, at.rows(p), member, lane);
    } else {
      Pieces none(p, Cursor());
      const auto take = [&](auto state, auto read) {
        state.clear();
        read(state);
        state.template put<F::kRows, F::kPitch>(to, at.rows(p), lane);
      };
      if (packed)
        take(PageState<D, tiles_of(kSegmentRows)>(), [&](auto& state) {
          pages_run<D, kSegmentRows, kCodes>(p, queue, none, state, at.operands, scales, here, at.head, at.row0, run,
                                             lane);
        });
      else
        take(State<D, F::kBlocks>(), [&](auto& state) {
          exact_run<D, F::kBlocks>(p, queue, none, state, here, at.head, at.operands, at.row0, run, lane);
        });
    }
  }
}

template <int D, Rows kSegmentRows, Readers kReaders, Codes kCodes>
__device__ __forceinline__ void fused_all(const AttendParams& p) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  __shared__ FusedEnd end;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  {
    RotationTiles<D, F::kAheadFirst> columns;
    QueryRow<D> first;
    // What needs no earlier kernel's result: initialise the queues, prefetch the rotation's first tiles.
    if (lane == 0 && warp < F::kWarps) {
      unsigned char* const queue = memory + warp / F::kMembers * F::kQueueBytes;
      if constexpr (kReaders != Readers::warps)
        TeamQueue<F::kMembers, F::kDepth, Shape<D>::kSlotBytes>::prepare(queue, warp % F::kMembers);
      else Queue<F::kDepth, Shape<D>::kSlotBytes, Shape<D>::kExactPitch>::prepare(queue);
    }
    if (warp < F::kWarps) {
      __syncwarp();
      F::made();
      if (p.dual.words != nullptr) columns.prefetch(p.dual, warp, F::kWarps, lane);
    }
    wait_for_previous();
    let_next_begin();
    // Loads that everything else waits for come first.
    const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
    const SequenceView& s = p.sequences[at.b];
    const auto sinks = s.exact[0].count, window = s.exact[1].count;
    const int pages = s.page_count;
    const float* const lambda = s.lambda_k;
    if (warp == F::kWarps) prefetch_tables(p, s, lane);
    if (warp < F::kWarps) {
      first.load(p, s, at.head, at.row0 + warp, lane);
      first.load_lambda(lambda, at.head, lane);
    }
    const auto items = [](long long rows) { return static_cast<int>((rows + kExactTokens - 1) / kExactTokens); };
    const SharesOf<D, kSegmentRows, kReaders> shares(items(sinks) + items(window), pages);
    if (blockIdx.x >= shares.ctas || at.rows(p) <= 0) return;
    if (warp == F::kWarps) return fused_fill<D, kSegmentRows, kReaders>(p, shares, &end, lane);
    fused_read<D, kSegmentRows, kReaders, kCodes>(p, shares, first, columns, warp, lane);
  }
  fused_finish<D, kSegmentRows, kReaders>(p, &end);
}

// For the large shared memory only, where a separate warp fills the queues. Empty in code for devices before 9.0.
template <int D, Rows kSegmentRows, Readers kReaders, Codes kCodes>
__global__ void __launch_bounds__(FusedShape<D, kSegmentRows, kReaders>::kAllWarps* kLanes, 1)
    attend_fused(const __grid_constant__ AttendParams p) {
#ifdef __CUDA_ARCH__
  if constexpr (runs_in(Room::large, __CUDA_ARCH__ / 10)) fused_all<D, kSegmentRows, kReaders, kCodes>(p);
#endif
}

}  // namespace kv4::cuda
