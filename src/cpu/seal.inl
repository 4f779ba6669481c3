// Sealing one head slice: kLanes tokens at a time as [channel][token] vectors, so that a lane is one
// token and sums over channels need no horizontal step.
//
// Instructions per vector of kLanes values, loads folded where AVX2 folds them (d channels of 64 tokens
// are 64 d / kLanes vectors):
//   mean             3.5   2 convert, half an extract for each of two, 2 add in double
//   rows in          6     load, subtract, fma, 3 of the transpose (log2 kLanes), store
//   rotation               rotate_lanes.inl
//   measure          3     add a broadcast, fma, store
//   codes            9     fma; abs, min, convert; of each four: 4 that gather sizes as bytes, 4 for signs, 7 that
//                          look the index up, 5 to join sign and index, store
//   least squares    5     a quarter lookup, shift, and, convert, 2 fma
//   pack             0.5   words of four codes; of other widths than 4 bits 1 to 2
// Bytes at d = 128, both sides of 64 tokens: 65,536 read from fp32 rows (32,768 from 16-bit ones), 8,704
// written. Everything between stays in (3 kLanes + 27) d floats of scratch or less, 26 KB at d = 128 with 8
// lanes: L1, and L2 for the largest d. So instructions bound it, 24 to 27 per vector beside the rotation.
// At d = 128 with the paper's settings 830 instructions per token in AVX2, rotation included, 230 cycles on Zen 3 (75
// ns at 3.1 GHz); 60 ns would take 680 instructions at the same rate. The same with 16 lanes, stepped through, takes
// 431 a vector: rotation 170, codes 111, rows in 73, scales 34, packing 16, and 27 of what is done once a side or a
// block of tokens; 630 with means and least squares, of which 50 prepare rows, the mean's rotation in double among
// them, and 49 sum the mean. Packing values by 16 bytes and tables of levels by a search in each cell made it some 490
// (Emerald Rapids: 4 to 10 % slower). With 16 lanes the SRFT of 64, 128 and 256 channels is rotate_real.inl's, rows
// come to it in halves that loads join (seal_rows.inl), and codes are seal_wide.inl's and quantise_wide's. Operations
// on the two ports of 512-bit arithmetic, for 16 vectors of d = 128 with the paper's settings: rows in 640 (128 joins,
// 128 products, 384 shuffles), rotation 1,141, measure 192, codes and packing 256 to 290: 2,250, 70 cycles a vector
// where it was 109. On an Emerald Rapids at 3 GHz, by turns: 57 to 36 ns a vector from L2 (108 cycles), 63 to 43 from
// L3, where reading the 512 bytes alone takes 17; 60 to 39 of 16-bit rows; kv4's settings 90 to 77 and 88 to 74. 25 ns
// would be 75 cycles, all operations at the pace of their ports; rotation keeps it, rows in take 45 cycles where 20 are
// counted, although what GCC moved between kinds of registers there is gone (.5 ns). Tried with 16 lanes: halves of
// lambda joined by the compiler (two stores, and a load that waits for them: 12 ns); all rows fetched in one burst
// behind the rotation (10 ns more than a few lines beside each eight channels); into L1 alone (5 ns more than L2 a
// block before). With kv4's settings a quarter of the time are the levels' 10.5 operations a channel, and a tenth each
// the mean's sums and what is done once a side.
//
// At 6 bits each look-up takes 16 in place of 1, 12 more per vector; at 8 none. Tried for codes: one comparison of
// bytes per threshold, 21 in place of the 7 that look up (83 ns).
//
// Bounds: |unit y| is clamped to 255 before it becomes a byte; thresholds are at most 223. sum M^2 <=
// 512 * 127^2 < 2^23. Steps below 1e-15 count as zero (their fp16 scale is 0 anyway) and steps are clamped to
// 1e18, so squares that matter neither underflow nor overflow and no scale is NaN.
#pragma once

#include "cpu/seal_rows.inl"
#include "cpu/seal_trellis.inl"
#include "cpu/seal_wide.inl"
#include "cpu/second_rows.inl"

