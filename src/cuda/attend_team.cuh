// How a team of two or four warps reads pages and exact rows together: each takes the scores of its part of the tokens
// and the outputs of its part of the channels, and they hand maxima and weights round in shared memory, two barriers
// for 128 tokens.
//
// For short calls: a warp by itself (attend_pages.cuh) executes fewer instructions in all, but more of them one after
// another, each fetched for one use. 4 / 1 / 256, 1 x 4,096: 22 us by teams, 29 by warps; 16 x 32,768: 70 and 63.
#pragma once

#include <type_traits>

#include "cuda/attend_exact.cuh"
#include "cuda/attend_main.cuh"

namespace kv4::cuda {

template <int kMembers>
__device__ __forceinline__ void meet_team(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kMembers * kLanes) : "memory");
}

// A team's queue of copies, as Queue (device.cuh) is a warp's: a slot is free when every warp has let go of it.
template <int kMembers, int kDepth, int kSlotBytes>
class TeamQueue {
 public:
  __device__ TeamQueue(unsigned char* memory, int lane) : base_(memory), lane_(lane) {}

  // By lane 0 of each of the team's warps, before a barrier of the CTA.
  static __device__ __forceinline__ void prepare(unsigned char* memory, int member) {
    const uint32_t barriers = shared_address(memory + kDepth * kSlotBytes);
    for (int i = member; i < kDepth; i += kMembers) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers + i * 16) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers + i * 16 + 8), "n"(kMembers) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // The slot `ahead` of the oldest one held, complete.
  __device__ __forceinline__ unsigned char* wait(int ahead) const {
    int i = read_ + ahead;
    const uint32_t parity = i < kDepth ? parity_ : parity_ ^ 1;
    if (i >= kDepth) i -= kDepth;
    const uint32_t barrier = shared_address(base_ + kDepth * kSlotBytes) + i * 16;
    uint32_t done = 0;
    while (done == 0)
      asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(done)
                   : "r"(barrier), "r"(parity)
                   : "memory");
    return base_ + i * kSlotBytes;
  }
  // This warp is done with the `count` oldest slots.
  __device__ __forceinline__ void pop(int count) {
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (lane_ == 0)
        asm volatile(
            "mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(base_ + kDepth * kSlotBytes) + read_ * 16 + 8)
            : "memory");
      if (++read_ == kDepth) {
        read_ = 0;
        parity_ ^= 1;
      }
    }
  }

 private:
  unsigned char* base_;
  int lane_;
  int read_ = 0;
  uint32_t parity_ = 0;
};

// What a team hands round.
template <int kMembers, int kBlocks>
struct TeamExchange {
  uint4 weights[4 * kBlocks * kLanes];  // of pages [page][octets even, odd][block], of exact rows [item][block]
  float2 largest[kMembers]
                [kBlocks * kBlockRows];        // by warp: of the scores, and of them plus log2 of their value's scale
  float sums[kMembers][kBlocks * kBlockRows];  // by warp: of the weights of a run
};
static_assert(sizeof(TeamExchange<2, 1>) == team_exchange_bytes(2, 1) &&
              sizeof(TeamExchange<4, 2>) == team_exchange_bytes(4, 2));

// A warp's part of a team's state: channels 16 (kMembers i + member) ... + 15 of its pair of tiles i; m is the team's,
// l its own.
template <int kMembers>
constexpr int team_pairs(int dim) {
  return (dim / 16 + kMembers - 1) / kMembers;
}
template <int D, int kMembers, int kBlocks>
struct TeamState : Accumulators<2 * team_pairs<kMembers>(D), kBlocks> {
  static constexpr int kPairs = team_pairs<kMembers>(D);
  using Base = Accumulators<2 * kPairs, kBlocks>;
  using Base::o, Base::m, Base::l;

  // At the end of a run, before a barrier of the team and `put`. kTwice: rows of pages are laid twice.
  template <bool kTwice>
  __device__ __forceinline__ void share_sums(TeamExchange<kMembers, kBlocks>& exchange, bool packed, int member,
                                             int lane) const {
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float sum = quad_sum(l[r]);
      if (kTwice && packed) sum += __shfl_xor_sync(kAll, sum, 16);
      if (lane % 4 == 0) exchange.sums[member][r * kBlockRows + lane / 4] = sum;
    }
  }
  // As State's.
  template <bool kTwice, int kPitch = D>
  __device__ __forceinline__ void put(float* out, const TeamExchange<kMembers, kBlocks>& exchange, bool packed,
                                      int rows, int member, int lane) {
    constexpr int kRows = kBlocks * kBlockRows;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      if (kTwice && packed) {
#pragma unroll
        for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) o[r][n][e] += __shfl_xor_sync(kAll, o[r][n][e], 16);
      }
      const int row = r * kBlockRows + g;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n)
        if (const int c = (n / 2 * kMembers + member) * 16 + n % 2 * 8; c < D)
          *reinterpret_cast<float2*>(out + row * kPitch + c + 2 * t) = {o[r][n][0], o[r][n][1]};
      if (t == 0 && member == 0) {
        float sum = exchange.sums[0][row];
#pragma unroll
        for (int w = 1; w < kMembers; ++w) sum += exchange.sums[w][row];
        out[kRows * kPitch + row] = m[r];
        out[kRows * (kPitch + 1) + row] = sum;
      }
    }
  }
};

