// A run of pages read by a team: each warp computes the scores of its tokens, weights are exchanged, and each sums the
// values of its channels.
#pragma once

#include "cuda/attend_items.cuh"
#include "cuda/attend_mask.cuh"
#include "cuda/attend_rotate.cuh"
#include "cuda/attend_team.cuh"
#include "cuda/codes.cuh"

namespace kv4::cuda {

// The query operands of a warp of a team, and its work on two pages: means, scores, weights, values. kPitch: distance
// of the operands of the segment's blocks.
template <int D, Rows kRowsOf, int kPitch, int kMembers, Codes kCodes>
struct TeamReader {
  using S = Shape<D>;
  static constexpr int kBlocks = blocks_of(kRowsOf), kTiles = S::kTiles;
  static constexpr bool kFour = kRowsOf == Rows::four;
  static constexpr int kSixteens = 4 / kMembers;  // of tokens, whose scores a warp has
  static constexpr int kOctets = kFour ? 1 : 2;   // of each sixteen, whose scores a lane has
  static constexpr int kOfSixteen = 2 * kOctets, kScores = kSixteens * kOfSixteen;  // of a page, row and lane
  static constexpr float kUnits = 65280;  // of the largest weight; its logarithm is off by less than the 255 left over
  // At most 4 rows: rows 4 ... 7 of a product with keys are those again, and a lane takes one of its octets' products.
  // Products with means have them for the second half of the channels.
  static constexpr bool kFolded = kFour && kTiles % 2 == 0;
  static constexpr int kMeanTiles = kFolded ? kTiles / 2 : kTiles;
  using Exchange = TeamExchange<kMembers, kBlocks>;
  using State = TeamState<D, kMembers, kBlocks>;
  using Scores = float[kBlocks][kScores];

  const AttendParams& p;
  const int member, lane, g, t, row, odd;
  const uint4 *keys, *means_of;
  // Beyond d = 128 operands are loaded where they are used: kept in registers, they leave nvcc 13.0 too few to schedule
  // look-ups and products well.
  uint4 q[S::kKept ? kBlocks : 1][S::kKept ? kTiles : 1] = {};
  float row_scale[kBlocks], mean_scale[kBlocks];

  // `operands`: of the segment, in shared memory.
  __device__ __forceinline__ TeamReader(const AttendParams& params, const uint4* operands, const float* scales,
                                        int its_member, int its_lane)
      : p(params), member(its_member), lane(its_lane), g(its_lane / 4), t(its_lane % 4), row(kFour ? g % 4 : g),
        odd(kFour ? g / 4 : 0), keys(operands + (kFour ? its_lane % 16 : its_lane)),
        means_of(operands + mean_operand<D>(row / 4, kFolded && g >= 4 ? kMeanTiles : 0) + row % 4 * 8 + t) {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      row_scale[r] = scales[r * 2 * kBlockRows + row];
      mean_scale[r] = scales[r * 2 * kBlockRows + kBlockRows + (kFolded ? row : g)];
      if constexpr (S::kKept) {
#pragma unroll
        for (int c = 0; c < kTiles; ++c) q[r][c] = keys[r * kPitch + c * kLanes];
      }
    }
  }
  __device__ __forceinline__ uint4 query(int r, int c) const {
    if constexpr (S::kKept) return q[r][c];
    else return load_again(keys + r * kPitch + c * kLanes);
  }
  // Of a page, of score i of a lane.
  __device__ __forceinline__ int token(int i) const {
    return (member * kSixteens + i / kOfSixteen) * 16 + (kFour ? odd : i / 2 % 2) * 8 + 2 * t + i % 2;
  }

