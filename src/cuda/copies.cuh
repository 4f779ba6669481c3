// Copies into shared memory and the barriers in shared memory (mbarriers) that say when they are complete: those are
// there from 9.0 on. A barrier is named by its shared address, 8 bytes, and a phase of it by its parity.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.cuh"

namespace kv4::cuda {

// So many arrivals complete a phase. By one thread; others see the barrier after barriers_started and a barrier of the
// CTA, of which the first is for the copy engine and for other CTAs of the cluster.
__device__ __forceinline__ void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_started() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives; the phase waits for so many bytes too.
__device__ __forceinline__ void expect_at(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the phase is complete; may wait for it a while.
__device__ __forceinline__ bool has_passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
// The same without waiting.
__device__ __forceinline__ bool is_past(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
// A loop of three instructions; the compiler makes a longer one of has_passed, which may overlap with other work.
__device__ __forceinline__ void wait_at(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\nagain_%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again_%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// A copy by the copy engine, of which the barrier counts the bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const unsigned char* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// A part of the cache to copy into shared memory: rows of `bytes`, `pitch` apart in device memory.
struct Piece {
  const unsigned char* from = nullptr;
  int rows = 1;
  uint32_t bytes = 0;
  long long pitch = 0;
  bool aligned = true;  // whether it can be copied 16 bytes at a time
};

// One warp's ring buffer of copies from device into shared memory: kDepth slots of kSlotBytes, rows kRowPitch apart.
// From sm_90 on a slot has two barriers, and one lane of another warp fills it by the bulk copy engine (Filler);
// before, the warp fills it itself, 16 bytes per lane and instruction.
template <int kDepth, int kSlotBytes, int kRowPitch>
class Queue {
 public:
  // `memory`: queue_bytes(kDepth, kSlotBytes) of this warp, 128-byte aligned.
  __device__ Queue(unsigned char* memory, int lane) : base_(memory), lane_(lane) {}

  // Once, by one lane of a warp for its queue, before a barrier of the CTA. Lanes of one warp would be serialised, 60
  // cycles for each barrier.
  static __device__ void prepare(unsigned char* memory) {
    if constexpr (kBulkCopies) {
      const uint32_t barriers = shared_address(memory + kDepth * kSlotBytes);
      for (int i = 0; i < 2 * kDepth; ++i) start_barrier(barriers + i * 8, 1);
      barriers_started();
    }
  }

  // Waits for the next slot; the previous one has been released.
  __device__ __forceinline__ unsigned char* wait() {
    if constexpr (kBulkCopies) {
      const uint32_t barrier = shared_address(base_ + kDepth * kSlotBytes) + read_ * 16;
      while (!has_passed(barrier, parity_)) {}
    } else {
      // Each release begins a group of copies.
      asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - 1) : "memory");
      __syncwarp();
    }
    unsigned char* slot = base_ + read_ * kSlotBytes;
    if (++read_ == kDepth) {
      read_ = 0;
      parity_ ^= 1;
    }
    return slot;
  }

  // Every lane has finished reading the oldest slot that was waited for: it may be filled again, from `pieces` where
  // the warp does that itself.
  template <class Pieces>
  __device__ __forceinline__ void release(Pieces& pieces) {
    __syncwarp();
    if constexpr (kBulkCopies) {
      if (lane_ == 0) arrive_at(shared_address(base_ + kDepth * kSlotBytes) + freed_ * 16 + 8);
      freed_ = freed_ + 1 == kDepth ? 0 : freed_ + 1;
    } else {
      fill(pieces);
    }
  }

  // The warp's own filling, before sm_90.
  template <class Pieces>
  __device__ __forceinline__ void fill(Pieces& pieces) {
    pieces.settle();
    if (!pieces.done()) {
      const Piece piece = pieces.piece();
      if (piece.aligned) {
        const uint32_t to = shared_address(base_ + freed_ * kSlotBytes), chunks = piece.bytes / 16;
        for (uint32_t i = lane_; i < piece.rows * chunks; i += kLanes)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i / chunks * kRowPitch + i % chunks * 16),
                       "l"(piece.from + i / chunks * piece.pitch + i % chunks * 16)
                       : "memory");
      }
      pieces.next();
      freed_ = freed_ + 1 == kDepth ? 0 : freed_ + 1;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

 private:
  unsigned char* base_;
  int lane_;
  int read_ = 0, freed_ = 0;
  uint32_t parity_ = 0;
};

// Fills one queue from one lane of the filling warp. Never blocks: the warp's other lanes serve other queues.
template <int kDepth, int kSlotBytes, int kRowPitch>
class Filler {
 public:
  __device__ explicit Filler(unsigned char* memory) : base_(shared_address(memory)) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy_));
  }

  // Whether the next slot is free.
  __device__ __forceinline__ bool ready() const { return is_past(full() + 8, parity_ ^ 1); }
  // One row, aligned, by a lane alone.
  __device__ __forceinline__ void put(const unsigned char* from, uint32_t bytes) {
    expect_at(full(), bytes);
    copy(base_ + slot_ * kSlotBytes, from, bytes, full());
    advance();
  }
  // Of all lanes together, those with something to put say so: pieces of one row, or of rows that lie as they do in a
  // slot, go out from their own lanes, other rows from as many lanes. What is not aligned is left to the reader, who
  // gets the slot at once.
  __device__ __forceinline__ void put(bool mine, const Piece& piece, int lane) {
    const bool many = mine && piece.rows > 1 && piece.pitch != kRowPitch && piece.aligned;
    if (mine) {
      if (piece.aligned) {
        expect_at(full(), piece.rows * piece.bytes);
        if (!many) copy(base_ + slot_ * kSlotBytes, piece.from, piece.rows * piece.bytes, full());
      } else {
        arrive_at(full());
      }
    }
    for (unsigned left = __ballot_sync(kAll, many); left != 0; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const auto address = __shfl_sync(kAll, reinterpret_cast<unsigned long long>(piece.from), from);
      const auto pitch = __shfl_sync(kAll, piece.pitch, from);
      const int rows = __shfl_sync(kAll, piece.rows, from);
      const uint32_t bytes = __shfl_sync(kAll, piece.bytes, from), barrier = __shfl_sync(kAll, full(), from);
      const uint32_t to = __shfl_sync(kAll, base_ + slot_ * kSlotBytes, from);
      if (lane < rows)
        copy(to + lane * kRowPitch, reinterpret_cast<const unsigned char*>(address) + lane * pitch, bytes, barrier);
    }
    if (mine) advance();
  }

 private:
  __device__ __forceinline__ void advance() {
    if (++slot_ < kDepth) return;
    slot_ = 0;
    parity_ ^= 1;
  }
  __device__ __forceinline__ void copy(uint32_t to, const unsigned char* from, uint32_t bytes, uint32_t barrier) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy_)
        : "memory");
  }
  __device__ __forceinline__ uint32_t full() const { return base_ + kDepth * kSlotBytes + slot_ * 16; }

  uint32_t base_;
  uint64_t policy_;
  int slot_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace kv4::cuda
