// The second half of attend_fused, after the cache has been read: each CTA merges its readers' partial states, the last
// CTA of a segment to finish merges those of all its CTAs, rotates the part over pages back and writes the rows.
#pragma once

#include <cmath>

#include "cuda/attend_fused_queries.cuh"
#include "cuda/attend_merge.cuh"

namespace kv4::cuda {

// One row of several partial states, joined: four channels of it for every lane.
template <int D>
struct JoinedRow {
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
  // Rescales to a maximum of at least m_new.
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
  // `row`: [D]; kFresh: written by another CTA, so not read through L1. Lanes past the end load the last channels: a
  // branch would keep the loads from overlapping.
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

// Values per row that the warps of a CTA share after reading.
template <int kRows>
struct FusedRows {
  float largest[kRows];  // of the part over pages, in units of the rotation's matrix
  float whole[kRows];    // what sums are multiplied by
  long long to[kRows];   // a row's first element in the output or the call's own partial state
  int last;              // whether this CTA is its segment's last
};

// A segment's partial states in device memory: o [kRows][D], then m and l of each row.
template <int D, int kBlocks>
struct SegmentStates {
  static constexpr int kFloats = fused_state_floats(D, kBlocks), kM = kBlocks * kBlockRows * D;
  float* first;
  __device__ __forceinline__ float* state(int i) const { return first + static_cast<std::size_t>(i) * kFloats; }
};

// Merges the states of this CTA's readers into two states of the segment: over exact rows and over pages.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void join_readers(const FusedPlace<D, kSegmentRows, kReaders>& at, const FusedEnd& end,
                                             const SegmentStates<D, blocks_of(kSegmentRows)>& states, int cta, int rows,
                                             int warp, int lane) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  JoinedRow<D> sum;
  for (int unit = warp; unit < 2 * rows; unit += F::kWarps) {
    const int over_pages = unit < rows ? 0 : 1, r = unit - over_pages * rows;
    const int begin = over_pages != 0 ? end.first_pages : -end.carried,
              behind = over_pages != 0 ? end.readers : end.first_pages;
    if (begin >= behind) continue;
    sum.clear();
#pragma unroll 1
    for (int i = begin; i < behind; ++i) {
      const float* from = i < 0 ? at.carried : reinterpret_cast<const float*>(memory + i * F::kQueueBytes);
      float4 x[JoinedRow<D>::kQuads];
      sum.template load<false>(from + r * F::kPitch, lane, x);
      const float m = from[F::kM + r];
      sum.raise(m);
      const float weight = sum.weight(m, sum.m);
      sum.l = fmaf(from[F::kL + r], weight, sum.l);
      sum.add(weight, x);
    }
    float* const mine = states.state(over_pages != 0 ? end.exact + cta - end.first_paged : cta);
    sum.write(mine + r * D, mine + states.kM + 2 * r, lane);
  }
}

// Whether all other CTAs of the segment have written their states. Called by all reading warps.
template <class Shape>
__device__ __forceinline__ bool arrive(int* arrived, int ctas, int* last, int thread) {
  Shape::meet();
  if (thread == 0) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    *last = before == ctas - 1;
    if (*last) *arrived = 0;  // ready for the next call
  }
  Shape::meet();
  return *last != 0;
}

// Merges the segment's states into shared memory, over the queues. For each row `parts` warps merge the states over
// pages and one warp those over exact rows. Written for few instructions: most run once, so fetching them is the cost.
template <int D>
constexpr int kJoinedFloats = D + 4;  // of a row: o, m, l
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void join_ctas(const FusedEnd& end, const SegmentStates<D, blocks_of(kSegmentRows)>& states,
                                          float* sums, int parts, int rows, int warp, int lane) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  using Row = JoinedRow<D>;
  constexpr int kAtOnce = 8 / Row::kQuads, kStateFloats = SegmentStates<D, F::kBlocks>::kFloats;
  Row sum;
#pragma unroll 1
  for (int unit = warp; unit < rows * (parts + 1); unit += F::kWarps) {
    const int part = unit / rows, r = unit - part * rows, pages = end.all - end.exact;
    const int begin = part < parts ? end.exact + pages * part / parts : 0,
              behind = part < parts ? end.exact + pages * (part + 1) / parts : end.exact;
    sum.clear();
    const float* from = states.state(begin) + r * D;
#pragma unroll 1
    for (int left = behind - begin; left > 0; left -= kAtOnce, from += kAtOnce * kStateFloats) {
      float4 x[kAtOnce][Row::kQuads];
      float2 its[kAtOnce];
      // Past the end, the last state again with a weight of 0: memory that was never written may hold NaN.
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float* at_j = from + min(j, left - 1) * kStateFloats;
        sum.template load<true>(at_j, lane, x[j]);
        its[j] = __ldcg(reinterpret_cast<const float2*>(at_j + states.kM + 2 * r - r * D));
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
    sum.write(sums + unit * kJoinedFloats<D>, sums + unit * kJoinedFloats<D> + D, lane);
  }
}

