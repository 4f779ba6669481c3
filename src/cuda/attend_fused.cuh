// Attention in one kernel, where a call has no more segments than the device has multiprocessors (attend.cpp decides): each
// segment, the row blocks of one sequence and KV head, gets as many CTAs, and they share its items out. A CTA turns the
// segment's queries itself while the first pages are on their way, joins its readers' partial states in shared memory, and the
// last of a segment's CTAs joins theirs, turns the part over pages back and writes.
//
// Against prepare, main and merge this leaves out two launches, the waits between them and most of the partial states
// in device memory. Every CTA reads both rotations' matrices, 4 D^2 bytes each from L2 (64 KB at d = 128, 1.3 us at 13 bytes a
// cycle and multiprocessor with all of them reading), which is why calls of more segments keep the three kernels. Versions and
// times: docs/cuda.md.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/attend_main.cuh"
#include "cuda/attend_merge.cuh"
#include "cuda/attend_team.cuh"

namespace kv4::cuda {

template <int D, Rows kSegmentRows, Readers kReaders>
struct FusedShape {
  static constexpr int kBlocks = blocks_of(kSegmentRows), kRows = kBlocks * kBlockRows;
  static constexpr int kCount = fused_fit<D>(kReaders, kBlocks).warps, kDepth = fused_fit<D>(kReaders, kBlocks).depth;  // readers, their slots
  static constexpr int kMembers = members_of(kReaders), kWarps = kCount * kMembers, kAllWarps = kWarps + 1;
  static constexpr int kQueueBytes = queue_bytes(kDepth, Shape<D>::kSlotBytes);
  static constexpr int kSteps = D / 16, kTiles = D / 8;  // of a rotation
  // Tiles of a rotation that a warp asks for ahead: as many registers as there are before the reading, and after it.
  static constexpr int kAheadFirst = D == 64 || D == 256 ? 1 : 2, kAheadLast = kReaders == Readers::teams ? 1 : kAheadFirst;
  static constexpr int kPitch = fused_pitch(D);          // of rows of floats: no bank conflicts between rows of a product
  static constexpr int kOperands = kBlocks * operand_words(D), kFragments = kBlocks * kSteps * kLanes;  // uint4
  static constexpr int kM = kRows * kPitch, kL = kM + kRows;  // of a reader's partial state
  static constexpr int kStateFloats = reader_state_floats(kReaders, D, kBlocks);
  static_assert(kQueueBytes >= kStateFloats * 4, "a reader's state goes where its queue was");

