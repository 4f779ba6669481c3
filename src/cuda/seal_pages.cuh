// Sealing by matrix products: head dims up to 128, one scale per vector, both sides of one dim, rotations that are not
// the identity. seal.cu's kernel takes everything else; on 9.0 seal_wgmma.cu's takes rows of 16-bit floats.
//
// A persistent CTA holds one side's matrix in shared memory, each entry in fixed point: 12 bits, 12 more, and for means
// 12 more; the first two are factors of 16-bit float products. Three groups of four warps seal a slice each, a warp 16
// tokens whole, so that a row's statistics, codes and scale never leave the four lanes that hold it. Rows are
// multiplied as two 16-bit floats in units of a power of two at their maximum; one is enough where the row's own
// elements are 16-bit floats. A lane's channels are those that 16-byte loads bring and that a word of 8 codes takes:
// the matrix is laid out accordingly.
//
// Means: sums of differences from a row of the page, so that a large common bias costs no bits. The mean is rotated
// exactly: seven digits of 6 bits, which are columns of a product with the 36-bit matrix as its rows; no sum of
// products of a digit reaches 2^24, float accumulators hold them exactly, and float64 joins them.
//
// Count for d = 128 and a slice, 64 tokens of one side (16,384 bytes read, 4,224 written; at half a copy's speed, 1.5
// TB/s, 3,190 cycles of a multiprocessor at 1.75 GHz):
//   products    1,024 or, with split rows, 1,536 of m16n8k16, and 192 for the mean: about 1,640 to 2,760 cycles
//               at mma.sync's rate
//   matrix      64 KB for every 16 tokens, 256 KB in all: 2,048 cycles of shared memory
//   issue       12,200 instructions by ncu, mean of both sides: 3,050 cycles
//
// Measured on 9.0 with the code look-ups that preceded seal_codes.cuh, 16,384 slices each of keys (fp16, mean, lambda
// 1) and values: a slice of keys takes 8,300 cycles, of values 5,000. ncu: a scheduler issues in 45 % of the cycles;
// 168 registers leave it three warps. A quarter of their stalls are fixed latencies; the matrix unit, shared memory and
// loads cause an eighth each.
//
//   version                                                                  ns a vector, 32/8/128, 65,536 tokens
//   float products, the matrix from L2 (seal.cu; 8,192 tokens)               4.3
//   products by the matrix unit; a chain of seven compares a code            0.84
//   all loads issued at once, codes of 8 values by byte look-ups             0.50
//   five eighths of the CTAs for keys                                        0.46 to 0.47
//   products of four tiles interleaved                                       no change
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/seal.h"
#include "cuda/seal_codes.cuh"
#include "cuda/seal_digits.h"