// Row r of the sums: `pages` becomes the part over pages, `exact` that over exact rows, both relative to the row's
// maximum.
template <int D>
__device__ __forceinline__ void join_parts(const float* sums, int parts, int rows, int r, int lane, JoinedRow<D>& pages,
                                           float4 (&exact)[JoinedRow<D>::kQuads]) {
  const float* const rest = sums + (parts * rows + r) * kJoinedFloats<D>;
  float m = rest[D];
  for (int part = 0; part < parts; ++part) m = fmaxf(m, sums[(part * rows + r) * kJoinedFloats<D> + D]);
  pages.raise(m);
  for (int part = 0; part < parts; ++part) {
    const float* from = sums + (part * rows + r) * kJoinedFloats<D>;
    float4 x[JoinedRow<D>::kQuads];
    pages.template load<false>(from, lane, x);
    const float weight = pages.weight(from[D], pages.m);
    pages.l = fmaf(from[D + 1], weight, pages.l);
    pages.add(weight, x);
  }
  pages.template load<false>(rest, lane, exact);
  const float weight = pages.weight(rest[D], pages.m);
  pages.l = fmaf(rest[D + 1], weight, pages.l);
#pragma unroll
  for (int i = 0; i < JoinedRow<D>::kQuads; ++i)
    exact[i] = {exact[i].x * weight, exact[i].y * weight, exact[i].z * weight, exact[i].w * weight};
}

// Computes where row r is written and its normalisation; writes m and l for a call that wants a partial state.
template <int D, int kRows>
__device__ __forceinline__ void address_row(const AttendParams& p, const SequenceView& s, int head, int row, bool there,
                                            const JoinedRow<D>& sum, int r, FusedRows<kRows>& shared) {
  const int q_head = head * p.group + row % p.group;
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  const float more =
      there && p.out != nullptr && p.sinks != nullptr && sum.l != 0 ? exp2f(p.sinks[q_head] * kLog2e - sum.m) : 0.0f;
  // No weight at all: the row sees nothing. NaN stays.
  shared.whole[r] = sum.l == 0 ? 0.0f : p.out == nullptr ? 1.0f : 1.0f / (sum.l + more);
  if (!there) return;
  const int query = row / p.group;
  shared.to[r] = p.out != nullptr
                     ? s.input * p.out_stride[0] + q_head * p.out_stride[1] + (s.input_row + query) * p.out_stride[2]
                     : (static_cast<long long>(s.input) * p.kv_heads * p.group + q_head) * p.rows + s.input_row + query;
  if (p.out != nullptr) return;
  p.partial.m[shared.to[r]] = sum.m * kLn2;
  p.partial.l[shared.to[r]] = sum.l;
}

// out = R^-1 y / lambda + z, as attend_merge has it: y of each row as the product's operand, z in at.y; where nothing
// is rotated the whole in at.y.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void finish_rows(const AttendParams& p, const FusedPlace<D, kSegmentRows, kReaders>& at,
                                            const SequenceView& s, const float* sums, int parts, int rows, bool rotated,
                                            int warp, int lane,
                                            FusedRows<FusedShape<D, kSegmentRows, kReaders>::kRows>& shared) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  using Row = JoinedRow<D>;
  Row sum;
#pragma unroll 1
  for (int r = warp; r < F::kRows; r += F::kWarps) {
    sum.clear();
    float4 rest[Row::kQuads] = {};
    if (r < rows) join_parts<D>(sums, parts, rows, r, lane, sum, rest);
    float top = 0;
#pragma unroll
    for (int i = 0; i < Row::kQuads; ++i) {
      const float4& x = sum.o[i];
      top = fmaxf(top, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
    }
    top = warp_max(top);
    const float inverse = top > 0 ? 1.0f / top : 0.0f;
    auto* words = reinterpret_cast<uint32_t*>(at.fragments + r / kBlockRows * F::kSteps * kLanes);
#pragma unroll
    for (int i = 0; i < Row::kQuads; ++i) {
      const int c = 4 * (lane + i * kLanes);
      if (c >= D) continue;
      const float4 x = sum.o[i];
      if (rotated) {
        put_halves(words, false, r % kBlockRows, c, x.x * inverse, x.y * inverse);
        put_halves(words, false, r % kBlockRows, c + 2, x.z * inverse, x.w * inverse);
      } else if (s.page_count > 0) {
        float of[4] = {1, 1, 1, 1};
        if (s.lambda_v != nullptr)
          for (int e = 0; e < 4; ++e) of[e] = s.lambda_v[at.head * D + c + e];
        rest[i] = {rest[i].x + x.x / of[0], rest[i].y + x.y / of[1], rest[i].z + x.z / of[2], rest[i].w + x.w / of[3]};
      }
      *reinterpret_cast<float4*>(at.y + r * F::kPitch + c) = rest[i];
    }
    if (lane != 0) continue;
    shared.largest[r] = top * p.inverse_transpose.scale;
    address_row<D, F::kRows>(p, s, at.head, at.row0 + r, r < rows, sum, r, shared);
  }
}

