// Inputs of sealing and the rule of equality with the float64 definition (docs/format.md): codes are relative to the
// mean that the page stores; a code equals the reference unless the reference value lies within 1e-4 of a step from a
// decision boundary, then it is one level off at most; scales and means lie within one fp16 ulp, a scale being that of
// the codes the kernel chose.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <ostream>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/layout.h"
#include "format/convert.h"
#include "reference/seal.h"

namespace kv4::seal_case {

constexpr double kBoundary = 1e-4;  // of a step

// One rotation per kind and d: a dense one takes d^3 steps to invert.
inline std::shared_ptr<const Rotation> make_rotation(RotationKind kind, int d) {
  static std::map<std::pair<RotationKind, int>, std::shared_ptr<const Rotation>> made;
  std::shared_ptr<const Rotation>& r = made[{kind, d}];
  if (r != nullptr) return r;
  const std::uint64_t seed = 0x6b7634 + static_cast<std::uint64_t>(d);
  Status s;
  switch (kind) {
    case RotationKind::identity: s = Rotation::identity(d, &r); break;
    case RotationKind::srft: s = Rotation::srft(d, seed, &r); break;
    case RotationKind::srht: s = Rotation::srht(d, seed, &r); break;
    case RotationKind::householder: s = Rotation::householder(d, d / 2, seed, &r); break;
    case RotationKind::dense: {
      std::vector<float> m = cases::normal_rows(d, d, seed, 0.3 / std::sqrt(d));
      for (int i = 0; i < d; ++i) m[static_cast<std::size_t>(i) * d + i] += 1;
      s = Rotation::dense(d, m, &r);
      break;
    }
  }
  EXPECT_TRUE(s.ok()) << s.message();
  return r;
}

struct Side {
  int dim = 128;
  RotationKind rotation = RotationKind::srft;
  int group = 0;
  LevelKind levels = LevelKind::lloyd_max;
  ScaleRule scale = ScaleRule::least_squares;
  bool mean = false;
  bool lambda = false;
  int bits = 4;
};
inline std::ostream& operator<<(std::ostream& o, const Side& s) {
  return o << "d " << s.dim << " rotation " << int(s.rotation) << " group " << s.group << " levels " << int(s.levels)
           << " scale " << int(s.scale) << " mean " << s.mean << " lambda " << s.lambda << " bits " << s.bits;
}

inline SideSpec make_side(const Side& s) {
  SideSpec spec;
  spec.dim = s.dim;
  spec.group = s.group == 0 ? s.dim : s.group;
  spec.groups = s.dim / spec.group;
  spec.rotation = make_rotation(s.rotation, s.dim);
  spec.levels = levels(s.levels, s.bits);
  spec.scale = s.scale;
  spec.mean = s.mean;
  return spec;
}

inline PageSpec make_page(const Side& key, const Side& value, int refined = 0) {
  PageSpec p;
  p.key = make_side(key);
  p.value = make_side(value);
  p.value.values = true;
  p.layout = kv4_make_page_layout(key.dim, value.dim, p.key.groups, p.value.groups, key.mean,
                                  cpu::pad_channels(key.dim), cpu::pad_channels(value.dim),
                                  static_cast<std::uint32_t>(key.bits), static_cast<std::uint32_t>(value.bits),
                                  static_cast<std::uint32_t>(refined));
  p.second = kv4_make_second_layout(p.layout, static_cast<std::uint32_t>(cpu::pad_channels(key.dim)),
                                    static_cast<std::uint32_t>(refined));
  p.second_levels = second_levels(key.levels);
  return p;
}

inline std::vector<float> make_lambda(int d, std::uint64_t seed) {
  cases::Random random(seed);
  std::vector<float> lambda(d);
  for (float& l : lambda) l = static_cast<float>(std::pow(10.0, random.uniform() - 0.5));
  return lambda;
}

// Rows of a dtype with a gap between them, everything outside the rows and in masked ones NaN.
struct Rows {
  int dim;
  DType dtype;
  std::int64_t stride;
  std::vector<float> f32;
  std::vector<std::uint16_t> f16;
  std::vector<double> exact;  // [tokens, dim], what the dtype holds

