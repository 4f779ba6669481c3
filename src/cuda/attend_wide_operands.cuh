// From a page's codes to the operands of attend_wide's products: copies, then two groups of four warps that write keys
// and values.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/attend_wide_shape.cuh"

namespace kv4::cuda {

__device__ __forceinline__ const unsigned char* page_of(const AttendParams& p, std::uint32_t id) {
  const std::uint32_t within = id & ((1u << p.pages.shift) - 1);
  return (p.pages.chunks != nullptr ? p.pages.chunks[id >> p.pages.shift] : p.pages.data) +
         static_cast<std::uint64_t>(within) * p.pages.page_stride;
}

// Slots of one side's codes as copied, a few pages ahead, and the copies. Four warps; the first thread copies.
template <int D, bool kValues>
struct WideSource {
  using S = WideShape<D>;
  static constexpr int kBytes = kValues ? S::kRawValues : S::kRawKeys;
  const AttendParams& p;
  const WideBarriers barriers;
  unsigned char* const memory;
  const std::uint32_t slice;  // of a page
  const std::int32_t* const ids;
  const int count;
  std::uint32_t id = 0;  // of the next page to copy, where this thread copies

  __device__ __forceinline__ WideSource(const AttendParams& params, WideBarriers its_barriers, unsigned char* shared,
                                        std::uint32_t its_slice, const std::int32_t* first, int pages)
      : p(params), barriers(its_barriers), memory(shared + (kValues ? S::kRawValuesAt : S::kRawAt)), slice(its_slice),
        ids(first), count(pages) {
    if (threadIdx.x % kGroupThreads == 0) id = static_cast<std::uint32_t>(__ldg(first));
    for (int i = 0; i < kRawSlots - 1; ++i) copy(i);
  }
  // Page i's codes.
  __device__ __forceinline__ const unsigned char* wait(int i) {
    copy(i + kRawSlots - 1);
    wait_at(barriers.copied(kValues, i % kRawSlots), i / kRawSlots & 1);
    return memory + i % kRawSlots * kBytes;
  }
  // This warp has read them.
  __device__ __forceinline__ void release(int i) const {
    if (threadIdx.x % kLanes == 0) arrive_at(barriers.read(kValues, i % kRawSlots));
  }

 private:
  __device__ __forceinline__ void copy(int i) {
    if (threadIdx.x % kGroupThreads == 0 && i < count) {
      const int slot = i % kRawSlots;
      wait_at(barriers.read(kValues, slot), (i / kRawSlots & 1) ^ 1);
      const unsigned char* const from = page_of(p, id) + slice;
      const uint32_t to = shared_address(memory) + slot * kBytes, barrier = barriers.copied(kValues, slot);
      const uint32_t bytes = kValues ? kBytes : p.k_copy_bytes + kPageTokens * 2;
      expect_at(barrier, bytes);
      if constexpr (kValues) {
        copy_bulk(to, from + p.v_codes, kBytes, barrier);
      } else {
        copy_bulk(to, from, p.k_copy_bytes, barrier);
        copy_bulk(to + S::kScalesAt, from + p.v_codes + p.value_scales, kPageTokens * 2, barrier);
      }
      if (i + 1 < count) id = static_cast<std::uint32_t>(__ldg(ids + i + 1));
    }
    __syncwarp();
  }
};

// The products may read what this warp has written.
__device__ __forceinline__ void operands_written(uint32_t barrier, int lane) {
  fence_shared_writes();
  __syncwarp();
  if (lane == 0) arrive_at(barrier);
}

// The four warps that write the operands of keys: levels, factors, means.
template <int D>
struct WideKeys {
  using S = WideShape<D>;
  static constexpr int kPieces = S::kPadded / 8;  // of a row
  const AttendParams& p;
  const SequenceView& s;
  unsigned char* const memory;
  const int thread, lane, warp;