  // Of all warps that read.
  static __device__ __forceinline__ void meet() { asm volatile("bar.sync %0, %1;" ::"n"(kTeams + 1), "n"(kWarps * kLanes) : "memory"); }
  // The same once the filling warp has called `filled`, which does not wait.
  static __device__ __forceinline__ void meet_filled() { asm volatile("bar.sync %0, %1;" ::"n"(kTeams + 2), "n"(kAllWarps * kLanes) : "memory"); }
  static __device__ __forceinline__ void filled() { asm volatile("bar.arrive %0, %1;" ::"n"(kTeams + 2), "n"(kAllWarps * kLanes) : "memory"); }
};

// Tiles of 8 columns of a rotation's matrix that a warp multiplies by: `first`, `first` + `apart`, ... The first kAhead are
// asked for before the rows are there.
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
  // f(block, n, i, c0, c1): columns 8n + 2t and + 1 of row g of each block, n of load i, in units of the row's and the matrix's scale.
  template <int kBlocks, class F>
  __device__ __forceinline__ void multiply(const PackedMatrix& matrix, const uint4* fragments, int first, int apart, int lane, F f) {
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

// What attend_prepare does, for one segment and into shared memory; by kWarps warps, who meet at a barrier of their own. `y`:
// [kRows][kPitch]. `scales`: as row_scale.
//
// A warp's first row and lambda are asked for before the CTA's first barrier.
template <int D>
struct QueryRow {
  static constexpr int kPairs = (D / 2 + kLanes - 1) / kLanes;
  uint2 raw[kPairs];  // widened when they are used, so that nobody waits here
  float2 lambda[kPairs];

  __device__ __forceinline__ void load_lambda(const float* of_keys, int head, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * (lane + i * kLanes);
      lambda[i] = {1, 1};
      if (of_keys != nullptr && c < D) lambda[i] = {of_keys[head * D + c], of_keys[head * D + c + 1]};
    }
  }

  __device__ __forceinline__ void load(const AttendParams& p, int b, int head, int row, int lane) {
    const int query = row / p.group;
    const long long from = b * p.q_stride[0] + (head * p.group + row - query * p.group) * p.q_stride[1] + query * p.q_stride[2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = 2 * (lane + i * kLanes);
      raw[i] = {0, 0};
      if (c >= D || row >= p.group * p.queries) continue;
      if (p.q_dtype == DType::f32) raw[i] = {static_cast<const uint32_t*>(p.q)[from + c], static_cast<const uint32_t*>(p.q)[from + c + 1]};
      else raw[i] = {static_cast<const uint16_t*>(p.q)[from + c], static_cast<const uint16_t*>(p.q)[from + c + 1]};
    }
  }
  __device__ __forceinline__ float2 operator()(const AttendParams& p, int i) const {
    if (p.q_dtype == DType::f32) return {__uint_as_float(raw[i].x), __uint_as_float(raw[i].y)};
    if (p.q_dtype == DType::bf16) return {__uint_as_float(raw[i].x << 16), __uint_as_float(raw[i].y << 16)};
    return unpack_halves(false, raw[i].x | raw[i].y << 16);
  }
};

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void turn_queries(const AttendParams& p, int b, int head, int row0, QueryRow<D>& first,
                                             Columns<D, FusedShape<D, kSegmentRows, kReaders>::kAheadFirst>& columns, uint4* operands,
                                             float* scales, float* y, uint4* fragments, int warp, int lane) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  __shared__ float largest[F::kRows];
  const int g = lane / 4, t = lane % 4;
  const bool turned = p.dual.words != nullptr;
  constexpr int kPairs = QueryRow<D>::kPairs, kQuads = (pad_channels(D) / 4 + kLanes - 1) / kLanes;
#pragma unroll 1
  for (int r = warp; r < F::kRows; r += F::kWarps) {
    float2 over[kPairs];
    float top = 0;
    if (r != warp) first.load(p, b, head, row0 + r, lane);
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
    columns.template multiply<F::kBlocks>(p.dual, fragments, warp, F::kWarps, lane, [&](int block, int n, int, float c0, float c1) {
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
        block[(operand_bytes_tiles(D) + c / 32 * 2 + c % 8 / 4) * kLanes + row * 4 + c % 32 / 8] =
            two_halves(false, values[0] * to_one, values[1] * to_one, values[2] * to_one, values[3] * to_one);
    }
    if (lane == 0) {
      scales[r / kBlockRows * 2 * kBlockRows + row] = top / 32512.0f * p.factor;
      scales[r / kBlockRows * 2 * kBlockRows + kBlockRows + row] = top * p.factor;
    }
  }
  F::meet();
}

// One row of several partial states, joined: over exact rows and over pages apart, four channels of each for every lane.
template <int D>
struct Joined {
  static constexpr int kQuads = (D / 4 + kLanes - 1) / kLanes;
  float4 o[2][kQuads];
  float m, l;

  __device__ __forceinline__ void clear(float largest) {
    m = largest;
    l = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) o[0][i] = o[1][i] = {};
  }
  static __device__ __forceinline__ float weight(float its_m, float m) { return m == -INFINITY ? 0.0f : exp2_fast(its_m - m); }
  // `row`: [D]; kFresh: of another CTA, so not from L1. Lanes behind the end take the last channels: around a branch no load would
  // overtake another.
  template <bool kFresh>
  static __device__ __forceinline__ void load(const float* row, int lane, float4 (&x)[kQuads]) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const auto* from = reinterpret_cast<const float4*>(row + min(4 * (lane + i * kLanes), D - 4));
      x[i] = kFresh ? __ldcg(from) : *from;
    }
  }
  // kind: 0 over exact rows, 1 over pages; without a branch.
  __device__ __forceinline__ void add(int kind, float w, const float4 (&x)[kQuads]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float weight = kind == k ? w : 0.0f;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        o[k][i].x = fmaf(x[i].x, weight, o[k][i].x);
        o[k][i].y = fmaf(x[i].y, weight, o[k][i].y);
        o[k][i].z = fmaf(x[i].z, weight, o[k][i].z);
        o[k][i].w = fmaf(x[i].w, weight, o[k][i].w);
      }
    }
  }
  __device__ __forceinline__ void write(int kind, float* row, int lane) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      if (const int c = 4 * (lane + i * kLanes); c < D) *reinterpret_cast<float4*>(row + c) = kind == 0 ? o[0][i] : o[1][i];
  }
};

