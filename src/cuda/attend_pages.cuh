// A run of pages of one segment, two at a time: scores of both, one maximum and one step of their weights, then their
// values, so that what each output costs beyond the products is paid once for 128 tokens.
#pragma once

#include <type_traits>

#include "cuda/attend_main.cuh"

namespace kv4::cuda {

// `operands`, `scales`: of the segment's first block (attend.h). kShared: they are in shared memory, that of the means too, which
// else go to `mean_operands`.
template <int D, Rows kRows, bool kShared, class Slots, class StateT>
__device__ __forceinline__ void pages_run(const AttendParams& p, Slots& queue, Pieces& pieces, StateT& state, const uint4* operands,
                                          const float* scales, uint4* mean_operands, const Cursor& here, int head, int row0, int run,
                                          int lane) {
  using S = Shape<D>;
  constexpr int kBlocks = blocks_of(kRows);
  constexpr bool kFour = kRows == Rows::four;
  constexpr int kScores = kFour ? 8 : 16;  // of a page, row and lane
  const int g = lane / 4, t = lane % 4;
  const int row = kFour ? g % 4 : g;             // of this lane's scores
  const int odd = kFour ? g / 4 : 0;             // whether they are of the odd groups of 8 tokens
  operands += lane;

  // Operands of the queries, in registers and shared memory where those suffice; else read as they are needed, from L1.
  uint4 q[S::kKept ? kBlocks : 1][S::kKept ? S::kTiles : 1];  // rows of the even groups where they are apart
  uint4 q_odd[kFour && S::kKept ? S::kTiles : 1] = {};
  float row_scale[kBlocks], mean_scale[kBlocks];
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) {
    row_scale[r] = scales[r * 2 * kBlockRows + row];
    mean_scale[r] = scales[r * 2 * kBlockRows + kBlockRows + g];
    if constexpr (S::kKept) {
#pragma unroll
      for (int c = 0; c < S::kTiles; ++c) q[r][c] = operands[r * operand_words(D) + c * kLanes];
      if (p.mean && !kShared) {
#pragma unroll
        for (int k = 0; k < 2 * S::kTiles; ++k)
          mean_operands[r * S::kMeanOperands + k * kLanes + lane] = operands[r * operand_words(D) + (S::kTiles + k) * kLanes];
      }
    }
  }
  __syncwarp();
  if constexpr (kFour && S::kKept) {
#pragma unroll
    for (int c = 0; c < S::kTiles; ++c) {  // rows 4 ... 7 of q are empty
      const uint4 x = q[0][c];
      q_odd[c] = {__shfl_up_sync(kAll, x.x, 16), __shfl_up_sync(kAll, x.y, 16), __shfl_up_sync(kAll, x.z, 16), __shfl_up_sync(kAll, x.w, 16)};
      if (lane < 16) q_odd[c] = {};
    }
  }
  const auto query = [&](int r, int c, bool of_odd) {
    if constexpr (S::kKept) return of_odd ? q_odd[kFour ? c : 0] : q[r][c];
    const uint4* at = operands + r * operand_words(D) + c * kLanes;
    if (!of_odd) return *at;
    return lane < 16 ? uint4{} : at[-16];
  };
  constexpr bool kCopied = S::kKept && !kShared;
  const uint4* means = kCopied ? mean_operands + lane : operands + S::kTiles * kLanes;
  constexpr int kMeansPitch = kCopied ? S::kMeanOperands : operand_words(D);

  const int first_page = here.item - here.exact_items;
  const int broken = broken_page(p, here.b);
  const int2 plain = plain_pages(p, here.b, head);
  // The token of score i of a page.
  const auto token = [t, odd](int i) { return kFour ? i / 2 * 16 + odd * 8 + 2 * t + i % 2 : i / 2 * 8 + 2 * t + i % 2; };

