// Attention in one kernel, where a call has no more segments than the device has multiprocessors (attend.cpp decides):
// each segment, the row blocks of one sequence and KV head, gets as many CTAs, and they share its items out. A CTA
// turns the segment's queries itself while the first pages are on their way, joins its readers' partial states in
// shared memory, and the last of a segment's CTAs joins theirs, turns the part over pages back and writes.
//
// Against prepare, main and merge this leaves out two launches, the waits between them and most of the partial states
// in device memory. Every CTA reads both rotations' matrices, 4 D^2 bytes each from L2 (64 KB at d = 128, 1.3 us at 13
// bytes a cycle and multiprocessor with all of them reading), which is why calls of more segments keep the three
// kernels. Versions and times: docs/cuda.md.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/attend_deal.cuh"
#include "cuda/attend_main.cuh"
#include "cuda/attend_merge.cuh"
#include "cuda/attend_team.cuh"

namespace kv4::cuda {

template <int D, Rows kSegmentRows, Readers kReaders>
struct FusedShape {
  static constexpr int kBlocks = blocks_of(kSegmentRows), kRows = kBlocks * kBlockRows;
  static constexpr int kCount = fused_fit<D>(kReaders, kBlocks).readers,
                       kDepth = fused_fit<D>(kReaders, kBlocks).depth;  // readers, their slots
  static constexpr bool kDealt = kReaders == Readers::warps;
  static constexpr int kMembers = members_of(kReaders), kWarps = kCount * kMembers, kAllWarps = kWarps + 1;
  static constexpr int kQueueBytes = queue_bytes(kDepth, Shape<D>::kSlotBytes);
  static constexpr int kSteps = D / 16, kTiles = D / 8;  // of a rotation
  // Tiles of a rotation that a warp asks for ahead: as many registers as there are before the reading, and after it.
  static constexpr int kAheadFirst = D == 64 || D == 256 ? 1 : 2,
                       kAheadLast = kReaders == Readers::fours ? 1 : kAheadFirst;
  static constexpr int kPitch = fused_pitch(D);  // of rows of floats: no bank conflicts between rows of a product
  static constexpr int kOperands = kBlocks * operand_words(D), kFragments = kBlocks * kSteps * kLanes;  // uint4
  static constexpr int kM = kRows * kPitch, kL = kM + kRows;  // of a reader's partial state
  static constexpr int kReaderFloats = reader_state_floats(D, kBlocks);
  static_assert(kQueueBytes >= kReaderFloats * 4, "a reader's state goes where its queue was");

  // Of all warps that read. Teams have the barriers before.
  static constexpr int kBarrier = kMembers > 1 ? kCount + 1 : 1;
  static __device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kWarps * kLanes) : "memory");
  }
  // The same once the filling warp has called `filled`, which does not wait.
  static __device__ __forceinline__ void meet_filled() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier + 1), "n"(kAllWarps * kLanes) : "memory");
  }
  // The queues' barriers are made: said by all warps that read, waited for by the filling warp.
  static __device__ __forceinline__ void made() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier + 2), "n"(kAllWarps * kLanes) : "memory");
  }
  static __device__ __forceinline__ void wait_made() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier + 2), "n"(kAllWarps * kLanes) : "memory");
  }
  static __device__ __forceinline__ void filled() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier + 1), "n"(kAllWarps * kLanes) : "memory");
  }
};

// Tiles of 8 columns of a rotation's matrix that a warp multiplies by: `first`, `first` + `apart`, ... The first kAhead
// are asked for before the rows are there.
template <int D, int kAheadOf>
struct Columns {
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
    // The others at least into L2.
    for (int n = first + kAhead * apart; n < kTiles; n += apart)
      for (int i = lane * 8; i < kSteps * kLanes; i += kLanes * 8)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(matrix.words + n * kSteps * kLanes + i));
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
          float high[4] = {}, low[4] = {};  // apart: half as long a chain
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