  __device__ __forceinline__ WideKeys(const AttendParams& params, const SequenceView& view, unsigned char* shared)
      : p(params), s(view), memory(shared), thread(static_cast<int>(threadIdx.x) % kGroupThreads),
        lane(threadIdx.x % kLanes), warp(__shfl_sync(kAll, static_cast<int>(threadIdx.x) % kGroupThreads / kLanes, 0)) {
  }

  // Where this lane's words of codes go in an operand.
  struct Places {
    int at[S::kKeyLoads][4];
  };
  __device__ __forceinline__ Places places() const {
    Places places;
#pragma unroll
    for (int i = 0; i < S::kKeyLoads; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = 4 * (warp + 4 * i) + e, octet = f / S::kBlocks32, piece = f % S::kBlocks32 * 4 + lane % 4;
        places.at[i][e] = piece / 8 * S::kKeyHalf + swizzled(column_of(octet * 8 + lane / 4), piece % 8);
      }
    return places;
  }
  template <bool kEven>
  __device__ __forceinline__ void put(const unsigned char* raw, unsigned char* to, const Places& places,
                                      const Tables& tables) const {
#pragma unroll
    for (int i = 0; i < S::kKeyLoads; ++i) {
      const int u = warp + 4 * i;
      if (4 * i + 3 >= S::kKeyWords && u >= S::kKeyWords) continue;
      const uint4 words = reinterpret_cast<const uint4*>(raw)[u * kLanes + lane];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        *reinterpret_cast<uint4*>(to + places.at[i][e]) = Halves8<kEven>(word_of(words, e), tables).even_first();
    }
  }
  // `unit`: of the products, as scores.
  __device__ __forceinline__ void put_factors(const unsigned char* raw, WideFactors* to, int page, float unit) const {
    if (thread >= kPageTokens) return;
    const bool seen = thread >= (page == 0 ? s.pages_hidden : 0) &&
                      thread < (page + 1 == s.page_count ? s.last_page_tokens : kPageTokens);
    const float of_key = from_half(reinterpret_cast<const unsigned short*>(raw + Shape<D>::kKeyCodeBytes)[thread]),
                of_value = from_half(reinterpret_cast<const unsigned short*>(raw + S::kScalesAt)[thread]);
    // A token of zeros has its weight all the same: 2^-60 stands for its scale.
    const bool zero = !(of_value > 0);
    const int j = column_of(thread), pair = j / 2, e = j % 2;
    reinterpret_cast<float*>(&to->of[pair])[e] = seen ? of_key * unit : 0.0f;
    reinterpret_cast<float*>(&to->of[pair])[2 + e] = !seen ? -INFINITY : zero ? -60.0f : log2_fast(of_value);
    reinterpret_cast<float*>(&to->reciprocals[pair])[e] = !seen ? 0.0f : zero ? 0x1p60f : reciprocal(of_value);
  }
  // Of one of eight pages, the channels of a piece: 32 (c / 4) + 4 (c % 4) + {0 ... 3, 16 ... 19}.
  __device__ __forceinline__ void load_mean(const unsigned char* page, uint2 (&mean)[2]) const {
    const int c = thread % 16 / 4 * 32 + thread % 4 * 4;
    const auto* from = reinterpret_cast<const uint2*>(page + Shape<D>::kMeanAt + c * 2);
    mean[0] = mean[1] = {0, 0};
    if (c < D) mean[0] = __ldcg(from);
    if (c + 16 < D) mean[1] = __ldcg(from + 4);
  }
  __device__ __forceinline__ void put_mean(const uint2 (&mean)[2]) const {
    const int page = thread / 16, piece = thread % 16;
    if (piece >= kPieces) return;
    *reinterpret_cast<uint4*>(memory + S::kMeansAt + piece / 8 * S::kMeanHalf + swizzled(page, piece % 8)) = {
        __byte_perm(mean[0].x, mean[0].y, 0x5410), __byte_perm(mean[1].x, mean[1].y, 0x5410),
        __byte_perm(mean[0].x, mean[0].y, 0x7632), __byte_perm(mean[1].x, mean[1].y, 0x7632)};
  }

