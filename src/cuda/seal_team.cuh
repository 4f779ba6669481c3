// The steps by which seal_wgmma.cu's teams of warps seal a slice: load its rows, sum and multiply them, send results to
// the other CTA of a cluster, store the codes of values.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "cuda/codes.cuh"
#include "cuda/copies.cuh"
#include "cuda/seal.h"
#include "cuda/wgmma.cuh"

namespace kv4::cuda {

// A slice that is being loaded: its job, the chunk of its page, its head.
struct TeamJob {
  SealJob job;
  const std::uint8_t* chunk;
  std::int64_t head;

  __device__ __forceinline__ std::uint8_t* slice(const PageMemory& pages) const volatile {
    const bool chunked = pages.chunks != nullptr;
    const std::int32_t within = chunked ? job.page & ((std::int32_t{1} << pages.chunk_shift) - 1) : job.page;
    return const_cast<std::uint8_t*>(chunked ? chunk : pages.data) + within * pages.page_stride +
           head * pages.head_stride;
  }
};
static_assert(sizeof(SealJob) % 8 == 0 && sizeof(SealJob) / 8 < kLanes && sizeof(TeamJob) % 8 == 0);

// A team seals a slice at a time: 64 rows, by one group of four warps, or, where the matrix is not a CTA's, by kSplit
// in each of kCluster CTAs, each group a part of the output channels.
template <int D>
struct TeamShape {
  static constexpr int kCluster = D > 128 ? 2 : 1, kSplit = D > 128 ? 2 : 1,
                       kTeams = D > 128  ? 2
                                : D > 96 ? 3
                                : D > 64 ? 4
                                         : 5;
  static constexpr int kTeamThreads = kSplit * 128, kTeamWarps = kTeamThreads / kLanes,
                       kThreads = kTeams * kTeamThreads;
  static constexpr int kParts = kCluster * kSplit, kColumns = D / kParts, kCtaColumns = D / kCluster;
  static constexpr int kBlocks = pad_channels(kColumns) / 32, kTiles = kBlocks * 4;  // of a part, for codes
  static constexpr int kSteps = D / 16,
                       kUnrolled = D > 128 ? 2 : kSteps;  // of a mean's products: registers are short at 256
  static constexpr int kKeyShare = D > 128  ? 72
                                   : D > 96 ? 70
                                   : D > 64 ? 68
                                            : 64;  // of CTAs, percent, measured; 96 as 80
  static constexpr int kOctets = 8 / kTeamWarps,
                       kPieces = (D / 8 + 3) / 4;  // a lane's share of the rows: of 8, 16 bytes of each
  static constexpr int kStaged = pad_channels(kCtaColumns) / 8 * 2 * kLanes;  // words of codes
  static constexpr int kDigits = 7, kDigitPitch = D + 8;                      // of a mean
  static constexpr int kPairs = (kCtaColumns / 16 + kTeamWarps - 1) /
                                kTeamWarps;  // of tiles, that a warp rotates it to
  // Shared memory: the matrix's digits, then of each team.
  static constexpr int kDigitBytes = D * kCtaColumns * 2, kDigitsHeld = D > 128 ? 2 : 3;
  static constexpr int kRowBytes = kPageTokens * D * 2;
  // Whether the rows' second halves lie beside the first, or take their place once these are multiplied.
  static constexpr bool kBeside = D <= 128;
  static constexpr int kRestBytes = kBeside ? kRowBytes : kStaged * 4, kPivotAt = kRowBytes + kRestBytes,
                       kLambdaAt = kPivotAt + D * 4, kOffsetAt = kLambdaAt + D * 4;
  static constexpr int kMeanDigitsAt = kOffsetAt + D * 4, kScaleAt = kMeanDigitsAt + 8 * kDigitPitch * 2;
  static constexpr int kStatAt = kScaleAt + kPageTokens * 4, kFitAt = kStatAt + kParts * kPageTokens * 4;
  static constexpr int kJobsAt = kFitAt + kParts * kPageTokens * 8,
                       kBarriersAt = kJobsAt + 3 * static_cast<int>(sizeof(TeamJob));
  static constexpr int kTeamBytes = (kBarriersAt + 16 + 127) / 128 * 128;
  static constexpr int kShared = kDigitsHeld * kDigitBytes + kTeams * kTeamBytes;
  static_assert(kStaged * 4 <= kRestBytes && kShared <= 227 << 10);
};

template <int D>
__device__ __forceinline__ void team_barrier(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TeamShape<D>::kTeamThreads) : "memory");
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Writes to the same address in the other CTA of a cluster, whose barrier at `barrier` counts the bytes.
__device__ __forceinline__ void put_beside(const float* p, uint32_t barrier, int rank, float x) {
  uint32_t there, barrier_there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank ^ 1));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier_there) : "r"(barrier), "r"(rank ^ 1));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
               "r"(__float_as_uint(x)), "r"(barrier_there)
               : "memory");
}
// For bytes that the other CTA writes.
__device__ __forceinline__ void wait_for_bytes(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\nagain_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@!p bra "
      "again_%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Asynchronous copy of 16 bytes into shared memory; zeros unless `any`.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool any) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(any ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads a slice's rows and lambda, and the address of its page's chunk. Masked and absent rows are zeros.
template <int D, bool kValues>
__device__ __forceinline__ void ask_for_rows(const PageMemory& pages, TeamJob& its, unsigned char* rows, float* lambda,
                                             int thread) {
  using S = TeamShape<D>;
  const SealJob& job = its.job;
  if (job.page < 0) return;
  const int hidden = job.hidden;
  const auto* from = static_cast<const unsigned short*>(kValues ? job.v : job.k) +
                     its.head * (kValues ? job.v_head_stride : job.k_head_stride);
  const long long stride = kValues ? job.v_stride : job.k_stride;
  const float* weights = kValues ? job.lambda_v : job.lambda_k;
  if (weights != nullptr) weights += its.head * D;
  if (thread == 0 && pages.chunks != nullptr) copy_8(&its.chunk, pages.chunks + (job.page >> pages.chunk_shift));
  const bool aligned = ((reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(stride * 2)) & 15) == 0;
  const int first_row = thread / kLanes * S::kOctets * 8 + thread % 8, c0 = thread % kLanes / 8 * 8;
  unsigned char* to = rows + block_at(first_row, c0, D);
  if (aligned && job.skip == nullptr && job.count == kPageTokens && hidden == 0) {
    const unsigned short* at = from + first_row * stride + c0;
#pragma unroll
    for (int o = 0; o < S::kOctets; ++o, at += 8 * stride)
#pragma unroll
      for (int b = 0; b < S::kPieces; ++b)
        if (D % 32 == 0 || c0 + 32 * b < D) copy_16(to + block_at(8 * o, 32 * b, D), at + 32 * b, true);
  } else {
#pragma unroll 1
    for (int i = 0; i < S::kOctets * S::kPieces; ++i) {
      const int b = i % S::kPieces * 32, o = i / S::kPieces * 8, j = first_row + o - job.first;
      if (D % 32 != 0 && c0 + b >= D) continue;
      const bool live = j >= hidden && j < job.count && (job.skip == nullptr || job.skip[j] == 0);
      const unsigned short* at = from + (live ? j * stride : 0) + c0 + b;
      if (aligned) {
        copy_16(to + block_at(o, b, D), at, live);
      } else {
        uint32_t words[4] = {};
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (live) words[k / 2] |= static_cast<uint32_t>(__ldg(at + k)) << k % 2 * 16;
        *reinterpret_cast<uint4*>(to + block_at(o, b, D)) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
  if (thread < D) {
    if (weights == nullptr) lambda[thread] = 1;
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(lambda + thread)),
                   "l"(weights + thread)
                   : "memory");
  }
}
// The job of slice `at`.
__device__ __forceinline__ void ask_for_job(const SealParams& p, int at, TeamJob* to, int thread) {
  if (thread >= kLanes) return;
  const int index = at / p.heads;
  if (thread < static_cast<int>(sizeof(SealJob) / 8))
    copy_8(reinterpret_cast<uint2*>(&to->job) + thread, reinterpret_cast<const uint2*>(p.jobs + index) + thread);
  if (thread == kLanes - 1) to->head = at - index * p.heads;
}

// Sums over the tokens by products with ones; exact where a channel's values are of similar magnitude.
template <int D>
__device__ __forceinline__ void sum_rows(const unsigned char* rows, bool bf16, int warp, int lane, float* sums) {
  for (int k = warp; k < D / 8; k += TeamShape<D>::kTeamWarps) {
    float sum[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 x = load_matrices<true>(shared_address(rows + block_at(half * 32 + lane, 8 * k, D)));
      const uint32_t one = bf16 ? 0x3f803f80 : 0x3c003c00;
      mma_halves(bf16, sum, {one, one, one, one}, x.x, x.y);
      mma_halves(bf16, sum, {one, one, one, one}, x.z, x.w);
    }
    if (lane < 4) *reinterpret_cast<float2*>(sums + 8 * k + 2 * lane) = {sum[0], sum[1]};
  }
}

// Starts y = rows times the matrix.
template <int D, bool kInTwo>
__device__ __forceinline__ void multiply(float (&y)[TeamShape<D>::kTiles][4], uint32_t rows, uint32_t rest,
                                         uint32_t columns_0, uint32_t columns_1) {
  using S = TeamShape<D>;
  products_begin();
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s)
    product<S::kColumns, D>(y, rows + s * kStepBlocks, columns_0 + s * kStepBlocks, s > 0);
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s)
    product<S::kColumns, D>(y, rows + s * kStepBlocks, columns_1 + s * kStepBlocks, true);
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s)
    if (kInTwo) product<S::kColumns, D>(y, rest + s * kStepBlocks, columns_0 + s * kStepBlocks, true);
  products_commit();
}