// Writes channels c and c + 1 of row r; `x` is not normalised yet.
template <int D, int kRows>
__device__ __forceinline__ void write_pair(const AttendParams& p, const FusedRows<kRows>& shared, int r, int c,
                                           float2 x) {
  const float whole = shared.whole[r];
  x = {x.x * whole, x.y * whole};
  if (whole == 0) x = {0, 0};
  if (p.out != nullptr) {
    store_element(p.out, p.out_dtype, shared.to[r] + c, x.x);
    store_element(p.out, p.out_dtype, shared.to[r] + c + 1, x.y);
  } else {
    *reinterpret_cast<float2*>(p.partial.o + shared.to[r] * D + c) = x;
  }
}

// An opaque copy: the compiler cannot hoist what is computed from it, which would occupy registers earlier.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Merging and output, by all reading warps. `prepared` was written by the filling warp.
template <int D, Rows kSegmentRows, Readers kReaders>
__device__ __forceinline__ void fused_finish(const AttendParams& p, const FusedEnd* prepared) {
  using F = FusedShape<D, kSegmentRows, kReaders>;
  using Tiles = RotationTiles<D, F::kAheadLast>;
  __shared__ FusedRows<F::kRows> shared;
  const int thread = anew(threadIdx.x), cta = anew(blockIdx.x), place = anew(blockIdx.z * gridDim.y + blockIdx.y);
  const int lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const FusedPlace<D, kSegmentRows, kReaders> at(p, memory, anew(blockIdx.y), anew(blockIdx.z));
  const int head = at.head, rows = at.rows(p);
  const SequenceView& s = p.sequences[at.b];
  const bool rotated = p.inverse_transpose.words != nullptr && s.page_count > 0;
  Tiles columns;
  if (rotated) columns.prefetch(p.inverse_transpose, warp, F::kWarps, lane);
  // The values' lambda for rows g, loaded early.
  float2 lambda[Tiles::kAhead];
#pragma unroll
  for (int i = 0; i < Tiles::kAhead; ++i) {
    const int c = (warp + i * F::kWarps) * 8 + 2 * t;
    lambda[i] = {1, 1};
    if (s.lambda_v != nullptr && c < D) lambda[i] = {s.lambda_v[head * D + c], s.lambda_v[head * D + c + 1]};
  }
  F::meet_filled();
  const FusedEnd& end = *prepared;
  const SegmentStates<D, F::kBlocks> states{p.states + static_cast<std::size_t>(place) * 2 * gridDim.x *
                                                           SegmentStates<D, F::kBlocks>::kFloats};
  join_readers(at, end, states, cta, rows, warp, lane);
  if (!arrive<F>(p.arrived + place, end.ctas, &shared.last, thread)) return;

  const int parts = max(1, F::kWarps / rows - 1);
  float* const sums = reinterpret_cast<float*>(memory);  // [parts + 1][rows][kJoinedFloats]
  join_ctas<D, kSegmentRows, kReaders>(end, states, sums, parts, rows, warp, lane);
  F::meet();
  finish_rows(p, at, s, sums, parts, rows, rotated, warp, lane, shared);
  F::meet();
  if (!rotated) {
    for (int r = warp; r < rows; r += F::kWarps)
      for (int c = 2 * lane; c < D; c += 2 * kLanes)
        write_pair<D>(p, shared, r, c, *reinterpret_cast<const float2*>(at.y + r * F::kPitch + c));
    return;
  }
  columns.template multiply<F::kBlocks>(
      p.inverse_transpose, at.fragments, warp, F::kWarps, lane, [&](int block, int n, int i, float c0, float c1) {
        const int r = block * kBlockRows + g, c = n * 8 + 2 * t;
        if (r >= rows) return;
        const float2 rest = *reinterpret_cast<const float2*>(at.y + r * F::kPitch + c);
        float2 of = lambda[i];
        if (n >= Tiles::kAhead * F::kWarps && s.lambda_v != nullptr)
          of = {s.lambda_v[head * D + c], s.lambda_v[head * D + c + 1]};
        write_pair<D>(p, shared, r, c,
                      {c0 * shared.largest[r] / of.x + rest.x, c1 * shared.largest[r] / of.y + rest.y});
      });
}

}  // namespace kv4::cuda