  template <bool kEven>
  __device__ __forceinline__ void run(const WideRange& range, WideBarriers barriers, std::uint32_t slice, float unit) {
    const Tables tables = p.key;
    const std::int32_t* ids = s.pages + range.first;
    const int own = thread / 16;  // of eight pages, the one whose mean this thread copies
    const auto id_at = [&](int i) { return static_cast<std::uint32_t>(__ldg(ids + min(i, range.count - 1))); };
    std::uint32_t of_mean = id_at(kMeanPages + own);
    uint2 mean[2];
    if (p.mean) load_mean(page_of(p, id_at(own)) + slice, mean);
    WideSource<D, false> source(p, barriers, memory, slice, ids, range.count);
    const Places where = places();
    WideStage stage;
#pragma unroll 1
    for (int i = 0; i < range.count; ++i, stage.next()) {
      const unsigned char* const raw = source.wait(i);
      wait_at(barriers.empty(false, stage.at), stage.parity ^ 1);
      put<kEven>(raw, memory + stage.at * S::kKeyBytes, where, tables);
      put_factors(raw, reinterpret_cast<WideFactors*>(memory + S::kFactorsAt) + stage.at, range.first + i, unit);
      const bool means = p.mean && i % kMeanPages == 0;
      if (means) put_mean(mean);
      operands_written(barriers.full(false, stage.at), lane);
      source.release(i);
      if (means) {
        load_mean(page_of(p, of_mean) + slice, mean);
        of_mean = id_at(i + 2 * kMeanPages + own);
      }
    }
  }
};

// The four warps that write the operands of values.
template <int D>
struct WideValues {
  using S = WideShape<D>;

  template <bool kEven>
  static __device__ __forceinline__ void run(const AttendParams& p, const WideRange& range, const std::int32_t* ids,
                                             unsigned char* memory, WideBarriers barriers, std::uint32_t slice) {
    const Tables tables = p.value;
    // A lane has of channel g two words of eight tokens; lanes of odd channels store the second one first, so that
    // those of eight neighbouring lanes meet no bank twice.
    const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4,
              warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) % kGroupThreads / kLanes, 0);
    const bool odd = g % 2 == 1;
    const int first = swizzled(warp * 16 + g, (odd ? 4 : 0) + t), second = first ^ (4 << 4);
    WideSource<D, true> source(p, barriers, memory, slice, ids + range.first, range.count);
    WideStage stage;
#pragma unroll 1
    for (int i = 0; i < range.count; ++i, stage.next()) {
      unsigned char* const to = memory + S::kValuesAt + stage.at * S::kValueBytes;
      const auto* raw = reinterpret_cast<const uint4*>(source.wait(i));
      uint4 codes[S::kValueLoads];
#pragma unroll
      for (int j = 0; j < S::kValueLoads; ++j) codes[j] = raw[min(warp + 4 * j, S::kValueWords - 1) * kLanes + lane];
      wait_at(barriers.empty(true, stage.at), stage.parity ^ 1);
#pragma unroll
      for (int j = 0; j < S::kValueLoads; ++j) {
        if (4 * j + 3 >= S::kValueWords && warp + 4 * j >= S::kValueWords) continue;
        const uint4 words = codes[j];
#pragma unroll
        for (int octet = 0; octet < 2; ++octet) {
          const uint32_t a = octet == 0 ? words.x : words.z, b = octet == 0 ? words.y : words.w;
          unsigned char* const at = to + (8 * j + octet) * 8 * kSwizzledRow;
          *reinterpret_cast<uint4*>(at + first) = Halves8<kEven>(odd ? b : a, tables).even_first();
          *reinterpret_cast<uint4*>(at + second) = Halves8<kEven>(odd ? a : b, tables).even_first();
        }
      }
      operands_written(barriers.full(true, stage.at), lane);
      source.release(i);
    }
  }
};

}  // namespace kv4::cuda