// Stores the codes of keys, rows g and g + 8 of each warp: a word is of one token and block. part: of the channels.
template <int D, bool kNarrow>
__device__ __forceinline__ void put_keys(const uint32_t (&words)[2][TeamShape<D>::kBlocks], unsigned char* codes,
                                         int bits, int warp, int lane, int part, const bool (&there)[2]) {
  using S = TeamShape<D>;
  constexpr int kAll32 = pad_channels(D) / 32;
  if constexpr (kNarrow) {
    if (is_narrow(bits)) {
      if (!there[0] && !there[1]) return;
      const uint32_t keep[2] = {there[0] ? 0 : ~0u, there[1] ? 0 : ~0u};
#pragma unroll
      for (int b = 0; b < S::kBlocks; b += 2)
        put_narrow(codes, bits, (warp % 4 * kAll32 + part * S::kBlocks + b) / 2, lane,
                   {words[0][b], words[0][b + 1], words[1][b], words[1][b + 1]}, {keep[0], keep[0], keep[1], keep[1]});
      return;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t* all = reinterpret_cast<uint32_t*>(codes);
    uint32_t* to = all + word_index((warp % 4 * 2 + r) * kAll32 + part * S::kBlocks, lane);
    if constexpr (S::kBlocks == 4) {
      if (there[r]) *reinterpret_cast<uint4*>(to) = {words[r][0], words[r][1], words[r][2], words[r][3]};
    } else if constexpr (S::kBlocks == 2) {
      if (there[r]) *reinterpret_cast<uint2*>(to) = {words[r][0], words[r][1]};
    } else {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
        if (there[r]) all[word_index((warp % 4 * 2 + r) * kAll32 + b, lane)] = words[r][b];
    }
  }
}

// Packs the codes of values, rows g and g + 8 of each warp, into words of one channel and 8 tokens; byte w holds warp
// w's tokens. codes: of the slice; first_group: of a lane's four words, that the CTA stores.
template <int D, bool kNarrow>
__device__ __forceinline__ void put_values(const uint32_t (&words)[2][TeamShape<D>::kBlocks], unsigned char* staged,
                                           unsigned char* codes, int bits, int first_group, int team, int thread,
                                           int first, int count) {
  using S = TeamShape<D>;
  constexpr int kCtaBlocks = pad_channels(S::kCtaColumns) / 32;
  const int lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  // [warp][block][row % 2][t % 2][row % 8 / 2][t / 2][row / 8], the second row of a pair where it meets no other in its
  // bank
  auto* to = reinterpret_cast<uint2*>(staged) + ((warp % 4 * kCtaBlocks + warp / 4 * S::kBlocks) * 64 + g % 2 * 32 +
                                                 t % 2 * 16 + (g / 2 * 4 ^ g % 2 * 8) + t / 2 * 2) /
                                                    2;
#pragma unroll
  for (int b = 0; b < S::kBlocks; ++b) to[b * 32] = {words[0][b], words[1][b]};
  team_barrier<D>(team);
  const int pair = lane % 4, m = lane / 4 % 4, half = lane / 16;  // tokens 2 pair, + 1 of 8; byte of a word; t % 2
  for (int b = warp; b < kCtaBlocks; b += S::kTeamWarps) {
    uint32_t low[4], high[4];  // even channels and odd ones
    {
      uint32_t row[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint4 from[4];
#pragma unroll
        for (int w = 0; w < 4; ++w)
          from[w] =
              reinterpret_cast<const uint4*>(staged)[(w * kCtaBlocks + b) * 16 + n * 8 + half * 4 + (pair ^ n * 2)];
        const uint32_t select = static_cast<uint32_t>(m) | static_cast<uint32_t>(4 + m) << 4;
        const auto gather = [&](uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
          return __byte_perm(__byte_perm(w0, w1, select), __byte_perm(w2, w3, select), 0x5410);
        };
        row[n][0] = gather(from[0].x, from[1].x, from[2].x, from[3].x);
        row[n][1] = gather(from[0].y, from[1].y, from[2].y, from[3].y);
        row[n][2] = gather(from[0].z, from[1].z, from[2].z, from[3].z);
        row[n][3] = gather(from[0].w, from[1].w, from[2].w, from[3].w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        low[j] = (row[0][j] & 0x0f0f0f0f) | (row[1][j] << 4 & 0xf0f0f0f0);
        high[j] = (row[0][j] >> 4 & 0x0f0f0f0f) | (row[1][j] & 0xf0f0f0f0);
      }
    }
    const int group = first_group + 2 * b + m / 2, to_lane = (half * 4 + m % 2 * 2) * 4 + pair;
    uint32_t keep[2] = {};  // of even words and odd ones: tokens outside the job keep their codes in the slice
    const bool whole = first == 0 && count == kPageTokens;
    if (!whole)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        for (int n = 0; n < 8; ++n) {
          const int token = n / 2 * 16 + odd * 8 + pair * 2 + n % 2 - first;
          if (token < 0 || token >= count) keep[odd] |= 15u << 4 * n;
        }
    if constexpr (kNarrow) {
      if (is_narrow(bits)) {
        const uint4 kept = {keep[0], keep[1], keep[0], keep[1]};
        put_narrow(codes, bits, group, to_lane, {low[0], low[1], low[2], low[3]}, kept);
        put_narrow(codes, bits, group, to_lane + 4, {high[0], high[1], high[2], high[3]}, kept);
        continue;
      }
    }
    uint32_t* at = reinterpret_cast<uint32_t*>(codes) + group * 128 + to_lane * 4;
    if (!whole) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        low[j] = (low[j] & ~keep[j % 2]) | (at[j] & keep[j % 2]);
        high[j] = (high[j] & ~keep[j % 2]) | (at[16 + j] & keep[j % 2]);
      }
    }
    *reinterpret_cast<uint4*>(at) = {low[0], low[1], low[2], low[3]};
    *reinterpret_cast<uint4*>(at + 16) = {high[0], high[1], high[2], high[3]};
  }
}

}  // namespace kv4::cuda
