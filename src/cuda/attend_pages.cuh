// A run of pages of one segment, read by one warp, a page at a time: scores, one step of their weights, values.
//
// The page is A of the products, 16 tokens or 16 channels of it, and the queries are B: a tile of four query rows fills
// the eight columns, each row's high bytes beside its low ones. A lane then has scores of eight tokens for every tile,
// and the products are fully used from four rows on.
#pragma once

#include "cuda/attend_items.cuh"
#include "cuda/attend_mask.cuh"
#include "cuda/attend_rotate.cuh"
#include "cuda/attend_state.cuh"
#include "cuda/codes.cuh"

namespace kv4::cuda {

constexpr int kTileRows = 4;
constexpr int tiles_of(Rows rows) { return rows == Rows::four ? 1 : 2 * blocks_of(rows); }

// A warp's softmax state of a run: lane 4g + t holds rows 4j + t of tiles j, and of those channels 16n + g and
// 16n + 8 + g; l covers the lane's own tokens.
template <int D, int kTiles>
struct PageState {
  float o[kTiles][D / 16][2];
  float m[kTiles], l[kTiles];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      m[j] = -INFINITY;
      l[j] = 0;
#pragma unroll
      for (int n = 0; n < D / 16; ++n) o[j][n][0] = o[j][n][1] = 0;
    }
  }
  // Raises the maximum of tile j to at least `largest`, which all lanes of a row share; returns what to subtract.
  __device__ __forceinline__ float raise(int j, float largest) {
    const float m_new = fmaxf(m[j], largest);
    if (__any_sync(kAll, m_new > m[j])) {
      const float shrink = m_new == -INFINITY ? 1.0f : exp2_fast(m[j] - m_new);
      l[j] *= shrink;
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        o[j][n][0] *= shrink;
        o[j][n][1] *= shrink;
      }
      m[j] = m_new;
    }
    return m_new == -INFINITY ? 0.0f : m_new;
  }
  // As a partial state of kRows rows (State::put), of the first `rows` rows.
  template <int kRows, int kPitch>
  __device__ __forceinline__ void put(float* out, int rows, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float sum = octet_sum(l[j]);
      const int row = j * kTileRows + t;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < D / 16; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[row * kPitch + n * 16 + e * 8 + g] = o[j][n][e];
      if (g == 0) {
        out[kRows * kPitch + row] = m[j];
        out[kRows * (kPitch + 1) + row] = sum;
      }
    }
  }
};

// Two fragments of A, of the levels of 16 x 32 codes: `low` holds rows g, `high` rows g + 8 (layout.h). Positive levels
// and 0, then -1 for those and the others less one: added up, all levels less one. So a sum that starts from the sum of
// B's column is that of levels.
struct PageTiles {
  uint4 positive, others;
};
__device__ __forceinline__ PageTiles page_tiles(uint32_t low, uint32_t high, const Tables& tables) {
  const Levels8 a = levels_of(low, tables), b = levels_of(high, tables);
  return {{a.positive.x, b.positive.x, a.positive.y, b.positive.y},
          {a.negative.x, b.negative.x, a.negative.y, b.negative.y}};
}
// Of narrow codes one fragment is enough.
template <int kBits>
__device__ __forceinline__ auto tiles_of_codes(uint32_t low, uint32_t high, const Tables& tables) {
  if constexpr (is_narrow(kBits)) {
    const uint2 a = narrow_levels(low, tables), b = narrow_levels(high, tables);
    return uint4{a.x, b.x, a.y, b.y};
  } else {
    return page_tiles(low, high, tables);
  }
}
// sum = c + the products of levels and b.
template <bool kSignedB>
__device__ __forceinline__ void multiply_levels(int (&sum)[4], const PageTiles& a, uint2 b, const int (&c)[4]) {
  mma_bytes<true, kSignedB>(sum, a.positive, b, c);
  mma_bytes<true, kSignedB>(sum, a.others, b);
}
template <bool kSignedB>
__device__ __forceinline__ void multiply_levels(int (&sum)[4], const uint4& a, uint2 b, const int (&c)[4]) {
  mma_bytes<true, kSignedB>(sum, a, b, c);
}
// `tables` as page_tiles takes them. Shuffled from lane 0 so that they stay in registers: nvcc 13.0 moves values that
// it knows to be uniform from uniform registers again for every look-up.
__device__ __forceinline__ Tables page_tables(const Tables& tables) {
  Tables own;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    own.positive[i] = __shfl_sync(kAll, tables.positive[i], 0);
    own.negative[i] = __shfl_sync(kAll, ~tables.negative[i], 0);  // magnitude m below 0: -m - 1, whose sign bit is set
  }
  return own;
}

