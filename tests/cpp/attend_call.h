// An attention call with its storage, and error bounds of its outputs, derived from what the
// kernels round. Rounding errors are taken as independent and uniform; an output may be off by six
// standard deviations of their sum, plus a few ulps of float:
//   q'   to units of max|q'| / 32512 per group: score_j gets the deviation scale unit |s_j L_j| / sqrt(12),
//   p s  to units of max p max s / 32512 per page and group: each channel of the rotated output gets
//        unit |L| / sqrt(12),
//   float: 8 ulps of scale |q| |k_j| in a score, 4 ulps of sum p |v| in an output.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "attend_scene.h"
#include "backend/backend.h"
#include "cpu/isa.h"
#include "format/convert.h"
#include "guard.h"
#include "kv4/attention.h"
#include "kv4/cpu.h"

namespace kv4::scene {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUlp = 0x1p-23;

// Arguments of a call with the storage behind them.
struct Call {
  AttendArgs args;
  std::vector<std::uint8_t> q;
  std::vector<std::int32_t> start, window;
  std::vector<float> sinks;
  std::vector<std::uint8_t> mask;
  DType out_dtype = DType::f32;
  std::uint64_t seed = 7;

  Call(const Scene& s, std::int64_t queries, DType dtype = DType::f32, double sigma = 1.0) {
    const std::int64_t heads = s.shape().kv_heads * s.shape().group, d = s.shape().dim_k;
    cases::Random random(s.shape().seed + 99);
    // Physically [batch, T, heads, channels], with a gap after each head.
    args.q.dtype = dtype;
    args.q.shape = {s.batch(), heads, queries, d};
    args.q.stride = {queries * heads * (d + 1), d + 1, heads * (d + 1), 1};
    q.assign(static_cast<std::size_t>(s.batch() * args.q.stride[0]) * size_of(dtype), 0xff);
    args.q.data = q.data();
    for (std::int64_t b = 0; b < s.batch(); ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t t = 0; t < queries; ++t)
          for (std::int64_t c = 0; c < d; ++c) set_query(b, h, t, c, sigma * random.normal());
  }
  Call(Call&&) = delete;