// A run of pages of one segment, two at a time. `operands`: of the segment, in shared memory, those of its blocks
// kPitch apart.
template <int D, Rows kRowsOf, int kPitch, int kMembers, class Slots>
__device__ __forceinline__ void team_pages(const AttendParams& p, Slots& queue,
                                           TeamState<D, kMembers, blocks_of(kRowsOf)>& state,
                                           TeamExchange<kMembers, blocks_of(kRowsOf)>& exchange, const uint4* operands,
                                           const float* scales, const Cursor& here, int head, int row0, int run,
                                           int team, int member, int lane) {
  using S = Shape<D>;
  constexpr int kBlocks = blocks_of(kRowsOf), kTiles = S::kTiles;
  constexpr bool kFour = kRowsOf == Rows::four;
  constexpr int kSixteens = 4 / kMembers;                                    // of tokens, whose scores a warp has
  constexpr int kOctets = kFour ? 1 : 2;                                     // of each sixteen, whose scores a lane has
  constexpr int kOfSixteen = 2 * kOctets, kScores = kSixteens * kOfSixteen;  // of a page, row and lane
  constexpr float kUnits = 65280;  // of the largest weight; its logarithm is off by less than the 255 left over
  const int g = lane / 4, t = lane % 4;
  const int row = kFour ? g % 4 : g, odd = kFour ? g / 4 : 0;  // as in pages_run
  // At most 4 rows: rows 4 ... 7 of a product with keys are those again, and a lane takes one of its octets' products.
  // Products with means have them for the second half of the channels.
  constexpr bool kFolded = kFour && kTiles % 2 == 0;
  constexpr int kMeanTiles = kFolded ? kTiles / 2 : kTiles;
  const uint4* keys = operands + (kFour ? lane % 16 : lane);
  const int mean_row = kFour ? g % 4 : g;
  const uint4* means = operands + mean_operand<D>(mean_row / 4, kFolded && g >= 4 ? kMeanTiles : 0) + mean_row % 4 * 8 +
                       t;

  // Beyond d = 128 they are read as they are needed: with them in registers nvcc 13.0 has too few left to order
  // look-ups and products well.
  uint4 q[S::kKept ? kBlocks : 1][S::kKept ? kTiles : 1] = {};
  const auto query = [&](int r, int c) {
    if constexpr (S::kKept) return q[r][c];
    return load_again(keys + r * kPitch + c * kLanes);
  };
  float row_scale[kBlocks], mean_scale[kBlocks];
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) {
    row_scale[r] = scales[r * 2 * kBlockRows + row];
    mean_scale[r] = scales[r * 2 * kBlockRows + kBlockRows + (kFolded ? row : g)];
    if constexpr (S::kKept) {
#pragma unroll
      for (int c = 0; c < kTiles; ++c) q[r][c] = keys[r * kPitch + c * kLanes];
    }
  }

  const int first_page = here.item - here.exact_items;
  const int2 plain = plain_pages(p, here.b, head);
  const auto token = [member, t, odd](int i) {
    return (member * kSixteens + i / kOfSixteen) * 16 + (kFour ? odd : i / 2 % 2) * 8 + 2 * t + i % 2;
  };