namespace kv4::cpu::KV4_ISA {

// max(a, |b|) of a >= 0; where one operation has it, it has one port, and every second channel takes the other two.
template <class Isa>
KV4_INLINE typename Isa::F largest(typename Isa::F a, typename Isa::F b, bool even) {
  if constexpr (Isa::kLanes == 16)
    if (even) return Isa::max_abs(a, b);
  return Isa::max(a, Isa::abs(b));
}

// Adds the correction; returns per lane the largest magnitude or the sum of squares of n channels.
template <class Isa, bool kLargest>
typename Isa::F measure(float* x, const float* correction, int n) {
  using F = typename Isa::F;
  constexpr int L = Isa::kLanes;
  constexpr int kParts = L == 16 ? 8 : 4;
  F part[kParts] = {};
  const auto add = [&](int c, F& to, bool even) KV4_INLINE_LAMBDA {
    F v = Isa::load(x + c * L);
    if (correction != nullptr) {
      v += Isa::set1(correction[c]);
      Isa::store(x + c * L, v);
    }
    if constexpr (kLargest) to = largest<Isa>(to, v, even);
    else to = Isa::fma(v, v, to);
  };
  int c = 0;
  for (; c + kParts <= n; c += kParts) {
    KV4_UNROLL
    for (int i = 0; i < kParts; ++i) add(c + i, part[i], i % 2 == 0);
  }
  for (; c < n; ++c) add(c, part[0], true);
  KV4_UNROLL
  for (int step = kParts / 2; step > 0; step /= 2) {
    KV4_UNROLL
    for (int i = 0; i < step; ++i) part[i] = kLargest ? Isa::max(part[i], part[i + step]) : part[i] + part[i + step];
  }
  return part[0];
}

// Magnitudes are looked up in cells, sixteenths to 4 bits and 64 at 6: with z = |unit y| < 256 and h its cell, the
// index is base[h] + (z >= threshold[h]), since no cell holds two thresholds (levels.cpp). At 8 bits it is what it
// counts.
template <class Isa>
struct LevelVectors {
  using B = typename LaneTypes<Isa::kLanes>::B;
  ByteTable<Isa, 4> base, threshold;  // the first part alone to 4 bits
  ByteTable<Isa, 2> magnitude;
  typename Isa::F by_code;  // levels of 16 codes, with 16 lanes
  typename Isa::I sizes_by_code;
  B half;   // the code of 0
  B tread;  // 1 where negative codes start one higher (mid-tread), else 0
  float unit, largest;

  explicit LevelVectors(const Levels& l) {
    std::uint8_t bases[64] = {}, thresholds[64] = {}, magnitudes[32] = {};
    const int cells = l.bits <= 4 ? 16 : l.bits == 6 ? 64 : 0;
    for (int i = 0; cells > 0 && i + 1 < l.half(); ++i) {
      const int threshold_i = l.twice_threshold[i] << l.spread;
      thresholds[threshold_i / (256 / cells)] = static_cast<std::uint8_t>(threshold_i);
    }
    // Without a threshold of its own every z of the cell passes 0. Thresholds are above 0.
    for (int h = 0, below = 0; h < cells; ++h) {
      const bool own = thresholds[h] > 0;
      bases[h] = static_cast<std::uint8_t>(own ? below : below - 1);
      below += own;
    }
    if (cells > 0)
      for (int i = 0; i < l.half(); ++i) magnitudes[i] = l.magnitude[i];
    base.set(bases);
    threshold.set(thresholds);
    magnitude.set(magnitudes);
    if constexpr (Isa::kLanes == 16) {
      std::uint8_t sizes[16];
      for (int n = 0; n < 16; ++n) {
        const int level = l.table[static_cast<std::size_t>(n)];
        by_code[n] = static_cast<float>(level);
        sizes[n] = static_cast<std::uint8_t>(level < 0 ? -level : level);
      }
      sizes_by_code = load_table16<Isa>(sizes);
    }
    half = B{} + static_cast<std::uint8_t>(l.half());
    tread = B{} + static_cast<std::uint8_t>(l.negative_base - l.half() + 1);
    unit = static_cast<float>(2 << l.spread);
    largest = l.bits == 8 ? 254.0f : 255.0f;  // so that the largest index is 127
  }