// A warp's query operands, and its work on a page: means, scores, weights, values.
template <int D, Rows kRows, Codes kCodes>
struct PageReader {
  using S = Shape<D>;
  using State = PageState<D, tiles_of(kRows)>;
  static constexpr int kTiles = tiles_of(kRows), kSteps = S::kTiles;  // of rows; of 32 channels
  static constexpr int kScores = kPageTokens / 8;                     // of a tile and lane: of tokens 8n + g
  static constexpr bool kKept = kTiles * kSteps <= 16;
  static constexpr uint32_t kOnes = 0x01010101;
  using Scores = float[kTiles][kScores];
  // Weights have 16 bits where one tile's two bytes fill a product's columns, else 8: then two tiles share them, which
  // halves the products with values and their sums (docs/cuda.md has what the rounding costs).
  static constexpr bool kBytes = kTiles > 1;
  static constexpr int kPacked = kBytes ? kTiles / 2 : 1;  // operands of weights
  static constexpr float kUnits = kBytes ? 255 : 65535;    // of a page's largest weight
  // Added to sums of 8-bit weights, which stay below 2^21: such an int is the float 1.5 * 2^23 + sum.
  static constexpr int kFloatBits = 0x4b400000;
  static constexpr float kFloatZero = 12582912;
  // p times the value's scale as the next product's operand: even, odd groups of 8 tokens
  using Weights = uint2[kPacked][2];

  const AttendParams& p;
  const uint4* operands;
  const int lane, g, t, half;
  uint2 kept[kKept ? kTiles : 1][kKept ? kSteps : 1] = {};
  int start[kTiles][4];  // the sums of columns, as a product's
  float row_scale[kTiles], mean_scale[kTiles];
  const Tables keys, values;
  // Scales of tokens 8n + g: as two of each matrix, whose rows are octets of tokens.
  const uint32_t scale_row;

  static constexpr __device__ int block_of(int j) { return j / (kBlockRows / kTileRows); }
  static constexpr __device__ int row_of(int j) {  // the tile's first of its block
    return j % (kBlockRows / kTileRows) * kTileRows;
  }

