// Attention of query rows over exact rows, in float.
//
// Up to kTileRows query rows (any number of float32 ones) read the rows of K and V in their own dtype, each
// vector widened once for all of them: decoding touches no memory but the cache. More rows (prefill), and head
// dims that are no multiple of the lanes, work on blocks of kBlockRows rows that are widened into float tiles
// once. Instructions per token and R query rows at d = 128, s = d / lanes:
//
//              widen K and V    scores            weights        o          bytes (fp16 rows)
//   AVX2       2 s              R s FMA, R x 5    about R x 3    R s FMA    512
//   AVX-512    2 s              R s FMA, R x 6    about R x 2    R s FMA    512
//
// with s = 16 and 8. The 2 s R FMA take, at two a cycle, 16 R cycles on Zen 3 and 8 R on Sapphire Rapids, and at
// one of 512 bits a cycle 16 R on Zen 4 (the last two are counts, not runs). The second term of the scores adds up
// lanes. A block's scores and sums of o are held R x C in registers, C tokens (scores) or vectors of channels (o)
// at a time: enough chains for two FMA of latency 4, and each widened vector serves R of them.
// Measured on Zen 3 at 3.2 GHz: 45 ns a token at R = 6 on one core from L3, 144 cycles, as much as 512 bytes take
// at 11 GB/s a core. So memory binds up to R = 4, both at 6, and FMA in prefill: from memory on two cores R = 1
// and 2 reach 80 to 95 % of its speed, R = 6 70 %.
// Sums run in float over d terms and over one block of tokens at a time.
//
// AVX512-BF16 (vdpbf16ps, 32 products of bf16) is not used, by count, at d = 128 and R rows of bf16:
//   scores   exact for a query that is bf16 itself and scaled afterwards; any other takes three parts of 8 bits. 4 R
//            instructions for 16 + 8 R. Sapphire Rapids makes each of 4 micro-operations on the two ports that start a
//            whole FMA each: 16 R, as much at R = 2, more above, and at R = 1 memory binds (28 cycles of vectors for
//            the whole token, 128 of memory).
//   values   pairs of tokens, interleaved by 2 shuffles for 4 of widening; but weights are float, and two parts of 8
//            bits leave 2^-18 where outputs are held to 2^-21 of sum p |v|: three parts, 12 R for 8 R.
// Where it starts as often as FMA (Zen 4) scores alone would gain: 12 R cycles for 16 R, at 6 rows and more, which is
// where arithmetic takes as long as memory. The same processor flag stands for both.
//
// Tried: widening every block into float tiles for decoding too. The tiles, 32 KiB, push the query and o out of L1:
// 45 ns per token and head at R = 6 on two cores and 32,768 tokens, 26 without them. Fetching into L2 as
// attend_pages.inl does: 1 to 20 % slower. Not fetching: 20 to 50 % slower at R = 2 to 6.
#pragma once

#include "cpu/rows.inl"
#include "cpu/softmax.inl"

namespace kv4::cpu::KV4_ISA {

// Elements of exact rows.
template <class V>
struct F32Row {
  using T = float;
  static KV4_INLINE typename V::F load(const T* p) { return V::load(p); }
};
template <class V>
struct F16Row {
  using T = std::uint16_t;
  static KV4_INLINE typename V::F load(const T* p) { return V::load_f16(p); }
};
template <class V>
struct BF16Row {
  using T = std::uint16_t;
  static KV4_INLINE typename V::F load(const T* p) { return V::load_bf16(p); }
};

// Rows to fetch while others are worked on.
struct Ahead {
  const void* row;
  std::int64_t stride;      // bytes
  std::int64_t begin, end;  // bytes of each row