  for (int i = 0; i < run; i += 2) {
    const bool two = i + 1 < run;
    unsigned char* slot[2];
    slot[0] = queue.wait();
    slot[1] = two ? queue.template wait<1>() : slot[0];
    float mean[kBlocks][2];  // q'.mu' of both pages, which are columns 0 and 1 of a product
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) mean[r][0] = mean[r][1] = 0;
    if (p.mean) {
      float c[kBlocks][4] = {};
#pragma unroll
      for (int k = 0; k < S::kTiles; ++k) {
        uint4 b = {};
        if (g < 2 && k * 32 + t * 8 < D) b = *reinterpret_cast<const uint4*>((g == 0 ? slot[0] : slot[1]) + S::kMeanAt + (k * 32 + t * 8) * 2);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          const uint4* a = means + r * kMeansPitch + 2 * k * kLanes;
          mma_halves(false, c[r], a[0], b.x, b.y);
          mma_halves(false, c[r], a[kLanes], b.z, b.w);
        }
      }
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        mean[r][0] = __shfl_sync(kAll, (c[r][0] + c[r][2]) * mean_scale[r], row * 4);
        mean[r][1] = __shfl_sync(kAll, (c[r][1] + c[r][3]) * mean_scale[r], row * 4);
      }
    }

    float score[kBlocks][2 * kScores] = {};
    // Less code for the instruction cache: of 16 x 32,768 and 1 x 131,072 tokens it takes 1 and 3 % from the time of at most 4 rows,
    // but adds 3 % to that of 16 x 32,768 with 6.
#pragma unroll(kFour ? 1 : 2)
    for (int page = 0; page < 2; ++page) {
#pragma unroll
      for (int r = 0; r < kBlocks; ++r)
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
          score[r][n] = score[r][kScores + n];
          score[r][kScores + n] = -INFINITY;
        }
      if (page == 1 && !two) break;
      const unsigned char* const keys = page == 0 ? slot[0] : slot[1];
      const auto* codes = reinterpret_cast<const uint4*>(keys) + lane;
      const auto* scales = reinterpret_cast<const __half2*>(keys + S::kKeyCodeBytes) + odd * 4 + t;
      uint4 words = {};
      constexpr int kTogether = kFour ? 2 : 1;  // groups of 8 tokens that share their sums
#pragma unroll
      for (int n = 0; n < 8 / kTogether; ++n) {
        Sums sums[kBlocks];
#pragma unroll
        for (int k = 0; k < kTogether * S::kTiles; ++k) {
          const int f = n * kTogether * S::kTiles + k;
          if (f % 4 == 0) words = codes[f / 4 * kLanes];
          const Levels8 b = levels_of(f % 4 == 0 ? words.x : f % 4 == 1 ? words.y : f % 4 == 2 ? words.z : words.w, p.key);
#pragma unroll
          for (int r = 0; r < kBlocks; ++r)
            sums[r].template add<true>(query(r, k % S::kTiles, kFour && k >= S::kTiles), b);
        }
        const float2 scale = __half22float2(scales[n * kTogether * 4]);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          const float of_mean = page == 0 ? mean[r][0] : mean[r][1];
          score[r][kScores + 2 * n] = fmaf(sums[r][0], scale.x * row_scale[r], of_mean);
          score[r][kScores + 2 * n + 1] = fmaf(sums[r][1], scale.y * row_scale[r], of_mean);
        }
      }
      queue.release(pieces);
      if (p.cap > 0) {
#pragma unroll
        for (int r = 0; r < kBlocks; ++r)
#pragma unroll
          for (int n = 0; n < kScores; ++n) score[r][kScores + n] = soft_cap(p.cap, score[r][kScores + n]);
      }
      const int at = first_page + i + page;
      if (at < plain.x || at > plain.y) {
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) hide_page<kScores, false>(p, here.b, head, row0 + r * kBlockRows + row, at, score[r] + kScores, token);
      }
    }

    // Weights, and the next product's operand: p times the value's scale, in 16 bits as two bytes.
    slot[0] = queue.wait();
    slot[1] = two ? queue.template wait<1>() : slot[0];  // read with weights of 0
    if (first_page + i + (two ? 1 : 0) == broken) {
      // Scales behind the last token are anything; its weight is 0, and 0 times NaN is NaN.
      auto* scales = reinterpret_cast<unsigned short*>(slot[1] + p.value_scales);
      for (int j = p.sequences[here.b].last_page_tokens + lane; j < kPageTokens; j += kLanes) scales[j] = 0;
      fence_shared_writes();
      __syncwarp();
    }
    uint4 weights[kBlocks][2][2];  // of page, even and odd groups of 8 tokens
    float step[kBlocks];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float largest = score[r][0];