namespace kv4::cuda {

template <int D>
struct SealShape {
  static constexpr int kGroups = 3, kGroupThreads = 128, kThreads = kGroups * kGroupThreads;
  static constexpr int kPadded = pad_channels(D), kBlocks = kPadded / 32, kSteps = kPadded / 16, kTiles = kPadded / 8;
  static constexpr int kMatrix = kTiles * kSteps * kLanes;  // fragments of two n8k16 halves
  static constexpr int kDigits = 7, kDigitPitch = kPadded + 8;
  static constexpr int kStaged = kPadded / 8 * 2 * kLanes;  // words of codes of a slice
  // Of a group: partial sums, the pivot, the mean less it, its rotated remainder, digits; or, values, words.
  static constexpr int kMeanBytes = (4 + 3) * kPadded * 4 + 8 * kDigitPitch * 2 + 16;
  static constexpr int kGroupBytes = ((kMeanBytes > kStaged * 4 ? kMeanBytes : kStaged * 4) + 15) / 16 * 16;
  static constexpr int kShared = kMatrix * 24 + kGroups * kGroupBytes;
  // Whether tile n of 8 output channels holds any: tiles 4b + 2h and 4b + 2h + 1 share channels 32b + 16h ... + 15.
  static constexpr bool has(int n) { return n / 2 * 16 < D; }
};

// Input channels of a lane: element i < 4 of lane t of a step of 16. Output channels: seal_digits.h.
__device__ __forceinline__ int input_channel(int step, int t, int i) {
  return step / 2 * 32 + 8 * t + step % 2 * 4 + i;
}

__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// A lane's channels of `kRows` rows of 16-bit floats, widened; zeros unless `any`. All loads are issued before the
// first is used.
template <int D, int kRows>
__device__ __forceinline__ void load_halves(const unsigned short* const (&row)[kRows], bool any, bool bf16,
                                            bool aligned, int t, float (&x)[kRows][pad_channels(D) / 32][8]) {
  constexpr int kBlocks = pad_channels(D) / 32;
  uint4 raw[kRows][kBlocks];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      raw[r][b] = {};
      if (aligned && any && 32 * b + 8 * t < D)
        raw[r][b] = __ldg(reinterpret_cast<const uint4*>(row[r] + 32 * b + 8 * t));
    }
  if (!aligned) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const unsigned short* from = row[r] + 32 * b + 8 * t;
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (any && 32 * b + 8 * t < D) words[i / 2] |= static_cast<uint32_t>(__ldg(from + i)) << i % 2 * 16;
        raw[r][b] = {words[0], words[1], words[2], words[3]};
      }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t words[4] = {raw[r][b].x, raw[r][b].y, raw[r][b].z, raw[r][b].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // The halves of a pair of bfloat16 are their floats' upper 16 bits.
        const float2 half = unpack_halves(false, words[i]);
        x[r][b][2 * i] = bf16 ? __uint_as_float(words[i] << 16) : half.x;
        x[r][b][2 * i + 1] = bf16 ? __uint_as_float(words[i] & 0xffff0000u) : half.y;
      }
    }
}
template <int D, int kRows>
__device__ __forceinline__ void load_rows(const void* rows, DType dtype, const long long (&at)[kRows], bool any,
                                          bool aligned, int t, float (&x)[kRows][pad_channels(D) / 32][8]) {
  if (dtype != DType::f32) {
    const unsigned short* row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = static_cast<const unsigned short*>(rows) + at[r];
    return load_halves<D>(row, any, dtype == DType::bf16, aligned, t, x);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int b = 0; b < pad_channels(D) / 32; ++b)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[r][b][i] = any && 32 * b + 8 * t < D ? static_cast<const float*>(rows)[at[r] + 32 * b + 8 * t + i] : 0.0f;
}

// Adds what the lane `kStep` away holds; each keeps one half, kHalf sums, the lanes with that bit the upper one.
template <int kHalf, int kStep>
__device__ __forceinline__ void halve(float* sum, int lane) {
  const bool upper = (lane & kStep) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = sum[i], high = sum[i + kHalf];
    sum[i] = (upper ? high : low) + __shfl_xor_sync(kAll, upper ? low : high, kStep);
  }
}

// Converts the matrix to fixed point. Returns the unit of products with it.
template <int D>
__device__ float load_matrix(const SideParams& side, uint4* matrix, uint2* third) {
  using S = SealShape<D>;
  __shared__ float largest[S::kThreads / kLanes];
  const int lane = threadIdx.x % kLanes;
  float top = 0;
  for (int i = threadIdx.x; i < D * D; i += S::kThreads) top = fmaxf(top, fabsf(side.rotation_transpose[i]));
  top = warp_max(top);
  if (lane == 0) largest[threadIdx.x / kLanes] = top;
  __syncthreads();
  for (int i = 0; i < S::kThreads / kLanes; ++i) top = fmaxf(top, largest[i]);
  int exponent = 0;
  frexpf(top, &exponent);
  const double units = ldexp(1.0, 11 - exponent);  // the largest magnitude is below 2^11 units
#pragma unroll 2
  for (int i = threadIdx.x; i < S::kMatrix; i += S::kThreads) {
    const int q = i % kLanes / 4, t = i % 4, step = i / kLanes % S::kSteps, n = i / kLanes / S::kSteps;
    const int row = output_channel(n, q);
    uint32_t digits[3][2] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = input_channel(step, t, e);
      double x = row < D && c < D ? side.rotation_transpose_f64[static_cast<std::size_t>(c) * D + row] * units : 0.0;
#pragma unroll
      for (int digit = 0; digit < 3; ++digit) {
        const double whole = rint(x);
        x = (x - whole) * 4096;
        const float stored = static_cast<float>(whole) * (digit > 0 ? 0x1p-12f : 1.0f);
        digits[digit][e / 2] |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(stored))) << e % 2 * 16;
      }
    }
    matrix[i] = {digits[0][0], digits[0][1], digits[1][0], digits[1][1]};
    if (third != nullptr) third[i] = {digits[2][0], digits[2][1]};
  }
  __syncthreads();
  return static_cast<float>(1.0 / units);
}