// Where a CTA stands, and what its shared memory holds behind the queues.
template <int D, Rows kSegmentRows, Readers kReaders>
struct FusedPlace {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  uint4 *operands, *fragments;
  float *y, *carried;  // [kRows][kPitch]; the state over exact rows of a reader that reads pages too
  TeamExchange<F::kBlocks>* exchanges;
  int segments_per_head, segment, b, head, row0, rows;

  // CTA (x, y, z): x of those of segment y of sequence z.
  __device__ __forceinline__ FusedPlace(const AttendParams& p, unsigned char* memory, int its_segment, int sequence) {
    operands = reinterpret_cast<uint4*>(memory + F::kCount * F::kQueueBytes);
    fragments = operands + F::kOperands;
    y = reinterpret_cast<float*>(fragments + F::kFragments);
    carried = y + F::kRows * F::kPitch;
    exchanges = reinterpret_cast<TeamExchange<F::kBlocks>*>(carried + F::kStateFloats);
    segments_per_head = p.blocks / F::kBlocks;
    segment = its_segment;
    b = sequence;
    head = segments_per_head == 1 ? segment : segment / segments_per_head;
    row0 = (segment - head * segments_per_head) * F::kRows;
    rows = min(F::kRows, p.group * p.queries - row0);
  }
};

// How a segment's items are shared out among its CTAs' readers, kCount each.
template <int kCount>
struct FusedShares : Shares {
  int exact_items, items, ctas;

  __device__ __forceinline__ FusedShares(int exact, int pages)
      : Shares(exact + pages, static_cast<int>(gridDim.x) * kCount), exact_items(exact), items(exact + pages),
        ctas(max(1, (warps + kCount - 1) / kCount)) {}
};

extern __shared__ __align__(128) unsigned char memory[];  // as attend_main declares it

// What follows the reading has to know, worked out by the filling warp, which has time for divisions.
struct FusedEnd {
  int ctas, states;              // of the segment; of this CTA's readers
  int exact_states, first_paged; // CTAs [0, exact_states) of the segment end with a state over exact rows, those from first_paged
                                 // on with one over pages; at least one is named
  int first_pages;               // of this CTA's readers those from this one on
};
template <int kCount>
__device__ __forceinline__ FusedEnd fused_end(const FusedShares<kCount>& shares, int cta) {
  FusedEnd end;
  end.ctas = shares.ctas;
  end.states = max(0, min(kCount, shares.warps - cta * kCount));
  const int pages_from = shares.exact_items < shares.items ? shares.owner(shares.exact_items) : shares.warps;
  end.exact_states = shares.exact_items > 0 ? shares.owner(shares.exact_items - 1) / kCount + 1 : shares.items > 0 ? 0 : 1;
  end.first_paged = shares.exact_items < shares.items ? pages_from / kCount : shares.ctas;
  end.first_pages = pages_from - cta * kCount;
  return end;
}

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_read(const AttendParams& p, const SequenceView& s,
                                           const FusedShares<FusedShape<D, kSegmentRows, kReaders>::kCount>& shares, QueryRow<D>& first,
                                           Columns<D, FusedShape<D, kSegmentRows, kReaders>::kAheadFirst>& columns, int* carries, FusedEnd* end,
                                           int warp, int lane) {
  using S = Shape<D>;
  using F = FusedShape<D, kSegmentRows, kReaders>;
  constexpr bool kTeamed = kReaders == Readers::teams;
  __shared__ float scales[F::kBlocks * 2 * kBlockRows];
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
  const int reader0 = blockIdx.x * F::kCount;
  if (warp == F::kWarps) {
    const int w = reader0 + lane;
    Cursor from;
    if (lane < F::kCount && w < shares.warps) from.start_within(p, at.b, at.segment, shares.first(w), shares.first(w + 1));
    PiecesOf<F::kMembers> pieces(p, from, at.segments_per_head);
    Filler<F::kDepth, S::kSlotBytes, S::kExactPitch> filler(memory + min(lane, F::kCount - 1) * F::kQueueBytes);
    while (__any_sync(kAll, !pieces.done())) {
      const bool mine = !pieces.done() && filler.ready();
      const Piece piece = mine ? pieces.piece() : Piece();
      filler.put(mine, piece, lane);
      if (mine) pieces.next();
    }
    if (lane == 0) *end = fused_end(shares, blockIdx.x);
    F::filled();
    return;
  }
  turn_queries<D, kSegmentRows, kReaders>(p, at.b, at.head, at.row0, first, columns, at.operands, scales, at.y, at.fragments, warp, lane);
  const int reader = warp / F::kMembers, member = warp % F::kMembers, w = reader0 + reader;
  Cursor here;
  if (w < shares.warps) here.start_within(p, at.b, at.segment, shares.first(w), shares.first(w + 1));
  unsigned char* const mine = memory + reader * F::kQueueBytes;
  std::conditional_t<kTeamed, TeamQueue<F::kDepth, S::kSlotBytes>, Queue<F::kDepth, S::kSlotBytes, S::kExactPitch>> queue(mine, lane);
  std::conditional_t<kTeamed, TeamState<D, F::kBlocks>, State<D, F::kBlocks>> state;
#pragma unroll 1
  while (here.flat < here.end) {
    const int run = here.run();
    const bool packed = here.packed(), more = here.flat + run < here.end;
    float* const to = more ? at.carried : reinterpret_cast<float*>(mine);
    state.clear();
    if constexpr (kTeamed) {
      auto& exchange = at.exchanges[reader];
      if (packed) team_pages<D, kSegmentRows>(p, queue, state, exchange, at.operands, scales, here, at.head, at.row0, run, reader, member, lane);
      else team_exact<D, F::kBlocks>(p, queue, state, exchange, at.operands, here, at.head, at.row0, run, reader, member, lane);
      meet_team(reader);  // nobody reads the queue any more
      state.template put<kSegmentRows == Rows::four, F::kPitch>(to, packed, at.rows, member, lane);
    } else {
      Pieces none(p, Cursor(), at.segments_per_head);
      if (packed) pages_run<D, kSegmentRows, true>(p, queue, none, state, at.operands, scales, nullptr, here, at.head, at.row0, run, lane);
      else exact_run<D, F::kBlocks>(p, queue, none, state, here, at.head, at.operands, at.row0, run, lane);
      state.template put<kSegmentRows == Rows::four, F::kPitch>(to, packed, at.rows, lane);
    }
    if (more && lane == 0) *carries = 1;
    here.skip(p, run, gridDim.y);
  }
}