  // q'.mu' of both pages: columns of B are both, and both again.
  __device__ __forceinline__ void means(const unsigned char* const (&slot)[2], float (&mean)[kBlocks][2]) const {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) mean[r][0] = mean[r][1] = 0;
    if (!p.mean) return;
    float c[kBlocks][4] = {}, c1[kBlocks][4] = {};  // separate sums: a dependency chain half as long
#pragma unroll 4
    for (int k = 0; k < kMeanTiles; ++k) {
      const int channel = (k + g / 2 * kMeanTiles) * 32 + t * 8;
      uint4 b = {};
      if (g < (kFolded ? 4 : 2) && channel < D)
        b = *reinterpret_cast<const uint4*>((g % 2 == 0 ? slot[0] : slot[1]) + mean_at<D, kCodes>(p) + channel * 2);
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        const uint4 *a = means_of + r * kPitch + 2 * k * kLanes, high = a[0], low = a[4];
        mma_halves(false, c[r], {high.x, low.x, high.z, low.z}, b.x, b.y);
        mma_halves(false, c1[r], {high.y, low.y, high.w, low.w}, b.z, b.w);
      }
    }
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
      for (int page = 0; page < 2; ++page) {
        const float x = (c[r][page] + c[r][page + 2] + (c1[r][page] + c1[r][page + 2])) * mean_scale[r];
        mean[r][page] = __shfl_sync(kAll, x, row * 4);
        if (kFolded) mean[r][page] += __shfl_sync(kAll, x, row * 4 + 17);  // row + 4, columns 2 and 3
      }
    }
  }

  // The codes of 16 tokens' fragments.
  template <int kBits>
  static __device__ __forceinline__ void key_codes(const unsigned char* from, int sixteen, int lane,
                                                   uint32_t (&words)[2 * kTiles]) {
    if constexpr (kTiles % 2 == 0) {
#pragma unroll
      for (int f = 0; f < kTiles / 2; ++f) {
        const uint4 x = group_words<kBits>(from, sixteen * (kTiles / 2) + f, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[is_narrow(kBits) ? i / 2 * kTiles + 2 * f + i % 2 : 4 * f + i] = word_of(x, i);
      }
    } else {
#pragma unroll
      for (int f = 0; f < 2 * kTiles; ++f) words[f] = group_word<kBits>(from, sixteen * 2 * kTiles + f, lane);
    }
  }

  // Of page 0 or 1, this warp's tokens.
  __device__ __forceinline__ void scores(const unsigned char* from, int page, const float (&mean)[kBlocks][2],
                                         Scores& now) const {
    with_bits<kCodes>(p.key_bits, [&](auto bits) { scores_of<decltype(bits)::value>(from, page, mean, now); });
  }
  template <int kBits>
  __device__ __forceinline__ void scores_of(const unsigned char* from, int page, const float (&mean)[kBlocks][2],
                                            Scores& now) const {
    const auto* key_scales = reinterpret_cast<const __half2*>(from + scales_at<D, kCodes>(p)) + t;
#pragma unroll
    for (int j = 0; j < kSixteens; ++j) {
      const int sixteen = member * kSixteens + j;
      uint32_t words[2 * kTiles];
      key_codes<kBits>(from, sixteen, lane, words);
      Sums sums[2][kBlocks];
#pragma unroll
      for (int k = 0; k < kTiles; ++k)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto b = operand_of<kBits>(words[n * kTiles + k], p.key);
#pragma unroll
          for (int r = 0; r < kBlocks; ++r) sums[n][r].template add<true>(query(r, k), b);
        }
      if constexpr (kFour) sums[0][0] = sums[0][0].or_else(odd, sums[1][0]);
#pragma unroll
      for (int n = 0; n < kOctets; ++n) {
        const float2 scale = __half22float2(key_scales[(2 * sixteen + odd + n) * 4]);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          const float added = page == 0 ? mean[r][0] : mean[r][1];
          const int at = j * kOfSixteen + 2 * n;
          now[r][at] = fmaf(sums[n][r][0], scale.x * row_scale[r], added);
          now[r][at + 1] = fmaf(sums[n][r][1], scale.y * row_scale[r], added);
        }
      }
    }
  }

  __device__ __forceinline__ void value_scales(const unsigned char* const (&slot)[2],
                                               float (&value_scale)[2][kScores]) const {
#pragma unroll
    for (int page = 0; page < 2; ++page)
#pragma unroll
      for (int n = 0; n < kScores / 2; ++n) {
        const int octet = (member * kSixteens + n / kOctets) * 2 + odd + n % kOctets;
        const float2 scale =
            __half22float2(reinterpret_cast<const __half2*>(slot[page] + p.value_scales)[octet * 4 + t]);
        value_scale[page][2 * n] = scale.x;
        value_scale[page][2 * n + 1] = scale.y;
      }
  }

  // Each row's largest score of this warp, alone and with its value's scale.
  __device__ __forceinline__ void share_largest(const float (&score)[kBlocks][2][kScores],
                                                const float (&value_scale)[2][kScores], Exchange& exchange) const {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float2 top = {-INFINITY, -INFINITY};
#pragma unroll
      for (int n = 0; n < 2 * kScores; ++n) {
        const float x = score[r][n / kScores][n % kScores];
        top.x = fmaxf(top.x, x);
        // Past the last token NaN, which fmaxf ignores.
        top.y = fmaxf(top.y, x + log2_fast(value_scale[n / kScores][n % kScores]));
      }
      top = {quad_max(top.x), quad_max(top.y)};
      if (kFour) top = {fmaxf(top.x, __shfl_xor_sync(kAll, top.x, 16)), fmaxf(top.y, __shfl_xor_sync(kAll, top.y, 16))};
      if (t == 0 && (!kFour || g < 4)) exchange.largest[member][r * kBlockRows + row] = top;
    }
  }

  // Weights in 16 bits, p times the value's scale, in units of the largest of both pages: `step`.
  __device__ __forceinline__ void share_weights(const float (&score)[kBlocks][2][kScores],
                                                const float (&value_scale)[2][kScores], Exchange& exchange,
                                                State& state, float (&step)[kBlocks]) const {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float2 top = exchange.largest[0][r * kBlockRows + row];
#pragma unroll
      for (int w = 1; w < kMembers; ++w) {
        const float2 other = exchange.largest[w][r * kBlockRows + row];
        top = {fmaxf(top.x, other.x), fmaxf(top.y, other.y)};
      }
      const float m = state.raise(r, top.x);
      const float heaviest = exp2_fast(top.y - m), inverse = heaviest > 0 ? __fdividef(kUnits, heaviest) : 0.0f;
      step[r] = heaviest * (1.0f / kUnits);
#pragma unroll
      for (int page = 0; page < 2; ++page)
#pragma unroll
        for (int n = 0; n < kOctets; ++n) {
          uint32_t pair[kSixteens];  // of tokens 2t and 2t + 1 of each sixteen: high bytes, then low ones
#pragma unroll
          for (int j = 0; j < kSixteens; ++j) {
            uint32_t x[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int i = j * kOfSixteen + 2 * n + e;
              const float weight = exp2_fast(score[r][page][i] - m);
              state.l[r] += weight;
              // Scales past the last token are undefined.
              x[e] = __float_as_uint(fmaf(weight > 0 ? weight * value_scale[page][i] : 0.0f, inverse, 8388608.0f));
            }
            pair[j] = __byte_perm(x[0], x[1], 0x4051);
          }
          auto* to =
              reinterpret_cast<uint32_t*>(exchange.weights + ((page * kOctets + n) * kBlocks + r) * kLanes + lane) +
              member * kSixteens;
          if constexpr (kSixteens == 1) *to = pair[0];
          else
            *reinterpret_cast<uint2*>(to) = {__byte_perm(pair[0], pair[1], 0x5410),
                                             __byte_perm(pair[0], pair[1], 0x7632)};
        }
    }
  }

  // This warp's channels of page 0 or 1. Sums over both would be fewer, but by the stall counts in the machine code
  // that nvcc 13.0 makes of them they would take twice the cycles; the two were not timed against each other.
  __device__ __forceinline__ void add_values(const unsigned char* slot, int page, const Exchange& exchange,
                                             const float (&step)[kBlocks], State& state) const {
    with_bits<kCodes>(p.value_bits,
                      [&](auto bits) { add_values_of<decltype(bits)::value>(slot, page, exchange, step, state); });
  }
  template <int kBits>
  __device__ __forceinline__ void add_values_of(const unsigned char* slot, int page, const Exchange& exchange,
                                                const float (&step)[kBlocks], State& state) const {
    constexpr int kTogether = State::kPairs < 4 / kBlocks ? State::kPairs : 4 / kBlocks;
    uint4 weights[kBlocks][2];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r)