  KV4_INLINE void fetch(std::int64_t j) const {
    const char* p = static_cast<const char*>(row) + j * stride;
    for (std::int64_t i = begin; i < end; i += 64) __builtin_prefetch(p + i);
  }
};

// Sums that registers hold for each of R rows: a power of two, no more than latency needs.
template <int R>
constexpr int sums_per_row() {
  int c = 1;
  while (c < 8 && 2 * c * R <= Dot::kAccumulators) c *= 2;
  return c;
}

// scores[r * kBlockRows + j] = q_r . k_j for R rows and C tokens; dim is a multiple of the lanes.
template <class V, class E, int R, int C>
KV4_INLINE void dots(const float* q, std::int64_t q_stride, const typename E::T* k, std::int64_t k_stride, int dim,
                     typename V::F overflow, float* scores) {
  using F = typename V::F;
  F acc[R * C];
  KV4_UNROLL
  for (int i = 0; i < R * C; ++i) acc[i] = V::set1(0.0f);
  for (int i = 0; i < dim; i += V::kLanes) {
    if constexpr (R < C) {
      F x[R];
      KV4_UNROLL
      for (int r = 0; r < R; ++r) x[r] = V::load(q + r * q_stride + i);
      KV4_UNROLL
      for (int c = 0; c < C; ++c) {
        const F key = E::load(k + c * k_stride + i);
        KV4_UNROLL
        for (int r = 0; r < R; ++r) acc[r * C + c] = V::fma(x[r], key, acc[r * C + c]);
      }
    } else {
      F keys[C];
      KV4_UNROLL
      for (int c = 0; c < C; ++c) keys[c] = E::load(k + c * k_stride + i);
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        const F x = V::load(q + r * q_stride + i);
        KV4_UNROLL
        for (int c = 0; c < C; ++c) acc[r * C + c] = V::fma(x, keys[c], acc[r * C + c]);
      }
    }
  }
  constexpr int kVectors = (R * C + V::kLanes - 1) / V::kLanes;
  F sums[kVectors];
  fold_lanes<V, AddLanes>(acc, sums);
  KV4_UNROLL
  for (int i = 0; i < kVectors; ++i) sums[i] = V::fma(sums[i], overflow, sums[i]);
  alignas(64) float out[kVectors * V::kLanes];
  std::memcpy(out, sums, sizeof out);
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    KV4_UNROLL
    for (int c = 0; c < C; ++c) scores[r * kBlockRows + c] = out[r * C + c];
  }
}

// o_r = o_r * rescale_r + sum over tokens [begin, end) of w_rj v_j, for C vectors of channels.
template <class V, class E, int R, int C>
KV4_INLINE void accumulate(const float (*weights)[kBlockRows], const typename E::T* v, std::int64_t v_stride,
                           std::int64_t begin, std::int64_t end, const float* rescale, float* o, std::int64_t o_stride,
                           const Ahead& ahead) {
  using F = typename V::F;
  F acc[R][C];
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    KV4_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = V::load(o + r * o_stride + c * V::kLanes) * V::set1(rescale[r]);
  }
  for (std::int64_t j = begin; j < end; ++j) {
    ahead.fetch(j);
    if constexpr (R < C) {
      F w[R];
      KV4_UNROLL
      for (int r = 0; r < R; ++r) w[r] = V::set1(weights[r][j]);
      KV4_UNROLL
      for (int c = 0; c < C; ++c) {
        const F value = E::load(v + j * v_stride + c * V::kLanes);
        KV4_UNROLL
        for (int r = 0; r < R; ++r) acc[r][c] = V::fma(w[r], value, acc[r][c]);
      }
    } else {
      F values[C];
      KV4_UNROLL
      for (int c = 0; c < C; ++c) values[c] = E::load(v + j * v_stride + c * V::kLanes);
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        const F w = V::set1(weights[r][j]);
        KV4_UNROLL
        for (int c = 0; c < C; ++c) acc[r][c] = V::fma(w, values[c], acc[r][c]);
      }
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

// Up to kBlockRows rows whose elements are E::T. Rows of `next` follow in memory: they are fetched meanwhile.
template <class E>
struct Block {
  const typename E::T *k, *v;
  std::int64_t k_stride, v_stride;  // elements
  std::int64_t position;
  int tokens;
  bool next;
};

template <class V, class E, int R>
void attend_rows(const ExactTask& t, const Block<E>& block, int row0) {
  using F = typename V::F;
  using T = typename E::T;
  constexpr int kSums = sums_per_row<R>();
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
  constexpr std::int64_t kSize = static_cast<std::int64_t>(sizeof(T));
  const F overflow = overflow_factor<V>(t.cap);
  const Ahead values{block.v, block.v_stride * kSize, 0, dim_v * kSize};
  std::int64_t j = begin;
  for (; j + kSums <= end; j += kSums) {
    for (int c = 0; c < kSums; ++c) values.fetch(j + c);
    dots<V, E, R, kSums>(q, t.q_stride, block.k + j * block.k_stride, block.k_stride, dim_k, overflow, scores[0] + j);
  }
  for (; j < end; ++j)
    dots<V, E, R, 1>(q, t.q_stride, block.k + j * block.k_stride, block.k_stride, dim_k, overflow, scores[0] + j);

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
  }
  alignas(64) float rescale[kRowLanes];
  weigh<V>(scores, t.states.m + row0, t.states.l + row0, 0.0f, rescale);

  const float(*weights)[kBlockRows] = scores;
  float* o = t.states.o + row0 * t.states.o_stride;
  Ahead keys{block.k + kBlockRows * block.k_stride, block.k_stride * kSize, 0, 0};
  // Channels of values stand for as large a share of the next block's keys.
  const auto share = [&](int channels) {
    return block.next ? (channels * dim_k * kSize / dim_v + 63) / 64 * 64 : std::int64_t{0};
  };
  int c = 0;
  for (; c + kSums * V::kLanes <= dim_v; c += kSums * V::kLanes) {
    keys.begin = share(c);
    keys.end = share(c + kSums * V::kLanes);
    accumulate<V, E, R, kSums>(weights, block.v + c, block.v_stride, begin, end, rescale, o + c, t.states.o_stride,
                               keys);
  }
  keys.end = keys.begin;
  for (; c < dim_v; c += V::kLanes)
    accumulate<V, E, R, 1>(weights, block.v + c, block.v_stride, begin, end, rescale, o + c, t.states.o_stride, keys);
}