  // `operands`, `scales`: of the segment's first block (attend.h), in shared memory or not: those of the means are read
  // again for every page.
  __device__ __forceinline__ PageReader(const AttendParams& params, const uint4* its_operands, const float* scales,
                                        int its_lane)
      : p(params), operands(its_operands), lane(its_lane), g(its_lane / 4), t(its_lane % 4), half(its_lane / 4 % 2),
        keys(page_tables(params.key)), values(page_tables(params.value)),
        scale_row(static_cast<uint32_t>(its_lane / 8 * 2 + its_lane % 2) * 16) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float* its = scales + block_of(j) * 2 * kBlockRows + row_of(j) + t;
      row_scale[j] = its[0];
      mean_scale[j] = its[kBlockRows];
      start[j][0] = start[j][1] = start[j][2] = start[j][3] = 0;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint2 b = query(j, k);
        if constexpr (kKept) kept[j][k] = b;
        mma_bytes<true, true>(start[j], {kOnes, kOnes, kOnes, kOnes}, b);
      }
    }
  }

  // Column g: row g / 2 of the tile, high bytes or low ones.
  __device__ __forceinline__ uint2 query(int j, int k) const {
    const auto* words = reinterpret_cast<const uint32_t*>(operands + block_of(j) * operand_words(D) + k * kLanes +
                                                          (row_of(j) + g / 2) * 4 + t) +
                        half;
    return {words[0], words[2]};
  }
  __device__ __forceinline__ uint2 key_operand(int j, int k) const {
    if constexpr (kKept) return kept[j][k];
    else return query(j, k);
  }

  // q'.mu', by products whose rows g of A are one half of the page's mean, g + 8 the other.
  __device__ __forceinline__ void means(const unsigned char* slot, float (&mean)[kTiles]) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mean[j] = 0;
    if (!p.mean) return;
    float c[kTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint4 a = {};
      if (D % 32 == 0 || k * 32 + t * 8 < D)
        a = *reinterpret_cast<const uint4*>(slot + mean_at<D, kCodes>(p) + (k * 32 + t * 8) * 2);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 b = operands[block_of(j) * operand_words(D) + mean_operand<D>(row_of(j) / kTileRows, k) + lane];
        mma_halves(false, c[j][0], a, b.x, b.y);
        mma_halves(false, c[j][1], a, b.z, b.w);
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mean[j] = (c[j][0][0] + c[j][0][1] + (c[j][1][2] + c[j][1][3])) * mean_scale[j];
  }

  // Codes of 32 channels k of two octets of tokens, 2n and 2n + 1, of all lanes' words four to a load.
  template <int kBits>
  static __device__ __forceinline__ void key_codes(const unsigned char* slot, int n, int k, int lane, uint4 (&words)[2],
                                                   uint32_t (&of)[2]) {
    // Whether a group holds two blocks of both octets (layout.h).
    constexpr bool kBoth = is_narrow(kBits) ? kSteps % 2 == 0 : kSteps == 2;
    if (kBoth && k % 2 == 0) words[0] = group_words<kBits>(slot, n * (kSteps / 2) + k / 2, lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int f = (2 * n + e) * kSteps + k;
      if constexpr (kBoth) {
        of[e] = word_of(words[0], e * 2 + k % 2);
      } else if constexpr (kSteps % 4 == 0) {
        if (k % 4 == 0) words[e] = group_words<kBits>(slot, f / 4, lane);
        of[e] = word_of(words[e], f % 4);
      } else {
        of[e] = group_word<kBits>(slot, f, lane);
      }
    }
  }

  __device__ __forceinline__ void scores(const unsigned char* slot, const float (&mean)[kTiles], Scores& score) const {
    with_bits<kCodes>(p.key_bits, [&](auto bits) { scores_of<decltype(bits)::value>(slot, mean, score); });
  }
  template <int kBits>
  __device__ __forceinline__ void scores_of(const unsigned char* slot, const float (&mean)[kTiles],
                                            Scores& score) const {
    const uint4 pairs = load_matrices<true>(shared_address(slot + scales_at<D, kCodes>(p)) + scale_row);
    const uint32_t scale[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    uint4 words[2] = {};
#pragma unroll
    for (int n = 0; n < kPageTokens / 16; ++n) {
      int sums[kTiles][4];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t of[2];
        key_codes<kBits>(slot, n, k, lane, words, of);
        const auto a = tiles_of_codes<kBits>(of[0], of[1], keys);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint2 b = key_operand(j, k);
          if (k > 0) multiply_levels<true>(sums[j], a, b, sums[j]);
          else if constexpr (is_narrow(kBits)) multiply_levels<true>(sums[j], a, b, {0, 0, 0, 0});
          else multiply_levels<true>(sums[j], a, b, start[j]);
        }
      }
      const float2 of_token = unpack_halves(false, scale[n]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        score[j][2 * n] = fmaf(static_cast<float>(sums[j][0] * 256 + sums[j][1]), of_token.x * row_scale[j], mean[j]);
        score[j][2 * n + 1] =
            fmaf(static_cast<float>(sums[j][2] * 256 + sums[j][3]), of_token.y * row_scale[j], mean[j]);
      }
    }
  }

  // A column's 16 tokens of a lane come from two lanes: 8n + 2t and 8n + 2t + 1. Lanes of even g hand over `high` where
  // those of odd g hand over `low`, then the other way round, so that each of the two columns of a row gets its own
  // from both. Bytes are of groups n = odd, odd + 2, ...
  __device__ __forceinline__ uint2 exchange(uint32_t high, uint32_t low) const {
    const uint32_t order[2] = {half == 0 ? 0x5140u : 0x1504u, half == 0 ? 0x7362u : 0x3726u};
    const int from_lane = (2 * t + half) * 4 + g / 2;
    const uint32_t first = __shfl_sync(kAll, half == 0 ? high : low, from_lane);
    const uint32_t then = __shfl_sync(kAll, half == 0 ? low : high, from_lane ^ 4);
    return {look_up(first, then, order[0]), look_up(first, then, order[1])};
  }
  // Weights of groups n = odd, odd + 2, ... as whole numbers of kUnits, in the low bits of each word.
  static __device__ __forceinline__ void whole(const float (&score)[kScores], float inverse, int odd,
                                               uint32_t (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = __float_as_uint(fmaf(score[2 * e + odd], inverse, 8388608.0f));
  }
  static __device__ __forceinline__ uint32_t low_bytes(const uint32_t (&x)[4]) {
    return __byte_perm(__byte_perm(x[0], x[1], 0x0040), __byte_perm(x[2], x[3], 0x0040), 0x5410);
  }

  // Scores to weights, in units of `step` of each tile; the softmax state's maximum and sum follow.
  __device__ __forceinline__ void weigh(const unsigned char* slot, Scores& score, State& state, Weights& weights,
                                        float (&step)[kTiles]) const {
    const uint4 pairs = load_matrices<true>(shared_address(slot + p.value_scales) + scale_row);
    const uint32_t scale[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    float inverse[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float largest = score[j][0];
#pragma unroll
      for (int n = 1; n < kScores; ++n) largest = fmaxf(largest, score[j][n]);
      const float m = state.raise(j, octet_max(largest));
      float sum = 0, top = 0;
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
        const float2 of_token = unpack_halves(false, scale[n / 2]);
        const float w = exp2_fast(score[j][n] - m);
        sum += w;
        score[j][n] = w * (n % 2 == 0 ? of_token.x : of_token.y);
        top = fmaxf(top, score[j][n]);
      }
      state.l[j] += sum;
      top = octet_max(top);
      step[j] = top * (1.0f / kUnits);
      inverse[j] = top > 0 ? __fdividef(kUnits, top) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPacked; ++i)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        uint32_t x[4];
        if constexpr (kBytes) {
          whole(score[2 * i], inverse[2 * i], odd, x);
          const uint32_t first = low_bytes(x);
          whole(score[2 * i + 1], inverse[2 * i + 1], odd, x);
          weights[i][odd] = exchange(first, low_bytes(x));
        } else {
          whole(score[i], inverse[i], odd, x);
          const uint32_t ab = __byte_perm(x[0], x[1], 0x5410), cd = __byte_perm(x[2], x[3], 0x5410);
          weights[i][odd] = exchange(__byte_perm(ab, cd, 0x7531), __byte_perm(ab, cd, 0x6420));
        }
      }
  }

  __device__ __forceinline__ void add_values(const unsigned char* slot, const Weights& weights,
                                             const float (&step)[kTiles], State& state) const {
    with_bits<kCodes>(p.value_bits,
                      [&](auto bits) { add_values_of<decltype(bits)::value>(slot, weights, step, state); });
  }
  template <int kBits>
  __device__ __forceinline__ void add_values_of(const unsigned char* slot, const Weights& weights,
                                                const float (&step)[kTiles], State& state) const {
    int of_weights[kPacked][4] = {};
    if constexpr (!is_narrow(kBits)) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          mma_bytes<true, false>(of_weights[i], {kOnes, kOnes, kOnes, kOnes}, weights[i][odd]);
    }
    if constexpr (kBytes) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
