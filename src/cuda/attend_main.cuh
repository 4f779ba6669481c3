// The kernel that reads the cache. See attend.h for its place, layout.h for the order of codes.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/attend.h"
#include "cuda/attend_line.cuh"
#include "cuda/attend_mask.cuh"
#include "cuda/attend_tuning.h"
#include "cuda/attend_turn.cuh"
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

#include "cuda/attend_exact.cuh"
#include "cuda/attend_pages.cuh"
#include "cuda/attend_team.cuh"

namespace kv4::cuda {

template <int D, Rows kRows, Room kRoom, Readers kKind>
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
  int* line = reinterpret_cast<int*>(memory + main_shared<D>(kKind, kReaders, kDepth, kBlocks));
  if (threadIdx.x == kWarps * kLanes) expect_pages(p);
  if (warp == kWarps) lay_line(p, lane, line);  // not from the kernel before: fetching begins without it
  __syncthreads();
  const Shares shares(line[p.batch], p.readers);

  if (warp == kWarps) {
    if constexpr (kBulkCopies) {
      const int w = blockIdx.x * kReaders + lane;
      Cursor at;
      if (lane < kReaders && w < shares.readers) at.start(p, line, shares.first(w), shares.first(w + 1));
      PiecesOf<kMembers, kTeamed ? 2 : 1> pieces(p, at);
      Filler<kDepth, S::kSlotBytes, S::kExactPitch> filler(memory + min(lane, kReaders - 1) * kQueueBytes);
      fill_all(pieces, filler, lane, [] {});
    }
    return;
  }

  const int w = blockIdx.x * kReaders + reader;
  if (w >= shares.readers) return wait_for_previous();  // what runs behind this kernel runs behind that before it
  Cursor here;
  here.start(p, line, shares.first(w), shares.first(w + 1));
  Slots queue(memory + reader * kQueueBytes, lane);
  Pieces pieces(p, here);  // used, and then not kept up, only where warps fill their own queues
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
    };  // looked up behind the run
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
        team_pages<D, kRows, page_operand_words(D)>(p, queue, state, exchange, copied, scales, here, head, row0, run,
                                                    reader, member, lane);
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
          pages_run<D, kRows>(p, queue, pieces, state, operands, scales, here, head, row0, run, lane);
        });
      else
        take(State<D, kBlocks>(), [&](auto& state) {
          exact_run<D, kBlocks>(p, queue, pieces, state, here, head, operands, row0, run, lane);
        });
    }
    here.skip(p, run);
  }
}

// Empty where no device that runs this code has such room, so that each architecture compiles what it may run.
template <int D, Rows kRows, Room kRoom, Readers kKind>
__global__ void __launch_bounds__(main_warps<D>(kRoom, blocks_of(kRows), kKind) * kLanes, 1)
    attend_main(const __grid_constant__ AttendParams p) {
#ifdef __CUDA_ARCH__
  if constexpr (runs_in(kRoom, __CUDA_ARCH__ / 10)) attend_all<D, kRows, kRoom, kKind>(p);
#endif
}

}  // namespace kv4::cuda