  // The magnitudes' indices of bytes z.
  template <LookUp kLookUp>
  KV4_INLINE B index(typename Isa::I z) const {
    using I = typename Isa::I;
    if constexpr (kLookUp == LookUp::none) return (B)(z >> 1 & 0x7f7f7f7f) + (B)(z & 0x01010101);
    // A comparison that holds is -1 in each byte.
    if constexpr (kLookUp == LookUp::one) {
      const I sixteenth = (z >> 4) & 0x0f0f0f0f;
      return (B)SealOps::lookup16(base.part[0], sixteenth) -
             (B)((B)z >= (B)SealOps::lookup16(threshold.part[0], sixteenth));
    } else {
      const I cell = (z >> 2) & 0x3f3f3f3f;
      return (B)base.lookup(cell) - (B)((B)z >= (B)threshold.lookup(cell));
    }
  }
  template <LookUp kLookUp>
  KV4_INLINE typename Isa::I magnitudes(B index) const {
    using I = typename Isa::I;
    if constexpr (kLookUp == LookUp::none) return (I)index;
    else if constexpr (kLookUp == LookUp::one) return SealOps::lookup16(magnitude.part[0], (I)index);
    else return magnitude.lookup((I)index);
  }
};

template <class Isa>
struct FitSums {
  typename Isa::F xm{}, mm{};  // sum |unit y| M and sum M^2
};
struct WideSums {
  VecTypes<16>::F xl{};  // sum unit y L
  VecTypes<16>::I mm{};
};

// Codes of channels 0 ... 3 at x into one vector of quads; `valid` is 0xff in the bytes of channels that
// exist.
template <class Isa, ScaleRule kRule, LookUp kLookUp>
KV4_INLINE typename Isa::I quantise_quad(const float* x, typename Isa::F inverse, const LevelVectors<Isa>& levels,
                                         int valid, FitSums<Isa> (&sums)[2]) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using B = typename LaneTypes<Isa::kLanes>::B;
  constexpr int L = Isa::kLanes;
  F y[4], size[4];
  I whole[4];
  KV4_UNROLL
  for (int k = 0; k < 4; ++k) {
    // Adding 0 makes -0 0, whose code is half.
    y[k] = Isa::fma(Isa::load(x + k * L), inverse, F{});
    size[k] = Isa::abs(y[k]);
    whole[k] = Isa::truncate(Isa::min(size[k], Isa::set1(levels.largest)));
  }
  const B index = levels.template index<kLookUp>(SealOps::gather_bytes(whole));
  if constexpr (kRule == ScaleRule::least_squares) {
    const I magnitudes = levels.template magnitudes<kLookUp>(index) & valid;
    KV4_UNROLL
    for (int k = 0; k < 4; ++k) {
      const F m = Isa::to_float((magnitudes >> (8 * k)) & 0xff);
      sums[k % 2].xm = Isa::fma(size[k], m, sums[k % 2].xm);
      sums[k % 2].mm = Isa::fma(m, m, sums[k % 2].mm);
    }
  }
  // half + index, or negative_base - index = ~index + negative_base + 1.
  const B sign = (B)((typename LaneTypes<L>::S)SealOps::gather_signs(y) < 0);
  return (I)((index ^ sign) + levels.half + (sign & levels.tread)) & valid;
}

// The same with 16 lanes, by tables of 16: 42 operations for four channels in place of 58. Rounded down, a number keeps
// its sign with what it is to be looked up by, and the sums take levels by their codes.
template <class Isa, ScaleRule kRule, class Ops>
KV4_INLINE typename Isa::I quantise_wide(const float* x, typename Isa::F inverse, const LevelVectors<Isa>& levels,
                                         int valid, WideSums (&sums)[2]) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using B = typename LaneTypes<Isa::kLanes>::B;
  F y[4];
  KV4_UNROLL
  for (int k = 0; k < 4; ++k) y[k] = Isa::load(x + k * Isa::kLanes) * inverse;
  I sizes, signs;
  Ops::split_signs(y, sizes, signs);
  const B index = levels.template index<LookUp::one>(sizes);
  const I code = Ops::transpose_bytes((I)((index ^ (B)signs) + levels.half + ((B)signs & levels.tread)));
  if constexpr (kRule == ScaleRule::least_squares) {
    KV4_UNROLL
    for (int k = 0; k < 4; ++k)
      sums[k % 2].xl = Isa::fma(y[k], Ops::lookup_f32(levels.by_code, code >> (8 * k)), sums[k % 2].xl);
    sums[0].mm = Ops::add_squares(sums[0].mm, Ops::lookup16(levels.sizes_by_code, code) & valid);
  }
  return code & valid;
}

