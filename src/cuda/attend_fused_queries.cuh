// The queries of a segment as the readers' operands: divided by lambda, rotated, quantised, in shared memory.
#pragma once

#include "cuda/attend_fused_shape.cuh"
#include "cuda/attend_rotate.cuh"

namespace kv4::cuda {

// Tiles of 8 columns of a rotation's matrix that a warp multiplies by: `first`, `first` + `apart`, ... The first kAhead
// are loaded before the rows have arrived.
template <int D, int kAheadOf>
struct RotationTiles {
  static constexpr int kSteps = D / 16, kTiles = D / 8, kAhead = kAheadOf;
  uint4 m[kAhead][kSteps];

  __device__ __forceinline__ void load(const PackedMatrix& matrix, int i, int n, int lane) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      if (n < kTiles) m[i][k] = __ldg(matrix.words + (n * kSteps + k) * kLanes + lane);
  }
  __device__ __forceinline__ void prefetch(const PackedMatrix& matrix, int first, int apart, int lane) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(matrix, i, first + i * apart, lane);
    // The others are prefetched into L2.
    for (int n = first + kAhead * apart; n < kTiles; n += apart)
      for (int i = lane * 8; i < kSteps * kLanes; i += kLanes * 8) prefetch_l2(matrix.words + n * kSteps * kLanes + i);
  }
  // f(block, n, i, c0, c1): columns 8n + 2t and + 1 of row g of each block, n of load i, in units of the row's and the
  // matrix's scale.
  template <int kBlocks, class F>
  __device__ __forceinline__ void multiply(const PackedMatrix& matrix, const uint4* fragments, int first, int apart,
                                           int lane, F f) {
    for (int n0 = first; n0 < kTiles; n0 += kAhead * apart) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int n = n0 + i * apart;
        if (n >= kTiles) break;
        if (n0 != first) load(matrix, i, n, lane);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          float high[4] = {}, low[4] = {};  // separate sums: a dependency chain half as long
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            const uint4 a = fragments[(r * kSteps + k) * kLanes + lane];
            mma_halves(false, high, a, m[i][k].x, m[i][k].y);
            mma_halves(false, low, a, m[i][k].z, m[i][k].w);
          }
          f(r, n, i, (high[0] + high[2]) + (low[0] + low[2]), (high[1] + high[3]) + (low[1] + low[3]));
        }
      }
    }
  }
};

// Channels c and c + 1 of a row as the operand of 16-bit products whose rows are halves: `words` of the row's block.
__device__ __forceinline__ void put_halves(uint32_t* words, bool bf16, int row, int c, float a, float b) {
  uint32_t* to = words + (c / 16 * kLanes + row * 4 + c % 8 / 2) * 4 + c % 16 / 8 * 2;
  const uint32_t high = pack_halves(bf16, a, b);
  const float2 back = unpack_halves(bf16, high);
  *reinterpret_cast<uint2*>(to) = {high, pack_halves(bf16, a - back.x, b - back.y)};
}

// attend_prepare's work for one segment, into shared memory, by kWarps warps with a barrier of their own. `y`:
// [kRows][kPitch]. `scales`: as row_scale. Each warp's first row and lambda are already being loaded.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void rotate_queries(
    const AttendParams& p, int b, int head, int row0, QueryRow<D>& first,
    RotationTiles<D, FusedShape<D, kSegmentRows, kReaders>::kAheadFirst>& columns, uint4* operands, float* scales,
    float* y, uint4* fragments, int warp, int lane) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  __shared__ float largest[F::kRows];
  const int g = lane / 4, t = lane % 4;
  const bool rotated = p.dual.words != nullptr;
  constexpr int kPairs = QueryRow<D>::kPairs, kQuads = (pad_channels(D) / 4 + kLanes - 1) / kLanes;
#pragma unroll 1
  for (int r = warp; r < F::kRows; r += F::kWarps) {
    float2 over[kPairs];
    float top = 0;
    if (r != warp) first.load(p, p.sequences[b], head, row0 + r, lane);
    float2 x[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x[i] = first(p, i);
      over[i] = {x[i].x / first.lambda[i].x, x[i].y / first.lambda[i].y};
      top = fmaxf(top, fmaxf(fabsf(over[i].x), fabsf(over[i].y)));
    }
    top = warp_max(top);
    const float inverse = top > 0 ? 1.0f / top : 0.0f;
    uint4* block = operands + r / kBlockRows * operand_words(D);
    auto* exact = reinterpret_cast<uint32_t*>(block + (operand_bytes_tiles(D) + operand_mean_steps(D)) * kLanes);
    auto* words = reinterpret_cast<uint32_t*>(fragments + r / kBlockRows * F::kSteps * kLanes);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * (lane + i * kLanes);
      if (c >= D) continue;
      put_halves(exact, p.bf16, r % kBlockRows, c, x[i].x, x[i].y);
      if (rotated) put_halves(words, false, r % kBlockRows, c, over[i].x * inverse, over[i].y * inverse);
      else *reinterpret_cast<float2*>(y + r * F::kPitch + c) = over[i];
    }
    if (lane == 0) largest[r] = top;
  }
  F::meet();
  if (rotated) {
    columns.template multiply<F::kBlocks>(
        p.dual, fragments, warp, F::kWarps, lane, [&](int block, int n, int, float c0, float c1) {
          const int r = block * kBlockRows + g;
          const float scale = largest[r] * p.dual.scale;
          *reinterpret_cast<float2*>(y + r * F::kPitch + n * 8 + 2 * t) = {c0 * scale, c1 * scale};
        });
    F::meet();
  }
#pragma unroll 1
  for (int r = warp; r < F::kRows; r += F::kWarps) {
    float4 x[kQuads];
    float top = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int c = 4 * (lane + i * kLanes);
      x[i] = c < D ? *reinterpret_cast<const float4*>(y + r * F::kPitch + c) : float4{};
      top = max_or_nan(top,
                       max_or_nan(max_or_nan(fabsf(x[i].x), fabsf(x[i].y)), max_or_nan(fabsf(x[i].z), fabsf(x[i].w))));
    }
    top = warp_max_or_nan(top);  // a query with NaN has scores of NaN, whatever else they are made of
    const float to_units = top > 0 ? 32512.0f / top : 0.0f, to_one = top > 0 ? 1.0f / top : 0.0f;
    uint4* block = operands + r / kBlockRows * operand_words(D);
    auto* bytes = reinterpret_cast<uint32_t*>(block);
    const int row = r % kBlockRows;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int c = 4 * (lane + i * kLanes);
      if (c >= pad_channels(D)) continue;
      const float values[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
      uint32_t high = 0, low = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = __float2int_rn(values[j] * to_units);
        high |= (static_cast<uint32_t>((n + 128) >> 8) & 255) << 8 * j;
        low |= (static_cast<uint32_t>(n) & 255) << 8 * j;
      }
      *reinterpret_cast<uint2*>(bytes + (c / 32 * kLanes + row * 4 + c % 16 / 4) * 4 + c % 32 / 16 * 2) = {high, low};
      if (p.mean)
        put_mean<D>(block, row, c, {values[0] * to_one, values[1] * to_one, values[2] * to_one, values[3] * to_one});
    }
    if (lane == 0) {
      scales[r / kBlockRows * 2 * kBlockRows + row] = top / 32512.0f * p.factor;
      scales[r / kBlockRows * 2 * kBlockRows + kBlockRows + row] = top * p.factor;
    }
  }
  F::meet();
}

}  // namespace kv4::cuda