  void set_query(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t c, double x) {
    std::uint8_t* at = q.data() + (b * args.q.stride[0] + h * args.q.stride[1] + t * args.q.stride[2] + c) *
                                      static_cast<std::int64_t>(size_of(args.q.dtype));
    const float f = static_cast<float>(x);
    if (args.q.dtype == DType::f32) {
      std::memcpy(at, &f, 4);
    } else {
      const bool half = args.q.dtype == DType::f16;
      // f32_to_f16 saturates, but infinity is needed here.
      const std::uint16_t h16 = half ? (std::isinf(f) ? 0x7c00 : f32_to_f16(f)) : f32_to_bf16(f);
      std::memcpy(at, &h16, 2);
    }
  }
  double query(std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t c) const {
    const std::uint8_t* at = static_cast<const std::uint8_t*>(args.q.at(b, h, t)) +
                             c * static_cast<std::int64_t>(size_of(args.q.dtype));
    if (args.q.dtype == DType::f32) {
      float f;
      std::memcpy(&f, at, 4);
      return f;
    }
    std::uint16_t h16;
    std::memcpy(&h16, at, 2);
    return args.q.dtype == DType::f16 ? f16_to_f32(h16) : bf16_to_f32(h16);
  }
  void starts(std::vector<std::int32_t> x) {
    start = std::move(x);
    args.mask.start = start.data();
  }
  void windows(std::vector<std::int32_t> x) {
    window = std::move(x);
    args.mask.window = window.data();
  }
  void with_sinks() {
    cases::Random random(seed);
    for (std::int64_t h = 0; h < args.q.shape[1]; ++h) sinks.push_back(static_cast<float>(random.normal() * 3));
    args.sinks = sinks.data();
  }
  // A random mask over `columns` columns; axes of size 1 broadcast. A fifth of the columns is hidden.
  void general(Mask::General kind, DType dtype, std::int64_t columns, bool per_head, bool per_query) {
    cases::Random random(seed);
    const std::int64_t heads = per_head ? args.q.shape[1] : 1, rows = per_query ? args.q.shape[2] : 1;
    const std::int64_t width = columns + 3;
    args.mask.kind = kind;
    args.mask.general_dtype = dtype;
    args.mask.columns = columns;
    args.mask.general_stride = {heads * rows * width, per_head ? rows * width : 0, per_query ? width : 0, 1};
    const std::size_t count = static_cast<std::size_t>(args.q.shape[0] * heads * rows * width);
    const std::size_t size = kind == Mask::General::boolean ? 1 : size_of(dtype);
    mask.assign(count * size, 0);
    for (std::size_t i = 0; i < count; ++i) {
      const bool hidden = random.below(5) == 0;
      const double hide = random.below(2) == 0 ? -kInfinity : dtype == DType::f16 ? -65504.0 : -3.38e38;
      const float x = static_cast<float>(hidden ? hide : random.normal());
      if (kind == Mask::General::boolean) {
        mask[i] = hidden ? 0 : 1;
      } else if (dtype == DType::f32) {
        std::memcpy(mask.data() + i * 4, &x, 4);
      } else {
        const std::uint16_t h = dtype == DType::f16 ? (std::isinf(x) ? 0xfc00 : f32_to_f16(x)) : f32_to_bf16(x);
        std::memcpy(mask.data() + i * 2, &h, 2);
      }
    }
    args.mask.general = mask.data();
  }
  double scale() const { return args.scale != 0 ? args.scale : 1 / std::sqrt(static_cast<double>(args.q.shape[3])); }
};

// A device's rounding: relative error of queries and weights at exact rows; at pages the number of steps in the largest
// channel of a query and in a page's largest weight times its largest value scale, and the relative error of weights.
struct Rounding {
  double query = 0, weight = 0;
  double page_queries = 32512, page_weights = 32512, page_weight = 0;
  double weight_variance = 1.0 / 12;  // of a page's weight, in steps squared
};
// Of queries and weights as bytes (kv4/cpu.h). A weight's fraction f is compared with a fixed number between 0 and 1:
// the deviation is that of a coin which falls up with probability f, at most 1/4.
constexpr Rounding kBytes{.page_queries = 127, .page_weights = 255, .weight_variance = 0.25};

// Bounds of |error| of every output, [batch, q_heads, T, head_dim_v].
inline std::vector<double> bounds(const Scene& s, const Call& call, const std::vector<reference::DenseTokens>& dense,
                                  const reference::Attention& expected, const Rounding& rounds = {}) {
  const int heads = s.shape().kv_heads * s.shape().group, dk = s.shape().dim_k, dv = s.shape().dim_v;
  const std::int64_t queries = call.args.q.shape[2];
  std::vector<double> inverse;
  if (s.spec().key.rotation) inverse = s.spec().key.rotation->inverse_f64();
  std::vector<double> all;
  std::size_t weight_row = 0, row = 0;
  for (int b = 0; b < s.batch(); ++b) {
    const reference::DenseTokens& tokens = dense[static_cast<std::size_t>(b)];
    const std::size_t count = tokens.position.size();
    const std::vector<SequenceView> views = s.views(queries);
    const std::size_t paged = static_cast<std::size_t>(s.steps(b).first_token);
    const SequenceView& view = views[static_cast<std::size_t>(b)];
    const std::size_t page_tokens =
        view.page_count == 0 ? 0
                             : static_cast<std::size_t>((view.page_count - 1) * kPageTokens + view.last_page_tokens);
    for (int h = 0; h < heads; ++h) {
      const int kv = h / s.shape().group;
      const double* k = tokens.k[static_cast<std::size_t>(kv)].data();
      const double* v = tokens.v[static_cast<std::size_t>(kv)].data();
      for (std::int64_t t = 0; t < queries; ++t, ++row) {
        const double* p = expected.weights.data() + weight_row;
        weight_row += count;
        std::vector<double> scaled(static_cast<std::size_t>(dk)), unit;
        double q_norm = 0;
        for (int c = 0; c < dk; ++c) {
          const double x = call.query(b, h, t, c) / (s.lambda_k(kv) != nullptr ? s.lambda_k(kv)[c] : 1.0f);
          scaled[static_cast<std::size_t>(c)] = x;
          q_norm += x * x;
        }
        q_norm = std::sqrt(q_norm);
        if (page_tokens > 0) {
          unit.assign(static_cast<std::size_t>(s.spec().key.groups), 0.0);
          for (int i = 0; i < dk; ++i) {
            double x = 0;
            for (int c = 0; c < dk; ++c)
              x += inverse[static_cast<std::size_t>(c * dk + i)] * scaled[static_cast<std::size_t>(c)];
            double& u = unit[static_cast<std::size_t>(i / s.spec().key.group)];
            u = std::max(u, std::abs(x) / rounds.page_queries);
          }
        }
        std::vector<double> sigma(count, 0.0), ulps(count, 0.0);
        double rounded_weights = 0;
        for (std::size_t j = 0; j < count; ++j) {
          double norm = 0;
          for (int c = 0; c < dk; ++c) {
            const double x = k[j * static_cast<std::size_t>(dk) + static_cast<std::size_t>(c)] *
                             (s.lambda_k(kv) != nullptr ? s.lambda_k(kv)[c] : 1.0f);
            norm += x * x;
          }
          ulps[j] = 8 * kUlp * (1 + call.scale() * q_norm * std::sqrt(norm));
          if (j < paged || j >= paged + page_tokens) {
            sigma[j] = call.scale() * rounds.query * q_norm * std::sqrt(norm);
            continue;
          }
          double variance = 0;
          for (int g = 0; g < s.spec().key.groups; ++g) {
            const double x =
                unit[static_cast<std::size_t>(g)] *
                s.steps(b).key_norm[static_cast<std::size_t>(
                    kv)][(j - paged) * static_cast<std::size_t>(s.spec().key.groups) + static_cast<std::size_t>(g)];
            variance += x * x / 12;
          }
          sigma[j] = call.scale() * std::sqrt(variance);
        }
        for (std::size_t first = 0; first < page_tokens; first += kPageTokens) {
          double largest = 0, largest_scale = 0, used = 0;
          for (std::size_t j = first; j < std::min<std::size_t>(first + kPageTokens, page_tokens); ++j) {
            used += p[paged + j] > 0;
            largest = std::max(largest, p[paged + j]);
            for (int g = 0; g < s.spec().value.groups; ++g)
              largest_scale =
                  std::max(largest_scale,
                           s.steps(b).value_scale[static_cast<std::size_t>(
                               kv)][j * static_cast<std::size_t>(s.spec().value.groups) + static_cast<std::size_t>(g)]);
          }
          const Levels& levels = s.spec().value.levels;
          const double step = largest * largest_scale / rounds.page_weights * (levels.bits == 8 ? 128 : levels.top());
          rounded_weights += step * step * rounds.weight_variance * used;
        }
        for (int c = 0; c < dv; ++c) {
          const double out = expected.out[row * static_cast<std::size_t>(dv) + static_cast<std::size_t>(c)];
          double variance = rounded_weights, rounding = 0, magnitude = 0;
          if (s.lambda_v(kv) != nullptr) variance /= s.lambda_v(kv)[c] * s.lambda_v(kv)[c];
          for (std::size_t j = 0; j < count; ++j) {
            const double value = v[j * static_cast<std::size_t>(dv) + static_cast<std::size_t>(c)];
            const double move = p[j] * std::abs(value - out);
            variance += move * move * sigma[j] * sigma[j];
            rounding += move * ulps[j];
            magnitude += p[j] * std::abs(value);
            const bool exact = j < paged || j >= paged + page_tokens;
            variance += std::pow(p[j] * (exact ? rounds.weight : rounds.page_weight) * value, 2);
          }
          all.push_back(6 * std::sqrt(variance) + rounding + 4 * kUlp * magnitude);
        }
      }
    }
  }
  return all;
}

// Expects every output within its bound plus its dtype's rounding. A miss is a fatal failure.
inline void expect_within(const Scene& s, const Call& call, const std::vector<double>& out,
                          const reference::Attention& expected, const std::vector<double>& bound) {
  const double half = call.out_dtype == DType::f32 ? 0x1p-24 : call.out_dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const std::size_t dv = static_cast<std::size_t>(s.shape().dim_v);
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double allowed = bound[i] + half * std::abs(expected.out[i]) + 0x1p-25;
    const double used = std::abs(out[i] - expected.out[i]) / allowed;
    if (!(used <= worst)) {
      worst = used;
      at = i;
    }
    if (used != used) break;
  }
  ASSERT_LE(worst, 1.0) << "row " << at / dv << " channel " << at % dv << ": " << out[at] << " for " << expected.out[at]
                        << ", bound " << bound[at];
}