#pragma unroll
        for (int& x : of_weights[i]) x += kFloatBits;
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const uint4 words = group_words<kBits>(slot, n, lane);
      int sums[kPacked][4];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const auto a = odd == 0 ? tiles_of_codes<kBits>(words.x, words.z, values)
                                : tiles_of_codes<kBits>(words.y, words.w, values);
#pragma unroll
        for (int i = 0; i < kPacked; ++i)
          multiply_levels<false>(sums[i], a, weights[i][odd], odd == 0 ? of_weights[i] : sums[i]);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum;
          if constexpr (kBytes) sum = __int_as_float(sums[j / 2][2 * e + j % 2]) - kFloatZero;
          else sum = static_cast<float>(sums[j][2 * e] * 256 + sums[j][2 * e + 1]);
          state.o[j][n][e] = fmaf(sum, step[j], state.o[j][n][e]);
        }
    }
  }
};

template <int D, Rows kRows, Codes kCodes, class Slots>
__device__ __forceinline__ void pages_run(const AttendParams& p, Slots& queue, Pieces& pieces,
                                          PageState<D, tiles_of(kRows)>& state, const uint4* operands,
                                          const float* scales, const Cursor& here, int head, int row0, int run,
                                          int lane) {
  using Reader = PageReader<D, kRows, kCodes>;
  constexpr int kTiles = Reader::kTiles, kScores = Reader::kScores;
  const Reader reader(p, operands, scales, lane);
  const int g = lane / 4, t = lane % 4;
  const int first_page = here.item - here.exact_items;
  const int broken = broken_page(p, here.b);
  const int2 plain = plain_pages(p, here.b, head);

#pragma unroll 1
  for (int i = 0; i < run; ++i) {
    unsigned char* slot = queue.wait();
    float mean[kTiles];
    reader.means(slot, mean);
    typename Reader::Scores score;
    reader.scores(slot, mean, score);
    queue.release(pieces);
    if (p.cap > 0) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int n = 0; n < kScores; ++n) score[j][n] = soft_cap(p.cap, score[j][n]);
    }
    const int at = first_page + i;
    if (at < plain.x || at > plain.y) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        hide_page<kScores, true>(p, here.b, head, row0 + j * kTileRows + t, at, score[j],
                                 [g](int n) { return n * 8 + g; });
    }

    slot = queue.wait();
    if (at == broken) {
      // Scales past the last token may be NaN; the weight is 0, but 0 times NaN is NaN.
      auto* behind = reinterpret_cast<unsigned short*>(slot + p.value_scales);
      for (int j = p.sequences[here.b].last_page_tokens + lane; j < kPageTokens; j += kLanes) behind[j] = 0;
      fence_shared_writes();
      __syncwarp();
    }
    typename Reader::Weights weights;
    float step[kTiles];
    reader.weigh(slot, score, state, weights, step);
    reader.add_values(slot, weights, step, state);
    queue.release(pieces);
  }
}

}  // namespace kv4::cuda