// The step of what measure() found, and unit / step, both 0 where nothing is to be coded.
template <class Isa>
KV4_INLINE void step_of(typename Isa::F measured, int n, const StepRule& rule, typename Isa::F live, float unit,
                        typename Isa::F& step, typename Isa::F& inverse) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  if (!rule.by_largest) measured = Isa::sqrt(measured * Isa::set1(1.0f / static_cast<float>(n)));
  step = measured * Isa::set1(rule.factor);
  const I nonzero = (I)(step >= Isa::set1(1e-15f)) & (I)(live > F{});
  step = (F)((I)Isa::min(step, Isa::set1(1e18f)) & nonzero);
  inverse = (F)((I)(Isa::set1(unit) / Isa::max(step, Isa::set1(1e-15f))) & nonzero);
}

// One group of n channels at x: quads and, per lane, the scale.
template <class Isa, ScaleRule kRule, LookUp kLookUp>
typename Isa::F quantise_group(float* x, const float* correction, int n, const StepRule& rule,
                               const LevelVectors<Isa>& levels, typename Isa::F live, std::int32_t* quads) {
  using F = typename Isa::F;
  constexpr int L = Isa::kLanes;
  const F measured = rule.by_largest ? measure<Isa, true>(x, correction, n) : measure<Isa, false>(x, correction, n);
  F step, inverse;
  step_of<Isa>(measured, n, rule, live, levels.unit, step, inverse);

  constexpr bool kWide = L == 16 && kLookUp == LookUp::one;
  std::conditional_t<kWide, WideSums, FitSums<Isa>> sums[2];
  const auto quad = [&](int c, int valid) KV4_INLINE_LAMBDA {
    if constexpr (kWide) return quantise_wide<Isa, kRule, SealOps>(x + c * L, inverse, levels, valid, sums);
    else return quantise_quad<Isa, kRule, kLookUp>(x + c * L, inverse, levels, valid, sums);
  };
  int c = 0;
  for (; c + 4 <= n; c += 4) store_as(quads + c / 4 * kPageTokens, quad(c, -1));
  if (c < n) store_as(quads + c / 4 * kPageTokens, quad(c, (1 << 8 * (n - c)) - 1));
  if constexpr (kRule == ScaleRule::abs_max) return step;
  F xm, mm;
  if constexpr (kWide) {
    xm = sums[0].xl + sums[1].xl;
    mm = Isa::to_float(sums[0].mm);
  } else {
    xm = sums[0].xm + sums[1].xm;
    mm = sums[0].mm + sums[1].mm;
  }
  return Isa::set1(1.0f / levels.unit) * step * (xm / Isa::max(mm, Isa::set1(1.0f)));
}

template <class Isa, LookUp kLookUp>
auto quantise_group_by(ScaleRule rule) {
  return rule == ScaleRule::abs_max ? quantise_group<Isa, ScaleRule::abs_max, kLookUp>
                                    : quantise_group<Isa, ScaleRule::least_squares, kLookUp>;
}
template <class Isa>
auto quantise_group_of(const SideSpec& spec) {
  switch (look_up_of(spec.levels.bits)) {
    case LookUp::none: return quantise_group_by<Isa, LookUp::none>(spec.scale);
    case LookUp::four: return quantise_group_by<Isa, LookUp::four>(spec.scale);
    default: return quantise_group_by<Isa, LookUp::one>(spec.scale);
  }
}

// Of a page's values.
template <class Isa>
RefinedTokens refined_tokens(const SealSide& s, int rows) {
  const auto sums = [&](auto load) {
    return lightest(
        rows, s.count, [&](int j) { return s.used(j); },
        [&](int j) { return sum_of_squares<Isa>(s.spec->dim, [&](int c) { return load(s.rows + j * s.stride, c); }); });
  };
  switch (s.dtype) {
    case DType::f32: return sums([](const std::byte* row, int c) { return load_row<Isa, DType::f32>(row, c); });
    case DType::f16: return sums([](const std::byte* row, int c) { return load_row<Isa, DType::f16>(row, c); });
    default: return sums([](const std::byte* row, int c) { return load_row<Isa, DType::bf16>(row, c); });
  }
}