// The same number, which the compiler takes for another: what is made of it is made anew and takes no registers before.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What follows the reading.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_finish(const AttendParams& p, const int* carries, const FusedEnd* worked_out) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  constexpr int kSteps = F::kSteps;
  __shared__ float largest[F::kRows], whole[F::kRows];  // of the part over pages; what the sums are multiplied by
  __shared__ long long to[F::kRows];                    // a row's first element
  __shared__ int last;
  const int thread = anew(threadIdx.x), cta = anew(blockIdx.x), place = anew(blockIdx.z * gridDim.y + blockIdx.y);
  const int lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, anew(blockIdx.y), anew(blockIdx.z));
  const int head = at.head, row0 = at.row0, rows = at.rows;
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

  // This CTA's state, of its readers': o over exact rows, o over pages [rows][D] each, m, l [rows].
  Joined<D> sum;
  constexpr int kCtaFloats = fused_state_floats(D, F::kBlocks), kM = 2 * F::kRows * D, kL = kM + F::kRows;
  const float* const of_segment = p.states + static_cast<std::size_t>(place) * gridDim.x * kCtaFloats;
  {
    float* const mine = p.states + (static_cast<std::size_t>(place) * gridDim.x + cta) * kCtaFloats;
    const auto state = [&](int i) { return i < 0 ? at.carried : reinterpret_cast<const float*>(memory + i * F::kQueueBytes); };
    const int begin = *carries != 0 ? -1 : 0, states = end.states, first_pages = end.first_pages;
    for (int r = warp; r < rows; r += F::kWarps) {
      float m = -INFINITY;
      for (int i = begin; i < states; ++i) m = fmaxf(m, state(i)[F::kM + r]);
      sum.clear(m);
#pragma unroll 1
      for (int i = begin; i < states; ++i) {
        const float* from = state(i);
        const float weight = sum.weight(from[F::kM + r], m);
#pragma unroll
        for (int j = 0; j < F::kMembers; ++j) sum.l = fmaf(from[F::kL + j * F::kRows + r], weight, sum.l);
        float4 x[Joined<D>::kQuads];
        sum.template load<false>(from + r * F::kPitch, lane, x);
        sum.add(i >= 0 && i >= first_pages ? 1 : 0, weight, x);
      }
      if (cta < end.exact_states) sum.write(0, mine + r * D, lane);
      if (cta >= end.first_paged) sum.write(1, mine + (F::kRows + r) * D, lane);
      if (lane == 0) {
        mine[kM + r] = sum.m;
        mine[kL + r] = sum.l;
      }
    }
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

  // The CTAs' states joined: `parts` warps share a row, each takes every parts-th state of it and leaves its sums in shared memory,
  // where the queues were. Up to kAtOnce states are asked for together, the first before the maximum is known.
  constexpr int kAtOnce = D == 256 ? 4 : 8, kPart = 2 * D + 4;
  const int parts = max(1, F::kWarps / rows), units = rows * parts;
  float* const sums = reinterpret_cast<float*>(memory);  // [units][kPart]: both o, m, l
  for (int unit = warp; unit < units; unit += F::kWarps) {
    const int r = unit % rows, exact = end.exact_states, all = exact + end.ctas - end.first_paged;
    // Behind the end the last one again, with a weight of 0: what nobody wrote may be NaN.
    const auto state = [&](int i) { return of_segment + (i < exact ? i : i - exact + end.first_paged) * kCtaFloats; };
    float4 x[kAtOnce][Joined<D>::kQuads];
    float its_m[kAtOnce];
    const auto load = [&](int i0) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = min(i0 + j * parts, all - 1);
        const float* from = state(i);
        sum.template load<true>(from + ((i < exact ? 0 : F::kRows) + r) * D, lane, x[j]);
        its_m[j] = __ldcg(from + kM + r);
      }
    };
    load(unit / rows);
    float m = -INFINITY;
    for (int i = lane; i < end.ctas; i += kLanes) m = fmaxf(m, __ldcg(of_segment + i * kCtaFloats + kM + r));
    sum.clear(warp_max(m));
    if (unit < rows) {
      for (int i = lane; i < end.ctas; i += kLanes)
        sum.l = fmaf(__ldcg(of_segment + i * kCtaFloats + kL + r), sum.weight(__ldcg(of_segment + i * kCtaFloats + kM + r), sum.m), sum.l);
      for (int step = kLanes / 2; step > 0; step /= 2) sum.l += __shfl_xor_sync(kAll, sum.l, step);
    }
