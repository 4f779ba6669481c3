// Masks and the running softmax, shared by attention over pages and over exact rows. Scores
// are in units of log2; a hidden column has the score -infinity and the weight 0, exactly.
#pragma once

namespace kv4::cpu::KV4_ISA {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 126, NaN for NaN. Relative error below 2^-22: 2^f = 1 + f p(f) with the degree-4 p that
// minimises the relative error over |f| <= 1/2 (9.1e-8), in float arithmetic. From -127 down the bits of 1
// less 127 exponents are those of 0, exactly; between -126 and -127 the result is off by less than 2^-126.
template <class V>
KV4_INLINE typename V::F exp2_of(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  const F clamped = V::max(V::set1(-127.0f), x);  // this order keeps NaN on x86
  const I n = V::round(clamped);
  const F f = clamped - V::to_float(n);
  F p = V::set1(1.326472614891827e-3f);
  p = V::fma(p, f, V::set1(9.671512991189957e-3f));
  p = V::fma(p, f, V::set1(5.550733581185341e-2f));
  p = V::fma(p, f, V::set1(2.402224242687225e-1f));
  p = V::fma(p, f, V::set1(6.931470036506653e-1f));
  p = V::fma(p, f, V::set1(1.0f));
  return (F)((I)p + (n << 23));
}

template <class V>
KV4_INLINE typename V::F tanh_of(typename V::F x) {
  using F = typename V::F;
  // 1 - 2 / (e^2x + 1): absolute error below 2^-22, which is what a score needs. tanh(15) is 1 in float.
  const F e = exp2_of<V>(V::max(V::set1(-43.0f), V::min(V::set1(43.0f), x * V::set1(2 * kLog2E))));
  return V::set1(1.0f) - V::set1(2.0f) / (e + V::set1(1.0f));
}

// s + s * factor is s where it is finite, and NaN where it overflowed: an infinite score must not pass for that of
// a hidden token. A soft cap brings infinite scores back, and keeps them.
template <class V>
KV4_INLINE typename V::F overflow_factor(float cap) {
  return V::set1(cap == 0 ? 0.0f : 1e-30f);
}

struct Span {
  std::int64_t begin, end;
};

// Positions that `row` may see by every condition but the entries of a general mask.
inline Span visible_positions(const RowMask& mask, int row) {
  constexpr std::int64_t kFar = std::int64_t{1} << 62;
  const std::int64_t query = mask.query_position + row / mask.heads;
  Span s{mask.start, mask.causal ? query + 1 : kFar};
  if (mask.window > 0 && query - mask.window + 1 > s.begin) s.begin = query - mask.window + 1;
  if (mask.kind != Mask::General::none) {
    if (mask.offset > s.begin) s.begin = mask.offset;
    if (mask.offset + mask.columns < s.end) s.end = mask.offset + mask.columns;
  }
  return s;
}

// The part of [position, position + count) that `row` may see, relative to `position`.
inline Span visible_span(const RowMask& mask, int row, std::int64_t position, std::int64_t count) {
  const Span s = visible_positions(mask, row);
  Span out{s.begin - position, s.end - position};
  if (out.begin < 0) out.begin = 0;
  if (out.begin > count) out.begin = count;
  if (out.end > count) out.end = count;
  if (out.end < out.begin) out.end = out.begin;
  return out;
}

// An additive entry hides its column where it is -infinity, NaN or the lowest number of its dtype.
inline float additive_entry(const void* mask, DType dtype, std::int64_t index) {
  float x;
  if (dtype == DType::f32) {
    x = static_cast<const float*>(mask)[index];
  } else {
    const std::uint16_t h = static_cast<const std::uint16_t*>(mask)[index];
    x = dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
    if (dtype == DType::f16 && !(x > -65504.0f)) return kHidden;
  }
  return x > -1e30f ? x * kLog2E : kHidden;
}

// Applies the mask to the scores of `row` for the tokens [0, size) that start at `position`;
// tokens outside `span` are hidden.
inline void apply_mask(const RowMask& mask, int row, std::int64_t position, Span span, int size, float* scores) {
  for (std::int64_t j = 0; j < span.begin; ++j) scores[j] = kHidden;
  for (std::int64_t j = span.end; j < size; ++j) scores[j] = kHidden;
  if (mask.kind == Mask::General::none) return;
  const std::int64_t first = (row / mask.heads) * mask.query_stride + (row % mask.heads) * mask.head_stride +
                             (position - mask.offset) * mask.column_stride;
  if (mask.kind == Mask::General::boolean) {
    const std::uint8_t* visible = static_cast<const std::uint8_t*>(mask.general);
    for (std::int64_t j = span.begin; j < span.end; ++j)
      if (visible[first + j * mask.column_stride] == 0) scores[j] = kHidden;
  } else {
    for (std::int64_t j = span.begin; j < span.end; ++j) {
      const float entry = additive_entry(mask.general, mask.dtype, first + j * mask.column_stride);
      scores[j] = entry == kHidden ? kHidden : scores[j] + entry;
    }
  }
}

// Numbers of one tile's rows side by side: enough for kTileRows and a whole number of vectors.
constexpr int kRowLanes = 16;

struct AddLanes {
  template <class F>
  static KV4_INLINE F apply(F a, F b) {
    return a + b;
  }
};
template <class V>
struct MaxLanes {
  static KV4_INLINE typename V::F apply(typename V::F a, typename V::F b) { return V::max(a, b); }
};

// lane(j) for every lane j: an index into x and, behind it, y.
template <class X, class Lane, int... J>
KV4_INLINE X shuffle(X x, X y, Lane lane, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(x, y, decltype(lane)::of(J)...);
}

// Of registers whose rows have kWidth lanes each: of two the lower or upper halves of their rows, in turn.
template <int kLanes, int kWidth, int kHalf>
struct HalvesOf {
  static constexpr int of(int j) {
    const int row = j / (kWidth / 2);
    return row / 2 * kWidth + kHalf * (kWidth / 2) + j % (kWidth / 2) + row % 2 * kLanes;
  }
};
// A row's lanes, half its width further on.
template <int kWidth>
struct OtherHalf {
  static constexpr int of(int j) { return j ^ (kWidth / 2); }
};
// The first lane of every row.
template <int kLanes, int kWidth>
struct FirstOf {
  static constexpr int of(int j) { return j * kWidth % kLanes; }
};

// Joins the lanes of every row of a register; lane r of the result is row r's.
template <class V, class Op, int kRow, int kWidth, class X>
KV4_INLINE X fold_rows(X x) {
  constexpr auto lanes = std::make_integer_sequence<int, V::kLanes>{};
  if constexpr (kWidth > 1)
    return fold_rows<V, Op, kRow, kWidth / 2>(Op::apply(x, shuffle(x, x, OtherHalf<kWidth>{}, lanes)));
  else return shuffle(x, x, FirstOf<V::kLanes, kRow>{}, lanes);
}

// Joins the lanes of N registers, a power of two, by Op: lane r of the result is register r's. Rows of kWidth lanes
// were joined before. Two registers become one of half as wide rows; at last the rows of one register are folded.
template <class V, class Op, int kWidth = V::kLanes, class X, int N>
KV4_INLINE X fold_registers(const X (&x)[N]) {
  constexpr int L = V::kLanes;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  if constexpr (N > 1) {
    X half[N / 2];
    KV4_UNROLL
    for (int i = 0; i < N / 2; ++i)
      half[i] = Op::apply(shuffle(x[i], x[i + N / 2], HalvesOf<L, kWidth, 0>{}, lanes),
                          shuffle(x[i], x[i + N / 2], HalvesOf<L, kWidth, 1>{}, lanes));
    return fold_registers<V, Op, kWidth / 2>(half);
  } else if constexpr (kWidth > 1) {
    return fold_rows<V, Op, kWidth, kWidth>(x[0]);
  } else {
    return x[0];
  }
}

// Lane r of out, taken as one array, is the lanes of x[r] joined by Op; X is F or I. The last vector of out is
// written whole. All rows share shuffles: one row after another would wait for each other's.
template <class V, class Op, class X, int R>
KV4_INLINE void fold_lanes(const X (&x)[R], X* out) {
  static_assert(sizeof(X) == sizeof(typename V::F));
  KV4_UNROLL
  for (int first = 0; first < R; first += V::kLanes) {
    constexpr int kRegisters = std::min(V::kLanes, static_cast<int>(std::bit_ceil(static_cast<unsigned>(R))));
    X part[kRegisters];
    KV4_UNROLL
    for (int i = 0; i < kRegisters; ++i) part[i] = first + i < R ? x[first + i < R ? first + i : 0] : X{};
    out[first / V::kLanes] = fold_registers<V, Op>(part);
  }
}

// Rows that have seen nothing are centred on 0: their scores are -infinity, their weights 0.
template <class V>
KV4_INLINE typename V::F centred(typename V::F top) {
  using I = typename V::I;
  return (typename V::F)((I)top & ~(I)(top == V::set1(kHidden)));
}

// Takes the largest scores of R rows, in the lanes of `top`, into m. centre[r]: what weights are 2^(score - centre)
// of; rescale[r]: what the row's earlier weights must be multiplied with; kRowLanes entries each.
template <class V, int R>
KV4_INLINE void raise_maxima(const typename V::F* top, float* m, float* centre, float* rescale) {
  using F = typename V::F;
  alignas(64) float now[kRowLanes] = {};
  for (int r = 0; r < R; ++r) now[r] = m[r];
  KV4_UNROLL
  for (int i = 0; i * V::kLanes < R; ++i) {
    const F before = V::load(now + i * V::kLanes), after = V::max(before, top[i]);
    const F c = centred<V>(after);
    V::store(now + i * V::kLanes, after);
    V::store(centre + i * V::kLanes, c);
    V::store(rescale + i * V::kLanes, exp2_of<V>(before - c));
  }
  for (int r = 0; r < R; ++r) m[r] = now[r];
}

// Takes the weights of R rows, added up in the lanes of `total`, into l. Returns false where no row gains more than
// `negligible`.
template <class V, int R>
KV4_INLINE bool gain_weights(const typename V::F (&total)[R], float* l, float negligible, const float* rescale) {
  typename V::F sum[kRowLanes / V::kLanes];
  fold_lanes<V, AddLanes>(total, sum);
  alignas(64) float gain[kRowLanes];
  KV4_UNROLL
  for (int i = 0; i * V::kLanes < R; ++i) V::store(gain + i * V::kLanes, sum[i]);
  bool gains = false;
  for (int r = 0; r < R; ++r) {
    l[r] = l[r] * rescale[r] + gain[r];
    gains = gains || !(gain[r] < negligible);
  }
  return gains;
}

// Turns the scores of R rows over N tokens (N a multiple of the lanes) into weights 2^(score - m) and takes them
// into m and l. rescale, negligible and what it returns: as above. Each step is done for all rows before the next: the
// rows' chains of dependent instructions then run side by side.
template <class V, int R, int N>
KV4_INLINE bool weigh(float (&scores)[R][N], float* m, float* l, float negligible, float* rescale) {
  using F = typename V::F;
  F lanes[R];
  for (int r = 0; r < R; ++r) {
    lanes[r] = V::load(scores[r]);
    for (int j = V::kLanes; j < N; j += V::kLanes) lanes[r] = V::max(lanes[r], V::load(scores[r] + j));
  }
  F top[kRowLanes / V::kLanes];
  fold_lanes<V, MaxLanes<V>>(lanes, top);
  alignas(64) float centre[kRowLanes];
  raise_maxima<V, R>(top, m, centre, rescale);
  for (int r = 0; r < R; ++r) {
    const F c = V::set1(centre[r]);
    F total = F{};
    for (int j = 0; j < N; j += V::kLanes) {
      const F w = exp2_of<V>(V::load(scores[r] + j) - c);
      V::store(scores[r] + j, w);
      total += w;
    }
    lanes[r] = total;
  }
  return gain_weights<V>(lanes, l, negligible, rescale);
}

}  // namespace kv4::cpu::KV4_ISA
