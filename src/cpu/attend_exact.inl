// Attention of query rows over exact rows, in float.
//
// Blocks of kBlockRows rows of K and V become float tiles once (float32 rows are read in place) and
// serve all query rows, four at a time. Instructions per token and R rows at d = 128, d / lanes = s:
//
//              K and V to float     scores      weights           o           bytes (fp16 rows)
//   AVX2       4 s                  R s FMA     about R x 3       R s FMA     512
//   AVX-512    4 s                  R s FMA     about R x 2       R s FMA     512
//
// with s = 16 and 8. Scores keep 8 (16) independent sums, as many as two FMA units of latency 4 need;
// each vector of K is loaded once for 4 rows, each of q once for 2 (4) tokens. Decoding few rows is bound by
// memory, prefill by FMA. Sums run in float over d terms and over one block of tokens at a time.
#pragma once

#include "cpu/rows.inl"
#include "cpu/softmax.inl"

namespace kv4::cpu::KV4_ISA {

// The sums of N vectors, N a multiple of the lanes or not.
template <class V, int N>
KV4_INLINE void reduce(typename V::F (&x)[N], float* sums) {
  using F = typename V::F;
  if constexpr (N % V::kLanes == 0) {
    for (int i = 0; i < N; i += V::kLanes) {
      F part[V::kLanes];
      KV4_UNROLL
      for (int lane = 0; lane < V::kLanes; ++lane) part[lane] = x[i + lane];
      V::transpose(part);
      KV4_UNROLL
      for (int step = V::kLanes / 2; step > 0; step /= 2) {
        KV4_UNROLL
        for (int lane = 0; lane < step; ++lane) part[lane] += part[lane + step];
      }
      V::store(sums + i, part[0]);
    }
  } else {
    for (int i = 0; i < N; ++i) sums[i] = V::reduce_add(x[i]);
  }
}

// scores[r * kBlockRows + j] = q_r . k_j for R rows and C tokens; dim is a multiple of the lanes.
template <class V, int R, int C>
KV4_INLINE void dots(const float* q, std::int64_t q_stride, const float* k, std::int64_t k_stride, int dim,
                     float* scores) {
  using F = typename V::F;
  F acc[R * C];
  KV4_UNROLL
  for (int i = 0; i < R * C; ++i) acc[i] = V::set1(0.0f);
  for (int i = 0; i < dim; i += V::kLanes) {
    F keys[C];
    KV4_UNROLL
    for (int c = 0; c < C; ++c) keys[c] = V::load(k + c * k_stride + i);
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const F x = V::load(q + r * q_stride + i);
      KV4_UNROLL
      for (int c = 0; c < C; ++c) acc[r * C + c] = V::fma(x, keys[c], acc[r * C + c]);
    }
  }
  alignas(64) float sums[R * C];
  reduce<V, R * C>(acc, sums);
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    KV4_UNROLL
    for (int c = 0; c < C; ++c) scores[r * kBlockRows + c] = sums[r * C + c];
  }
}

// o_r = o_r * rescale_r + sum over tokens [begin, end) of w_rj v_j, for C vectors of channels.
template <class V, int R, int C>
KV4_INLINE void accumulate(const float (*weights)[kBlockRows], const float* v, std::int64_t v_stride,
                           std::int64_t begin, std::int64_t end, const float* rescale, float* o,
                           std::int64_t o_stride) {
  using F = typename V::F;
  F acc[R][C];
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    KV4_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = V::load(o + r * o_stride + c * V::kLanes) * V::set1(rescale[r]);
  }
  for (std::int64_t j = begin; j < end; ++j) {
    F values[C];
    KV4_UNROLL
    for (int c = 0; c < C; ++c) values[c] = V::load(v + j * v_stride + c * V::kLanes);
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const F w = V::set1(weights[r][j]);
      KV4_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = V::fma(w, values[c], acc[r][c]);
    }
  }
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    KV4_UNROLL
    for (int c = 0; c < C; ++c) V::store(o + r * o_stride + c * V::kLanes, acc[r][c]);
  }
}

// `count` rows of `dim` numbers as float rows, zero from dim to padded.
template <class V>
inline void widen_rows(DType dtype, const void* from, std::int64_t stride, std::int64_t count, int dim, int padded,
                       float* to) {
  const std::byte* row = static_cast<const std::byte*>(from);
  stride *= static_cast<std::int64_t>(size_of(dtype));
  for (std::int64_t j = 0; j < count; ++j, row += stride, to += padded) {
    widen_row<V>(dtype, row, dim, to);
    for (int i = dim; i < padded; ++i) to[i] = 0.0f;
  }
}

struct FloatBlock {
  const float *k, *v;
  std::int64_t k_stride, v_stride;
  std::int64_t position;
  int tokens;
};