// What attend_prepare does, for one segment and into shared memory; by kWarps warps, who meet at a barrier of their
// own. `y`: [kRows][kPitch]. `scales`: as row_scale.
//
// A warp's first row and lambda have been asked for.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void turn_queries(const AttendParams& p, int b, int head, int row0, QueryRow<D>& first,
                                             Columns<D, FusedShape<D, kSegmentRows, kReaders>::kAheadFirst>& columns,
                                             uint4* operands, float* scales, float* y, uint4* fragments, int warp,
                                             int lane) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  __shared__ float largest[F::kRows];
  const int g = lane / 4, t = lane % 4;
  const bool turned = p.dual.words != nullptr;
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
      if (turned) put_halves(words, false, r % kBlockRows, c, over[i].x * inverse, over[i].y * inverse);
      else *reinterpret_cast<float2*>(y + r * F::kPitch + c) = over[i];
    }
    if (lane == 0) largest[r] = top;
  }
  F::meet();
  if (turned) {
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
      top = fmaxf(top, fmaxf(fmaxf(fabsf(x[i].x), fabsf(x[i].y)), fmaxf(fabsf(x[i].z), fabsf(x[i].w))));
    }
    top = warp_max(top);
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

// One row of several partial states, joined: four channels of it for every lane.
template <int D>
struct Joined {
  static constexpr int kQuads = (D / 4 + kLanes - 1) / kLanes;
  float4 o[kQuads];
  float m, l;

  __device__ __forceinline__ void clear() {
    m = -INFINITY;
    l = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) o[i] = {};
  }
  static __device__ __forceinline__ float weight(float its_m, float m) {
    return m == -INFINITY ? 0.0f : exp2_fast(its_m - m);
  }
  // To a maximum of at least m_new.
  __device__ __forceinline__ void raise(float m_new) {
    m_new = fmaxf(m_new, m);
    const float shrink = weight(m, m_new);
    m = m_new;
    l *= shrink;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) o[i] = {o[i].x * shrink, o[i].y * shrink, o[i].z * shrink, o[i].w * shrink};
  }
  __device__ __forceinline__ void add(float w, const float4 (&x)[kQuads]) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      o[i] = {fmaf(x[i].x, w, o[i].x), fmaf(x[i].y, w, o[i].y), fmaf(x[i].z, w, o[i].z), fmaf(x[i].w, w, o[i].w)};
  }
  // `row`: [D]; kFresh: of another CTA, so not from L1. Lanes behind the end take the last channels: around a branch no
  // load would overtake another.
  template <bool kFresh>
  static __device__ __forceinline__ void load(const float* row, int lane, float4 (&x)[kQuads]) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const auto* from = reinterpret_cast<const float4*>(row + min(4 * (lane + i * kLanes), D - 4));
      x[i] = kFresh ? __ldcg(from) : *from;
    }
  }
  // As `row` [D] and its m and l.
  __device__ __forceinline__ void write(float* row, float* m_and_l, int lane) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      if (const int c = 4 * (lane + i * kLanes); c < D) *reinterpret_cast<float4*>(row + c) = o[i];
    if (lane == 0) *reinterpret_cast<float2*>(m_and_l) = {m, l};
  }
};

// Where a CTA stands, and what its shared memory holds behind the queues.
template <int D, Rows kSegmentRows, Readers kReaders>
struct FusedPlace {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  uint4 *operands, *fragments;
  float *y, *carried;  // [kRows][kPitch]; the state over exact rows of a reader that reads pages too
  TeamExchange<F::kMembers, F::kBlocks>* exchanges;
  int b, head, part, row0;  // part: segment of the head's

  // CTA (x, y, z): x of those of segment y of sequence z.
  __device__ __forceinline__ FusedPlace(const AttendParams& p, unsigned char* memory, int its_segment, int sequence) {
    operands = reinterpret_cast<uint4*>(memory + F::kCount * F::kQueueBytes);
    fragments = operands + F::kOperands;
    y = reinterpret_cast<float*>(fragments + F::kFragments);
    carried = y + F::kRows * F::kPitch;
    exchanges = reinterpret_cast<TeamExchange<F::kMembers, F::kBlocks>*>(carried + F::kReaderFloats);
    const int most_per_head = p.blocks / F::kBlocks;
    b = sequence;
    head = most_per_head == 1 ? its_segment : its_segment / most_per_head;
    part = its_segment - head * most_per_head;
    row0 = part * F::kRows;
  }
  // Looked up where it is needed: registers are short.
  __device__ __forceinline__ int rows(const AttendParams& p) const {
    return min(F::kRows, p.group * static_cast<int>(p.sequences[b].query_count) - row0);
  }
};

