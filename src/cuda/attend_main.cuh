// The kernel that reads the cache. See attend.h for its place, layout.h for the order of codes.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/attend.h"
#include "cuda/attend_line.cuh"
#include "cuda/attend_mask.cuh"
#include "cuda/device.cuh"

namespace kv4::cuda {

template <int D>
struct Shape {
  static constexpr int kTiles = operand_bytes_tiles(D);         // of 32 key channels
  static constexpr int kKeyCodeBytes = kPageTokens * pad_channels(D) / 2;
  static constexpr int kExactPitch = D * 2 + 16;                // keeps ldmatrix free of bank conflicts
  static constexpr int kMeanAt = kKeyCodeBytes + kPageTokens * 2;     // in a slot of keys
  static constexpr int kPackedBytes = kMeanAt + D * 2;
  static constexpr bool kKept = D <= 128;                       // whether a warp keeps the operands of its queries
  static constexpr int kMeanOperands = kKept ? operand_mean_steps(D) * kLanes : 0;  // uint4 of a block
  static constexpr int kExactBytes = kExactTokens * kExactPitch;
  static constexpr int kSlotBytes = ((kPackedBytes > kExactBytes ? kPackedBytes : kExactBytes) + 127) / 128 * 128;
};

// How the query rows of a segment lie in the products' 8 rows. At most 4 rows are laid twice, so that no lane's work on
// scores is for nothing: rows 0 ... 3 take the even groups of 8 tokens, rows 4 ... 7 are the same queries and take the
// odd ones, and the two partial states are added at the end.
enum class Rows { four, eight, sixteen };
constexpr int blocks_of(Rows rows) { return rows == Rows::sixteen ? 2 : 1; }

template <int D, int kBlocks>
struct State {
  float o[kBlocks][D / 8][2];
  float m[kBlocks], l[kBlocks];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      m[r] = -INFINITY;
      l[r] = 0;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) o[r][i][0] = o[r][i][1] = 0;
    }
  }
  // Raises the maximum of block r to at least `largest`, which all lanes of a row share; returns what to subtract.
  __device__ __forceinline__ float raise(int r, float largest) {
    const float m_new = fmaxf(m[r], largest);
    if (__any_sync(kAll, m_new > m[r])) {
      const float shrink = m_new == -INFINITY ? 1.0f : exp2_fast(m[r] - m_new);
      l[r] *= shrink;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        o[r][i][0] *= shrink;
        o[r][i][1] *= shrink;
      }
      m[r] = m_new;
    }
    return m_new == -INFINITY ? 0.0f : m_new;
  }
};

}  // namespace kv4::cuda

#include "cuda/attend_exact.cuh"
#include "cuda/attend_pages.cuh"

namespace kv4::cuda {

// Shared memory of a CTA but for the line: queues, then each warp's operands of the means.
constexpr int main_shared(int warps, int queue_bytes, int operand_bytes) { return warps * (queue_bytes + operand_bytes); }

template <int D, Rows kRows, int kWarps, int kDepth>
__global__ void __launch_bounds__((kWarps + 1) * kLanes, 1) attend_main(const __grid_constant__ AttendParams p) {
  using S = Shape<D>;
  using Slots = Queue<kDepth, S::kSlotBytes, S::kExactPitch>;
  constexpr int kBlocks = blocks_of(kRows);
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / kLanes;
  const int segments_per_head = p.blocks / kBlocks, segments = p.kv_heads * segments_per_head;
  if (threadIdx.x < kWarps) Slots::prepare(memory + threadIdx.x * Slots::kBytes);
  auto* mean_operands = reinterpret_cast<uint4*>(memory + kWarps * Slots::kBytes) + warp * kBlocks * S::kMeanOperands;
  int* line = reinterpret_cast<int*>(memory + main_shared(kWarps, Slots::kBytes, kBlocks * S::kMeanOperands * 16));
  if (warp == kWarps) lay_line(p, lane, line);  // not from the kernel before: fetching begins without it
  __syncthreads();
  const Shares shares(line[p.batch], p.warps);

  if (warp == kWarps) {
    if constexpr (Slots::kBulk) {
      const int w = blockIdx.x * kWarps + lane;
      Cursor at;
      if (lane < kWarps && w < shares.warps) at.start(p, line, shares.first(w), shares.first(w + 1));
      Pieces pieces(p, at, segments_per_head);
      Filler<kDepth, S::kSlotBytes, S::kExactPitch> filler(memory + min(lane, kWarps - 1) * Slots::kBytes);
      while (__any_sync(kAll, !pieces.done())) {
        const bool mine = !pieces.done() && filler.ready();
        const Piece piece = mine ? pieces.piece() : Piece();
        filler.put(mine, piece, lane);
        if (mine) pieces.next();
      }
    }
    return;
  }

  const int w = blockIdx.x * kWarps + warp;
  if (w >= shares.warps) return;
  Cursor here;
  here.start(p, line, shares.first(w), shares.first(w + 1));
  Slots queue(memory + warp * Slots::kBytes, lane);
  Pieces pieces(p, here, segments_per_head);  // used, and then not kept up, only where warps fill their own queues
  if constexpr (!Slots::kBulk)
    for (int i = 0; i < kDepth; ++i) queue.fill(pieces);

  wait_for_previous();
  let_next_begin();
  State<D, kBlocks> state;
  while (here.flat < here.end) {
    const int run = here.run(), head = here.segment / segments_per_head;
    const bool packed = here.packed();
    const int block0 = here.segment % segments_per_head * kBlocks;
    const int block = (here.b * p.kv_heads + head) * p.blocks + block0, row0 = block0 * kBlockRows;
    state.clear();
    if (packed) pages_run<D, kRows>(p, queue, pieces, state, mean_operands, here, head, block, row0, run, lane);
    else exact_run<D, kBlocks>(p, queue, pieces, state, here, head, block, row0, run, lane);

    const int slot = w + 2 * (here.b * segments + here.segment) + (packed ? 1 : 0);
    float* out = p.states + static_cast<std::size_t>(slot) * (kBlocks * kBlockRows) * (D + 2);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float l = quad_sum(state.l[r]);
      if (kRows == Rows::four && packed) {
        l += __shfl_xor_sync(kAll, l, 16);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) state.o[r][n][e] += __shfl_xor_sync(kAll, state.o[r][n][e], 16);
      }
      const int row = r * kBlockRows + g;
      if (row0 + row >= p.group * p.queries) continue;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(out + row * D + n * 8 + 2 * t) = {state.o[r][n][0], state.o[r][n][1]};
      if (t == 0) {
        out[kBlocks * kBlockRows * D + row] = state.m[r];
        out[kBlocks * kBlockRows * (D + 1) + row] = l;
      }
    }
    here.skip(p, run, segments);
  }
}

}  // namespace kv4::cuda