  Rows(const std::vector<float>& x, int tokens, int d, DType type, const std::uint8_t* skip)
      : dim(d), dtype(type), stride(d + 6) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    f32.assign(static_cast<std::size_t>(tokens) * stride, nan);
    f16.assign(f32.size(), 0x7fff);  // NaN as fp16 and as bf16
    exact.assign(static_cast<std::size_t>(tokens) * d, nan);
    for (int j = 0; j < tokens; ++j) {
      if (skip != nullptr && skip[j] != 0) continue;
      for (int c = 0; c < d; ++c) {
        const float v = x[static_cast<std::size_t>(j) * d + c];
        const std::size_t at = j * stride + c;
        f32[at] = v;
        f16[at] = type == DType::bf16 ? f32_to_bf16(v) : f32_to_f16(v);
        exact[static_cast<std::size_t>(j) * d + c] = type == DType::f32   ? v
                                                     : type == DType::f16 ? f16_to_f32(f16[at])
                                                                          : bf16_to_f32(f16[at]);
      }
    }
  }
  const void* row(int j) const {
    return dtype == DType::f32 ? static_cast<const void*>(f32.data() + j * stride) : f16.data() + j * stride;
  }
};

struct Codes {
  std::vector<std::uint8_t> key, value;  // one per byte [64, dim]
};
inline std::vector<std::uint16_t> read_u16(const std::uint8_t* p, int n) {
  std::vector<std::uint16_t> x(n);
  if (n > 0) std::memcpy(x.data(), p, 2 * x.size());  // else of no address
  return x;
}

// Ordered like the values they stand for.
inline int order_of(std::uint16_t half) { return half & 0x8000 ? -(half & 0x7fff) : half; }

// The least distance of two neighbouring levels.
inline double least_gap(const Levels& levels) {
  std::vector<int> all;  // of a trellis those of any state
  for (int n = levels.negative_base == levels.half() ? 1 : 0; n < levels.count(); ++n)
    all.push_back(levels.table[static_cast<std::size_t>(n)]);
  std::sort(all.begin(), all.end());
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t n = 0; n + 1 < all.size(); ++n) least = std::min<double>(least, all[n + 1] - all[n]);
  return least;
}

// The codes of a trellis follow a path that is as good as the reference's, but for what a kernel cannot tell apart: its
// y, known to kBoundary of the least distance of two levels, and sums of n squares whose last six bits of 24 are lost.
inline void check_paths(const SideSpec& spec, const reference::Sealed& r, const std::vector<std::uint8_t>& codes,
                        const std::vector<double>& level) {
  const double gap = least_gap(spec.levels);
  const std::vector<double> best = reference::levels_of(spec, spec.levels, r.codes.data(), kPageTokens);
  std::map<std::pair<int, int>, std::array<double, 3>> chains;  // squared errors of either path, places
  for (int j = 0; j < kPageTokens; ++j) {
    for (int c = 0; c < spec.dim; ++c) {
      const std::size_t at = static_cast<std::size_t>(j * spec.dim + c);
      const double step = r.step[static_cast<std::size_t>(c / spec.group * kPageTokens + j)];
      const double y = step > 0 ? r.x[at] / step : 0;
      auto& chain = chains[spec.values ? std::pair(c, j % 4) : std::pair(j, c / spec.group * 4 + c % 4)];
      chain[0] += std::pow(y - level[at], 2);
      chain[1] += std::pow(y - best[at], 2);
      chain[2] += 1;
      ASSERT_LT(codes[at], spec.levels.count());
    }
  }
  for (const auto& [name, chain] : chains) {
    const double shift = std::sqrt(chain[2]) * kBoundary * gap, lost = 1 + chain[2] * 0x1p-18;
    ASSERT_LE(std::sqrt(chain[0]), lost * (std::sqrt(chain[1]) + shift) + shift)
        << "chain " << name.first << ", " << name.second;
  }
}