#pragma unroll 1
  for (int i = 0; i < run; i += 2) {
    const int count = min(2, run - i);
    const unsigned char* slot[2];
    slot[0] = queue.wait(0);
    slot[1] = count == 2 ? queue.wait(1) : slot[0];
    float mean[kBlocks][2];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) mean[r][0] = mean[r][1] = 0;
    if (p.mean) {
      float c[kBlocks][4] = {}, c1[kBlocks][4] = {};  // apart: half as long a chain
#pragma unroll 4
      for (int k = 0; k < kMeanTiles; ++k) {
        // Columns: both pages, and both again.
        const int channel = (k + g / 2 * kMeanTiles) * 32 + t * 8;
        uint4 b = {};
        if (g < (kFolded ? 4 : 2) && channel < D)
          b = *reinterpret_cast<const uint4*>((g % 2 == 0 ? slot[0] : slot[1]) + S::kMeanAt + channel * 2);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          const uint4 *a = means + r * kPitch + 2 * k * kLanes, high = a[0], low = a[4];
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

    float score[kBlocks][2][kScores];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r)
#pragma unroll
      for (int n = 0; n < kScores; ++n) score[r][1][n] = -INFINITY;
#pragma unroll 1
    for (int page = 0; page < count; ++page) {
      const unsigned char* from = page == 0 ? slot[0] : slot[1];
      const auto* key_scales = reinterpret_cast<const __half2*>(from + S::kKeyCodeBytes) + t;
      float now[kBlocks][kScores];
#pragma unroll
      for (int j = 0; j < kSixteens; ++j) {
        const int sixteen = member * kSixteens + j;
        uint32_t words[2 * kTiles];  // its fragments
        if constexpr (kTiles % 2 == 0) {
          const auto* codes = reinterpret_cast<const uint4*>(from) + sixteen * (kTiles / 2) * kLanes + lane;
#pragma unroll
          for (int f = 0; f < kTiles / 2; ++f) {
            const uint4 x = codes[f * kLanes];
            words[4 * f] = x.x, words[4 * f + 1] = x.y, words[4 * f + 2] = x.z, words[4 * f + 3] = x.w;
          }
        } else {
#pragma unroll
          for (int f = 0; f < 2 * kTiles; ++f)
            words[f] = reinterpret_cast<const uint32_t*>(from)[word_index(sixteen * 2 * kTiles + f, lane)];
        }
        Sums sums[2][kBlocks];
#pragma unroll
        for (int k = 0; k < kTiles; ++k)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const Levels8 b = levels_of(words[n * kTiles + k], p.key);
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
          hide_page<kScores, true>(p, here.b, head, row0 + r * kBlockRows + row, at, now[r], token);
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

    // Weights in 16 bits: p times the value's scale, in units of the largest of both pages.
    slot[0] = queue.wait(0);
    slot[1] = count == 2 ? queue.wait(1) : slot[0];
    float value_scale[2][kScores];
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
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float2 top = {-INFINITY, -INFINITY};
#pragma unroll
      for (int n = 0; n < 2 * kScores; ++n) {
        const float x = score[r][n / kScores][n % kScores];
        top.x = fmaxf(top.x, x);
        top.y = fmaxf(
            top.y,
            x + log2_fast(
                    value_scale[n / kScores][n % kScores]));  // behind the last token NaN, which fmaxf passes over
      }
      top = {quad_max(top.x), quad_max(top.y)};
      if (kFour) top = {fmaxf(top.x, __shfl_xor_sync(kAll, top.x, 16)), fmaxf(top.y, __shfl_xor_sync(kAll, top.y, 16))};
      if (t == 0 && (!kFour || g < 4)) exchange.largest[member][r * kBlockRows + row] = top;
    }
    meet_team<kMembers>(team);
    float step[kBlocks];
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
              // Scales behind the last token are anything.
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
    meet_team<kMembers>(team);

    // This warp's channels, a page at a time. Sums over both would be fewer, but by the stall counts in the machine
    // code that nvcc 13.0 makes of them they would take twice the cycles; the two were not timed against each other.
    using StateT = TeamState<D, kMembers, kBlocks>;
    constexpr int kTogether = StateT::kPairs < 4 / kBlocks ? StateT::kPairs : 4 / kBlocks;
#pragma unroll 1
    for (int page = 0; page < count; ++page) {
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
      const auto* codes = reinterpret_cast<const uint4*>(page == 0 ? slot[0] : slot[1]) + lane;
#pragma unroll
      for (int first = 0; first < StateT::kPairs; first += kTogether) {
        Sums sums[kTogether][2][kBlocks];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int pair = (first + j) * kMembers + member;
          if (D / 16 % kMembers != 0 && pair >= D / 16) break;
          const uint4 words = codes[pair * kLanes];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const Levels8 even = levels_of(n == 0 ? words.x : words.z, p.value),
                          odds = levels_of(n == 0 ? words.y : words.w, p.value);
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
    queue.pop(count);
  }
}

// A run of exact items of one segment, as many at a time as the team has warps; `operands`: of the segment.
template <int D, int kMembers, int kBlocks, class Slots>
__device__ __forceinline__ void team_exact(const AttendParams& p, Slots& queue, TeamState<D, kMembers, kBlocks>& state,
                                           TeamExchange<kMembers, kBlocks>& exchange, const uint4* operands,
                                           const Cursor& here, int head, int row0, int run, int team, int member,
                                           int lane) {
  constexpr int kPitch = Shape<D>::kExactPitch;
  const int g = lane / 4, t = lane % 4, matrix = lane / 8, matrix_row = lane % 8;
  operands += (operand_bytes_tiles(D) + operand_mean_steps(D)) * kLanes + lane;
  longlong2 seen = {0, -1};
  if (p.mask.kind == Mask::General::none) {
    const Sight sight(p, here.b, head);
    seen = {sight.first_of_all(p), sight.last_of_all(p)};
  }
#pragma unroll 1
  for (int i = 0; i < run; i += kMembers) {
    const int count = min(kMembers, run - i);
    const bool mine = member < count;
    Cursor at = here;
    at.item += i + member;
    int rows = 0;
    float score[kBlocks][4];
#pragma unroll
    for (int r = 0; r < kBlocks; ++r)
#pragma unroll
      for (int n = 0; n < 4; ++n) score[r][n] = -INFINITY;
    if (mine) {
      const ExactItem item(p, at);
      const long long position = item.position;
      const bool aligned = exact_aligned(p.sequences[at.b].exact[item.set], 0);
      unsigned char* slot = queue.wait(member);
      rows = item.rows;
      if (!aligned) copy_unaligned(p, at.b, item.set, item.first, rows, head, 0, slot, kPitch, lane);
      const uint32_t base = shared_address(slot);
      float c[kBlocks][2][4] = {};
#pragma unroll 4
      for (int k = 0; k < D / 16; ++k) {
        const uint4 x =
            load_matrices<false>(base + (matrix / 2 * 8 + matrix_row) * kPitch + (k * 16 + matrix % 2 * 8) * 2);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          const uint4 q = operands[r * operand_words(D) + k * kLanes];
          mma_halves(p.bf16, c[r][0], q, x.x, x.y);
          mma_halves(p.bf16, c[r][1], q, x.z, x.w);
        }
      }
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          score[r][n] = (c[r][n / 2][n % 2] + c[r][n / 2][n % 2 + 2]) * p.factor;
          if (p.cap > 0) score[r][n] = soft_cap(p.cap, score[r][n]);
        }
        if (rows < kExactTokens || position < seen.x || position + kExactTokens - 1 > seen.y)
          hide<4, true>(p, at.b, head, row0 + r * kBlockRows + g, position, 0, rows, score[r],
                        [t](int n) { return n / 2 * 8 + 2 * t + n % 2; });
      }
    }
    queue.pop(count);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      const float top = quad_max(fmaxf(fmaxf(score[r][0], score[r][1]), fmaxf(score[r][2], score[r][3])));
      if (t == 0) exchange.largest[member][r * kBlockRows + g].x = top;
    }
    meet_team<kMembers>(team);
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      float top = exchange.largest[0][r * kBlockRows + g].x;
#pragma unroll
      for (int w = 1; w < kMembers; ++w) top = fmaxf(top, exchange.largest[w][r * kBlockRows + g].x);
      const float m = state.raise(r, top);
      float weight[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        weight[n] = exp2_fast(score[r][n] - m);
        state.l[r] += weight[n];
      }
      exchange.weights[(member * kBlocks + r) * kLanes + lane] =
          two_halves(p.bf16, weight[0], weight[1], weight[2], weight[3]);
    }
    if (mine) {
      const ExactItem item(p, at);
      const bool aligned = exact_aligned(p.sequences[at.b].exact[item.set], 1);
      if (!aligned || rows < kExactTokens) {
        unsigned char* slot = queue.wait(member);
        if (!aligned) copy_unaligned(p, at.b, item.set, item.first, rows, head, 1, slot, kPitch, lane);
        // What lies behind the rows is anything; its weight is 0, and 0 times NaN is NaN.
        for (int n = lane; n < (kExactTokens - rows) * (D / 8); n += kLanes)
          *reinterpret_cast<uint4*>(slot + (rows + n / (D / 8)) * kPitch + n % (D / 8) * 16) = {};
        fence_shared_writes();
      }
    }
    meet_team<kMembers>(team);
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      const uint32_t base = shared_address(queue.wait(n));
      uint4 weights[kBlocks];
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) weights[r] = exchange.weights[(n * kBlocks + r) * kLanes + lane];
#pragma unroll
      for (int j = 0; j < TeamState<D, kMembers, kBlocks>::kPairs; ++j) {
        const int pair = j * kMembers + member;
        if (D / 16 % kMembers != 0 && pair >= D / 16) break;
        const uint4 x =
            load_matrices<true>(base + (matrix % 2 * 8 + matrix_row) * kPitch + (pair * 16 + matrix / 2 * 8) * 2);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float sum[4] = {};
            mma_halves(p.bf16, sum, weights[r], h == 0 ? x.x : x.z, h == 0 ? x.y : x.w);
            state.o[r][2 * j + h][0] += sum[0] + sum[2];
            state.o[r][2 * j + h][1] += sum[1] + sum[3];
          }
      }
    }
    queue.pop(count);
  }
}

}  // namespace kv4::cuda