// check(scene, call) of every token count of the case list.
template <class Check>
void every_token_count(Check check) {
  std::uint64_t seed = 1000;
  for (int n : cases::kTokens) {
    SCOPED_TRACE(std::to_string(n) + " tokens");
    Shape shape;
    shape.dim_k = shape.dim_v = 64;
    shape.group = 2;
    shape.kv_heads = n > 1000 ? 1 : 2;
    shape.seed = seed++;
    const Scene s(shape, {Held::of(n)});
    Call call(s, 1, DType::bf16);
    call.out_dtype = static_cast<DType>(seed % 3);
    check(s, call);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

class Attend : public ::testing::Test {
 protected:
  void SetUp() override {
    isa_ = cpu::active_isa();
    threads_ = cpu::num_threads();
    bits_ = cpu::operand_bits();
    ASSERT_TRUE(cpu::set_operand_bits(16).ok());
  }
  void TearDown() override {
    EXPECT_TRUE(cpu::force_isa(isa_).ok());
    EXPECT_TRUE(cpu::set_num_threads(threads_).ok());
    EXPECT_TRUE(cpu::set_operand_bits(bits_).ok());
  }

  template <class F>
  static void every_isa(F f) {
    for (const std::string& isa : cpu::compiled_isas()) {
      if (!cpu::supported(isa)) continue;
      SCOPED_TRACE(isa);
      ASSERT_TRUE(cpu::force_isa(isa).ok());
      f();
      if (::testing::Test::HasFatalFailure()) return;
    }
  }

  // Output of one call: physically [batch, T, heads, dim_v + 2], the gap and both ends guarded.
  static std::vector<double> run(const Scene& s, const Call& call, Status* status) {
    const std::int64_t heads = call.args.q.shape[1], queries = call.args.q.shape[2], dv = s.shape().dim_v;
    const std::int64_t width = dv + 2, size = static_cast<std::int64_t>(size_of(call.out_dtype));
    tests::Guarded buffer(static_cast<std::size_t>(s.batch() * queries * heads * width * size));
    const std::vector<SequenceView> views = s.views(queries);
    AttendJob job = s.job(call.args, views);
    job.out.data = buffer.data();
    job.out.dtype = call.out_dtype;
    job.out.shape = {s.batch(), heads, queries, dv};
    job.out.stride = {queries * heads * width, width, heads * width, 1};
    *status = find_backend("cpu")->attend(job);
    EXPECT_TRUE(buffer.intact());
    std::vector<double> out;
    for (std::int64_t b = 0; b < s.batch(); ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t t = 0; t < queries; ++t) {
          const std::uint8_t* row = static_cast<const std::uint8_t*>(job.out.at(b, h, t));
          for (std::int64_t c = 0; c < dv; ++c) {
            if (call.out_dtype == DType::f32) {
              float f;
              std::memcpy(&f, row + c * 4, 4);
              out.push_back(f);
            } else {
              std::uint16_t x;
              std::memcpy(&x, row + c * 2, 2);
              out.push_back(call.out_dtype == DType::f16 ? f16_to_f32(x) : bf16_to_f32(x));
            }
          }
          for (std::int64_t i = dv * size; i < width * size; ++i) EXPECT_EQ(row[i], tests::kGuard);
        }
    return out;
  }

  // Every instruction set, with operands of 16 bits and of 8 where it has them, on one thread and on three, which
  // splits the tokens of large calls.
  static void check(const Scene& s, const Call& call) {
    const std::vector<reference::DenseTokens> dense = s.dense();
    std::vector<std::int64_t> position;
    for (int b = 0; b < s.batch(); ++b) position.push_back(s.length(b) - call.args.q.shape[2]);
    const reference::Attention expected =
        reference::attend(call.args, s.shape().kv_heads, s.shape().dim_v, dense, position);
    const std::vector<double> fine = bounds(s, call, dense, expected),
                              of_bytes = bounds(s, call, dense, expected, kBytes);
    every_isa([&] {
      for (int bits : {16, 8}) {
        ASSERT_TRUE(cpu::set_operand_bits(bits).ok());
        const bool bytes = cpu::takes_bytes(cpu::active(), s.spec());
        if (bits == 8 && !bytes) continue;
        for (int threads : {1, 3}) {
          SCOPED_TRACE(std::to_string(threads) + " threads, " + std::to_string(bits) + " bits");
          ASSERT_TRUE(cpu::set_num_threads(threads).ok());
          Status status;
          const std::vector<double> out = run(s, call, &status);
          ASSERT_TRUE(status.ok()) << status.message();
          ASSERT_NO_FATAL_FAILURE(expect_within(s, call, out, expected, bytes ? of_bytes : fine));
        }
      }
      ASSERT_TRUE(cpu::set_operand_bits(16).ok());
    });
  }

 private:
  std::string isa_;
  int threads_ = 1, bits_ = 8;
};

}  // namespace kv4::scene