template <class V, int R>
void attend_rows(const ExactTask& t, const FloatBlock& block, int row0) {
  using F = typename V::F;
  constexpr int kSums = Dot::kAccumulators;
  constexpr int kTokens = kSums / (R == 3 ? 4 : R), kVectors = kSums / 4;
  const int dim_k = (t.head_dim_k + V::kLanes - 1) / V::kLanes * V::kLanes;
  const int dim_v = (t.head_dim_v + V::kLanes - 1) / V::kLanes * V::kLanes;

  Span spans[R];
  std::int64_t begin = block.tokens, end = 0;
  for (int r = 0; r < R; ++r) {
    spans[r] = visible_span(t.mask, row0 + r, block.position, block.tokens);
    if (spans[r].end <= spans[r].begin) continue;
    if (spans[r].begin < begin) begin = spans[r].begin;
    if (spans[r].end > end) end = spans[r].end;
  }
  if (end <= begin) return;

  alignas(64) float scores[R][kBlockRows];
  const float* q = t.q + row0 * t.q_stride;
  std::int64_t j = begin;
  for (; j + kTokens <= end; j += kTokens)
    dots<V, R, kTokens>(q, t.q_stride, block.k + j * block.k_stride, block.k_stride, dim_k, scores[0] + j);
  for (; j < end; ++j) dots<V, R, 1>(q, t.q_stride, block.k + j * block.k_stride, block.k_stride, dim_k, scores[0] + j);

  float rescale[R];
  for (int r = 0; r < R; ++r) {
    const int row = row0 + r;
    for (std::int64_t i = 0; i < begin; ++i) scores[r][i] = kHidden;
    for (std::int64_t i = end; i < kBlockRows; ++i) scores[r][i] = kHidden;
    if (t.cap != 0) {
      const F cap = V::set1(t.cap);
      for (int i = 0; i < kBlockRows; i += V::kLanes) V::store(scores[r] + i, cap * tanh_of<V>(V::load(scores[r] + i)));
    }
    if (t.cap != 0 || t.mask.kind != Mask::General::none || spans[r].begin > begin || spans[r].end < end)
      apply_mask(t.mask, row, block.position, spans[r], kBlockRows, scores[r]);
    const Weights w = weigh<V>(scores[r], kBlockRows, t.states.m + row, t.states.l + row);
    rescale[r] = w.rescale;
    if (!w.visible)
      for (int i = 0; i < kBlockRows; ++i) scores[r][i] = 0.0f;
  }

  const float (*weights)[kBlockRows] = scores;
  float* o = t.states.o + row0 * t.states.o_stride;
  int c = 0;
  for (; c + kVectors * V::kLanes <= dim_v; c += kVectors * V::kLanes)
    accumulate<V, R, kVectors>(weights, block.v + c, block.v_stride, begin, end, rescale, o + c, t.states.o_stride);
  for (; c < dim_v; c += V::kLanes)
    accumulate<V, R, 1>(weights, block.v + c, block.v_stride, begin, end, rescale, o + c, t.states.o_stride);
}

template <class V>
void attend_exact(const ExactTask& t) {
  const std::int64_t size = static_cast<std::int64_t>(size_of(t.dtype));
  const int padded_v = static_cast<int>(t.states.o_stride), padded_k = static_cast<int>(t.q_stride);
  const bool k_in_place = t.dtype == DType::f32 && t.head_dim_k % V::kLanes == 0;
  const bool v_in_place = t.dtype == DType::f32 && t.head_dim_v % V::kLanes == 0;
  for (std::int64_t first = t.first; first < t.last; first += kBlockRows) {
    FloatBlock block;
    block.position = t.position + first;
    block.tokens = static_cast<int>(t.last - first < kBlockRows ? t.last - first : kBlockRows);
    bool any = false;
    for (int r = 0; r < t.rows && !any; r += t.mask.heads) {  // rows of one query see the same span
      const Span s = visible_span(t.mask, r, block.position, block.tokens);
      any = s.end > s.begin;
    }
    if (!any) continue;
    const void* k = static_cast<const std::byte*>(t.k) + first * t.k_stride * size;
    const void* v = static_cast<const std::byte*>(t.v) + first * t.v_stride * size;
    if (k_in_place) {
      block.k = static_cast<const float*>(k);
      block.k_stride = t.k_stride;
    } else {
      widen_rows<V>(t.dtype, k, t.k_stride, block.tokens, t.head_dim_k, padded_k, t.k_tile);
      block.k = t.k_tile;
      block.k_stride = padded_k;
    }
    if (v_in_place) {
      block.v = static_cast<const float*>(v);
      block.v_stride = t.v_stride;
    } else {
      widen_rows<V>(t.dtype, v, t.v_stride, block.tokens, t.head_dim_v, padded_v, t.v_tile);
      block.v = t.v_tile;
      block.v_stride = padded_v;
    }
    int row = 0;
    for (; row + 4 <= t.rows; row += 4) attend_rows<V, 4>(t, block, row);
    switch (t.rows - row) {
      case 3:
        attend_rows<V, 3>(t, block, row);
        break;
      case 2:
        attend_rows<V, 2>(t, block, row);
        break;
      case 1:
        attend_rows<V, 1>(t, block, row);
        break;
      default:
        break;
    }
  }
}

}  // namespace kv4::cpu::KV4_ISA