#pragma unroll
      for (int n = 1; n < 2 * kScores; ++n) largest = fmaxf(largest, score[r][n]);
      largest = quad_max(largest);
      if (kFour) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 16));
      const float m = state.raise(r, largest);
      float sum = 0, top = 0;
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
        const int page = n / (kScores / 2), pair = n % (kScores / 2);
        const float2 scale = __half22float2(reinterpret_cast<const __half2*>(slot[page] + p.value_scales)[pair * (kFour ? 8 : 4) + odd * 4 + t]);
        const float w0 = exp2_fast(score[r][2 * n] - m), w1 = exp2_fast(score[r][2 * n + 1] - m);
        sum += w0 + w1;
        score[r][2 * n] = w0 * scale.x;
        score[r][2 * n + 1] = w1 * scale.y;
        top = fmaxf(top, fmaxf(score[r][2 * n], score[r][2 * n + 1]));
      }
      state.l[r] += sum;
      top = quad_max(top);
      step[r] = top * (1.0f / 65535.0f);
      const float inverse = top > 0 ? __fdividef(65535.0f, top) : 0.0f;
#pragma unroll
      for (int page = 0; page < 2; ++page)
#pragma unroll
        for (int c = 0; c < (kFour ? 1 : 2); ++c) {
          uint32_t low[2], high[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int n = kFour ? 4 * h + e : 8 * h + 4 * (e / 2) + 2 * c + e % 2;
              x[e] = __float_as_uint(fmaf(score[r][page * kScores + n], inverse, 8388608.0f));
            }
            const uint32_t ab = __byte_perm(x[0], x[1], 0x5410), cd = __byte_perm(x[2], x[3], 0x5410);
            low[h] = __byte_perm(ab, cd, 0x6420);
            high[h] = __byte_perm(ab, cd, 0x7531);
          }
          const uint4 both = {high[0], low[0], high[1], low[1]}, none = {};
          if (kFour) {
            weights[r][page][0] = odd ? none : both;
            weights[r][page][1] = odd ? both : none;
          } else {
            weights[r][page][c] = both;
          }
        }
    }
    // Values: eight channels at a time. A page alone is not multiplied as two.
    const auto values = [&](auto together) {
      uint4 words[2] = {};
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        Sums sums[kBlocks];
#pragma unroll
        for (int page = 0; page < decltype(together)::value; ++page) {
          if (n % 2 == 0) words[page] = reinterpret_cast<const uint4*>(slot[page])[n / 2 * kLanes + lane];
          const Levels8 even = levels_of(n % 2 == 0 ? words[page].x : words[page].z, p.value);
          const Levels8 odds = levels_of(n % 2 == 0 ? words[page].y : words[page].w, p.value);
#pragma unroll
          for (int r = 0; r < kBlocks; ++r) {
            sums[r].template add<false>(weights[r][page][0], even);
            sums[r].template add<false>(weights[r][page][1], odds);
          }
        }
#pragma unroll
        for (int r = 0; r < kBlocks; ++r)
#pragma unroll
          for (int e = 0; e < 2; ++e) state.o[r][n][e] = fmaf(sums[r][e], step[r], state.o[r][n][e]);
      }
    };
    if (two) values(std::integral_constant<int, 2>());
    else values(std::integral_constant<int, 1>());
    queue.release(pieces);
    if (two) queue.release(pieces);
  }
}

}  // namespace kv4::cuda