template <class V, class E, int R = kTileRows>
void attend_run(const ExactTask& t, const Block<E>& block, int row, int rows) {
  if constexpr (R > 1)
    if (rows < R) return attend_run<V, E, R - 1>(t, block, row, rows);
  attend_rows<V, E, R>(t, block, row);
}

// All rows of the task over one block, in runs of at most `most` rows and nearly equal size.
template <class V, class E>
void attend_block(const ExactTask& t, const Block<E>& block, int most) {
  const int runs = (t.rows + most - 1) / most;
  for (int i = 0; i < runs; ++i) {
    const int row = t.rows * i / runs;
    attend_run<V, E>(t, block, row, t.rows * (i + 1) / runs - row);
  }
}

template <class V, class E>
void attend_in_place(const ExactTask& t) {
  using T = typename E::T;
  for (std::int64_t first = t.first; first < t.last; first += kBlockRows) {
    const std::int64_t left = t.last - first;
    const Block<E> block{static_cast<const T*>(t.k) + first * t.k_stride,
                         static_cast<const T*>(t.v) + first * t.v_stride,
                         t.k_stride,
                         t.v_stride,
                         t.position + first,
                         static_cast<int>(left < kBlockRows ? left : kBlockRows),
                         left > kBlockRows};
    attend_block<V, E>(t, block, kTileRows);
  }
}

template <class V>
void attend_widened(const ExactTask& t) {
  const std::int64_t size = static_cast<std::int64_t>(size_of(t.dtype));
  const int padded_v = static_cast<int>(t.states.o_stride), padded_k = static_cast<int>(t.q_stride);
  for (std::int64_t first = t.first; first < t.last; first += kBlockRows) {
    const std::int64_t left = t.last - first;
    const Block<F32Row<V>> block{t.k_tile, t.v_tile,           padded_k,
                                 padded_v, t.position + first, static_cast<int>(left < kBlockRows ? left : kBlockRows),
                                 false};
    bool any = false;
    for (int r = 0; r < t.rows && !any; r += t.mask.heads) {  // rows of one query see the same span
      const Span s = visible_span(t.mask, r, block.position, block.tokens);
      any = s.end > s.begin;
    }
    if (!any) continue;
    widen_rows<V>(t.dtype, static_cast<const std::byte*>(t.k) + first * t.k_stride * size, t.k_stride, block.tokens,
                  t.head_dim_k, padded_k, t.k_tile);
    widen_rows<V>(t.dtype, static_cast<const std::byte*>(t.v) + first * t.v_stride * size, t.v_stride, block.tokens,
                  t.head_dim_v, padded_v, t.v_tile);
    // Of 16 vector registers 6 rows by 2 tokens leave the best ratio of FMA to loads.
    attend_block<V, F32Row<V>>(t, block, 6);
  }
}

template <class V>
void attend_exact(const ExactTask& t) {
  const bool whole = t.head_dim_k % V::kLanes == 0 && t.head_dim_v % V::kLanes == 0;
  if (!whole || (t.rows > kTileRows && t.dtype != DType::f32)) return attend_widened<V>(t);
  if (t.dtype == DType::f32) return attend_in_place<V, F32Row<V>>(t);
  if (t.dtype == DType::f16) return attend_in_place<V, F16Row<V>>(t);
  return attend_in_place<V, BF16Row<V>>(t);
}

}  // namespace kv4::cpu::KV4_ISA
