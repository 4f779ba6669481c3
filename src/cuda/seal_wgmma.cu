// Sealing on compute capability 9.0: seal_pages.cuh's arithmetic with products of four warps (wgmma.cuh). Rows are
// copied to shared memory while the previous slice is quantised. Compiled as sm_90a. Differences from seal_pages.cuh:
//
// - Means are channel sums by products with ones, exact where a channel's values are of similar magnitude. The pivot,
//   the mean rounded to float, is subtracted from the rows in the instruction that weighs them. The rotated mean is
//   computed from digits of the float64 mean; an eighth digit holds the difference between mean and pivot.
// - fp16 values without weights are operands as they were copied.
// - The second halves of split rows are stored beside the first halves or, at d = 256, over them once those have been
//   multiplied.
//
// Count for d = 128 and a slice, 64 tokens of one side (16,384 bytes read, 4,224 written; half a copy's speed: 3,190
// cycles):
//   products    16 or, with split rows, 24 of m64n128k16: 1,024 or 1,536 cycles of the matrix unit; 192 of m16n8k16 for
//               the mean
//   issue       6,950 instructions by ncu, mean of both sides: 1,740 cycles
//
// ncu: a scheduler's three warps are stalled on shared memory in 18 % of the samples, on fixed latencies in 17, on the
// matrix unit in 16 (the mean's products wait for the others'); in 12 one issues. A quarter of all samples lie between
// the start of the keys' products and the rotated mean.
//
//   version, 32/8/128, 65,536 tokens                                                         ns a vector
//   products by mma.sync (seal_pages.cuh)                                                    0.46 to 0.49
//   wgmma, operands in shared memory, rows copied ahead                                      0.42
//   operand addresses once per warp, values' words of four warps by 8-byte stores, 70 % of CTAs for keys  0.37
//   two groups a slice, each half of the channels: 24 warps of 80 registers, which spill     0.57
//   scales fitted in integers, nothing spilled, a warp's tiles of the mean at once           0.35
//   four teams of 128 registers, which spill, the third digits from L2 (before, and with, the previous row)  0.39
// Where shared memory is full, spilled registers come from L2. Means by wgmma of 8 columns were not run: the operand
// addresses take too many registers. d = 256, one KV head, 131,072 tokens: one team 1.86; two 1.84, with 72 % of the
// CTAs for keys 1.76; seal.cu 13.3.
#include "cuda/seal.h"

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/seal_codes.cuh"
#include "cuda/seal_team.cuh"

namespace kv4::cuda {
namespace {

// One side's slices: `at`, `at` + `apart`, ...
template <int D, bool kValues, bool kNarrow>
__device__ __forceinline__ void seal_side(const SealParams& p, unsigned char* memory, int at, int apart) {
  using S = TeamShape<D>;
  const SideParams& side = kValues ? p.value : p.key;
  const int rank = S::kCluster > 1 ? cluster_rank() : 0;
  const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  // Uniform over the warp, so that what depends on it is kept in uniform registers.
  const int cta_warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kLanes, 0);
  const int team = cta_warp / S::kTeamWarps, warp = cta_warp % S::kTeamWarps, thread = warp * kLanes + lane;
  const int part = rank * S::kSplit + warp / 4;  // of the output channels
  at += team;
  unsigned char* mine = memory + S::kDigitsHeld * S::kDigitBytes + team * S::kTeamBytes;
  unsigned char *rows = mine, *rest = mine + S::kRowBytes;  // the rows, then their first halves; their second halves
  auto* pivot = reinterpret_cast<float*>(mine + S::kPivotAt);
  auto* lambda = reinterpret_cast<float*>(mine + S::kLambdaAt);
  auto* offset =
      reinterpret_cast<float*>(mine + S::kOffsetAt);  // sums of the channels, then what the stored mean leaves out
  auto* mean_digits = reinterpret_cast<__half*>(mine + S::kMeanDigitsAt);
  auto* scales = reinterpret_cast<float*>(mine + S::kScaleAt);
  auto* stats = reinterpret_cast<float*>(mine + S::kStatAt);
  auto* fits = reinterpret_cast<float*>(mine + S::kFitAt);
  auto* jobs = reinterpret_cast<TeamJob*>(mine + S::kJobsAt);