template <int D, Rows kSegmentRows, Readers kReaders>
using SharesOf =
    FusedShares<FusedShape<D, kSegmentRows, kReaders>::kCount, FusedShape<D, kSegmentRows, kReaders>::kDealt>;

extern __shared__ __align__(128) unsigned char memory[];  // as attend_main declares it

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_fill(const AttendParams& p, const SharesOf<D, kSegmentRows, kReaders>& shares,
                                           FusedEnd* end, int lane) {
  using S = Shape<D>;
  using F = FusedShape<D, kSegmentRows, kReaders>;
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
  Cursor from;
  if (lane < F::kCount) from.start_within(p, at.b, at.head, at.part, shares.of(blockIdx.x, lane));
  PiecesOf<F::kMembers, kReaders == Readers::warps ? 1 : 2, true> pieces(p, from, at.head);
  Filler<F::kDepth, S::kSlotBytes, S::kExactPitch> filler(memory + min(lane, F::kCount - 1) * F::kQueueBytes);
  fill_all(pieces, filler, lane, [] { F::wait_made(); });
  if (lane == 0) *end = fused_end(shares, blockIdx.x);
  F::filled();
}

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_read(const AttendParams& p, const SharesOf<D, kSegmentRows, kReaders>& shares,
                                           QueryRow<D>& first,
                                           Columns<D, FusedShape<D, kSegmentRows, kReaders>::kAheadFirst>& columns,
                                           int warp, int lane) {
  using S = Shape<D>;
  using F = FusedShape<D, kSegmentRows, kReaders>;
  constexpr bool kTeamed = kReaders != Readers::warps;
  __shared__ float scales[F::kBlocks * 2 * kBlockRows];
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
  turn_queries<D, kSegmentRows, kReaders>(p, at.b, at.head, at.row0, first, columns, at.operands, scales, at.y,
                                          at.fragments, warp, lane);
  const int reader = warp / F::kMembers, member = warp % F::kMembers;
  const Stretch stretch = shares.of(blockIdx.x, reader);
  unsigned char* const mine = memory + reader * F::kQueueBytes;
  std::conditional_t<kTeamed, TeamQueue<F::kMembers, F::kDepth, S::kSlotBytes>,
                     Queue<F::kDepth, S::kSlotBytes, S::kExactPitch>>
      queue(mine, lane);
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const bool packed = kind != 0;
    const int run = packed ? stretch.page_count : stretch.exact_count;
    if (run == 0) continue;
    Cursor here;
    here.start_within(p, at.b, at.head, at.part, {stretch.exact, packed ? 0 : run, stretch.page, packed ? run : 0});
    float* const to = packed || stretch.page_count == 0 ? reinterpret_cast<float*>(mine)
                                                        : at.carried;  // one reader at most has both kinds
    if constexpr (kTeamed) {
      TeamState<D, F::kMembers, F::kBlocks> state;
      state.clear();
      auto& exchange = at.exchanges[reader];
      if (packed)
        team_pages<D, kSegmentRows, operand_words(D)>(p, queue, state, exchange, at.operands, scales, here, at.head,
                                                      at.row0, run, reader, member, lane);
      else team_exact<D>(p, queue, state, exchange, at.operands, here, at.head, at.row0, run, reader, member, lane);
      state.template share_sums<kSegmentRows == Rows::four>(exchange, packed, member, lane);
      meet_team<F::kMembers>(reader);  // and nobody reads the queue any more
      state.template put<kSegmentRows == Rows::four, F::kPitch>(to, exchange, packed, at.rows(p), member, lane);
    } else {
      Pieces none(p, Cursor());
      const auto take = [&](auto state, auto read) {
        state.clear();
        read(state);
        state.template put<F::kRows, F::kPitch>(to, at.rows(p), lane);
      };
      if (packed)
        take(PageState<D, tiles_of(kSegmentRows)>(), [&](auto& state) {
          pages_run<D, kSegmentRows>(p, queue, none, state, at.operands, scales, here, at.head, at.row0, run, lane);
        });
      else
        take(State<D, F::kBlocks>(), [&](auto& state) {
          exact_run<D, F::kBlocks>(p, queue, none, state, here, at.head, at.operands, at.row0, run, lane);
        });
    }
  }
}

