// The rows of attend_wide: products with keys, softmax, products with values.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/attend_rotate.cuh"
#include "cuda/attend_wide_shape.cuh"

namespace kv4::cuda {

// Their values are final here, so that the compiler moves nothing that makes them behind the products' beginning.
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&x)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

// Four warps and their 64 rows: lane 4g + t of warp w has rows 16w + g and 16w + g + 8.
template <int D>
struct WideRows {
  using S = WideShape<D>;
  using Weights = uint32_t[kPageTokens / 16][4];
  using Scores = float[kPageTokens / 8][4];
  const AttendParams& p;
  unsigned char* const memory;
  const WideBarriers barriers;
  const int lane, g, t;
  uint32_t queries[S::kSteps][4];
  float o[D / 8][4], mean[4];
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};

  __device__ __forceinline__ WideRows(const AttendParams& params, unsigned char* shared, WideBarriers its_barriers)
      : p(params), memory(shared), barriers(its_barriers), lane(threadIdx.x % kLanes), g(lane / 4), t(lane % 4) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0;
    mean[0] = mean[1] = mean[2] = mean[3] = 0;
  }

  // The rows' operands: first halves in registers, second halves in `rest`, for means. Row r of the group's is row
  // row0 + r of the head's, of whose `rows` there are. `to_units`: from scores to products.
  __device__ __forceinline__ void load(int first_block, int row0, int rows, float to_units, unsigned char* rest) {
    const int warp_row = static_cast<int>(threadIdx.x) % kGroupThreads / kLanes * 16 + g;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_group = warp_row + 8 * r, row = row0 + in_group, index = first_block + row / kBlockRows;
      const bool there = row < rows;
      const uint4* block = p.operands + static_cast<std::size_t>(there ? index : first_block) * operand_words(D);
      const float scale =
          there
              ? p.row_scale[static_cast<std::size_t>(index) * 2 * kBlockRows + kBlockRows + row % kBlockRows] * to_units
              : 0.0f;
#pragma unroll
      for (int c = 0; c < S::kPadded / 8; ++c) {  // pieces of 8 channels, of which this lane has two
        const int channel = c / 4 * 32 + c % 4 * 4 + t % 2 * 16;
        const auto* from = reinterpret_cast<const uint32_t*>(block +
                                                             mean_operand<D>(row % kBlockRows / 4, channel / 32) +
                                                             row % 4 * 8 + channel % 32 / 8) +
                           channel % 8 / 4;
        float x[2] = {0, 0};
        if (there) {
          const float2 a = unpack_halves(false, from[0]), b = unpack_halves(false, from[2]);
          const float2 a_rest = unpack_halves(false, from[16]), b_rest = unpack_halves(false, from[18]);
          x[0] = t / 2 == 0 ? a.x + a_rest.x : a.y + a_rest.y;
          x[1] = t / 2 == 0 ? b.x + b_rest.x : b.y + b_rest.y;
        }
        x[0] *= scale;
        x[1] *= scale;
        const uint32_t whole = pack_halves(false, x[0], x[1]);
        const float2 back = unpack_halves(false, whole);
        queries[c / 2][c % 2 * 2 + r] = whole;
        *reinterpret_cast<uint32_t*>(rest + c / 8 * S::kRestHalf + swizzled(in_group, c % 8) + t * 4) =
            pack_halves(false, x[0] - back.x, x[1] - back.y);
      }
    }
  }

  // Products with the means of eight pages, the queries in two halves.
  __device__ __forceinline__ void multiply_means(uint32_t rest) {
    const uint32_t from = shared_address(memory) + S::kMeansAt;
    float sum[1][4];
    products_begin();
#pragma unroll
    for (int k = 0; k < S::kSteps; ++k) {
      const uint64_t columns = swizzled_operand(from + k / 4 * S::kMeanHalf) + k % 4 * kSwizzledStep;
      product<8>(sum, queries[k], columns, k > 0);
      add_product_8(sum, swizzled_operand(rest + k / 4 * S::kRestHalf) + k % 4 * kSwizzledStep, columns);
    }
    products_commit();
    products_wait<0>(sum);
    for (int e = 0; e < 4; ++e) mean[e] = sum[0][e];
  }
  // Starts the products with a page's keys.
  __device__ __forceinline__ void multiply_keys(int stage, Scores& score) const {
    const uint32_t from = shared_address(memory) + stage * S::kKeyBytes;
    products_begin();
#pragma unroll
    for (int k = 0; k < S::kSteps; ++k)
      product<kPageTokens>(score, queries[k], swizzled_operand(from + k / 4 * S::kKeyHalf) + k % 4 * kSwizzledStep,
                           k > 0);
    products_commit();
  }
  __device__ __forceinline__ void multiply_values(int stage, Weights& weights) {
    const uint32_t from = shared_address(memory) + S::kValuesAt + stage * S::kValueBytes;
    products_begin();
#pragma unroll
    for (int k = 0; k < kPageTokens / 16; ++k)
      product<D>(o, weights[k], swizzled_operand(from) + k * kSwizzledStep, true);
    products_commit();
  }

  // Hides from each row what it does not see of a page that begins at `position`.
  __device__ __forceinline__ void hide(const Sight& sight, int row0, long long position, Scores& score) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const longlong2 seen = sight.range(p, row0 + 8 * r);
      const int first = static_cast<int>(max(seen.x - position, 0ll)),
                last = static_cast<int>(min(seen.y - position, static_cast<long long>(kPageTokens - 1)));