inline void check_side(const SideSpec& spec, const Rows& rows, const std::uint8_t* skip,
                       const std::vector<double>& lambda, const std::vector<std::uint8_t>& codes,
                       const std::vector<std::uint16_t>& scales, const std::vector<std::uint16_t>& mean) {
  const double* weights = lambda.empty() ? nullptr : lambda.data();
  const reference::Sealed r =
      reference::seal(spec, rows.exact.data(), kPageTokens, skip, weights, mean.empty() ? nullptr : mean.data());
  const std::vector<double> level = reference::levels_of(spec, spec.levels, codes.data(), kPageTokens);
  if (spec.levels.is_trellis()) check_paths(spec, r, codes, level);
  for (std::size_t c = 0; c < mean.size(); ++c)
    ASSERT_LE(std::abs(order_of(mean[c]) - order_of(f32_to_f16(static_cast<float>(r.mean_f64[c])))), 1) << c;
  for (int j = 0; j < kPageTokens; ++j) {
    for (int g = 0; g < spec.groups; ++g) {
      const std::size_t first = static_cast<std::size_t>(j) * spec.dim + static_cast<std::size_t>(g) * spec.group;
      for (std::size_t i = first; i < first + spec.group && !spec.levels.is_trellis(); ++i) {
        const int off = std::abs(codes[i] - r.codes[i]);
        ASSERT_TRUE(off == 0 || (off == 1 && r.margin[i] < kBoundary))
            << "token " << j << " channel " << i % spec.dim << ": code " << int(codes[i]) << ", reference "
            << int(r.codes[i]) << ", " << r.margin[i] << " steps from a boundary";
      }
      const std::size_t s = static_cast<std::size_t>(g) * kPageTokens + j;
      double scale = r.step[s];
      if (scale > 0 && spec.scale == ScaleRule::least_squares)
        scale = reference::least_squares_scale(r.x.data() + first, level.data() + first, spec.group);
      ASSERT_LE(std::abs(scales[s] - f32_to_f16(static_cast<float>(scale))), 1) << "token " << j << " group " << g;
    }
  }
}

// Second rows of a slice's keys, relative to what the first ones of the slice leave. A kernel knows what is left as
// well as it knows what was there: a boundary is as wide as at the first rows' levels, so more of the second rows'
// steps.
inline void check_second(const PageSpec& spec, const Rows& k, const Rows& v, const std::uint8_t* skip,
                         const std::vector<double>& lambda, const std::vector<std::uint8_t>& codes,
                         const std::uint8_t* slice) {
  const auto scales = read_u16(slice + spec.layout.k_scales, spec.key.groups * kPageTokens);
  const auto mean = read_u16(slice + spec.layout.k_mean, spec.key.mean ? spec.key.dim : 0);
  const reference::Sealed r = reference::seal(spec.key, k.exact.data(), kPageTokens, skip,
                                              lambda.empty() ? nullptr : lambda.data(),
                                              mean.empty() ? nullptr : mean.data());
  const int rows = static_cast<int>(spec.second.rows), d = spec.key.dim;
  const std::vector<int> places = reference::lightest(v.exact.data(), kPageTokens, spec.value.dim, skip, rows);
  const reference::SecondRows got = reference::read_second_rows(spec, slice);
  const reference::Sealed want =
      reference::second_rows(spec.key, spec.second_levels, r, codes.data(), scales.data(), places);
  const double gap = least_gap(spec.key.levels), second_gap = least_gap(spec.second_levels);
  SideSpec second = spec.key;
  second.levels = spec.second_levels;
  const std::vector<double> level = reference::levels_of(second, second.levels, got.codes.data(), rows);
  for (int row = 0; row < rows; ++row) {
    const bool used = row < static_cast<int>(places.size());
    ASSERT_EQ(got.places[row], used ? places[row] : 0) << row;
    for (int g = 0; g < spec.key.groups; ++g) {
      const std::size_t first = static_cast<std::size_t>(row * d + g * spec.key.group);
      const std::uint16_t scale = got.scales[static_cast<std::size_t>(row * spec.key.groups + g)];
      if (!used) {
        ASSERT_EQ(scale, 0);
        for (std::size_t i = first; i < first + spec.key.group; ++i) ASSERT_EQ(got.codes[i], spec.second_levels.half());
        continue;
      }
      const std::size_t s = static_cast<std::size_t>(g * want.tokens + row);
      const double ratio = r.step[static_cast<std::size_t>(g * kPageTokens + places[row])] * gap /
                           (want.step[s] * second_gap);
      for (std::size_t i = first; i < first + spec.key.group; ++i) {
        const int off = std::abs(got.codes[i] - want.codes[i]);
        ASSERT_TRUE(off == 0 || (off == 1 && want.margin[i] < kBoundary * std::max(1.0, ratio)))
            << "second row " << row << " channel " << i % d << ": code " << int(got.codes[i]) << ", reference "
            << int(want.codes[i]) << ", " << want.margin[i] << " steps from a boundary";
      }
      double fit = want.step[s];
      if (fit > 0 && spec.key.scale == ScaleRule::least_squares)
        fit = reference::least_squares_scale(want.x.data() + first, level.data() + first, spec.key.group);
      ASSERT_LE(std::abs(scale - f32_to_f16(static_cast<float>(fit))), 1) << "second row " << row << " group " << g;
    }
  }
}