// The same number, which the compiler takes for another: what is made of it is made anew and takes no registers before.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What follows the reading.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_finish(const AttendParams& p, const FusedEnd* worked_out) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  constexpr int kSteps = F::kSteps;
  __shared__ float largest[F::kRows], whole[F::kRows];  // of the part over pages; what the sums are multiplied by
  __shared__ long long to[F::kRows];                    // a row's first element
  __shared__ int last;
  const int thread = anew(threadIdx.x), cta = anew(blockIdx.x), place = anew(blockIdx.z * gridDim.y + blockIdx.y);
  const int lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, anew(blockIdx.y), anew(blockIdx.z));
  const int head = at.head, row0 = at.row0, rows = at.rows(p);
  const SequenceView& s = p.sequences[at.b];
  const bool turned = p.inverse_transpose.words != nullptr && s.page_count > 0;
  Columns<D, F::kAheadLast> columns;
  if (turned) columns.prefetch(p.inverse_transpose, warp, F::kWarps, lane);
  // Of rows g: what lambda of the values divides by, asked for early.
  float2 lambda[Columns<D, F::kAheadLast>::kAhead];
#pragma unroll
  for (int i = 0; i < Columns<D, F::kAheadLast>::kAhead; ++i) {
    const int c = (warp + i * F::kWarps) * 8 + 2 * t;
    lambda[i] = {1, 1};
    if (s.lambda_v != nullptr && c < D) lambda[i] = {s.lambda_v[head * D + c], s.lambda_v[head * D + c + 1]};
  }
  F::meet_filled();
  const FusedEnd& end = *worked_out;

  // This CTA's states, of its readers'.
  Joined<D> sum;
  constexpr int kStateFloats = fused_state_floats(D, F::kBlocks),
                kM = F::kRows * D;  // o [kRows][D], m and l of each row
  float* const of_segment = p.states + static_cast<std::size_t>(place) * 2 * gridDim.x * kStateFloats;
  for (int unit = warp; unit < 2 * rows; unit += F::kWarps) {
    const int over_pages = unit < rows ? 0 : 1, r = unit - over_pages * rows;
    const int begin = over_pages != 0 ? end.first_pages : -end.carried,
              behind = over_pages != 0 ? end.readers : end.first_pages;
    if (begin >= behind) continue;
    const auto state = [&](int i) {
      return i < 0 ? at.carried : reinterpret_cast<const float*>(memory + i * F::kQueueBytes);
    };
    sum.clear();
#pragma unroll 1
    for (int i = begin; i < behind; ++i) {
      const float* from = state(i);
      float4 x[Joined<D>::kQuads];
      sum.template load<false>(from + r * F::kPitch, lane, x);
      const float m = from[F::kM + r];
      sum.raise(m);
      const float weight = sum.weight(m, sum.m);
      sum.l = fmaf(from[F::kL + r], weight, sum.l);
      sum.add(weight, x);
    }
    float* const mine =
        of_segment + static_cast<std::size_t>(over_pages != 0 ? end.exact + cta - end.first_paged : cta) * kStateFloats;
    sum.write(mine + r * D, mine + kM + 2 * r, lane);
  }
  F::meet();
  if (thread == 0) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(p.arrived + place) : "memory");
    last = before == end.ctas - 1;
    if (last) p.arrived[place] = 0;  // as the next call wants it
  }
  F::meet();
  if (!last) return;

  // The segment's states joined, into shared memory where the queues were: of each row the part over pages by `parts`
  // warps, that over exact rows by one. In few instructions: most of them run once, and wait to be fetched.
  constexpr int kAtOnce = 8 / Joined<D>::kQuads, kPart = D + 4;
  const int parts = max(1, F::kWarps / rows - 1);
  float* const sums = reinterpret_cast<float*>(memory);  // [parts + 1][rows][kPart]: o, m, l