// What the first row of codes, as it is stored, leaves of lane `lane` of the block at token t.
template <class Isa>
void take_left(const SealSide& s, const SealScratch& scratch, int t, int lane, float* left) {
  constexpr int L = Isa::kLanes;
  const SideSpec& spec = *s.spec;
  for (int g = 0; g < spec.groups; ++g) {
    const float scale = f16_to_f32(load_as<std::uint16_t>(s.scales + 2 * (g * kPageTokens + t + lane)));
    for (int c = g * spec.group; c < (g + 1) * spec.group; ++c) {
      const std::int32_t quad = scratch.quads[c / 4 * kPageTokens + t + lane];
      const int code = quad >> (8 * (c % 4)) & 0xff, place = (c - g * spec.group) / 4;
      int level = spec.levels.table[static_cast<std::size_t>(code)];
      if (spec.levels.is_trellis()) {
        const int before = place > 0 ? scratch.quads[(c / 4 - 1) * kPageTokens + t + lane] >> (8 * (c % 4)) & 0xff : 0;
        level = spec.levels.level(place, spec.levels.next_state(place + 1, before), code);
      }
      left[c * L] = scratch.x[c * L + lane] - scale * static_cast<float>(level);
    }
  }
}

// Second rows of codes of what is left, by the rules of a first one.
template <class Isa>
void seal_second(const PageSpec& page, const RefinedTokens& tokens, const SealScratch& scratch, std::uint8_t* slice) {
  constexpr int L = Isa::kLanes;
  static_assert(kMostRefined <= L, "a lane for each");
  const SideSpec& spec = page.key;
  const kv4_second_layout& at = page.second;
  const LevelVectors<Isa> levels(page.second_levels);
  const StepRule rule = step_rule(page.second_levels, spec.scale, spec.group);
  const auto quantise = quantise_group_by<Isa, LookUp::one>(spec.scale);
  alignas(64) float live[L] = {};
  for (int r = 0; r < tokens.rows; ++r) live[r] = tokens.token[r] >= 0 ? 1.0f : 0.0f;
  for (int g = 0; g < spec.groups; ++g) {
    const int c = g * spec.group;
    alignas(64) std::uint16_t halves[L];
    Isa::store_f16(halves, quantise(scratch.left + c * L, nullptr, spec.group, rule, levels, Isa::load(live),
                                    scratch.quads + c / 4 * kPageTokens));
    for (int r = 0; r < tokens.rows; ++r) store_as(slice + at.scales + 2 * (r * spec.groups + g), halves[r]);
  }
  for (int r = 0; r < tokens.rows; ++r) {
    std::uint8_t* const codes = slice + at.codes + static_cast<std::uint32_t>(r) * at.row_bytes;
    std::memset(codes, 0, at.row_bytes);
    for (int c = 0; c < spec.dim; ++c) {
      const std::int32_t code = scratch.quads[c / 4 * kPageTokens + r] >> (8 * (c % 4)) & 15;
      codes[c / 2] = static_cast<std::uint8_t>(codes[c / 2] | code << (4 * (c % 2)));
    }
    slice[at.places + static_cast<std::uint32_t>(r)] = static_cast<std::uint8_t>(std::max(0, tokens.token[r]));
  }
}

// Rows of a block, those of zeros for tokens that are not used.
template <class Isa, class Token>
KV4_INLINE void take_rows(const SealSide& s, const SealScratch& scratch, bool all, Token token,
                          const std::byte* (&rows)[Isa::kLanes], float (&live)[Isa::kLanes]) {
  for (int i = 0; i < Isa::kLanes; ++i) live[i] = 1.0f;
  const std::byte* const first = s.rows - s.first * s.stride;
  if (all) {
    for (int i = 0; i < Isa::kLanes; ++i) rows[i] = first + token(i) * s.stride;
    return;
  }
  for (int i = 0; i < Isa::kLanes; ++i) {
    const int j = token(i) - s.first;
    const bool used = j >= 0 && j < s.count && s.used(j);
    rows[i] = used ? s.rows + j * s.stride : reinterpret_cast<const std::byte*>(scratch.zeros);
    if (!used) live[i] = 0.0f;
  }
}