  const uint32_t barriers = shared_address(mine + S::kBarriersAt);  // of what the other CTA puts here
  uint32_t parity = 0;
  if (S::kCluster > 1 && thread == 0) {
    for (int i = 0; i < 2; ++i) start_barrier(barriers + i * 8, 1);
    barriers_started();
  }
  if (at < p.count) ask_for_job(p, at, jobs, thread);
  if (at + apart < p.count) ask_for_job(p, at + apart, jobs + 1, thread);
  __shared__ Quantiser<kNarrow> quantiser;
  if (threadIdx.x == 0) quantiser = Quantiser<kNarrow>(side);
  const auto* matrix = reinterpret_cast<const unsigned char*>(side.rotation_digits);
  // The third digits as they lie in registers, where they are not held.
  const uint4* third_at = reinterpret_cast<const uint4*>(matrix + 3 * D * D * 2) + rank * (S::kDigitBytes / 16) + lane;
  for (int digit = 0; digit < (side.mean ? S::kDigitsHeld : 2); ++digit)
    for (int i = threadIdx.x * 16; i < S::kDigitBytes; i += S::kThreads * 16)
      copy_16(memory + digit * S::kDigitBytes + i, matrix + digit * D * D * 2 + rank * S::kDigitBytes + i, true);
  if (thread < D) pivot[thread] = 0;
  copies_end();
  if constexpr (S::kCluster > 1) cluster_barrier();
  else __syncthreads();
  if (at < p.count) ask_for_rows<D, kValues>(p.pages, jobs[0], rows, lambda, thread);
  const float unit = side.digit_unit;
  const uint32_t a_here = operand(shared_address(rows)),
                 columns_here = operand(shared_address(memory + block_at(warp / 4 * S::kColumns, 0, D)));

