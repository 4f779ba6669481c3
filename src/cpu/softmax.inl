// Masks and the running softmax, shared by attention over pages and over exact rows. Scores
// are in units of log2; a hidden column has the score -infinity and the weight 0, exactly.
#pragma once

namespace kv4::cpu::KV4_ISA {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 126: 0 below -126, NaN for NaN. Relative error below 2^-22: 2^f = 1 + f p(f) with
// the degree-4 p that minimises the relative error over |f| <= 1/2 (9.1e-8), in float arithmetic.
template <class V>
KV4_INLINE typename V::F exp2_of(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  const F low = V::set1(-126.0f);
  const F clamped = V::max(low, x);  // this order keeps NaN on x86
  const I n = V::round(clamped);
  const F f = clamped - V::to_float(n);
  F p = V::set1(1.326472614891827e-3f);
  p = V::fma(p, f, V::set1(9.671512991189957e-3f));
  p = V::fma(p, f, V::set1(5.550733581185341e-2f));
  p = V::fma(p, f, V::set1(2.402224242687225e-1f));
  p = V::fma(p, f, V::set1(6.931470036506653e-1f));
  p = V::fma(p, f, V::set1(1.0f));
  return (F)((I)((F)((I)p + (n << 23))) & ~(I)(x < low));
}

template <class V>
KV4_INLINE typename V::F tanh_of(typename V::F x) {
  using F = typename V::F;
  // 1 - 2 / (e^2x + 1): absolute error below 2^-22, which is what a score needs. tanh(15) is 1 in float.
  const F e = exp2_of<V>(V::max(V::set1(-43.0f), V::min(V::set1(43.0f), x * V::set1(2 * kLog2E))));
  return V::set1(1.0f) - V::set1(2.0f) / (e + V::set1(1.0f));
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
    for (std::int64_t j = span.begin; j < span.end; ++j)
      scores[j] += additive_entry(mask.general, mask.dtype, first + j * mask.column_stride);
  }
}

struct Weights {
  bool visible;   // false where every token is hidden; the other members are then 0 and 1, the weights undefined
  float sum;      // of the block's weights
  float rescale;  // what the row's earlier weights must be multiplied with
};

// Turns the scores of `size` tokens (a multiple of the lanes) into weights 2^(score - m) and takes
// them into m and l.
template <class V>
inline Weights weigh(float* scores, int size, float* m, float* l) {
  using F = typename V::F;
  F largest = V::load(scores);
  for (int j = V::kLanes; j < size; j += V::kLanes) largest = V::max(largest, V::load(scores + j));
  const float top = V::reduce_max(largest);
  if (top == kHidden) return {false, 0.0f, 1.0f};
  float rescale = 1.0f;
  if (!(top <= *m)) {
    rescale = exp2_of<V>(V::set1(*m - top))[0];
    *m = top;
  }
  const F centre = V::set1(*m);
  F sums = V::set1(0.0f);
  for (int j = 0; j < size; j += V::kLanes) {
    const F w = exp2_of<V>(V::load(scores + j) - centre);
    V::store(scores + j, w);
    sums += w;
  }
  const float sum = V::reduce_add(sums);
  *l = *l * rescale + sum;
  return {true, sum, rescale};
}

}  // namespace kv4::cpu::KV4_ISA