#pragma unroll
      for (int n = 0; n < kPageTokens / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = token_of(8 * n) + (2 * t + e) % 4 * 16 + (2 * t + e) / 4;
          if (token < first || token > last) score[n][2 * r + e] = -INFINITY;
        }
    }
  }

  // What a lane's columns are scored with.
  using Factors = float4[kPageTokens / 8];
  __device__ __forceinline__ const WideFactors& factors_of(int stage) const {
    return reinterpret_cast<const WideFactors*>(memory + S::kFactorsAt)[stage];
  }
  __device__ __forceinline__ void load_factors(int stage, Factors& of) const {
#pragma unroll
    for (int n = 0; n < kPageTokens / 8; ++n) of[n] = factors_of(stage).of[4 * n + t];
  }

  // q'.m' of a page, of the eight whose means were multiplied.
  __device__ __forceinline__ void load_offset(int page, float unit, float (&offset)[2]) const {
    const bool second = page % 2 == 1;
    const int from = (lane & ~3) + page / 2;
    offset[0] = __shfl_sync(kAll, second ? mean[1] : mean[0], from) * unit;
    offset[1] = __shfl_sync(kAll, second ? mean[3] : mean[2], from) * unit;
  }

  // Products to scores plus log2 of their values' scales, without `offset`, which becomes 0 where a cap needs it added.
  __device__ __forceinline__ void scores_of(const Factors& of, float (&offset)[2], Scores& score) const {
    if (p.cap > 0) {
#pragma unroll
      for (int n = 0; n < kPageTokens / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          score[n][e] = fmaf(p.cap, tanhf(fmaf(score[n][e], e % 2 == 0 ? of[n].x : of[n].y, offset[e / 2])),
                             e % 2 == 0 ? of[n].z : of[n].w);
      offset[0] = offset[1] = 0;
    } else {
#pragma unroll
      for (int n = 0; n < kPageTokens / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          score[n][e] = fmaf(score[n][e], e % 2 == 0 ? of[n].x : of[n].y, e % 2 == 0 ? of[n].z : of[n].w);
    }
  }
  // Scores to weights; what to multiply earlier sums by.
  __device__ __forceinline__ void weigh(const float (&offset)[2], int stage, Scores& score, float (&shrink)[2]) {
    float2 back[kPageTokens / 8];
#pragma unroll
    for (int n = 0; n < kPageTokens / 8; ++n) back[n] = factors_of(stage).reciprocals[4 * n + t];
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest[2] = {score[0][2 * r], score[0][2 * r + 1]};
#pragma unroll
      for (int n = 1; n < kPageTokens / 8; ++n) {
        largest[0] = fmaxf(largest[0], score[n][2 * r]);
        largest[1] = fmaxf(largest[1], score[n][2 * r + 1]);
      }
      const float m_new = fmaxf(m[r], quad_max(fmaxf(largest[0], largest[1])) + offset[r]),
                  zero = m_new == -INFINITY ? 0.0f : m_new;
      shrink[r] = exp2_fast(m[r] - zero);
      m[r] = m_new;
      base[r] = zero - offset[r];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum[2] = {l[r] * shrink[r], 0};
#pragma unroll
      for (int n = 0; n < kPageTokens / 8; ++n) {
        score[n][2 * r] = exp2_fast(score[n][2 * r] - base[r]);
        score[n][2 * r + 1] = exp2_fast(score[n][2 * r + 1] - base[r]);
        sum[0] = fmaf(score[n][2 * r], back[n].x, sum[0]);
        sum[1] = fmaf(score[n][2 * r + 1], back[n].y, sum[1]);
      }
      l[r] = sum[0] + sum[1];
    }
  }
  static __device__ __forceinline__ void pack(const Scores& score, Weights& weights) {
#pragma unroll
    for (int n = 0; n < kPageTokens / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        weights[n / 2][n % 2 * 2 + r] = pack_halves(false, score[n][2 * r], score[n][2 * r + 1]);
  }
  __device__ __forceinline__ void leave(bool values, int stage) const {
    __syncwarp();
    if (lane == 0) arrive_at(barriers.empty(values, stage));
  }

  __device__ __forceinline__ void run(const WideRange& range, const Sight& sight, const SequenceView& s, int row0,
                                      float unit, uint32_t rest) {
    pin(queries);
    Weights weights;
    float shrink[2];
    Factors of;
    float offset[2] = {0, 0};
    WideStage of_keys, of_values;
    // What a page's scores need is loaded before its products are queued: shared memory serves a warp in order.
    const auto look_ahead = [&] {
      wait_at(barriers.full(false, of_keys.at), of_keys.parity);
      load_factors(of_keys.at, of);
    };
    const auto start_keys = [&](int i, Scores& score) {
      if (p.mean) {
        if (i % kMeanPages == 0) multiply_means(rest);
        load_offset(i % kMeanPages, unit, offset);
      }
      multiply_keys(of_keys.at, score);
    };
    const auto weigh_page = [&](int i, Scores& score) {
      scores_of(of, offset, score);
      if (i < range.first_plain || i >= range.behind_plain)
        hide(sight, row0, s.pages_position + static_cast<long long>(range.first + i) * kPageTokens, score);
      weigh(offset, of_keys.at, score, shrink);
      leave(false, of_keys.at);
      of_keys.next();
    };
    look_ahead();
    {
      Scores score;
      start_keys(0, score);
      products_wait<0>(score);
      weigh_page(0, score);
      pack(score, weights);
    }
#pragma unroll 1
    for (int i = 1; i < range.count; ++i, of_values.next()) {
      look_ahead();
      pin(weights);
      Scores score;
      start_keys(i, score);
      wait_at(barriers.full(true, of_values.at), of_values.parity);
      multiply_values(of_values.at, weights);
      products_wait<1>(score);
      weigh_page(i, score);
      products_wait<0>(o);
      pin(weights);
      leave(true, of_values.at);
      if (__any_sync(kAll, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] *= shrink[e / 2];
      }
      pack(score, weights);
    }
    pin(weights);
    wait_at(barriers.full(true, of_values.at), of_values.parity);
    multiply_values(of_values.at, weights);
    products_wait<0>(o);
  }

  // As partial states (State::put) of the segments that the rows are of. state(row): that of the head's row, and the
  // row's place in it.
  template <class StateOf>
  __device__ __forceinline__ void put(int row0, int rows, int segment_rows, StateOf state) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(l[r]);
      const int row = row0 + 8 * r, within = row % segment_rows;
      if (row >= rows) continue;
      float* const to = state(row / segment_rows);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(to + within * D + 8 * n + 2 * t) = {o[n][2 * r] * 0x1p24f,
                                                                       o[n][2 * r + 1] * 0x1p24f};
      if (t == 0) {
        to[segment_rows * D + within] = m[r];
        to[segment_rows * (D + 1) + within] = sum;
      }
    }
  }
};

}  // namespace kv4::cuda
