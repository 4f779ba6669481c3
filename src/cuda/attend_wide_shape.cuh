// What the parts of attend_wide share: the order of operands, their places in shared memory, barriers, a CTA's pages.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attend_mask.cuh"
#include "cuda/attend_tuning.h"
#include "cuda/attend_wide.h"
#include "cuda/copies.cuh"
#include "cuda/wgmma.cuh"

namespace kv4::cuda {

constexpr int kGroupThreads = 128, kRowGroups = 2, kGroupRows = kWideRows / kRowGroups, kStages = 3;
constexpr int kWideThreads = (kRowGroups + 2) * kGroupThreads;  // two more groups write operands
constexpr int kRawSlots = 3;                                    // pages that a side's copies are ahead
constexpr int kMeanPages = 8;                                   // whose means are multiplied together

// A place in a ring of kStages operands, and the parity of its barrier's phase.
struct WideStage {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++at < kStages) return;
    at = 0;
    parity ^= 1;
  }
};

// What a page's tokens are scored and weighed with, by pairs of columns: key scales, in units of the products, and log2
// of the value scales; the reciprocals of those. Tokens that no row sees have 0, -infinity, 0.
struct WideFactors {
  float4 of[kPageTokens / 2];
  float2 reciprocals[kPageTokens / 2];
};

// Barriers of the two kinds of operands, keys (with factors and means) and values, and of what they are made from.
struct WideBarriers {
  static constexpr int kCount = 2 * (2 * kStages + 2 * kRawSlots);
  uint32_t base;
  __device__ __forceinline__ uint32_t of(bool values, int i) const { return base + (values * kCount / 2 + i) * 8; }
  __device__ __forceinline__ uint32_t full(bool values, int stage) const { return of(values, stage); }
  __device__ __forceinline__ uint32_t empty(bool values, int stage) const { return of(values, kStages + stage); }
  __device__ __forceinline__ uint32_t copied(bool values, int slot) const { return of(values, 2 * kStages + slot); }
  __device__ __forceinline__ uint32_t read(bool values, int slot) const {
    return of(values, 2 * kStages + kRawSlots + slot);
  }
  // By one thread; `groups` of rows read the operands.
  __device__ __forceinline__ void prepare(int groups) const {
    for (const bool values : {false, true}) {
      for (int i = 0; i < kStages; ++i) {
        start_barrier(full(values, i), kGroupThreads / kLanes);
        start_barrier(empty(values, i), groups * kGroupThreads / kLanes);
      }
      for (int i = 0; i < kRawSlots; ++i) {
        start_barrier(copied(values, i), 1);
        start_barrier(read(values, i), kGroupThreads / kLanes);
      }
    }
    barriers_started();
  }
};

template <int D>
struct WideShape {
  static constexpr int kPadded = pad_channels(D), kBlocks32 = kPadded / 32, kSteps = kPadded / 16;
  static constexpr int kHalves = (kPadded + 63) / 64;  // blocks of 64 channels
  static constexpr int kKeyHalf = kPageTokens * kSwizzledRow, kKeyBytes = kHalves * kKeyHalf;
  static constexpr int kValueBytes = D * kSwizzledRow;
  static constexpr int kMeanHalf = kMeanPages * kSwizzledRow, kRestHalf = kGroupRows * kSwizzledRow;
  // Parts of a page as copied: codes, key scales and mean, value scales; codes of values.
  static constexpr int kScalesAt = (Shape<D>::kPackedBytes + 127) / 128 * 128, kRawKeys = kScalesAt + kPageTokens * 2,
                       kRawValues = D * kPageTokens / 2;
  // Shared memory, from a multiple of 1,024 bytes on.
  static constexpr int kValuesAt = kStages * kKeyBytes, kRestAt = kValuesAt + kStages * kValueBytes,
                       kMeansAt = kRestAt + kRowGroups * kHalves * kRestHalf,
                       kFactorsAt = kMeansAt + kHalves * kMeanHalf,
                       kRawAt = kFactorsAt + kStages * static_cast<int>(sizeof(WideFactors)),
                       kRawValuesAt = kRawAt + kRawSlots * kRawKeys,
                       kBarriersAt = kRawValuesAt + kRawSlots * kRawValues,
                       kShared = kBarriersAt + WideBarriers::kCount * 8 + 1024;
  static constexpr int kKeyWords = 2 * kBlocks32, kValueWords = D / 16;  // of four words of codes a lane, in a page
  static constexpr int kKeyLoads = (kKeyWords + 3) / 4, kValueLoads = (kValueWords + 3) / 4;  // of a thread
  static_assert(kValueBytes % 1024 == 0 && kShared <= 227 << 10);
};

// The pages that a CTA reads, and what their rows see of them.
struct WideRange {
  int first = 0, count = 0;
  // Of those, counted from `first`: pages that every row of the tile sees, but for hidden tokens.
  int first_plain = 0, behind_plain = 0;

  __device__ __forceinline__ WideRange(const AttendParams& p, const SequenceView& s, int b, int head, int row0,
                                       int rows, int split) {
    const Sight sight(p, b, head);
    const longlong2 of_first = sight.range(p, row0), of_last = sight.range(p, row0 + rows - 1);
    const int begin = pages_before(of_first.x - s.pages_position, s.page_count),
              behind = pages_before(of_last.y - s.pages_position + kPageTokens, s.page_count);
    const int all = max(0, behind - begin), splits = p.wide_splits;
    first = begin + static_cast<int>(static_cast<long long>(all) * split / splits);
    count = begin + static_cast<int>(static_cast<long long>(all) * (split + 1) / splits) - first;
    first_plain = pages_before(of_last.x - s.pages_position + kPageTokens - 1, s.page_count) - first;
    behind_plain = pages_before(of_first.y - s.pages_position + 1, s.page_count) - first;
  }
  // Whole pages before a token, counted from the first page's first; at most `most`.
  static __device__ __forceinline__ int pages_before(long long token, int most) {
    return token < 0 ? 0 : static_cast<int>(min(token / kPageTokens, static_cast<long long>(most)));
  }
};

}  // namespace kv4::cuda
