// The kernel that reads the cache. See attend.h for its place, layout.h for the order of codes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attend_exact.cuh"
#include "cuda/attend_items.cuh"
#include "cuda/attend_pages.cuh"
#include "cuda/attend_team_exact.cuh"
#include "cuda/attend_team_pages.cuh"

namespace kv4::cuda {

template <int D, Rows kRows, Room kRoom, Readers kKind, Codes kCodes>
__device__ __forceinline__ void attend_all(const AttendParams& p) {
  using S = Shape<D>;
  constexpr bool kTeamed = kKind != Readers::warps;
  constexpr int kBlocks = blocks_of(kRows), kReaders = fit<D>(kRoom, kBlocks, kKind).readers,
                kDepth = fit<D>(kRoom, kBlocks, kKind).depth;
  constexpr int kMembers = members_of(kKind), kWarps = kReaders * kMembers;
  constexpr int kQueueBytes = queue_bytes(kDepth, S::kSlotBytes), kStateRows = kBlocks * kBlockRows;
  using Slots = std::conditional_t<kTeamed, TeamQueue<kMembers, kDepth, S::kSlotBytes>,
                                   Queue<kDepth, S::kSlotBytes, S::kExactPitch>>;
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int segments = p.kv_heads * (p.blocks / kBlocks);  // at most, of a sequence
  const int reader = warp / kMembers, member = warp % kMembers;
  if (lane == 0 && warp < kWarps) {
    if constexpr (kTeamed) Slots::prepare(memory + reader * kQueueBytes, member);
    else Slots::prepare(memory + reader * kQueueBytes);
  }
  int* item_offsets = reinterpret_cast<int*>(memory + main_shared<D>(kKind, kReaders, kDepth, kBlocks));
  if (threadIdx.x == kWarps * kLanes) prefetch_chunks(p);
  if (warp == kWarps) sum_items(p, lane, item_offsets);  // computed here, so as not to wait for the previous kernel
  __syncthreads();
  const Shares shares(item_offsets[p.batch], p.readers);

  if (warp == kWarps) {
    if constexpr (kBulkCopies) {
      const int w = blockIdx.x * kReaders + lane;
      Cursor at;
      if (lane < kReaders && w < shares.readers) at.start(p, item_offsets, shares.first(w), shares.first(w + 1));
      PiecesOf<kMembers, kTeamed ? 2 : 1> pieces(p, at);
      Filler<kDepth, S::kSlotBytes, S::kExactPitch> filler(memory + min(lane, kReaders - 1) * kQueueBytes);
      // The first pages are looked up early, but not copied before wait_for_previous.
      fill_all(pieces, filler, lane, [] { wait_for_previous(); });
    }
    return;
  }

  const int w = blockIdx.x * kReaders + reader;
  if (w >= shares.readers) return wait_for_previous();  // keeps the next kernel behind the previous one
  Cursor here;
  here.start(p, item_offsets, shares.first(w), shares.first(w + 1));
  Slots queue(memory + reader * kQueueBytes, lane);
  Pieces pieces(p, here);  // used only where warps fill their own queues
  if constexpr (!kBulkCopies)
    for (int i = 0; i < kDepth; ++i) queue.fill(pieces);

  wait_for_previous();
  let_next_begin();
  while (here.flat < here.end) {
    const int run = here.run(), head = here.head();
    const bool packed = here.packed();
    const int block0 = (here.segment - head * here.per_head) * kBlocks;
    const int block = (here.b * p.kv_heads + head) * p.blocks + block0, row0 = block0 * kBlockRows;
    const uint4* operands = p.operands + static_cast<std::size_t>(block) * operand_words(D);
    const float* scales = p.row_scale + block * 2 * kBlockRows;
    const int slot = w + 2 * (here.b * segments + here.segment) + (packed ? 1 : 0);
    const auto rows = [&] {
      return p.group * static_cast<int>(p.sequences[here.b].query_count) - row0;
    };  // loaded after the run
    float* const to = p.states + static_cast<std::size_t>(slot) * (kStateRows * (D + 2));
    if constexpr (kTeamed) {
      TeamState<D, kMembers, kBlocks> state;
      state.clear();
      auto* exchanges = reinterpret_cast<TeamExchange<kMembers, kBlocks>*>(memory + kReaders * kQueueBytes);
      auto* copied = reinterpret_cast<uint4*>(exchanges + kReaders) + reader * kBlocks * page_operand_words(D);
      auto& exchange = exchanges[reader];
      if (packed) {
        for (int i = threadIdx.x % (kMembers * kLanes); i < kBlocks * page_operand_words(D); i += kMembers * kLanes)
          copied[i] = operands[i / page_operand_words(D) * operand_words(D) + i % page_operand_words(D)];
        meet_team<kMembers>(reader);
        team_pages<D, kRows, page_operand_words(D), kCodes>(p, queue, state, exchange, copied, scales, here, head, row0,
                                                            run, reader, member, lane);
      } else {
        team_exact<D>(p, queue, state, exchange, operands, here, head, row0, run, reader, member, lane);
      }
      state.template share_sums<kRows == Rows::four>(exchange, packed, member, lane);
      meet_team<kMembers>(reader);
      state.template put<kRows == Rows::four>(to, exchange, packed, rows(), member, lane);
    } else {
      const auto take = [&](auto state, auto read) {
        state.clear();
        read(state);
        state.template put<kStateRows, D>(to, rows(), lane);
      };
      if (packed)
        take(PageState<D, tiles_of(kRows)>(), [&](auto& state) {
          pages_run<D, kRows, kCodes>(p, queue, pieces, state, operands, scales, here, head, row0, run, lane);
        });
      else
        take(State<D, kBlocks>(), [&](auto& state) {
          exact_run<D, kBlocks>(p, queue, pieces, state, here, head, operands, row0, run, lane);
        });
    }
    here.skip(p, run);
  }
}

// Empty where no device that runs this code has as much shared memory: each architecture compiles only what it can run.
template <int D, Rows kRows, Room kRoom, Readers kKind, Codes kCodes>
__global__ void __launch_bounds__(main_warps<D>(kRoom, blocks_of(kRows), kKind) * kLanes, 1)
    attend_main(const __grid_constant__ AttendParams p) {
#ifdef __CUDA_ARCH__
  if constexpr (runs_in(kRoom, __CUDA_ARCH__ / 10)) attend_all<D, kRows, kRoom, kKind, kCodes>(p);
#endif
}

}  // namespace kv4::cuda