#pragma unroll 1
  for (int unit = warp; unit < rows * (parts + 1); unit += F::kWarps) {
    const int part = unit / rows, r = unit - part * rows, pages = end.all - end.exact;
    const int begin = part < parts ? end.exact + pages * part / parts : 0,
              behind = part < parts ? end.exact + pages * (part + 1) / parts : end.exact;
    sum.clear();
    const float* from = of_segment + static_cast<std::size_t>(begin) * kStateFloats + r * D;
#pragma unroll 1
    for (int left = behind - begin; left > 0; left -= kAtOnce, from += kAtOnce * kStateFloats) {
      float4 x[kAtOnce][Joined<D>::kQuads];
      float2 its[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce;
           ++j) {  // behind the end the last one again, with a weight of 0: what nobody wrote may be NaN
        const float* at_j = from + min(j, left - 1) * kStateFloats;
        sum.template load<true>(at_j, lane, x[j]);
        its[j] = __ldcg(reinterpret_cast<const float2*>(at_j + kM + 2 * r - r * D));
        if (j >= left) its[j].x = -INFINITY;
      }
      float m = its[0].x;
#pragma unroll
      for (int j = 1; j < kAtOnce; ++j) m = fmaxf(m, its[j].x);
      sum.raise(m);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float weight = sum.weight(its[j].x, sum.m);
        sum.l = fmaf(its[j].y, weight, sum.l);
        sum.add(weight, x[j]);
      }
    }
    sum.write(sums + unit * kPart, sums + unit * kPart + D, lane);
  }
  F::meet();

  // out = R^-1 y / lambda + z, as attend_merge has it.