struct Case {
  Side key, value;
  DType dtype = DType::f32;
  double bias = 20, sigma = 0;  // sigma > 0: every channel of the keys bias +- sigma
  bool masked = false;
  int refined = 0;
};
inline std::ostream& operator<<(std::ostream& o, const Case& c) {
  return o << "key " << c.key << "; value " << c.value << "; " << name_of(c.dtype) << " bias " << c.bias << " sigma "
           << c.sigma << " masked " << c.masked << " refined " << c.refined;
}

// The case at other widths, the n-th of them.
inline Case at_width(Case c, int n) {
  constexpr int kBits[] = {2, 3, 6, 8};
  c.key.bits = kBits[n % 4];
  c.value.bits = kBits[(n / 4 + n + 1) % 4];
  c.key.levels = c.value.levels = LevelKind::lloyd_max;
  return c;
}
// The case by a trellis: keys, values or both, the n-th choice.
inline Case by_trellis(Case c, int n) {
  for (Side* side : {&c.key, &c.value}) {
    if (n % 3 == (side == &c.key ? 1 : 2)) continue;
    side->levels = LevelKind::trellis;
    side->bits = side == &c.key ? 2 + n / 3 % 3 : 4 - n % 3;
    side->scale = ScaleRule::least_squares;
  }
  return c;
}
inline Case refined(Case c, int rows) {
  c.refined = rows;
  return c;
}

struct Inputs {
  PageSpec spec;
  std::vector<std::uint8_t> skip;
  std::vector<float> lambda_k, lambda_v;
  std::vector<float> raw_k, raw_v;
  std::unique_ptr<Rows> k, v;

  explicit Inputs(const Case& c) : spec(make_page(c.key, c.value, c.refined)), skip(kPageTokens, 0) {
    if (c.masked) {
      cases::Random random(7);
      for (auto& s : skip) s = random.below(3) == 0;
      skip[0] = 1;
    }
    if (c.key.lambda) lambda_k = make_lambda(c.key.dim, 11);
    if (c.value.lambda) lambda_v = make_lambda(c.value.dim, 13);
    raw_k = c.sigma > 0 ? cases::normal_rows(kPageTokens, c.key.dim, 3, c.sigma)
                        : cases::key_rows(kPageTokens, c.key.dim, 3, c.bias);
    if (c.sigma > 0)
      for (float& x : raw_k) x += static_cast<float>(c.bias);
    raw_v = cases::normal_rows(kPageTokens, c.value.dim, 5);
    std::fill_n(raw_v.begin() + static_cast<std::ptrdiff_t>(9) * c.value.dim, c.value.dim, 0.0f);  // a row of zeros
    k = std::make_unique<Rows>(raw_k, kPageTokens, c.key.dim, c.dtype, skip.data());
    v = std::make_unique<Rows>(raw_v, kPageTokens, c.value.dim, c.dtype, skip.data());
  }
  SealJob job(int first = 0, int count = kPageTokens) const {
    SealJob j;
    j.k = k->row(first);
    j.v = v->row(first);
    j.dtype = k->dtype;
    j.k_stride = k->stride;
    j.v_stride = v->stride;
    j.skip = skip.data() + first;
    j.lambda_k = lambda_k.empty() ? nullptr : lambda_k.data();
    j.lambda_v = lambda_v.empty() ? nullptr : lambda_v.data();
    j.first = static_cast<std::int16_t>(first);
    j.count = count;
    return j;
  }
  std::vector<std::uint16_t> mean(const std::uint8_t* slice) const {
    return spec.key.mean ? read_u16(slice + spec.layout.k_mean, spec.key.dim) : std::vector<std::uint16_t>{};
  }
};

}  // namespace kv4::seal_case
