// 16 exact rows: scores and weights by 16-bit matrix products, queries and weights in two halves of their precision.
#pragma once

#include "cuda/attend_items.cuh"
#include "cuda/attend_mask.cuh"
#include "cuda/attend_state.cuh"

namespace kv4::cuda {

// An exact item's keys or values that could not be copied 16 bytes at a time: by the warp itself.
__device__ __noinline__ inline void copy_unaligned(const AttendParams& p, int b, int set, int first, int rows, int head,
                                                   int half, unsigned char* slot, int pitch, int lane) {
  const Piece piece = exact_piece(p, b, set, first, rows, head, half);
  const int width = static_cast<int>(piece.bytes / 2);
#pragma unroll 8
  for (int i = lane; i < piece.rows * width; i += kLanes)
    *reinterpret_cast<uint16_t*>(slot + i / width * pitch + i % width * 2) =
        *reinterpret_cast<const uint16_t*>(piece.from + i / width * piece.pitch + i % width * 2);
  fence_shared_writes();
  __syncwarp();
}

template <int D, int kBlocks, class Slots, class StateT>
__device__ __forceinline__ void exact_item(const AttendParams& p, Slots& queue, Pieces& pieces, StateT& state,
                                           const uint4 (&kept)[kBlocks][Shape<D>::kKept ? D / 16 : 1],
                                           const uint4* operands, const Cursor& at, int head, int row0, longlong2 seen,
                                           int lane) {
  constexpr int kPitch = Shape<D>::kExactPitch;
  const int g = lane / 4, t = lane % 4;
  const int matrix = lane / 8, matrix_row = lane % 8;
  int rows;
  long long position;
  float c[kBlocks][2][4] = {};
  {
    const ExactItem item(p, at);
    rows = item.rows;
    position = item.position;
    const bool aligned = exact_aligned(p.sequences[at.b].exact[item.set], 0);
    unsigned char* slot = queue.wait();
    if (!aligned) copy_unaligned(p, at.b, item.set, item.first, rows, head, 0, slot, kPitch, lane);
    const uint32_t base = shared_address(slot);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint4 x =
          load_matrices<false>(base + (matrix / 2 * 8 + matrix_row) * kPitch + (k * 16 + matrix % 2 * 8) * 2);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        const uint4 q = Shape<D>::kKept ? kept[r][Shape<D>::kKept ? k : 0]
                                        : operands[r * operand_words(D) + k * kLanes];
        mma_halves(p.bf16, c[r][0], q, x.x, x.y);
        mma_halves(p.bf16, c[r][1], q, x.z, x.w);
      }
    }
  }
  queue.release(pieces);
  uint4 weights[kBlocks];
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) {
    float score[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[i] = (c[r][i / 2][i % 2] + c[r][i / 2][i % 2 + 2]) * p.factor;
      if (p.cap > 0) score[i] = soft_cap(p.cap, score[i]);
    }
    if (rows < kExactTokens || position < seen.x || position + kExactTokens - 1 > seen.y)
      hide<4, false>(p, at.b, head, row0 + r * kBlockRows + g, position, 0, rows, score,
                     [t](int i) { return i / 2 * 8 + 2 * t + i % 2; });
    const float m = state.raise(r, quad_max(fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]))));
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = exp2_fast(score[i] - m);
      state.l[r] += weight[i];
    }
    weights[r] = two_halves(p.bf16, weight[0], weight[1], weight[2], weight[3]);
  }
  const ExactItem item(p, at);  // recomputed, to save registers
  const bool aligned = exact_aligned(p.sequences[at.b].exact[item.set], 1);
  unsigned char* slot = queue.wait();
  if (!aligned) copy_unaligned(p, at.b, item.set, item.first, rows, head, 1, slot, kPitch, lane);
  const uint32_t base = shared_address(slot);
  if (rows < kExactTokens) {  // memory past the rows may hold NaN; its weight is 0, but 0 times NaN is NaN
    for (int i = lane; i < (kExactTokens - rows) * (D / 8); i += kLanes)
      *reinterpret_cast<uint4*>(slot + (rows + i / (D / 8)) * kPitch + i % (D / 8) * 16) = {};
    fence_shared_writes();
    __syncwarp();
  }
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const uint4 x = load_matrices<true>(base + (matrix % 2 * 8 + matrix_row) * kPitch + (k * 16 + matrix / 2 * 8) * 2);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float(&o)[2] = state.o[r][2 * k + n];
        float sum[4] = {o[0], o[1], 0, 0};
        mma_halves(p.bf16, sum, weights[r], n == 0 ? x.x : x.z, n == 0 ? x.y : x.w);
        o[0] = sum[0] + sum[2];
        o[1] = sum[1] + sum[3];
      }
    }
  }
  queue.release(pieces);
}

// A run of exact items of one segment; `operands`: of its first block.
template <int D, int kBlocks, class Slots, class StateT>
__device__ __forceinline__ void exact_run(const AttendParams& p, Slots& queue, Pieces& pieces, StateT& state,
                                          const Cursor& here, int head, const uint4* operands, int row0, int run,
                                          int lane) {
  operands += (operand_bytes_tiles(D) + operand_mean_steps(D)) * kLanes + lane;
  constexpr int kSteps = Shape<D>::kKept ? D / 16 : 0;
  uint4 q[kBlocks][kSteps > 0 ? kSteps : 1];
#pragma unroll
  for (int r = 0; r < kBlocks; ++r)
#pragma unroll
    for (int k = 0; k < kSteps; ++k) q[r][k] = operands[r * operand_words(D) + k * kLanes];
  // Positions that every row is known to see: none under a general mask.
  longlong2 seen = {0, -1};
  if (p.mask.kind == Mask::General::none) {
    const Sight sight(p, here.b, head);
    seen = {sight.first_of_all(p), sight.last_of_all(p)};
  }
  Cursor at = here;
  for (int i = 0; i < run; ++i, ++at.item)
    exact_item<D, kBlocks>(p, queue, pieces, state, q, operands, at, head, row0, seen, lane);
}

}  // namespace kv4::cuda