#pragma unroll
      for (int n = 0; n < kOctets; ++n) {
        const uint4 x = exchange.weights[((page * kOctets + n) * kBlocks + r) * kLanes + lane];
        weights[r][n] = kSixteens > 1 ? x
                                      : uint4{__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                                              __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632)};
      }
    if constexpr (kFour) {
      const uint4 both = weights[0][0], none = {};
      weights[0][0] = odd ? none : both;
      weights[0][1] = odd ? both : none;
    }
#pragma unroll
    for (int first = 0; first < State::kPairs; first += kTogether) {
      Sums sums[kTogether][2][kBlocks];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int pair = (first + j) * kMembers + member;
        if (D / 16 % kMembers != 0 && pair >= D / 16) break;
        const uint4 words = group_words<kBits>(slot, pair, lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto even = operand_of<kBits>(n == 0 ? words.x : words.z, p.value),
                     odds = operand_of<kBits>(n == 0 ? words.y : words.w, p.value);
#pragma unroll
          for (int r = 0; r < kBlocks; ++r) {
            sums[j][n][r].template add<false>(weights[r][0], even);
            sums[j][n][r].template add<false>(weights[r][1], odds);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int r = 0; r < kBlocks; ++r)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& o = state.o[r][2 * (first + j) + n][e];
              o = fmaf(sums[j][n][r][e], step[r], o);
            }
    }
  }
};