#pragma unroll 1
    for (int i0 = unit / rows; i0 < all; i0 += kAtOnce * parts) {
      if (i0 >= kAtOnce * parts) load(i0);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = i0 + j * parts;
        sum.add(i < exact ? 0 : 1, i < all ? sum.weight(its_m[j], sum.m) : 0.0f, x[j]);
      }
    }
    float* const mine = sums + unit * kPart;
    sum.write(0, mine, lane);
    sum.write(1, mine + D, lane);
    if (lane == 0) {
      mine[2 * D] = sum.m;
      mine[2 * D + 1] = sum.l;
    }
  }
  F::meet();

  // out = R^-1 y / lambda + z, as attend_merge has it.
#pragma unroll 1
  for (int r = warp; r < F::kRows; r += F::kWarps) {
    sum.clear(-INFINITY);
    if (r < rows) {
      sum.m = sums[r * kPart + 2 * D];
      sum.l = sums[r * kPart + 2 * D + 1];
      for (int unit = r; unit < units; unit += rows)
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) {
          float4 x[Joined<D>::kQuads];
          sum.template load<false>(sums + unit * kPart + kind * D, lane, x);
          sum.add(kind, 1, x);
        }
    }
    float top = 0;
#pragma unroll
    for (int i = 0; i < Joined<D>::kQuads; ++i) {
      const float4& x = sum.o[1][i];
      top = fmaxf(top, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
    }
    top = warp_max(top);
    const float inverse = top > 0 ? 1.0f / top : 0.0f;
    auto* words = reinterpret_cast<uint32_t*>(at.fragments + r / kBlockRows * kSteps * kLanes);
#pragma unroll
    for (int i = 0; i < Joined<D>::kQuads; ++i) {
      const int c = 4 * (lane + i * kLanes);
      if (c >= D) continue;
      const float4 x = sum.o[1][i];
      float4 rest = sum.o[0][i];
      if (turned) {
        put_halves(words, false, r % kBlockRows, c, x.x * inverse, x.y * inverse);
        put_halves(words, false, r % kBlockRows, c + 2, x.z * inverse, x.w * inverse);
      } else if (s.page_count > 0) {
        float of[4] = {1, 1, 1, 1};
        if (s.lambda_v != nullptr)
          for (int e = 0; e < 4; ++e) of[e] = s.lambda_v[head * D + c + e];
        rest = {rest.x + x.x / of[0], rest.y + x.y / of[1], rest.z + x.z / of[2], rest.w + x.w / of[3]};
      }
      *reinterpret_cast<float4*>(at.y + r * F::kPitch + c) = rest;
    }
    if (lane == 0) {
      const int row = row0 + r, q_head = head * p.group + row % p.group;
      constexpr float kLog2e = 1.4426950408889634f;
      const float more = r < rows && p.out != nullptr && p.sinks != nullptr && sum.l > 0 ? exp2f(p.sinks[q_head] * kLog2e - sum.m) : 0.0f;
      largest[r] = top * p.inverse_transpose.scale;
      whole[r] = p.out == nullptr ? (sum.l > 0 ? 1.0f : 0.0f) : sum.l > 0 ? 1.0f / (sum.l + more) : 0.0f;
      if (r < rows) {
        const int query = row / p.group;
        to[r] = p.out != nullptr ? at.b * p.out_stride[0] + q_head * p.out_stride[1] + query * p.out_stride[2]
                                 : (static_cast<long long>(at.b) * p.kv_heads * p.group + q_head) * p.partial_queries + p.partial_begin + query;
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
    columns.template multiply<F::kBlocks>(p.inverse_transpose, at.fragments, warp, F::kWarps, lane, [&](int block, int n, int i, float c0, float c1) {
      const int r = block * kBlockRows + g, c = n * 8 + 2 * t;
      const float2 rest = *reinterpret_cast<const float2*>(at.y + r * F::kPitch + c);
      float2 of = lambda[i];
      if (n >= Columns<D, F::kAheadLast>::kAhead * F::kWarps && s.lambda_v != nullptr) of = {s.lambda_v[head * D + c], s.lambda_v[head * D + c + 1]};
      write(r, c, {c0 * largest[r] / of.x + rest.x, c1 * largest[r] / of.y + rest.y});
    });
  } else {
    for (int r = warp; r < rows; r += F::kWarps)
      for (int c = 2 * lane; c < D; c += 2 * kLanes) write(r, c, *reinterpret_cast<const float2*>(at.y + r * F::kPitch + c));
  }
}

template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_all(const AttendParams& p) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  __shared__ int carries;
  __shared__ FusedEnd end;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  {
    Columns<D, F::kAheadFirst> columns;
    QueryRow<D> first;
    wait_for_previous();
    let_next_begin();
    // What everything else waits for is asked for first; what is needed of it, looked at behind the barrier.
    const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, blockIdx.y, blockIdx.z);
    const SequenceView& s = p.sequences[at.b];
    const auto sinks = s.exact[0].count, window = s.exact[1].count;
    const int pages = s.page_count;
    const float* const lambda = s.lambda_k;
    if (warp < F::kWarps) first.load(p, at.b, at.head, at.row0 + warp, lane);
    if (lane == 0 && warp < F::kWarps) {
      unsigned char* const queue = memory + warp / F::kMembers * F::kQueueBytes;
      if constexpr (kReaders == Readers::teams) TeamQueue<F::kDepth, Shape<D>::kSlotBytes>::prepare(queue, warp % F::kMembers);
      else Queue<F::kDepth, Shape<D>::kSlotBytes, Shape<D>::kExactPitch>::prepare(queue);
    }
    if (threadIdx.x == 0) carries = 0;
    if (warp < F::kWarps && p.dual.words != nullptr) columns.prefetch(p.dual, warp, F::kWarps, lane);
    if (warp < F::kWarps) first.load_lambda(lambda, at.head, lane);
    __syncthreads();
    const auto items = [](long long rows) { return static_cast<int>((rows + kExactTokens - 1) / kExactTokens); };
    const FusedShares<F::kCount> shares(items(sinks) + items(window), pages);
    if (blockIdx.x >= shares.ctas) return;
    fused_read<D, kSegmentRows, kReaders>(p, s, shares, first, columns, &carries, &end, warp, lane);
    if (warp == F::kWarps) return;
  }
  fused_finish<D, kSegmentRows, kReaders>(p, &carries, &end);
}

// For the large room alone, where another warp fills the queues. Empty in code for devices before 9.0.
template <int D, Rows kSegmentRows, Readers kReaders>
__global__ void __launch_bounds__(FusedShape<D, kSegmentRows, kReaders>::kAllWarps * kLanes, 1) attend_fused(const __grid_constant__ AttendParams p) {
#ifdef __CUDA_ARCH__
  if constexpr (runs_in(Room::large, __CUDA_ARCH__ / 10)) fused_all<D, kSegmentRows, kReaders>(p);
#endif
}

}  // namespace kv4::cuda