template <class Isa>
KV4_INLINE void rotate_block(const Rotation& r, bool real, const SealScratch& scratch) {
  if constexpr (Isa::kLanes == 16)
    if (real) return real_transform<Isa>(r, scratch.rotate, scratch.x);
  if (r.kind() == RotationKind::srft) srft_forward<Isa, true>(r, scratch.x, scratch.rotate);
  else rotate_lanes<Isa>(r, Map::forward, scratch.x, scratch.rotate);
}

// A whole page of even levels (seal_wide.inl), rows already prepared.
template <class Isa>
void seal_even(const SealSide& s, const SealScratch& scratch) {
  using F = typename Isa::F;
  constexpr int L = Isa::kLanes;
  const SideSpec& spec = *s.spec;
  const int d = spec.dim;
  const bool real = real_sides<Isa>(*spec.rotation);
  const auto load = load_of<Isa>(s.dtype, spec.mean, real);
  const StepRule rule = step_rule(spec.levels, spec.scale, spec.group);
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype));
  for (int t = 0; t < kPageTokens; t += L) {
    const std::byte* rows[L];
    alignas(64) float live[L];
    const auto token = [&](int i) { return s.keys ? t + i : even_value_token(t, i); };
    take_rows<Isa>(s, scratch, s.skip == nullptr && s.hidden == 0, token, rows, live);
    RowFetch next{t + L < kPageTokens ? s.rows + (t + L) * s.stride : s.after, s.stride, d * size};
    load(rows, d, scratch, next, static_cast<int>(size));
    rotate_block<Isa>(*spec.rotation, real, scratch);
    const F measured = measure<Isa, true>(scratch.x, spec.mean ? scratch.correction : nullptr, d);
    F step, inverse;
    step_of<Isa>(measured, d, rule, Isa::load(live), 1.0f, step, inverse);
    if (s.keys) {
      even_keys<SealOps>(scratch.x, d, inverse, s.codes + key_nibble(t, 0, d).byte,
                         [&] { next.lines(static_cast<int>(size)); });
    } else {
      even_values<SealOps>(scratch.x, d, inverse, t, scratch.quads, s.codes,
                           [&] { next.lines(static_cast<int>(size) / 2); });
    }
    alignas(64) std::uint16_t halves[L];
    Isa::store_f16(halves, step);
    for (int i = 0; i < L; i += 4) std::memcpy(s.scales + 2 * token(i), halves + i, 4 * sizeof *halves);
  }
}

// A page of values by a trellis, rows already prepared.
template <class Isa>
void seal_trellis_values(const SealSide& s, const SealScratch& scratch) {
  using F = typename Isa::F;
  constexpr int L = Isa::kLanes;
  const SideSpec& spec = *s.spec;
  const int d = spec.dim, padded = pad_channels(d);
  const bool real = real_sides<Isa>(*spec.rotation);
  const auto load = load_of<Isa>(s.dtype, spec.mean, real);
  const StepRule rule = step_rule(spec.levels, spec.scale, spec.group);
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype));
  for (int t = 0; t < kPageTokens; t += L) {
    const std::byte* rows[L];
    alignas(64) float live[L];
    const bool all = s.count == kPageTokens && s.skip == nullptr && s.hidden <= t;
    take_rows<Isa>(s, scratch, all, [t](int i) { return t + i; }, rows, live);
    RowFetch next{t + L < kPageTokens ? s.rows + (t + L) * s.stride : s.after, s.stride, d * size};
    load(rows, d, scratch, next, 2 * static_cast<int>(size));
    rotate_block<Isa>(*spec.rotation, real, scratch);
    for (int c = d; c < padded; ++c) Isa::store(scratch.x + c * L, F{});
    for (int g = 0; g < spec.groups; ++g) {
      const int begin = g * spec.group, end = spec.groups == 1 ? padded : begin + spec.group;
      float* const x = scratch.x + begin * L;
      const F measured = rule.by_largest ? measure<Isa, true>(x, nullptr, spec.group)
                                         : measure<Isa, false>(x, nullptr, spec.group);
      F step, inverse;
      step_of<Isa>(measured, spec.group, rule, Isa::load(live), 1.0f, step, inverse);
      Isa::store(scratch.trellis.step + g * kPageTokens + t, step);
      for (int c = begin; c < end; c += L) {
        F r[L];
        KV4_UNROLL
        for (int i = 0; i < L; ++i) r[i] = Isa::load(scratch.x + (c + i) * L) * inverse;
        Isa::transpose(r);
        KV4_UNROLL
        for (int i = 0; i < L; ++i) Isa::store(scratch.trellis.x + (t + i) * padded + c, r[i]);
      }
    }
  }
  const TrellisTables<Isa> tables(spec.levels);
  const auto chains = spec.levels.bits == 2   ? seal_chains<Isa, 2>
                      : spec.levels.bits == 3 ? seal_chains<Isa, 3>
                                              : seal_chains<Isa, 4>;
  for (int g = 0; g < spec.groups; ++g)
    chains(tables, scratch.trellis, g, g * spec.group, spec.groups == 1 ? padded : (g + 1) * spec.group, d, padded,
           s.codes, s.scales);
}

