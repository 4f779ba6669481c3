// A run of exact items read by a team: one warp computes the scores of an item, weights are exchanged, and each warp
// sums the values of its channels.
#pragma once

#include "cuda/attend_exact.cuh"
#include "cuda/attend_team.cuh"

namespace kv4::cuda {

// Scores of one item, by one warp; returns its rows. Rows of a matrix of 8 x 8 are a lane's own: `slot` lies as rows
// do.
template <int D, int kBlocks>
__device__ __forceinline__ int team_exact_scores(const AttendParams& p, unsigned char* slot, const uint4* operands,
                                                 const Cursor& at, int head, int row0, longlong2 seen,
                                                 float (&score)[kBlocks][4], int lane) {
  constexpr int kPitch = Shape<D>::kExactPitch;
  const int g = lane / 4, t = lane % 4, matrix = lane / 8, matrix_row = lane % 8;
  const ExactItem item(p, at);
  const int rows = item.rows;
  const long long position = item.position;
  if (!exact_aligned(p.sequences[at.b].exact[item.set], 0))
    copy_unaligned(p, at.b, item.set, item.first, rows, head, 0, slot, kPitch, lane);
  const uint32_t base = shared_address(slot);
  float c[kBlocks][2][4] = {};
#pragma unroll 4
  for (int k = 0; k < D / 16; ++k) {
    const uint4 x = load_matrices<false>(base + (matrix / 2 * 8 + matrix_row) * kPitch + (k * 16 + matrix % 2 * 8) * 2);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      const uint4 q = operands[r * operand_words(D) + k * kLanes];
      mma_halves(p.bf16, c[r][0], q, x.x, x.y);
      mma_halves(p.bf16, c[r][1], q, x.z, x.w);
    }
  }
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      score[r][n] = (c[r][n / 2][n % 2] + c[r][n / 2][n % 2 + 2]) * p.factor;
      if (p.cap > 0) score[r][n] = soft_cap(p.cap, score[r][n]);
    }
    if (rows < kExactTokens || position < seen.x || position + kExactTokens - 1 > seen.y)
      hide<4, true>(p, at.b, head, row0 + r * kBlockRows + g, position, 0, rows, score[r],
                    [t](int n) { return n / 2 * 8 + 2 * t + n % 2; });
  }
  return rows;
}

// Values of item n of those read together, of this warp's channels.
template <int D, int kMembers, int kBlocks>
__device__ __forceinline__ void team_exact_values(const AttendParams& p, const unsigned char* slot, int n,
                                                  const TeamExchange<kMembers, kBlocks>& exchange,
                                                  TeamState<D, kMembers, kBlocks>& state, int member, int lane) {
  constexpr int kPitch = Shape<D>::kExactPitch;
  const int matrix = lane / 8, matrix_row = lane % 8;
  const uint32_t base = shared_address(slot);
  uint4 weights[kBlocks];
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) weights[r] = exchange.weights[(n * kBlocks + r) * kLanes + lane];
#pragma unroll
  for (int j = 0; j < TeamState<D, kMembers, kBlocks>::kPairs; ++j) {
    const int pair = j * kMembers + member;
    if (D / 16 % kMembers != 0 && pair >= D / 16) break;
    const uint4 x =
        load_matrices<true>(base + (matrix % 2 * 8 + matrix_row) * kPitch + (pair * 16 + matrix / 2 * 8) * 2);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum[4] = {};
        mma_halves(p.bf16, sum, weights[r], h == 0 ? x.x : x.z, h == 0 ? x.y : x.w);
        state.o[r][2 * j + h][0] += sum[0] + sum[2];
        state.o[r][2 * j + h][1] += sum[1] + sum[3];
      }
  }
}

// As many items at a time as the team has warps; `operands`: of the segment.
template <int D, int kMembers, int kBlocks, class Slots>
__device__ __forceinline__ void team_exact(const AttendParams& p, Slots& queue, TeamState<D, kMembers, kBlocks>& state,
                                           TeamExchange<kMembers, kBlocks>& exchange, const uint4* operands,
                                           const Cursor& here, int head, int row0, int run, int team, int member,
                                           int lane) {
  constexpr int kPitch = Shape<D>::kExactPitch;
  const int g = lane / 4, t = lane % 4;
  operands += (operand_bytes_tiles(D) + operand_mean_steps(D)) * kLanes + lane;
  longlong2 seen = {0, -1};
  if (p.mask.kind == Mask::General::none) {
    const Sight sight(p, here.b, head);
    seen = {sight.first_of_all(p), sight.last_of_all(p)};
  }
#pragma unroll 1
  for (int i = 0; i < run; i += kMembers) {
    const int count = min(kMembers, run - i);
    const bool mine = member < count;
    Cursor at = here;
    at.item += i + member;
    int rows = 0;
    float score[kBlocks][4];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r)
#pragma unroll
      for (int n = 0; n < 4; ++n) score[r][n] = -INFINITY;
    if (mine) rows = team_exact_scores<D>(p, queue.wait(member), operands, at, head, row0, seen, score, lane);
    queue.pop(count);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      const float top = quad_max(fmaxf(fmaxf(score[r][0], score[r][1]), fmaxf(score[r][2], score[r][3])));
      if (t == 0) exchange.largest[member][r * kBlockRows + g].x = top;
    }
    meet_team<kMembers>(team);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float top = exchange.largest[0][r * kBlockRows + g].x;
#pragma unroll
      for (int w = 1; w < kMembers; ++w) top = fmaxf(top, exchange.largest[w][r * kBlockRows + g].x);
      const float m = state.raise(r, top);
      float weight[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        weight[n] = exp2_fast(score[r][n] - m);
        state.l[r] += weight[n];
      }
      exchange.weights[(member * kBlocks + r) * kLanes + lane] =
          two_halves(p.bf16, weight[0], weight[1], weight[2], weight[3]);
    }
    if (mine) {
      const ExactItem item(p, at);
      const bool aligned = exact_aligned(p.sequences[at.b].exact[item.set], 1);
      if (!aligned || rows < kExactTokens) {
        unsigned char* slot = queue.wait(member);
        if (!aligned) copy_unaligned(p, at.b, item.set, item.first, rows, head, 1, slot, kPitch, lane);
        // Memory past the rows may hold NaN; its weight is 0, but 0 times NaN is NaN.
        for (int n = lane; n < (kExactTokens - rows) * (D / 8); n += kLanes)
          *reinterpret_cast<uint4*>(slot + (rows + n / (D / 8)) * kPitch + n % (D / 8) * 16) = {};
        fence_shared_writes();
      }
    }
    meet_team<kMembers>(team);
#pragma unroll 1
    for (int n = 0; n < count; ++n) team_exact_values<D>(p, queue.wait(n), n, exchange, state, member, lane);
    queue.pop(count);
  }
}

}  // namespace kv4::cuda