  const auto ask_for_next = [&](int slot) {
    if (at + apart >= p.count) return;
    ask_for_rows<D, kValues>(p.pages, jobs[slot == 2 ? 0 : slot + 1], rows, lambda, thread);
    if (at + 2 * apart < p.count) ask_for_job(p, at + 2 * apart, jobs + (slot == 0 ? 2 : slot - 1), thread);
  };
  for (int slot = 0; at < p.count; at += apart, slot = slot == 2 ? 0 : slot + 1) {
    copies_end();
    fence_shared_writes();
    team_barrier<D>(team);
    // Reloaded wherever it is used, to save registers.
    const volatile TeamJob& its = jobs[slot];
    const volatile SealJob& job = its.job;
    if (job.page < 0) break;
    const bool bf16 = job.dtype == DType::bf16, weighted = (kValues ? job.lambda_v : job.lambda_k) != nullptr;

    double rotation_scale = 0;  // of the mean's digits
    if (!kValues && side.mean) {
      sum_rows<D>(rows, bf16, warp, lane, offset);
      const std::uint8_t* skip = job.skip;
      const int count = static_cast<int>(job.count), hidden = job.hidden;
      int used = max(count - hidden, 0);
      if (skip != nullptr) {
        const auto live = [&](int j) { return j >= hidden && j < count && skip[j] == 0; };
        used = __popc(__ballot_sync(kAll, live(lane))) + __popc(__ballot_sync(kAll, live(lane + 32)));
      }
      const double each = used == kPageTokens ? 1.0 / kPageTokens : used > 0 ? 1.0 / used : 0.0;
      team_barrier<D>(team);
      float top = 0;
#pragma unroll
      for (int c = lane; c < D; c += kLanes) top = fmaxf(top, fabsf(offset[c] * lambda[c]));
      top = warp_max(top) * static_cast<float>(each);
      const int exponent = min(max(static_cast<int>(__float_as_uint(top) >> 23), 64), 250) -
                           126;  // 2^exponent is above top
      rotation_scale = static_cast<double>(unit) * __hiloint2double((1023 + exponent - 5) << 20, 0);
      if (thread < D) {
        const double mu = offset[thread] * each * lambda[thread];
        const float near = static_cast<float>(mu);
        pivot[thread] = near;
        const int place = thread / 16 * 16 + thread % 8 / 2 * 4 + thread % 16 / 8 * 2 +
                          thread % 2;  // a lane's four of a step together
        // Seven digits of 6 bits, from -32 on, and what the pivot leaves out.
        const double to_units = __hiloint2double((1023 + 41 - exponent) << 20, 0);
        const unsigned long long fixed = static_cast<unsigned long long>(__double2ll_rn(mu * to_units)) +
                                         0x20820820820ull;
#pragma unroll
        for (int digit = 0; digit < S::kDigits; ++digit) {
          const int bits = static_cast<int>(fixed >> 6 * (S::kDigits - 1 - digit)) & (digit == 0 ? 127 : 63);
          mean_digits[digit * S::kDigitPitch + place] = __int2half_rn(bits - 32);
        }
        mean_digits[S::kDigits * S::kDigitPitch + place] =
            __float2half_rn(static_cast<float>((mu - near) * to_units) * 0x1p-12f);
      }
      team_barrier<D>(team);
    }
    // The products' rows: as they are, or in units of a power of two at each row's maximum, in two halves.
    const bool in_two = !kValues || weighted;
    const bool raw = !in_two && !bf16;
    [[maybe_unused]] uint4 left[S::kBeside ? 1 : S::kOctets][S::kPieces];
    if (!raw) {
      float x[S::kOctets][S::kPieces][8];
#pragma unroll
      for (int b = 0; b < S::kPieces; ++b) {
        const int c = 8 * (lane / 8 + 4 * b);
        float l[8], m[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const int from = D % 32 == 0 || c < D ? c + i : 0;
          *reinterpret_cast<float4*>(l + i) = *reinterpret_cast<const float4*>(lambda + from);
          *reinterpret_cast<float4*>(m + i) = *reinterpret_cast<const float4*>(pivot + from);
        }
#pragma unroll
        for (int o = 0; o < S::kOctets; ++o) {
          uint4 word = {};
          const bool any = D % 32 == 0 || c < D;
          if (any)
            word = *reinterpret_cast<const uint4*>(rows + block_at((warp * S::kOctets + o) * 8 + lane % 8, c, D));
          const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float2 two;  // the halves of a pair of bfloat16 are their floats' upper 16 bits
            if (bf16) two = {__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
            else two = unpack_halves(false, words[i]);
            x[o][b][2 * i] = any ? fmaf(two.x, l[2 * i], -m[2 * i]) : 0.0f;
            x[o][b][2 * i + 1] = any ? fmaf(two.y, l[2 * i + 1], -m[2 * i + 1]) : 0.0f;
          }
        }
      }
#pragma unroll
      for (int o = 0; o < S::kOctets; ++o) {
        float top = 0;
#pragma unroll
        for (int b = 0; b < S::kPieces; ++b)
#pragma unroll
          for (int i = 0; i < 8; ++i) top = fmaxf(top, fabsf(x[o][b][i]));
        top = fmaxf(top, __shfl_xor_sync(kAll, top, 8));
        top = fmaxf(top, __shfl_xor_sync(kAll, top, 16));
        const uint32_t exponent = min(max(__float_as_uint(top) >> 23, 2u), 252u);
        const float units = __uint_as_float((254 - exponent) << 23);
        const int row = (warp * S::kOctets + o) * 8 + lane % 8;
        if (lane < 8) scales[row] = __uint_as_float(exponent << 23) * unit;
#pragma unroll
        for (int b = 0; b < S::kPieces; ++b) {
          const int c = 8 * (lane / 8 + 4 * b);
          uint32_t h[4], l[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = x[o][b][2 * i] * units, high = x[o][b][2 * i + 1] * units;
            h[i] = pack_halves(false, low, high);
            const float2 back = unpack_halves(false, h[i]);
            l[i] = pack_halves(false, low - back.x, high - back.y);
          }
          if (D % 32 != 0 && c >= D) continue;
          *reinterpret_cast<uint4*>(rows + block_at(row, c, D)) = {h[0], h[1], h[2], h[3]};
          if constexpr (!S::kBeside) left[o][b] = {l[0], l[1], l[2], l[3]};
          else if (in_two) *reinterpret_cast<uint4*>(rest + block_at(row, c, D)) = {l[0], l[1], l[2], l[3]};
        }
      }
      fence_shared_writes();
      team_barrier<D>(team);
    }

    // Recomputed for every slice: the operand addresses of all steps do not fit in registers.
    const uint32_t a = __shfl_sync(kAll, a_here, 0), a_rest = a + S::kRowBytes / 16;
    const uint32_t columns_0 = __shfl_sync(kAll, columns_here, 0), columns_1 = columns_0 + S::kDigitBytes / 16;
    float y[S::kTiles][4];
#pragma unroll
    for (int n = S::kColumns / 8; n < S::kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[n][e] = 0;
    // A branch between products of one group makes the compiler serialise them.
    if constexpr (!kValues) {
      multiply<D, S::kBeside>(y, a, a_rest, columns_0, columns_1);
    } else if (S::kBeside && in_two) {
      multiply<D, true>(y, a, a_rest, columns_0, columns_1);
      products_end<S::kColumns>(y);
    } else {
      multiply<D, false>(y, a, a_rest, columns_0, columns_1);
      products_end<S::kColumns>(y);
    }

    if (!kValues && side.mean) {
      float sums[S::kPairs][3][4] = {};
      const int i = lane / 8;  // block of two by two: rows first
      const auto tile = [&](int pair) { return min(2 * (warp + pair * S::kTeamWarps), S::kCtaColumns / 8 - 2); };
#pragma unroll(S::kUnrolled)
      for (int s = 0; s < S::kSteps; ++s) {
        const uint2 b = *reinterpret_cast<const uint2*>(mean_digits + g * S::kDigitPitch + s * 16 + t * 4);
#pragma unroll
        for (int pair = 0; pair < S::kPairs; ++pair) {
          const uint32_t from = shared_address(memory + block_at(8 * (tile(pair) + i % 2) + lane % 8, i / 2 * 8, D)) +
                                s * 2 * kBlockBytes;
#pragma unroll
          for (int digit = 0; digit < 3; ++digit) {
            uint4 rows_of_it;
            if (digit < S::kDigitsHeld) rows_of_it = load_matrices<false>(from + digit * S::kDigitBytes);
            else rows_of_it = __ldg(third_at + (tile(pair) / 2 * S::kSteps + s) * kLanes);
            mma_halves(false, sums[pair][digit], rows_of_it, b.x, b.y);
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < S::kPairs; ++pair) {
        const int n = 2 * (warp + pair * S::kTeamWarps);
        if (n >= S::kCtaColumns / 8) break;
        const double weight = __hiloint2double((1023 - 12 * t) << 20, 0);  // 2^-12t: of digits 2t, 64 of 2t + 1
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          double rotated = 0;
#pragma unroll
          for (int digit = 2; digit >= 0; --digit) {
            const double odd = t == 3 ? 0.0 : static_cast<double>(sums[pair][digit][2 * half + 1]) * (1.0 / 64);
            rotated += (static_cast<double>(sums[pair][digit][2 * half]) + odd) * (digit == 2 ? 1.0 / 4096 : 1.0);
          }
          rotated *= weight;
          rotated += __shfl_xor_sync(kAll, rotated, 1);
          rotated += __shfl_xor_sync(kAll, rotated, 2);
          rotated *= rotation_scale;
          const int c = rank * S::kCtaColumns + output_channel(n + half, g);
          if (t == 3) {
            const unsigned short stored = to_half(static_cast<float>(rotated));
            reinterpret_cast<unsigned short*>(its.slice(p.pages) + side.mean_at)[c] = stored;
            const double left = static_cast<double>(sums[pair][0][2 * half + 1] + sums[pair][1][2 * half + 1]) *
                                0x1p-24 * rotation_scale;
            offset[c] = static_cast<float>(rotated - left - static_cast<double>(from_half(stored)));
          }
        }
      }
    }
    if constexpr (!kValues) products_end<S::kColumns>(y);
    team_barrier<D>(team);
    if constexpr (!S::kBeside) {
      if (in_two) {
#pragma unroll
        for (int o = 0; o < S::kOctets; ++o)
#pragma unroll
          for (int b = 0; b < S::kPieces; ++b)
            *reinterpret_cast<uint4*>(
                rows + block_at((warp * S::kOctets + o) * 8 + lane % 8, 8 * (lane / 8 + 4 * b), D)) = left[o][b];
        fence_shared_writes();
        team_barrier<D>(team);
        products_begin();
#pragma unroll
        for (int s = 0; s < S::kSteps; ++s)
          product<S::kColumns, D>(y, a + s * kStepBlocks, columns_0 + s * kStepBlocks, true);
        products_commit();
        products_end<S::kColumns>(y);
        team_barrier<D>(team);
      }
    }
    ask_for_next(slot);

    // Statistics of the rows, then codes.
    const int row = warp % 4 * 16 + g, first = job.first, count = static_cast<int>(job.count),
              hidden = job.hidden;  // and the row 8 further
    const std::uint8_t* skip = job.skip;
    unsigned char* slice = its.slice(p.pages);
    bool there[2], live[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = row + 8 * r - first;
      there[r] = j >= 0 && j < count;
      live[r] = there[r] && j >= hidden && (skip == nullptr || skip[j] == 0);
    }
    float scale[2] = {unit, unit};
    if (!raw) {
      scale[0] = scales[row];
      scale[1] = scales[row + 8];
    }
    if (!kValues && side.mean) {
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) {
        const float2 more = *reinterpret_cast<const float2*>(offset + part * S::kColumns + output_channel(n, 2 * t));
#pragma unroll
        for (int e = 0; e < 4; ++e) y[n][e] = fmaf(y[n][e], scale[e / 2], e % 2 == 0 ? more.x : more.y);
      }
      scale[0] = scale[1] = 1;
    }
    float step[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float partial[2] = {};
      if (side.step.by_largest) {
#pragma unroll
        for (int n = 0; n < S::kColumns / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) partial[e] = fmaxf(partial[e], fabsf(y[n][2 * r + e]));
        step[r] = quad_max(fmaxf(partial[0], partial[1]));
      } else {
#pragma unroll
        for (int n = 0; n < S::kColumns / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) partial[e] = fmaf(y[n][2 * r + e], y[n][2 * r + e], partial[e]);
        step[r] = quad_sum(partial[0] + partial[1]);
      }
    }
    if constexpr (S::kParts > 1) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* to = stats + part * kPageTokens + row + 8 * r;
        if (t == 0) *to = step[r];
        if (S::kCluster > 1 && t == 0) put_beside(to, barriers, rank, step[r]);
      }
      if (S::kCluster > 1 && thread == 0) expect_at(barriers, S::kSplit * kPageTokens * 4);
      team_barrier<D>(team);
      if (S::kCluster > 1) wait_for_bytes(barriers, parity);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float all = 0;
#pragma unroll
        for (int i = 0; i < S::kParts; ++i) {
          const float one = stats[i * kPageTokens + row + 8 * r];
          all = side.step.by_largest ? fmaxf(all, one) : all + one;
        }
        step[r] = all;
      }
    }
    uint32_t words[2][S::kBlocks];
    float fitted[2][2];
    const Quantiser<kNarrow> quantise = quantiser;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      step[r] = (side.step.by_largest ? step[r] : sqrtf(step[r] * (1.0f / D))) * quantise.to_step;
      const bool any = step[r] > 0 && live[r];
      const float inverse = any ? reciprocal(step[r]) * quantise.units : 0.0f;
      const Fit fit = codes_of_row<S::kColumns>(quantise, y, r, any, inverse, words[r]);
      fitted[r][0] = static_cast<float>(quad_sum(fit.products));
      fitted[r][1] = static_cast<float>(quad_sum(fit.squares));
    }
    if constexpr (S::kParts > 1) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* to = fits + (part * kPageTokens + row + 8 * r) * 2;
        if (t < 2) to[t] = fitted[r][t];
        if (S::kCluster > 1 && t < 2) put_beside(to + t, barriers + 8, rank, fitted[r][t]);
      }
      if (S::kCluster > 1 && thread == 0) expect_at(barriers + 8, S::kSplit * kPageTokens * 8);
      team_barrier<D>(team);
      if (S::kCluster > 1) wait_for_bytes(barriers + 8, parity);
      parity ^= 1;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        fitted[r][0] = fitted[r][1] = 0;
