// Sealing and dequantising of every instruction set against the float64 definition.
// The rule of equality is that of seal_case.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <ostream>
#include <span>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "cpu/order.h"
#include "format/convert.h"
#include "guard.h"
#include "kv4/cpu.h"
#include "reference/seal.h"
#include "seal_case.h"

namespace kv4 {
namespace {

using namespace seal_case;
using tests::Guarded;

std::vector<const cpu::Kernels*> runnable() {
  std::vector<const cpu::Kernels*> all;
  for (const std::string& name : cpu::compiled_isas())
    if (cpu::supported(name)) all.push_back(cpu::find(name.c_str()));
  return all;
}

void run_seal(const cpu::Kernels& kernels, const PageSpec& spec, const SealJob& job, std::uint8_t* slice) {
  Guarded scratch(kernels.seal_scratch(spec));
  kernels.seal(spec, job, 0, slice, scratch.data());
  EXPECT_TRUE(scratch.intact());
}

Codes read_codes(const PageSpec& spec, const std::uint8_t* slice) {
  const int bits_k = spec.key.levels.bits, bits_v = spec.value.levels.bits;
  std::vector<std::uint8_t> k(8 * bits_k * spec.key.dim), v(8 * bits_v * spec.value.dim);
  cpu::codes_to_canonical(spec, slice, k.data(), v.data());
  return {reference::from_canonical(k.data(), kPageTokens, spec.key.dim, bits_k),
          reference::from_canonical(v.data(), kPageTokens, spec.value.dim, bits_v)};
}
// Padded channels hold code 0 in every plane.
void check_padding(const SideSpec& spec, const std::uint8_t* side, bool keys) {
  const int bits = spec.levels.bits, padded = cpu::pad_channels(spec.dim);
  for (int j = 0; j < kPageTokens; ++j) {
    for (int c = spec.dim; c < padded; ++c) {
      const auto place = [&](int plane) {
        return keys ? cpu::key_place(plane, j, c, padded) : cpu::value_place(plane, j, c);
      };
      const int first = cpu::first_plane(bits);
      const cpu::Nibble at = place(first);
      ASSERT_EQ(side[at.byte] >> at.shift & ((1 << first) - 1), 0);
      if (bits == first) continue;
      const cpu::Nibble more = place(bits - first);
      ASSERT_EQ(side[cpu::second_plane(bits, padded) + more.byte] >> more.shift & ((1 << (bits - first)) - 1), 0);
    }
  }
}
void check_padding(const PageSpec& spec, const std::uint8_t* slice) {
  check_padding(spec.key, slice + spec.layout.k_codes, true);
  check_padding(spec.value, slice + spec.layout.v_codes, false);
}

void check_case(const Case& c) {
  const Inputs in(c);
  for (const cpu::Kernels* kernels : runnable()) {
    SCOPED_TRACE(testing::Message() << kernels->name << ": " << c);
    Guarded slice(in.spec.layout.head_bytes);
    run_seal(*kernels, in.spec, in.job(), slice.data());
    ASSERT_TRUE(slice.intact());
    const Codes codes = read_codes(in.spec, slice.data());
    const kv4_page_layout& at = in.spec.layout;
    check_padding(in.spec, slice.data());
    check_side(in.spec.key, *in.k, in.skip.data(), {in.lambda_k.begin(), in.lambda_k.end()}, codes.key,
               read_u16(slice.data() + at.k_scales, in.spec.key.groups * kPageTokens), in.mean(slice.data()));
    check_side(in.spec.value, *in.v, in.skip.data(), {in.lambda_v.begin(), in.lambda_v.end()}, codes.value,
               read_u16(slice.data() + at.v_scales, in.spec.value.groups * kPageTokens), {});
    check_second(in.spec, *in.k, *in.v, in.skip.data(), {in.lambda_k.begin(), in.lambda_k.end()}, codes.key,
                 slice.data());
    if (testing::Test::HasFatalFailure()) return;
  }
}

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr RotationKind kRotations[] = {RotationKind::identity, RotationKind::srft, RotationKind::srht,
                                       RotationKind::householder, RotationKind::dense};

// One test for each head dim, so that they run side by side and emulation.txt can leave some out.
constexpr int kSealDims[] = {32, 34, 46, 64, 80, 96, 128, 256, 512};
constexpr int kDequantiseDims[] = {34, 46, 64, 80, 96, 128, 256};
class SealDims : public ::testing::TestWithParam<int> {};
class SealHeadDims : public ::testing::TestWithParam<int> {};
class DequantiseDims : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, SealDims, ::testing::ValuesIn(kSealDims), ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(All, SealHeadDims, ::testing::ValuesIn(cases::kHeadDims), ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(All, DequantiseDims, ::testing::ValuesIn(kDequantiseDims),
                         ::testing::PrintToStringParamName());

int index_of(std::span<const int> list, int value) {
  return static_cast<int>(std::find(list.begin(), list.end(), value) - list.begin());
}

TEST_P(SealDims, MatchesReference) {
  const int d = GetParam();
  int n = 20 * index_of(kSealDims, d);
  for (RotationKind rotation : kRotations) {
    for (int repeat = 0; repeat < (d == 512 ? 1 : 4); ++repeat, ++n) {
      Case c;
      const int groups[] = {0, 32, 64, 128};
      const auto group = [&](int g) { return d % (g == 0 ? d : g) == 0 ? g : 0; };
      c.key = {d,
               rotation,
               group(groups[repeat]),
               n % 3 == 0 ? LevelKind::uniform : LevelKind::lloyd_max,
               n % 5 < 2 ? ScaleRule::abs_max : ScaleRule::least_squares,
               repeat != 1,
               repeat % 2 == 0};
      c.value = {d == 34 ? 80 : d,
                 rotation,
                 d == 34 ? 0 : group(groups[3 - repeat]),
                 n % 4 == 1 ? LevelKind::uniform : LevelKind::lloyd_max,
                 n % 7 < 2 ? ScaleRule::abs_max : ScaleRule::least_squares,
                 false,
                 repeat == 3};
      c.dtype = kDTypes[(n + n / 4) % 3];
      c.masked = n % 3 == 1;
      c.bias = n % 2 == 0 ? 20 : 350;
      check_case(refined(c, n / 2 % 3));
      check_case(refined(at_width(c, n), (n + 1) % 3));
      check_case(refined(by_trellis(c, n), n % 3));
      if (HasFatalFailure()) return;
    }
  }
}

// A common bias far above the spread costs no accuracy, since it goes into the mean.
TEST_P(SealHeadDims, LargeKeyBias) {
  const int d = GetParam();
  int n = 12 * index_of(cases::kHeadDims, d);
  for (double sigma : {0.01, 0.1, 1.0, 10.0}) {
    for (DType dtype : kDTypes) {
      Case c;
      c.key = {d,
               d == 96   ? RotationKind::householder
               : d == 80 ? RotationKind::srht
                         : RotationKind::srft,
               0,
               LevelKind::lloyd_max,
               ScaleRule::least_squares,
               true,
               true};
      c.value.dim = d;
      c.dtype = dtype;
      c.bias = 350;
      c.sigma = sigma;
      check_case(refined(c, n % 2));
      check_case(refined(at_width(c, n), 1 + n % 2));
      check_case(refined(by_trellis(c, n), n % 2));
      ++n;
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Seal, MaskedRowsReachNothing) {
  for (int d : {46, 128}) {
    Case c;
    c.key = {d, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, true, true};
    c.value.dim = d;
    for (int n = 0; n < 9; ++n) {
      const DType dtype = kDTypes[n % 3];
      c.dtype = dtype;
      c.masked = true;
      const bool trellis = n >= 6;
      const Inputs in(refined(trellis ? by_trellis(c, n) : n < 3 ? c : at_width(c, n + (d == 46 ? 1 : 0)), n % 3));
      const int zero_k = in.spec.key.levels.half(), zero_v = in.spec.value.levels.half();
      for (const cpu::Kernels* kernels : runnable()) {
        SCOPED_TRACE(kernels->name);
        Guarded a(in.spec.layout.head_bytes), b(in.spec.layout.head_bytes);
        run_seal(*kernels, in.spec, in.job(), a.data());
        // The same page, the masked rows being numbers instead of NaN.
        const Rows k(in.raw_k, kPageTokens, d, dtype, nullptr), v(in.raw_v, kPageTokens, d, dtype, nullptr);
        SealJob job = in.job();
        job.k = k.row(0);
        job.v = v.row(0);
        run_seal(*kernels, in.spec, job, b.data());
        EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size()), 0);
        const Codes codes = read_codes(in.spec, a.data());
        for (int j = 0; j < kPageTokens; ++j) {
          if (in.skip[j] == 0) continue;
          EXPECT_EQ(read_u16(a.data() + in.spec.layout.k_scales + 2 * j, 1)[0], 0);
          EXPECT_EQ(read_u16(a.data() + in.spec.layout.v_scales + 2 * j, 1)[0], 0);
          for (int i = 0; i < d && !trellis; ++i)
            ASSERT_TRUE(codes.key[j * d + i] == zero_k && codes.value[j * d + i] == zero_v);
        }
        // Nothing but masked rows: mean, scales and codes of zero.
        SealJob none = in.job();
        const std::vector<std::uint8_t> all(kPageTokens, 1);
        none.skip = all.data();
        run_seal(*kernels, in.spec, none, a.data());
        for (std::uint16_t m : in.mean(a.data())) EXPECT_EQ(m & 0x7fff, 0);
        check_second(in.spec, *in.k, *in.v, all.data(), {in.lambda_k.begin(), in.lambda_k.end()},
                     read_codes(in.spec, a.data()).key, a.data());
        // One that is not.
        std::vector<std::uint8_t> one = all;
        one[17] = in.skip[17] == 0 ? 0 : 1;
        one[18] = in.skip[18] == 0 && one[17] != 0 ? 0 : 1;
        none.skip = one.data();
        run_seal(*kernels, in.spec, none, a.data());
        check_second(in.spec, *in.k, *in.v, one.data(), {in.lambda_k.begin(), in.lambda_k.end()},
                     read_codes(in.spec, a.data()).key, a.data());
        // Hidden rows are masked ones at the front.
        SealJob front = in.job(), hidden = front;
        std::vector<std::uint8_t> flags = in.skip;
        std::fill_n(flags.begin(), 5, std::uint8_t{1});
        front.skip = flags.data();
        hidden.hidden = 5;
        run_seal(*kernels, in.spec, front, a.data());
        run_seal(*kernels, in.spec, hidden, b.data());
        EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size()), 0);
      }
    }
  }
}

// Sealing tokens singly or in pieces gives the same bytes as sealing a whole page, and leaves neighbours
// unchanged.
TEST(Seal, PiecesMakeTheWholePage) {
  for (int n = 0; n < 15; ++n) {
    const int d = std::array{34, 80, 128}[static_cast<std::size_t>(n % 3)];
    Case c;
    c.key = {d, RotationKind::srft, d == 128 ? 32 : 0, LevelKind::uniform, ScaleRule::abs_max, false, true};
    c.value = {d == 34 ? 46 : d, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, false, false};
    c.dtype = d == 80 ? DType::f16 : DType::f32;
    c.masked = d == 128;
    if (n >= 3) c = at_width(c, n);
    const Inputs in(c);
    for (const cpu::Kernels* kernels : runnable()) {
      SCOPED_TRACE(testing::Message() << kernels->name << ": " << c);
      Guarded whole(in.spec.layout.head_bytes);
      std::memset(whole.data(), 0, whole.size());
      run_seal(*kernels, in.spec, in.job(), whole.data());
      const std::vector<std::vector<int>> splits = {{1, 1, 62},     {63, 1},     {5, 20, 39},
                                                    {7, 9, 16, 32}, {33, 3, 28}, std::vector<int>(64, 1)};
      for (const std::vector<int>& split : splits) {
        Guarded pieces(in.spec.layout.head_bytes);
        std::memset(pieces.data(), 0, pieces.size());
        int first = 0;
        for (int count : split) {
          run_seal(*kernels, in.spec, in.job(first, count), pieces.data());
          first += count;
        }
        ASSERT_TRUE(pieces.intact());
        ASSERT_EQ(std::memcmp(whole.data(), pieces.data(), whole.size()), 0) << "pieces of " << split[0];
      }
      for (const auto& [first, count] : {std::pair{0, 1}, {3, 2}, {13, 30}, {40, 24}, {63, 1}}) {
        Guarded slice(in.spec.layout.head_bytes);  // every byte 0xa5
        const Codes before = read_codes(in.spec, slice.data());
        run_seal(*kernels, in.spec, in.job(first, count), slice.data());
        ASSERT_TRUE(slice.intact());
        const Codes after = read_codes(in.spec, slice.data()), expected = read_codes(in.spec, whole.data());
        const auto inside = [&, f = first, n = count](int j) { return j >= f && j < f + n; };
        for (std::size_t i = 0; i < after.key.size(); ++i)
          ASSERT_EQ(after.key[i], (inside(static_cast<int>(i) / d) ? expected : before).key[i]) << i;
        for (std::size_t i = 0; i < after.value.size(); ++i)
          ASSERT_EQ(after.value[i], (inside(static_cast<int>(i) / c.value.dim) ? expected : before).value[i]) << i;
        for (int g = 0; g < in.spec.key.groups; ++g) {
          for (int j = 0; j < kPageTokens; ++j) {
            const std::size_t at = in.spec.layout.k_scales + 2 * (g * kPageTokens + j);
            ASSERT_EQ(std::memcmp(slice.data() + at, (inside(j) ? whole.data() + at : Guarded(2).data()), 2), 0);
          }
        }
      }
    }
  }
}

// Magnitudes that fp16 scales cannot hold give scale 0 or the largest one, never NaN.
TEST(Seal, ExtremeMagnitudes) {
  for (float factor : {0.0f, 1e-42f, 1e-30f, 1e-12f, 1e7f, 1e20f, 1e30f}) {
    Case c;
    c.key = {64, RotationKind::srft, 32, LevelKind::lloyd_max, ScaleRule::least_squares, false, false};
    c.value = {64, RotationKind::srft, 0, LevelKind::uniform, ScaleRule::abs_max, false, false};
    Inputs in(c);
    for (float& x : in.k->f32) x *= factor;
    for (float& x : in.v->f32) x *= factor;
    for (const cpu::Kernels* kernels : runnable()) {
      SCOPED_TRACE(testing::Message() << kernels->name << " factor " << factor);
      Guarded slice(in.spec.layout.head_bytes);
      run_seal(*kernels, in.spec, in.job(), slice.data());
      for (std::uint16_t s : read_u16(slice.data() + in.spec.layout.k_scales, 2 * kPageTokens)) {
        if (factor < 1e-9f) ASSERT_EQ(s, 0);
        else if (factor > 1e8f) ASSERT_EQ(s, 0x7bff);
        else ASSERT_LE(s, 0x7bff);
      }
      for (std::uint16_t s : read_u16(slice.data() + in.spec.layout.v_scales, kPageTokens)) ASSERT_LE(s, 0x7bff);
    }
  }
}

struct Dequantised {
  std::vector<float> k, v;
};
Dequantised run_dequantise(const cpu::Kernels& kernels, const Inputs& in, const std::uint8_t* slice, int first,
                           int count) {
  const PageSpec& spec = in.spec;
  Guarded scratch(kernels.dequantise_scratch(spec));
  Guarded k(4u * count * spec.key.dim), v(4u * count * spec.value.dim);
  const float* lk = in.lambda_k.empty() ? nullptr : in.lambda_k.data();
  const float* lv = in.lambda_v.empty() ? nullptr : in.lambda_v.data();
  float* const kp = reinterpret_cast<float*>(k.data());
  float* const vp = reinterpret_cast<float*>(v.data());
  // Keys and values separately, then together: the same rows.
  kernels.dequantise(spec, slice, lk, lv, first, count, kp, nullptr, scratch.data());
  kernels.dequantise(spec, slice, lk, lv, first, count, nullptr, vp, scratch.data());
  Dequantised out{{kp, kp + count * spec.key.dim}, {vp, vp + count * spec.value.dim}};
  kernels.dequantise(spec, slice, lk, lv, first, count, kp, vp, scratch.data());
  EXPECT_EQ(std::memcmp(out.k.data(), kp, k.size()), 0);
  EXPECT_EQ(std::memcmp(out.v.data(), vp, v.size()), 0);
  EXPECT_TRUE(scratch.intact() && k.intact() && v.intact());
  return out;
}

// Against the same codes in float64. The float error of R^-1 x is at most d roundings of numbers no
// larger than |x| (orthonormal) or sum |R^-1_ci| |x_i| (dense).
void check_dequantised(const SideSpec& spec, const std::vector<std::uint8_t>& codes,
                       const std::vector<std::uint16_t>& scales, const std::vector<std::uint16_t>& mean,
                       const std::vector<double>& lambda, int first, int count, const std::vector<float>& got,
                       const reference::SecondRows* second = nullptr) {
  const int d = spec.dim;
  const std::vector<double> want = reference::dequantise(spec, codes.data(), scales.data(),
                                                         mean.empty() ? nullptr : mean.data(), kPageTokens,
                                                         lambda.empty() ? nullptr : lambda.data(), second);
  const std::vector<double> inverse = spec.rotation->inverse_f64();
  const std::vector<double> level = reference::levels_of(spec, spec.levels, codes.data(), kPageTokens);
  std::vector<double> x(d);
  for (int j = first; j < first + count; ++j) {
    double norm = 0;
    for (int i = 0; i < d; ++i) {
      x[i] = f16_to_f32(scales[static_cast<std::size_t>(i / spec.group) * kPageTokens + j]) *
             level[static_cast<std::size_t>(j) * d + i];
      if (!mean.empty()) x[i] += f16_to_f32(mean[i]);
      norm += x[i] * x[i];
    }
    norm = std::sqrt(norm);
    for (int c = 0; c < d; ++c) {
      double size = norm;
      for (int i = 0; i < d; ++i) size += std::abs(inverse[static_cast<std::size_t>(c) * d + i] * x[i]);
      const double bound = d * 0x1p-24 * size / (lambda.empty() ? 1.0 : lambda[c]);
      ASSERT_LE(std::abs(got[static_cast<std::size_t>(j - first) * d + c] - want[static_cast<std::size_t>(j) * d + c]),
                bound)
          << "token " << j << " channel " << c;
    }
  }
}

// The format's promise, in the basis that was quantised: x lies within half the gap next to its code,
// plus what lies beyond the outermost level, plus the level's share of the scale's change by the fit.
void check_error(const SideSpec& spec, const reference::Sealed& r, const std::vector<std::uint8_t>& codes,
                 const std::vector<std::uint16_t>& scales, const std::vector<std::uint16_t>& mean,
                 const std::vector<double>& lambda, const std::vector<float>& got,
                 const reference::SecondRows& second = {}) {
  if (spec.levels.is_trellis()) return;  // what a path promises is about all its values together: check_paths
  const int d = spec.dim;
  const std::vector<double> rotation = spec.rotation->matrix_f64();
  const int lowest = spec.levels.negative_base == spec.levels.half() ? 1 : 0;
  for (int j = 0; j < kPageTokens; ++j) {
    if (std::find(second.places.begin(), second.places.end(), j) != second.places.end()) continue;
    for (int i = 0; i < d; ++i) {
      double x = mean.empty() ? 0.0 : -f16_to_f32(mean[i]), size = std::abs(x);
      for (int c = 0; c < d; ++c) {
        const double term = rotation[static_cast<std::size_t>(i) * d + c] * (lambda.empty() ? 1.0 : lambda[c]) *
                            got[static_cast<std::size_t>(j) * d + c];
        x += term;
        size += std::abs(term);
      }
      const std::size_t s = static_cast<std::size_t>(i / spec.group) * kPageTokens + j;
      const int code = codes[static_cast<std::size_t>(j) * d + i];
      const double level = spec.levels.table[code], step = r.step[s];
      const double exact = r.x[static_cast<std::size_t>(j) * d + i];
      const double gap = std::max(code + 1 < spec.levels.count() ? spec.levels.table[code + 1] - level : 0.0,
                                  code > lowest ? level - spec.levels.table[code - 1] : 0.0);
      const double beyond = std::max(0.0, std::abs(exact) - step * spec.levels.top());
      const double fit = std::abs(f16_to_f32(scales[s]) - step) * std::abs(level);
      const double bound = step * gap * (0.5 + kBoundary) + beyond + fit + d * 0x1p-24 * size;
      ASSERT_LE(std::abs(x - exact), bound) << "token " << j << " channel " << i;
    }
  }
}

// The same promise of second rows, about what the first ones leave; and the least squares leave less than there was.
void check_second_error(const PageSpec& spec, const reference::Sealed& r, const std::vector<std::uint8_t>& codes,
                        const std::vector<std::uint16_t>& scales, const std::vector<std::uint16_t>& mean,
                        const std::vector<double>& lambda, const reference::SecondRows& second,
                        const std::vector<float>& got) {
  const int d = spec.key.dim, groups = spec.key.groups;
  const Levels& levels = spec.second_levels;
  const std::vector<double> rotation = spec.key.rotation->matrix_f64();
  const reference::Sealed want =
      reference::second_rows(spec.key, levels, r, codes.data(), scales.data(), second.places);
  for (int row = 0; row < want.tokens; ++row) {
    const int j = second.places[static_cast<std::size_t>(row)];
    double before = 0, after = 0;
    for (int i = 0; i < d; ++i) {
      double x = mean.empty() ? 0.0 : -f16_to_f32(mean[i]), size = std::abs(x);
      for (int c = 0; c < d; ++c) {
        const double term = rotation[static_cast<std::size_t>(i * d + c)] * (lambda.empty() ? 1.0 : lambda[c]) *
                            got[static_cast<std::size_t>(j * d + c)];
        x += term;
        size += std::abs(term);
      }
      const std::size_t at = static_cast<std::size_t>(row * d + i);
      const int g = i / spec.key.group, code = second.codes[at];
      const double left = want.x[at], step = want.step[static_cast<std::size_t>(g * want.tokens + row)];
      const double level = levels.table[code], lowest = levels.negative_base == levels.half() ? 1 : 0;
      const double gap = std::max(code + 1 < levels.count() ? levels.table[code + 1] - level : 0.0,
                                  code > lowest ? level - levels.table[code - 1] : 0.0);
      const double boundary = kBoundary * r.step[static_cast<std::size_t>(g * kPageTokens + j)] *
                              least_gap(spec.key.levels);
      const double fit = std::abs(f16_to_f32(second.scales[static_cast<std::size_t>(row * groups + g)]) - step);
      const double bound = step * gap * (0.5 + kBoundary) + boundary +
                           std::max(0.0, std::abs(left) - step * levels.top()) + fit * std::abs(level) +
                           d * 0x1p-24 * size;
      const double error = x - r.x[static_cast<std::size_t>(j * d + i)];
      ASSERT_LE(std::abs(error), bound) << "token " << j << " channel " << i;
      before += left * left;
      after += error * error;
    }
    if (spec.key.scale == ScaleRule::least_squares) {
      ASSERT_LT(after, before) << "token " << j;
    }
  }
}

TEST_P(DequantiseDims, ErrorsStayWithinTheFormat) {
  const int d = GetParam();
  int n = 5 * index_of(kDequantiseDims, d);
  for (RotationKind rotation : kRotations) {
    ++n;
    Case c;
    c.key = {d,
             rotation,
             d % 32 == 0 && n % 2 == 0 ? 32 : 0,
             n % 3 == 0 ? LevelKind::uniform : LevelKind::lloyd_max,
             n % 4 == 0 ? ScaleRule::abs_max : ScaleRule::least_squares,
             n % 5 != 0,
             n % 2 == 1};
    c.value = {d, rotation, 0, LevelKind::lloyd_max, ScaleRule::least_squares, false, n % 3 == 1};
    c.dtype = kDTypes[n % 3];
    for (const Case& width : {refined(c, n % 3), at_width(c, n), refined(at_width(c, n + 2), 1 + n % 2),
                              refined(by_trellis(c, n), n % 2)}) {
      c = width;
      const Inputs in(c);
      const kv4_page_layout& at = in.spec.layout;
      const std::vector<double> lk(in.lambda_k.begin(), in.lambda_k.end()), lv(in.lambda_v.begin(), in.lambda_v.end());
      for (const cpu::Kernels* kernels : runnable()) {
        SCOPED_TRACE(testing::Message() << kernels->name << ": " << c);
        Guarded slice(at.head_bytes);
        run_seal(*kernels, in.spec, in.job(), slice.data());
        const Codes codes = read_codes(in.spec, slice.data());
        const auto ks = read_u16(slice.data() + at.k_scales, in.spec.key.groups * kPageTokens);
        const auto vs = read_u16(slice.data() + at.v_scales, in.spec.value.groups * kPageTokens);
        const auto mean = in.mean(slice.data());
        const reference::SecondRows second = reference::read_second_rows(in.spec, slice.data());
        const Dequantised all = run_dequantise(*kernels, in, slice.data(), 0, kPageTokens);
        check_dequantised(in.spec.key, codes.key, ks, mean, lk, 0, kPageTokens, all.k, &second);
        check_dequantised(in.spec.value, codes.value, vs, {}, lv, 0, kPageTokens, all.v);
        if (HasFatalFailure()) return;
        for (const auto& [first, count] : {std::pair{0, 1}, {3, 2}, {13, 30}, {40, 24}, {63, 1}}) {
          const Dequantised part = run_dequantise(*kernels, in, slice.data(), first, count);
          EXPECT_TRUE(std::equal(part.k.begin(), part.k.end(), all.k.begin() + first * d));
          EXPECT_TRUE(std::equal(part.v.begin(), part.v.end(), all.v.begin() + first * d));
        }
        const auto rk = reference::seal(in.spec.key, in.k->exact.data(), kPageTokens, nullptr,
                                        lk.empty() ? nullptr : lk.data(), mean.empty() ? nullptr : mean.data());
        const auto rv =
            reference::seal(in.spec.value, in.v->exact.data(), kPageTokens, nullptr, lv.empty() ? nullptr : lv.data());
        check_error(in.spec.key, rk, codes.key, ks, mean, lk, all.k, second);
        check_second_error(in.spec, rk, codes.key, ks, mean, lk, second, all.k);
        check_error(in.spec.value, rv, codes.value, vs, {}, lv, all.v);
        if (HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace kv4