#pragma unroll 1
  for (int r = warp; r < F::kRows; r += F::kWarps) {
    sum.clear();
    float4 rest[Joined<D>::kQuads] = {};
    if (r < rows) {
      const float* const exact = sums + (parts * rows + r) * kPart;
      float m = exact[D];
      for (int part = 0; part < parts; ++part) m = fmaxf(m, sums[(part * rows + r) * kPart + D]);
      sum.raise(m);
      for (int part = 0; part < parts; ++part) {
        const float* from = sums + (part * rows + r) * kPart;
        float4 x[Joined<D>::kQuads];
        sum.template load<false>(from, lane, x);
        const float weight = sum.weight(from[D], sum.m);
        sum.l = fmaf(from[D + 1], weight, sum.l);
        sum.add(weight, x);
      }
      sum.template load<false>(exact, lane, rest);
      const float weight = sum.weight(exact[D], sum.m);
      sum.l = fmaf(exact[D + 1], weight, sum.l);
#pragma unroll
      for (int i = 0; i < Joined<D>::kQuads; ++i)
        rest[i] = {rest[i].x * weight, rest[i].y * weight, rest[i].z * weight, rest[i].w * weight};
    }
    float top = 0;
#pragma unroll
    for (int i = 0; i < Joined<D>::kQuads; ++i) {
      const float4& x = sum.o[i];
      top = fmaxf(top, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
    }
    top = warp_max(top);
    const float inverse = top > 0 ? 1.0f / top : 0.0f;
    auto* words = reinterpret_cast<uint32_t*>(at.fragments + r / kBlockRows * kSteps * kLanes);
#pragma unroll
    for (int i = 0; i < Joined<D>::kQuads; ++i) {
      const int c = 4 * (lane + i * kLanes);
      if (c >= D) continue;
      const float4 x = sum.o[i];
      if (turned) {
        put_halves(words, false, r % kBlockRows, c, x.x * inverse, x.y * inverse);
        put_halves(words, false, r % kBlockRows, c + 2, x.z * inverse, x.w * inverse);
      } else if (s.page_count > 0) {
        float of[4] = {1, 1, 1, 1};
        if (s.lambda_v != nullptr)
          for (int e = 0; e < 4; ++e) of[e] = s.lambda_v[head * D + c + e];
        rest[i] = {rest[i].x + x.x / of[0], rest[i].y + x.y / of[1], rest[i].z + x.z / of[2], rest[i].w + x.w / of[3]};
      }
      *reinterpret_cast<float4*>(at.y + r * F::kPitch + c) = rest[i];
    }
    if (lane == 0) {
      const int row = row0 + r, q_head = head * p.group + row % p.group;
      constexpr float kLog2e = 1.4426950408889634f;
      const float more = r < rows && p.out != nullptr && p.sinks != nullptr && sum.l > 0
                             ? exp2f(p.sinks[q_head] * kLog2e - sum.m)
                             : 0.0f;
      largest[r] = top * p.inverse_transpose.scale;
      whole[r] = p.out == nullptr ? (sum.l > 0 ? 1.0f : 0.0f) : sum.l > 0 ? 1.0f / (sum.l + more) : 0.0f;
      if (r < rows) {
        const int query = row / p.group;
        to[r] = p.out != nullptr
                    ? s.input * p.out_stride[0] + q_head * p.out_stride[1] + (s.input_row + query) * p.out_stride[2]
                    : (static_cast<long long>(s.input) * p.kv_heads * p.group + q_head) * p.rows + s.input_row + query;
        if (p.out == nullptr) {
          constexpr float kLn2 = 0.6931471805599453f;
          p.partial.m[to[r]] = sum.m * kLn2;
          p.partial.l[to[r]] = sum.l;
        }
      }
    }
  }
  F::meet();

  const auto write = [&](int r, int c, float2 x) {
    if (r >= rows) return;
    x = {x.x * whole[r], x.y * whole[r]};
    if (whole[r] == 0) x = {0, 0};
    if (p.out != nullptr) {
      store_element(p.out, p.out_dtype, to[r] + c, x.x);
      store_element(p.out, p.out_dtype, to[r] + c + 1, x.y);
    } else {
      *reinterpret_cast<float2*>(p.partial.o + to[r] * D + c) = x;
    }
  };
  if (turned) {
    columns.template multiply<F::kBlocks>(
        p.inverse_transpose, at.fragments, warp, F::kWarps, lane, [&](int block, int n, int i, float c0, float c1) {
          const int r = block * kBlockRows + g, c = n * 8 + 2 * t;
          const float2 rest = *reinterpret_cast<const float2*>(at.y + r * F::kPitch + c);
          float2 of = lambda[i];
          if (n >= Columns<D, F::kAheadLast>::kAhead * F::kWarps && s.lambda_v != nullptr)
            of = {s.lambda_v[head * D + c], s.lambda_v[head * D + c + 1]};
          write(r, c, {c0 * largest[r] / of.x + rest.x, c1 * largest[r] / of.y + rest.y});
        });
  } else {
    for (int r = warp; r < rows; r += F::kWarps)
      for (int c = 2 * lane; c < D; c += 2 * kLanes)
        write(r, c, *reinterpret_cast<const float2*>(at.y + r * F::kPitch + c));
  }
}

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_all(const AttendParams& p) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  __shared__ FusedEnd end;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  {
    Columns<D, F::kAheadFirst> columns;
    QueryRow<D> first;
    wait_for_previous();
    let_next_begin();
    // What everything else waits for is asked for first.
    const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
    const SequenceView& s = p.sequences[at.b];
    const auto sinks = s.exact[0].count, window = s.exact[1].count;
    const int pages = s.page_count;
    const float* const lambda = s.lambda_k;
    if (warp == F::kWarps) expect_ids(p, s, lane);
    if (lane == 0 && warp < F::kWarps) {
      unsigned char* const queue = memory + warp / F::kMembers * F::kQueueBytes;
      if constexpr (kReaders != Readers::warps)
        TeamQueue<F::kMembers, F::kDepth, Shape<D>::kSlotBytes>::prepare(queue, warp % F::kMembers);
      else Queue<F::kDepth, Shape<D>::kSlotBytes, Shape<D>::kExactPitch>::prepare(queue);
    }
    if (warp < F::kWarps) {
      __syncwarp();
      F::made();
      if (p.dual.words != nullptr) columns.prefetch(p.dual, warp, F::kWarps, lane);
      first.load(p, s, at.head, at.row0 + warp, lane);
      first.load_lambda(lambda, at.head, lane);
    }
    const auto items = [](long long rows) { return static_cast<int>((rows + kExactTokens - 1) / kExactTokens); };
    const SharesOf<D, kSegmentRows, kReaders> shares(items(sinks) + items(window), pages);
    if (blockIdx.x >= shares.ctas || at.rows(p) <= 0) return;
    if (warp == F::kWarps) return fused_fill<D, kSegmentRows, kReaders>(p, shares, &end, lane);
    fused_read<D, kSegmentRows, kReaders>(p, shares, first, columns, warp, lane);
  }
  fused_finish<D, kSegmentRows, kReaders>(p, &end);
}

// For the large room alone, where another warp fills the queues. Empty in code for devices before 9.0.
template <int D, Rows kSegmentRows, Readers kReaders>
__global__ void __launch_bounds__(FusedShape<D, kSegmentRows, kReaders>::kAllWarps* kLanes, 1)
    attend_fused(const __grid_constant__ AttendParams p) {
#ifdef __CUDA_ARCH__
  if constexpr (runs_in(Room::large, __CUDA_ARCH__ / 10)) fused_all<D, kSegmentRows, kReaders>(p);
#endif
}

}  // namespace kv4::cuda