#pragma unroll
        for (int i = 0; i < S::kParts; ++i)
#pragma unroll
          for (int k = 0; k < 2; ++k) fitted[r][k] += fits[(i * kPageTokens + row + 8 * r) * 2 + k];
      }
    }
    if (t == 0 && part == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float fit = side.abs_max       ? step[r]
                          : fitted[r][1] > 0 ? fitted[r][0] * reciprocal(2 * quantise.units * fitted[r][1]) * step[r]
                                             : 0.0f;
        if (there[r])
          reinterpret_cast<unsigned short*>(slice + side.scales)[row + 8 * r] =
              to_half(step[r] > 0 && live[r] ? fit * scale[r] : 0.0f);
      }
    }

    if constexpr (!kValues) put_keys<D, kNarrow>(words, slice + side.codes, side.bits, warp, lane, part, there);
    else
      put_values<D, kNarrow>(words, rest, slice + side.codes, side.bits, rank * (S::kStaged / 128), team, thread, first,
                             count);
  }
  if constexpr (S::kCluster > 1) cluster_barrier();  // before this CTA's memory is gone
}

extern __shared__ __align__(128) unsigned char wgmma_memory[];

// The first `key_clusters` of the grid seal keys, the others values.
template <int D, bool kNarrow>
__global__ void __launch_bounds__(TeamShape<D>::kThreads, 1)
    seal_wgmma(const __grid_constant__ SealParams p, int key_clusters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = TeamShape<D>;
  if (p.beside) {
    const bool nothing = p.jobs[0].page < 0;  // as in most decode steps: the matrix is then not loaded
    wait_for_previous();                      // what runs behind this kernel runs behind attention too
    if (nothing) return;
  }
  const int cluster = static_cast<int>(blockIdx.x) / S::kCluster, clusters = static_cast<int>(gridDim.x) / S::kCluster;
  if (cluster < key_clusters)
    seal_side<D, false, kNarrow>(p, wgmma_memory, cluster * S::kTeams, key_clusters * S::kTeams);
  else
    seal_side<D, true, kNarrow>(p, wgmma_memory, (cluster - key_clusters) * S::kTeams,
                                (clusters - key_clusters) * S::kTeams);
#endif
}