// Keys of a group by a trellis: the scale of each lane.
template <class Isa>
typename Isa::F trellis_keys(const SealScratch& scratch, float* x, const float* correction, int n, const StepRule& rule,
                             int bits, const TrellisTables<Isa>& tables, typename Isa::F live, std::int32_t* quads) {
  const auto measured = rule.by_largest ? measure<Isa, true>(x, correction, n) : measure<Isa, false>(x, correction, n);
  typename Isa::F step, inverse;
  step_of<Isa>(measured, n, rule, live, 1.0f, step, inverse);
  const auto group = bits == 2 ? trellis_group<Isa, 2> : bits == 3 ? trellis_group<Isa, 3> : trellis_group<Isa, 4>;
  return group(tables, x, n, step, inverse, scratch.trellis.back, quads);
}

// refined: tokens whose rest goes to scratch.left.
template <class Isa>
void seal_side(const SealSide& s, const SealScratch& scratch, PackCodes pack, const RefinedTokens& refined) {
  using F = typename Isa::F;
  constexpr int L = Isa::kLanes;
  const SideSpec& spec = *s.spec;
  const int d = spec.dim, padded = pad_channels(d), end = s.first + s.count;
  const bool real = real_sides<Isa>(*spec.rotation);
  prepare_rows<Isa>(s, scratch);
  fold_scale(*spec.rotation, scratch, spec.mean, real ? 2.0f : 1.0f);
  std::memset(scratch.zeros, 0, d * sizeof(float));
  if constexpr (L == 16)
    if (even_levels(spec) && s.count == kPageTokens && refined.rows == 0) return seal_even<Isa>(s, scratch);
  const bool trellis = spec.levels.is_trellis();
  if (trellis && !s.keys) return seal_trellis_values<Isa>(s, scratch);
  const TrellisTables<Isa> tables(spec.levels);
  std::int32_t* const tail = scratch.quads + (d + 3) / 4 * kPageTokens;
  std::memset(tail, 0, static_cast<std::size_t>(padded / 4 - (d + 3) / 4) * kPageTokens * sizeof *tail);
  const LevelVectors<Isa> levels(spec.levels);
  const auto quantise = quantise_group_of<Isa>(spec);
  const StepRule rule = step_rule(spec.levels, spec.scale, spec.group);
  const auto load = load_of<Isa>(s.dtype, spec.mean, real);
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype));

  for (int t = s.first / L * L; t < end; t += L) {
    const std::byte* rows[L];
    alignas(64) float live[L];
    const bool all = t >= s.first && t + L <= end && s.skip == nullptr && t - s.first >= s.hidden;
    take_rows<Isa>(s, scratch, all, [t](int i) { return t + i; }, rows, live);
    RowFetch next{t + L < end ? s.rows + (t + L - s.first) * s.stride : s.after, s.stride, d * size};
    load(rows, d, scratch, next, 2 * static_cast<int>(size));
    rotate_block<Isa>(*spec.rotation, real, scratch);
    // A last quad of two channels reads two more.
    for (int c = d; c < (d + 3) / 4 * 4; ++c) Isa::store(scratch.x + c * L, F{});

    for (int g = 0; g < spec.groups; ++g) {
      const int c = g * spec.group;
      const float* correction = spec.mean ? scratch.correction + c : nullptr;
      std::int32_t* quads = scratch.quads + c / 4 * kPageTokens + t;
      float* x = scratch.x + c * L;
      const F lanes = Isa::load(live);
      const F scale =
          trellis ? trellis_keys<Isa>(scratch, x, correction, spec.group, rule, spec.levels.bits, tables, lanes, quads)
                  : quantise(x, correction, spec.group, rule, levels, lanes, quads);
      alignas(64) std::uint16_t halves[L];
      Isa::store_f16(halves, scale);
      const int begin = t < s.first ? s.first - t : 0, count = (t + L < end ? L : end - t) - begin;
      std::memcpy(s.scales + 2 * (g * kPageTokens + t + begin), halves + begin, 2 * static_cast<std::size_t>(count));
    }
    for (int r = 0; r < refined.rows; ++r)
      if (const int lane = refined.token[r] - t; refined.token[r] >= 0 && lane >= 0 && lane < L)
        take_left<Isa>(s, scratch, t, lane, scratch.left + r);
  }
  pack(scratch.quads, padded, s.first, s.count, s.codes);
}

