// The configuration of an attend_fused CTA: its warps, their barriers, and its shared memory layout.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attend_shares.cuh"
#include "cuda/attend_team.cuh"

namespace kv4::cuda {

template <int D, Rows kSegmentRows, Readers kReaders>
struct FusedShape {
  static constexpr int kBlocks = blocks_of(kSegmentRows), kRows = kBlocks * kBlockRows;
  static constexpr int kCount = fused_fit<D>(kReaders, kBlocks).readers,
                       kDepth = fused_fit<D>(kReaders, kBlocks).depth;  // readers, their slots
  static constexpr bool kApart = kReaders == Readers::warps;
  static constexpr int kMembers = members_of(kReaders), kWarps = kCount * kMembers, kAllWarps = kWarps + 1;
  static constexpr int kQueueBytes = queue_bytes(kDepth, Shape<D>::kSlotBytes);
  static constexpr int kSteps = D / 16, kTiles = D / 8;  // of a rotation
  // Tiles of a rotation that a warp loads ahead: as many as free registers allow before reading, and after it.
  static constexpr int kAheadFirst = D == 64 || D == 256 ? 1 : 2,
                       kAheadLast = kReaders == Readers::fours ? 1 : kAheadFirst;
  static constexpr int kPitch = fused_pitch(D);  // of rows of floats: no bank conflicts between rows of a product
  static constexpr int kOperands = kBlocks * operand_words(D), kFragments = kBlocks * kSteps * kLanes;  // uint4
  static constexpr int kM = kRows * kPitch, kL = kM + kRows;  // of a reader's partial state
  static constexpr int kReaderFloats = reader_state_floats(D, kBlocks);
  static_assert(kQueueBytes >= kReaderFloats * 4, "a reader's state goes where its queue was");

  // Barrier of all reading warps. Teams use those with lower numbers.
  static constexpr int kBarrier = kMembers > 1 ? kCount + 1 : 1;
  static __device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kWarps * kLanes) : "memory");
  }
  // The same, and waits for the filling warp to have called `filled`, which itself does not wait.
  static __device__ __forceinline__ void meet_filled() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier + 1), "n"(kAllWarps * kLanes) : "memory");
  }
  // Signals that the queues' barriers are initialised: all reading warps arrive, the filling warp waits.
  static __device__ __forceinline__ void made() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier + 2), "n"(kAllWarps * kLanes) : "memory");
  }
  static __device__ __forceinline__ void wait_made() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier + 2), "n"(kAllWarps * kLanes) : "memory");
  }
  static __device__ __forceinline__ void filled() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier + 1), "n"(kAllWarps * kLanes) : "memory");
  }
};

// A CTA's place in the grid, and its shared memory after the queues.
template <int D, Rows kSegmentRows, Readers kReaders>
struct FusedPlace {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  uint4 *operands, *fragments;
  float *y, *carried;  // [kRows][kPitch]; the state over exact rows of a reader that reads pages too
  TeamExchange<F::kMembers, F::kBlocks>* exchanges;
  int b, head, part, row0;  // part: segment of the head's

  // CTA (x, y, z): x of those of segment y of sequence z.
  __device__ __forceinline__ FusedPlace(const AttendParams& p, unsigned char* memory, int its_segment, int sequence) {
    operands = reinterpret_cast<uint4*>(memory + F::kCount * F::kQueueBytes);
    fragments = operands + F::kOperands;
    y = reinterpret_cast<float*>(fragments + F::kFragments);
    carried = y + F::kRows * F::kPitch;
    exchanges = reinterpret_cast<TeamExchange<F::kMembers, F::kBlocks>*>(carried + F::kReaderFloats);
    const int most_per_head = p.blocks / F::kBlocks;
    b = sequence;
    head = most_per_head == 1 ? its_segment : its_segment / most_per_head;
    part = its_segment - head * most_per_head;
    row0 = part * F::kRows;
  }
  // Loaded where it is needed, to save registers.
  __device__ __forceinline__ int rows(const AttendParams& p) const {
    return min(F::kRows, p.group * static_cast<int>(p.sequences[b].query_count) - row0);
  }
};

template <int D, Rows kSegmentRows, Readers kReaders>
using SharesOf =
    FusedShares<FusedShape<D, kSegmentRows, kReaders>::kCount, FusedShape<D, kSegmentRows, kReaders>::kApart>;

extern __shared__ __align__(128) unsigned char memory[];  // as attend_main declares it

}  // namespace kv4::cuda