template <int D, bool kNarrow = false>
cudaError_t launch(const SealParams& p, int device, cudaStream_t stream) {
  using S = TeamShape<D>;
  static SharedMost most;
  int multiprocessors = 1;
  if (const cudaError_t e = prepare_persistent(most, seal_wgmma<D, kNarrow>, S::kShared, device, &multiprocessors);
      e != cudaSuccess)
    return e;
  // A slice of keys with means takes longer than one of values.
  const int clusters = std::min(multiprocessors / S::kCluster, 2 * p.count);
  const int keys = p.key.mean && clusters < 2 * p.count ? std::max(1, clusters * S::kKeyShare / 100) : clusters / 2;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = S::kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  return queue_with(attributes, p.beside ? 2 : 1, seal_wgmma<D, kNarrow>,
                    dim3(static_cast<unsigned>(clusters * S::kCluster)), S::kThreads, S::kShared, stream, p, keys);
}

}  // namespace

bool wgmma_takes(const SealParams& p, int device) {
  const int dim = p.key.dim;
  // A lane's codes of keys are whole groups of narrow ones where blocks of 32 channels are even.
  const bool even = dim == 64 || dim == 128 || dim == 256;
  return has_wgmma(device) && p.halves && (even || (!has_narrow(p.key, p.value) && (dim == 80 || dim == 96)));
}

cudaError_t launch_seal_wgmma(const SealParams& p, int device, cudaStream_t stream) {
  if (has_narrow(p.key, p.value)) {
    switch (p.key.dim) {
      case 64: return launch<64, true>(p, device, stream);
      case 128: return launch<128, true>(p, device, stream);
      default: return launch<256, true>(p, device, stream);
    }
  }
  switch (p.key.dim) {
    case 64: return launch<64>(p, device, stream);
    case 80: return launch<80>(p, device, stream);
    case 96: return launch<96>(p, device, stream);
    case 128: return launch<128>(p, device, stream);
    default: return launch<256>(p, device, stream);
  }
}

}  // namespace kv4::cuda