// y = rows times the matrix.
template <int D, bool kSplit>
__device__ __forceinline__ void multiply(const uint4* matrix, const uint4 (&high)[SealShape<D>::kSteps],
                                         const uint4 (&low)[SealShape<D>::kSteps], int lane,
                                         float (&y)[SealShape<D>::kTiles][4]) {
  using S = SealShape<D>;
  constexpr int kTogether = 4;  // tiles: no product waits for the one before it
#pragma unroll
  for (int n = 0; n < S::kTiles; n += kTogether) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[n + i][e] = 0;
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      uint4 m[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (S::has(n + i)) m[i] = matrix[((n + i) * S::kSteps + s) * kLanes + lane];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (S::has(n + i)) mma_halves(false, y[n + i], high[s], m[i].x, m[i].y);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (S::has(n + i)) mma_halves(false, y[n + i], high[s], m[i].z, m[i].w);
      if constexpr (kSplit) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (S::has(n + i)) mma_halves(false, y[n + i], low[s], m[i].x, m[i].y);
      }
    }
  }
}

// One side's slices: `cta`, `cta` + `ctas`, ..., distributed over the groups of the CTA.
template <int D, bool kValues>
__device__ __forceinline__ void seal_side(const SealParams& p, unsigned char* memory, int cta, int ctas) {
  using S = SealShape<D>;
  const SideParams& side = kValues ? p.value : p.key;
  auto* matrix = reinterpret_cast<uint4*>(memory);
  auto* third = reinterpret_cast<uint2*>(memory + S::kMatrix * 16);
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / kLanes % 4, group = threadIdx.x / S::kGroupThreads,
            thread = threadIdx.x % S::kGroupThreads;
  unsigned char* mine = memory + S::kMatrix * 24 + group * S::kGroupBytes;
  auto(*part)[S::kPadded] = reinterpret_cast<float(*)[S::kPadded]>(mine);   // [4]
  auto* pivot = reinterpret_cast<float*>(part + 4);                         // a row of the page
  float* delta = pivot + S::kPadded;                                        // mean less pivot
  float* offset = delta + S::kPadded;                                       // what the stored mean leaves out
  auto* digits = reinterpret_cast<__half*>(offset + S::kPadded);            // [8][kDigitPitch]
  auto* group_max = reinterpret_cast<float*>(digits + 8 * S::kDigitPitch);  // [4]
  const float unit = load_matrix<D>(side, matrix, side.mean ? third : nullptr);
  const Quantiser<false> quantise(side);

  for (int index = cta + group * ctas; index < p.count; index += S::kGroups * ctas) {
    const SealJob& job = p.jobs[index / p.heads];
    if (job.page < 0) break;
    const int head = index % p.heads;
    const DType dtype = job.dtype;
    const int first = job.first, count = static_cast<int>(job.count), size = dtype == DType::f32 ? 4 : 2,
              hidden = job.hidden;
    const void* rows = static_cast<const unsigned char*>(kValues ? job.v : job.k) +
                       head * (kValues ? job.v_head_stride : job.k_head_stride) * size;
    const long long stride = kValues ? job.v_stride : job.k_stride;
    const float* lambda = kValues ? job.lambda_v : job.lambda_k;
    if (lambda != nullptr) lambda += head * D;
    const std::uint8_t* skip = job.skip;
    unsigned char* slice = slice_at(p.pages, job.page, head);
    const bool aligned = ((reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(stride * size)) & 15) == 0;
    const auto masked = [skip, hidden](int j) { return j < hidden || (skip != nullptr && skip[j] != 0); };
    int used = count, pivot_row = 0;
    if (skip != nullptr || hidden > 0) {
      const bool low = lane < count && !masked(lane), high = lane + 32 < count && !masked(lane + 32);
      const unsigned a = __ballot_sync(kAll, low), b = __ballot_sync(kAll, high);
      used = __popc(a) + __popc(b);
      pivot_row = a != 0 ? __ffs(a) - 1 : b != 0 ? 31 + __ffs(b) : 0;
    }
    // Rows g and g + 8 of the warp's 16; j counts from the job's first. A row that is masked or not there reads the
    // pivot.
    bool there[2], live[2];
    long long at[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = warp * 16 + g + 8 * r - first;
      there[r] = j >= 0 && j < count;
      live[r] = there[r] && !masked(j);
      at[r] = (live[r] ? j : pivot_row) * stride;
    }
    float pivot_here = 0;
    if (!kValues && side.mean && thread < D && used > 0)
      pivot_here = load_element(rows, dtype, pivot_row * stride + thread);
    float x[2][S::kBlocks][8];
    load_rows<D, 2>(rows, dtype, at, used > 0, aligned, t, x);
    if (index + S::kGroups * ctas < p.count && dtype != DType::f32) {
      // Prefetch the next slice's rows into L2.
      const int coming = index + S::kGroups * ctas, row = thread / 2;
      const SealJob& next = p.jobs[coming / p.heads];
      if (next.page >= 0 && row < next.count) {
        const auto* at = static_cast<const unsigned short*>(kValues ? next.v : next.k) +
                         row * (kValues ? next.v_stride : next.k_stride) +
                         coming % p.heads * (kValues ? next.v_head_stride : next.k_head_stride);
        prefetch_l2(at + thread % 2 * (D / 2));
      }
    }

    double rotation_scale = 0;  // of the digits
    if (!kValues && side.mean) {
      if (thread < S::kPadded) pivot[thread] = pivot_here;
      group_barrier(group);
      float sum[S::kBlocks * 8];
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float less = pivot[32 * b + 8 * t + i];
          x[0][b][i] -= less;
          x[1][b][i] -= less;
          sum[b * 8 + i] = x[0][b][i] + x[1][b][i];
        }
      constexpr int kSums = S::kBlocks * 8;
      halve<kSums / 2, 16>(sum, lane);
      halve<kSums / 4, 8>(sum, lane);
      halve<kSums / 8, 4>(sum, lane);
#pragma unroll
      for (int i = 0; i < kSums / 8; ++i) {
        const int at = (lane >> 4 & 1) * (kSums / 2) + (lane >> 3 & 1) * (kSums / 4) + (lane >> 2 & 1) * (kSums / 8) +
                       i;
        part[warp][at / 8 * 32 + 8 * t + at % 8] = sum[i];
      }
      group_barrier(group);
      double mu = 0;
      if (thread < S::kPadded) {
        float less = 0;
        if (thread < D && used > 0) {
          less = ((part[0][thread] + part[1][thread]) + (part[2][thread] + part[3][thread])) / used;
          mu = (static_cast<double>(pivot_here) + less) * (lambda != nullptr ? lambda[thread] : 1.0f);
        }
        delta[thread] = less;
      }
      const float top = warp_max(static_cast<float>(fabs(mu)));
      if (lane == 0) group_max[warp] = top;
      group_barrier(group);
      int exponent = 0;
      frexpf(fmaxf(fmaxf(group_max[0], group_max[1]), fmaxf(group_max[2], group_max[3])), &exponent);
      rotation_scale = ldexp(static_cast<double>(unit), exponent - 5);
      if (thread < S::kPadded) {
        double rest = ldexp(mu, 5 - exponent);
#pragma unroll
        for (int digit = 0; digit < S::kDigits; ++digit) {
          const double whole = rint(rest);
          rest = (rest - whole) * 64;
          digits[digit * S::kDigitPitch + thread] = __float2half_rn(static_cast<float>(whole));
        }
        digits[S::kDigits * S::kDigitPitch + thread] = __float2half_rn(0.0f);
      }
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float less = delta[32 * b + 8 * t + i];
          x[0][b][i] -= less;
          x[1][b][i] -= less;
        }
    }
    if (lambda != nullptr) {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int c = 32 * b + 8 * t + i;
          const float l = c < D ? __ldg(lambda + c) : 0.0f;
          x[0][b][i] *= l;
          x[1][b][i] *= l;
        }
    }
    // Operands: rows in units of a power of two, in two halves.
    float scale[2], units[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = 0;
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[r][b][i]));
      const uint32_t exponent = min(max(__float_as_uint(quad_max(top)) >> 23, 2u), 252u);
      scale[r] = __uint_as_float(exponent << 23);
      units[r] = live[r] ? __uint_as_float((254 - exponent) << 23) : 0.0f;
    }
    uint4 high[S::kSteps], low[S::kSteps];
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      uint32_t h[4], l[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // rows g, g + 8, then the same of the next two channels
        const int r = e % 2, i = s % 2 * 4 + e / 2 * 2;
        const float a = x[r][s / 2][i] * units[r], b = x[r][s / 2][i + 1] * units[r];
        h[e] = pack_halves(false, a, b);
        const float2 back = unpack_halves(false, h[e]);
        l[e] = pack_halves(false, a - back.x, b - back.y);
      }
      high[s] = {h[0], h[1], h[2], h[3]};
      low[s] = {l[0], l[1], l[2], l[3]};
    }
    float y[S::kTiles][4];
    if (!kValues || dtype == DType::f32 || lambda != nullptr) multiply<D, true>(matrix, high, low, lane, y);
    else multiply<D, false>(matrix, high, low, lane, y);

    if (!kValues && side.mean) {
      group_barrier(group);
      for (int n = 2 * warp; n < S::kTiles; n += 8) {
        float sums[3][4] = {};
#pragma unroll
        for (int s = 0; s < S::kSteps; ++s) {
          const uint2 b = *reinterpret_cast<const uint2*>(digits + g * S::kDigitPitch + input_channel(s, t, 0));
          const int at = (n * S::kSteps + s) * kLanes + lane, beside = at + S::kSteps * kLanes;
          const uint4 m0 = matrix[at], m1 = matrix[beside];
          const uint2 m2 = third[at], m3 = third[beside];
          mma_halves(false, sums[0], {m0.x, m1.x, m0.y, m1.y}, b.x, b.y);
          mma_halves(false, sums[1], {m0.z, m1.z, m0.w, m1.w}, b.x, b.y);
          mma_halves(false, sums[2], {m2.x, m3.x, m2.y, m3.y}, b.x, b.y);
        }
        const double weight = __hiloint2double((1023 - 12 * t) << 20, 0);  // 2^-12t: of digits 2t, 64 of 2t + 1
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          double rotated = 0;
#pragma unroll
          for (int digit = 2; digit >= 0; --digit)
            rotated += (static_cast<double>(sums[digit][2 * half]) +
                        static_cast<double>(sums[digit][2 * half + 1]) * (1.0 / 64)) *
                       (digit == 2 ? 1.0 / 4096 : 1.0);
          rotated *= weight;
          rotated += __shfl_xor_sync(kAll, rotated, 1);
          rotated += __shfl_xor_sync(kAll, rotated, 2);
          rotated *= rotation_scale;
          const int c = output_channel(n + half, g);
          if (t == 0 && c < D) {
            const unsigned short stored = to_half(static_cast<float>(rotated));
            reinterpret_cast<unsigned short*>(slice + side.mean_at)[c] = stored;
            offset[c] = static_cast<float>(rotated - static_cast<double>(from_half(stored)));
          }
        }
      }
      group_barrier(group);
    }

    // Statistics of the rows, then codes.
    float step[2] = {};
    scale[0] *= unit;
    scale[1] *= unit;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
      float2 more = {};
      if (!kValues && side.mean && S::has(n))
        more = *reinterpret_cast<const float2*>(offset + output_channel(n, 2 * t));
