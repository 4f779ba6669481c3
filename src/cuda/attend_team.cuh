// How a team of two or four warps reads pages and exact rows together: each computes the scores of its part of the
// tokens and the outputs of its part of the channels, and they exchange maxima and weights in shared memory, with two
// barriers for 128 tokens.
//
// For short calls: single warps (attend_pages.cuh) execute fewer instructions in all, but in a longer sequence, each
// fetched for one use. 4 / 1 / 256, 1 x 4,096: 22 us by teams, 29 by warps; 16 x 32,768: 70 and 63.
#pragma once

#include <type_traits>

#include "cuda/attend_state.cuh"
#include "cuda/copies.cuh"

namespace kv4::cuda {

template <int kMembers>
__device__ __forceinline__ void meet_team(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kMembers * kLanes) : "memory");
}

// A team's queue of copies, like a warp's Queue (copies.cuh): a slot is free once every warp has released it.
template <int kMembers, int kDepth, int kSlotBytes>
class TeamQueue {
 public:
  __device__ TeamQueue(unsigned char* memory, int lane) : base_(memory), lane_(lane) {}

  // By lane 0 of each of the team's warps, before a barrier of the CTA.
  static __device__ __forceinline__ void prepare(unsigned char* memory, int member) {
    const uint32_t barriers = shared_address(memory + kDepth * kSlotBytes);
    for (int i = member; i < kDepth; i += kMembers) {
      start_barrier(barriers + i * 16, 1);
      start_barrier(barriers + i * 16 + 8, kMembers);
    }
    barriers_started();
  }
  // The slot `ahead` of the oldest one held, complete.
  __device__ __forceinline__ unsigned char* wait(int ahead) const {
    int i = read_ + ahead;
    const uint32_t parity = i < kDepth ? parity_ : parity_ ^ 1;
    if (i >= kDepth) i -= kDepth;
    const uint32_t barrier = shared_address(base_ + kDepth * kSlotBytes) + i * 16;
    while (!has_passed(barrier, parity)) {}
    return base_ + i * kSlotBytes;
  }
  // This warp is done with the `count` oldest slots.
  __device__ __forceinline__ void pop(int count) {
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (lane_ == 0) arrive_at(shared_address(base_ + kDepth * kSlotBytes) + read_ * 16 + 8);
      if (++read_ == kDepth) {
        read_ = 0;
        parity_ ^= 1;
      }
    }
  }

 private:
  unsigned char* base_;
  int lane_;
  int read_ = 0;
  uint32_t parity_ = 0;
};

// What the warps of a team exchange.
template <int kMembers, int kBlocks>
struct TeamExchange {
  uint4 weights[4 * kBlocks * kLanes];  // of pages [page][octets even, odd][block], of exact rows [item][block]
  float2 largest[kMembers]
                [kBlocks * kBlockRows];        // by warp: of the scores, and of them plus log2 of their value's scale
  float sums[kMembers][kBlocks * kBlockRows];  // by warp: of the weights of a run
};
static_assert(sizeof(TeamExchange<2, 1>) == team_exchange_bytes(2, 1) &&
              sizeof(TeamExchange<4, 2>) == team_exchange_bytes(4, 2));

// A warp's part of a team's state: channels 16 (kMembers i + member) ... + 15 of its pair of tiles i; m is the team's,
// l its own.
template <int kMembers>
constexpr int team_pairs(int dim) {
  return (dim / 16 + kMembers - 1) / kMembers;
}
template <int D, int kMembers, int kBlocks>
struct TeamState : Accumulators<2 * team_pairs<kMembers>(D), kBlocks> {
  static constexpr int kPairs = team_pairs<kMembers>(D);
  using Base = Accumulators<2 * kPairs, kBlocks>;
  using Base::o, Base::m, Base::l;

  // At the end of a run, before a barrier of the team and `put`. kTwice: rows of pages are laid twice.
  template <bool kTwice>
  __device__ __forceinline__ void share_sums(TeamExchange<kMembers, kBlocks>& exchange, bool packed, int member,
                                             int lane) const {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float sum = quad_sum(l[r]);
      if (kTwice && packed) sum += __shfl_xor_sync(kAll, sum, 16);
      if (lane % 4 == 0) exchange.sums[member][r * kBlockRows + lane / 4] = sum;
    }
  }
  // As State's.
  template <bool kTwice, int kPitch = D>
  __device__ __forceinline__ void put(float* out, const TeamExchange<kMembers, kBlocks>& exchange, bool packed,
                                      int rows, int member, int lane) {
    constexpr int kRows = kBlocks * kBlockRows;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      if (kTwice && packed) {
#pragma unroll
        for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) o[r][n][e] += __shfl_xor_sync(kAll, o[r][n][e], 16);
      }
      const int row = r * kBlockRows + g;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n)
        if (const int c = (n / 2 * kMembers + member) * 16 + n % 2 * 8; c < D)
          *reinterpret_cast<float2*>(out + row * kPitch + c + 2 * t) = {o[r][n][0], o[r][n][1]};
      if (t == 0 && member == 0) {
        float sum = exchange.sums[0][row];
#pragma unroll
        for (int w = 1; w < kMembers; ++w) sum += exchange.sums[w][row];
        out[kRows * kPitch + row] = m[r];
        out[kRows * (kPitch + 1) + row] = sum;
      }
    }
  }
};

}  // namespace kv4::cuda