// A run of pages of one segment, two at a time.
template <int D, Rows kRowsOf, int kPitch, Codes kCodes, int kMembers, class Slots>
__device__ __forceinline__ void team_pages(const AttendParams& p, Slots& queue,
                                           TeamState<D, kMembers, blocks_of(kRowsOf)>& state,
                                           TeamExchange<kMembers, blocks_of(kRowsOf)>& exchange, const uint4* operands,
                                           const float* scales, const Cursor& here, int head, int row0, int run,
                                           int team, int member, int lane) {
  using Reader = TeamReader<D, kRowsOf, kPitch, kMembers, kCodes>;
  constexpr int kBlocks = Reader::kBlocks, kScores = Reader::kScores;
  const Reader reader(p, operands, scales, member, lane);
  const int first_page = here.item - here.exact_items;
  const int2 plain = plain_pages(p, here.b, head);

#pragma unroll 1
  for (int i = 0; i < run; i += 2) {
    const int count = min(2, run - i);
    const unsigned char* slot[2];
    slot[0] = queue.wait(0);
    slot[1] = count == 2 ? queue.wait(1) : slot[0];
    float mean[kBlocks][2];
    reader.means(slot, mean);
    float score[kBlocks][2][kScores];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r)
#pragma unroll
      for (int n = 0; n < kScores; ++n) score[r][1][n] = -INFINITY;
#pragma unroll 1
    for (int page = 0; page < count; ++page) {
      typename Reader::Scores now;
      reader.scores(page == 0 ? slot[0] : slot[1], page, mean, now);
      if (p.cap > 0) {
#pragma unroll
        for (int r = 0; r < kBlocks; ++r)
#pragma unroll
          for (int n = 0; n < kScores; ++n) now[r][n] = soft_cap(p.cap, now[r][n]);
      }
      const int at = first_page + i + page;
      if (at < plain.x || at > plain.y) {
#pragma unroll
        for (int r = 0; r < kBlocks; ++r)
          hide_page<kScores, true>(p, here.b, head, row0 + r * kBlockRows + reader.row, at, now[r],
                                   [&reader](int n) { return reader.token(n); });
      }
#pragma unroll
      for (int r = 0; r < kBlocks; ++r)
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
          if (page == 0) score[r][0][n] = now[r][n];
          else score[r][1][n] = now[r][n];
        }
    }
    queue.pop(count);

    slot[0] = queue.wait(0);
    slot[1] = count == 2 ? queue.wait(1) : slot[0];
    float value_scale[2][kScores];
    reader.value_scales(slot, value_scale);
    reader.share_largest(score, value_scale, exchange);
    meet_team<kMembers>(team);
    float step[kBlocks];
    reader.share_weights(score, value_scale, exchange, state, step);
    meet_team<kMembers>(team);
#pragma unroll 1
    for (int page = 0; page < count; ++page)
      reader.add_values(page == 0 ? slot[0] : slot[1], page, exchange, step, state);
    queue.pop(count);
  }
}

}  // namespace kv4::cuda