#pragma unroll
      for (int e = 0; e < 4; ++e) y[n][e] = fmaf(y[n][e], scale[e / 2], e % 2 == 0 ? more.x : more.y);
    }
    if (side.step.by_largest) {
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) step[e / 2] = fmaxf(step[e / 2], fabsf(y[n][e]));
#pragma unroll
      for (int r = 0; r < 2; ++r) step[r] = quad_max(step[r]) * side.step.factor;
    } else {
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) step[e / 2] = fmaf(y[n][e], y[n][e], step[e / 2]);
#pragma unroll
      for (int r = 0; r < 2; ++r) step[r] = sqrtf(quad_sum(step[r]) / D) * side.step.factor;
    }
    uint32_t words[2][S::kBlocks];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool any = step[r] > 0 && live[r];
      const float inverse = any ? quantise.units / step[r] : 0.0f;
      const Fit fit = codes_of_row<D>(quantise, y, r, any, inverse, words[r]);
      const unsigned products = quad_sum(fit.products), squares = quad_sum(fit.squares);
      const float fitted = side.abs_max  ? step[r]
                           : squares > 0 ? static_cast<float>(products) / static_cast<float>(squares) *
                                               (step[r] / (2 * quantise.units))
                                         : 0.0f;
      if (t == 0 && there[r])
        reinterpret_cast<unsigned short*>(slice + side.scales)[warp * 16 + g + 8 * r] = to_half(any ? fitted : 0.0f);
    }

    // Tokens outside the job keep their codes in the slice.
    auto* codes = reinterpret_cast<uint32_t*>(slice + side.codes);
    if constexpr (!kValues) {  // a word is of one token and block
      if (S::kBlocks == 4) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (there[r])
            *reinterpret_cast<uint4*>(codes + word_index((warp * 2 + r) * 4, lane)) = {
                words[r][0], words[r][1], words[r][2 % S::kBlocks], words[r][3 % S::kBlocks]};
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int b = 0; b < S::kBlocks; ++b)
            if (there[r]) codes[word_index((warp * 2 + r) * S::kBlocks + b, lane)] = words[r][b];
      }
    } else {
      // A word is of one channel and 8 tokens: bytes of it, two tokens each, come from four warps.
      auto* staged = reinterpret_cast<uint32_t*>(mine);
      // word_index of the lane's first channel, octet g % 2 and tokens 2 (g / 2), + 1
      unsigned char* bytes = mine + (t % 2 * 64 + g / 2 * 4 + t / 2 * 2 + g % 2) * 4 + warp;
      const bool whole = first == 0 && count == kPageTokens;
      group_barrier(group);
      if (!whole)
        for (int i = thread; i < S::kStaged; i += S::kGroupThreads) staged[i] = codes[i];
      if (!whole) group_barrier(group);
      const bool odd = g % 2 != 0;
      const bool beside_0 = __shfl_xor_sync(kAll, there[0], 4), beside_1 = __shfl_xor_sync(kAll, there[1], 4);
      const bool low_there = odd ? beside_1 : there[0], high_there = odd ? there[1] : beside_0;
      const uint32_t keep = (low_there ? 0 : 15) | (high_there ? 0 : 240);
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
        const uint32_t received = __shfl_xor_sync(kAll, odd ? words[0][b] : words[1][b], 4);
        const uint32_t even_row = odd ? received : words[0][b], odd_row = odd ? words[1][b] : received;
        const uint32_t pairs[2] = {(even_row & 0x0f0f0f0f) | (odd_row & 0x0f0f0f0f) << 4,
                                   (even_row >> 4 & 0x0f0f0f0f) | (odd_row & 0xf0f0f0f0)};
#pragma unroll
        for (int k = 0; k < 8; ++k) {  // channel 32b + 4t + k % 4 + 16 (k / 4)
          unsigned char& to = bytes[(2 * b + k / 4) * 512 + k % 4 * 64];
          const uint32_t made = pairs[k % 2] >> k / 2 * 8;
          to = static_cast<unsigned char>(whole ? made : (to & keep) | (made & ~keep));
        }
      }
      group_barrier(group);
      for (int i = thread; i < S::kStaged / 4; i += S::kGroupThreads)
        reinterpret_cast<uint4*>(codes)[i] = reinterpret_cast<const uint4*>(staged)[i];
    }
  }
}

extern __shared__ __align__(16) unsigned char seal_memory[];

// The first `key_ctas` of the grid seal keys, the others values.
template <int D>
__global__ void __launch_bounds__(SealShape<D>::kThreads, 1)
    seal_pages(const __grid_constant__ SealParams p, int key_ctas) {
  const int cta = blockIdx.x;
  if (cta < key_ctas) seal_side<D, false>(p, seal_memory, cta, key_ctas);
  else seal_side<D, true>(p, seal_memory, cta - key_ctas, static_cast<int>(gridDim.x) - key_ctas);
}

}  // namespace kv4::cuda