template <class Isa>
void seal(const PageSpec& spec, const SealJob& job, int head, std::uint8_t* slice, void* scratch) {
  const std::int64_t size = static_cast<std::int64_t>(size_of(job.dtype));
  const auto side = [&](const SideSpec& of, const void* rows, std::int64_t head_stride, std::int64_t stride,
                        const float* lambda, std::uint32_t codes, std::uint32_t scales, std::uint32_t mean,
                        const void* after) {
    return SealSide{.spec = &of,
                    .keys = &of == &spec.key,
                    .rows = static_cast<const std::byte*>(rows) + head * head_stride * size,
                    .stride = stride * size,
                    .after = static_cast<const std::byte*>(after),
                    .dtype = job.dtype,
                    .skip = job.skip,
                    .hidden = job.hidden,
                    .lambda = lambda == nullptr ? nullptr : lambda + head * of.dim,
                    .first = job.first,
                    .count = static_cast<int>(job.count),
                    .codes = slice + codes,
                    .scales = reinterpret_cast<std::byte*>(slice + scales),
                    .mean = reinterpret_cast<std::byte*>(slice + mean)};
  };
  const kv4_page_layout& at = spec.layout;
  const SealSide keys = side(spec.key, job.k, job.k_head_stride, job.k_stride, job.lambda_k, at.k_codes, at.k_scales,
                             at.k_mean, static_cast<const std::byte*>(job.v) + head * job.v_head_stride * size),
                 values = side(spec.value, job.v, job.v_head_stride, job.v_stride, job.lambda_v, at.v_codes,
                               at.v_scales, 0, scratch);
  const int rows = static_cast<int>(spec.second.rows);
  const SealScratch parts(spec.key, Isa::kLanes, rows > 0, scratch);
  RefinedTokens refined;
  if (rows > 0) {
    refined = refined_tokens<Isa>(values, rows);
    std::memset(parts.left, 0, static_cast<std::size_t>(pad_channels(spec.key.dim) * Isa::kLanes) * sizeof(float));
  }
  seal_side<Isa>(keys, parts, pack_of<Isa>(true, spec.key.levels.bits), refined);
  if (rows > 0) seal_second<Isa>(spec, refined, parts, slice);
  seal_side<Isa>(values, SealScratch(spec.value, Isa::kLanes, false, scratch),
                 pack_of<Isa>(false, spec.value.levels.bits), RefinedTokens());
}

template <class Isa>
std::size_t seal_scratch(const PageSpec& spec) {
  return std::max(SealScratch(spec.key, Isa::kLanes, spec.second.rows > 0, nullptr).bytes,
                  SealScratch(spec.value, Isa::kLanes, false, nullptr).bytes);
}

}  // namespace kv4::cpu::KV4_ISA
