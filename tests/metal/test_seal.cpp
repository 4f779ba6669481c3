// Sealing and dequantising by the Metal kernels, emulated, against the float64 definition, by the CPU's rule of equality
// (seal_case.h).
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "device.h"
#include "metal/order.h"
#include "metal/tables.h"
#include "seal_cases.h"

namespace kv4 {
namespace {

using namespace seal_case;
using tests::Buffer;
using tests::Build;
using tests::Module;
using tests::on_metal;

constexpr std::uint32_t kThreads = KV4_ROW_THREADS;

// Seals tokens [first, first + count) of one side into `slice`.
void seal_side(const Module& m, const PageSpec& spec, const Inputs& in, bool values, int first, int count,
               std::vector<std::uint8_t>* slice, std::uint64_t seed) {
  const SideSpec& side = values ? spec.value : spec.key;
  const Rows& rows = values ? *in.v : *in.k;
  const std::vector<float>& weights = values ? in.lambda_v : in.lambda_k;
  const Buffer data = rows.dtype == DType::f32 ? Buffer(m, "rows", rows.f32) : Buffer(m, "rows", rows.f16);
  const Buffer skip(m, "skip", in.skip), lambda(m, "lambda", weights), matrix(m, "matrix", apple::sealing_matrix(*side.rotation));
  const Buffer pages(m, "pages", *slice, EMU_INOUT);
  const std::vector<std::int64_t> job = {first * rows.stride, first, 0, weights.empty() ? -1 : 0, first, count};
  const Buffer jobs(m, "jobs", job), table(m, "side", apple::side_table(spec, values, rows.dtype, rows.stride));
  const Buffer levels(m, "levels", apple::level_table(side));
  m.run("kv4_seal", {kThreads, 1, 1}, {kThreads, 1, 1},
        {data.data(), skip.data(), lambda.data(), matrix.data(), jobs.data(), table.data(), levels.data(), pages.data()}, seed);
  *slice = pages.read();
}

Codes codes_of(const PageSpec& spec, const std::vector<std::uint8_t>& slice) {
  std::vector<std::uint8_t> k(32u * static_cast<unsigned>(spec.key.dim)), v(32u * static_cast<unsigned>(spec.value.dim));
  apple::codes_to_canonical(spec, slice.data(), k.data(), v.data());
  return {reference::from_canonical(k.data(), kPageTokens, spec.key.dim), reference::from_canonical(v.data(), kPageTokens, spec.value.dim)};
}

void check(const Case& c, Build build, std::uint64_t seed) {
  SCOPED_TRACE(testing::Message() << name_of(build) << ": " << c);
  const Module& m = Module::get("seal", build);
  const Inputs in(c);
  const PageSpec spec = on_metal(in.spec);
  std::vector<std::uint8_t> slice(spec.layout.head_bytes, 0xcd);
  for (bool values : {false, true}) seal_side(m, spec, in, values, 0, kPageTokens, &slice, seed);
  const Codes codes = codes_of(spec, slice);
  check_side(spec.key, *in.k, in.skip.data(), {in.lambda_k.begin(), in.lambda_k.end()}, codes.key,
             read_u16(slice.data() + spec.layout.k_scales, kPageTokens),
             spec.key.mean ? read_u16(slice.data() + spec.layout.k_mean, spec.key.dim) : std::vector<std::uint16_t>{});
  check_side(spec.value, *in.v, in.skip.data(), {in.lambda_v.begin(), in.lambda_v.end()}, codes.value,
             read_u16(slice.data() + spec.layout.v_scales, kPageTokens), {});
}

// A case's check in a build, with a seed of its own for the order of lanes.
auto in(Build build) {
  return [build, seed = std::uint64_t{0}](const Case& c) mutable { check(c, build, seed++); };
}

TEST(MetalSeal, MatchesReference) { every_dim_and_rotation(1, in(Build::fast)); }
TEST(MetalSeal, MatchesReferenceChecked) { every_dim_and_rotation(7, in(Build::check)); }
TEST(MetalSeal, LargeKeyBias) { large_key_bias(in(Build::fast)); }

// A page filled in parts holds what one filled at once does.
TEST(MetalSeal, PartsOfAPage) {
  for (int d : {80, 128}) {
    Case c;
    c.key = {d, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, false, false};
    c.value.dim = d;
    c.dtype = DType::bf16;
    const Inputs in(c);
    const PageSpec spec = on_metal(in.spec);
    for (Build build : {Build::fast, Build::check}) {
      const Module& m = Module::get("seal", build);
      std::vector<std::uint8_t> whole(spec.layout.head_bytes, 0), parts(whole);
      for (bool values : {false, true}) {
        seal_side(m, spec, in, values, 0, kPageTokens, &whole, 3);
        int first = 0;
        for (int count : {1, 6, 25, 32}) {
          seal_side(m, spec, in, values, first, count, &parts, 5);
          first += count;
        }
      }
      EXPECT_EQ(whole, parts) << "d " << d;
    }
  }
}

TEST(MetalSeal, DequantisesAsDefined) {
  for (int d : cases::kHeadDims) {
    for (Build build : {Build::fast, Build::check}) {
      if (build == Build::check && d != 80) continue;
      Case c;
      c.key = {d, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, true, true};
      c.value = {d, RotationKind::srht, 0, LevelKind::uniform, ScaleRule::abs_max, false, true};
      c.dtype = DType::f16;
      const Inputs in(c);
      const PageSpec spec = on_metal(in.spec);
      const Module& m = Module::get("seal", build);
      std::vector<std::uint8_t> slice(spec.layout.head_bytes, 0);
      for (bool values : {false, true}) seal_side(m, spec, in, values, 0, kPageTokens, &slice, 0);
      const Codes codes = codes_of(spec, slice);
      const int first = 5, count = 51;
      for (bool values : {false, true}) {
        const SideSpec& s = values ? spec.value : spec.key;
        const std::vector<float>& weights = values ? in.lambda_v : in.lambda_k;
        const std::vector<double> lambda(weights.begin(), weights.end());
        const Buffer pages(m, "pages", slice), weight(m, "lambda", weights), matrix(m, "matrix", apple::output_matrix(*s.rotation));
        const Buffer jobs(m, "jobs", std::vector<std::int64_t>{3, -1, 0, 0, first, count});
        const Buffer table(m, "side", apple::side_table(spec, values, DType::f32, d + 2)), levels(m, "levels", apple::level_table(s));
        const Buffer out(m, "out", nullptr, static_cast<std::size_t>(3 + count * (d + 2)) * 4, EMU_OUTPUT);
        m.run("kv4_dequantise", {kThreads, kPageTokens, 1}, {kThreads, 1, 1},
              {pages.data(), weight.data(), matrix.data(), jobs.data(), table.data(), levels.data(), out.data()}, 11);
        const std::vector<std::uint16_t> scales = read_u16(slice.data() + (values ? spec.layout.v_scales : spec.layout.k_scales), kPageTokens);
        const std::vector<std::uint16_t> mean = read_u16(slice.data() + spec.layout.k_mean, d);
        const std::vector<double> expected = reference::dequantise(s, values ? codes.value.data() : codes.key.data(), scales.data(),
                                                                   values ? nullptr : mean.data(), kPageTokens, lambda.data());
        const std::vector<float> got = out.read<float>();
        for (int j = 0; j < count; ++j) {
          double norm = 0;
          const auto at = [&](int i) { return static_cast<std::size_t>((first + j) * d + i); };
          for (int i = 0; i < d; ++i) norm += std::pow(expected[at(i)] * lambda[static_cast<std::size_t>(i)], 2);
          // A sum of d products in float; their magnitudes sum to at most the row's norm times sqrt(d).
          for (int i = 0; i < d; ++i)
            ASSERT_NEAR(got[static_cast<std::size_t>(3 + j * (d + 2) + i)], expected[at(i)],
                        d * 0x1p-24 * std::sqrt(norm) / lambda[static_cast<std::size_t>(i)])
                << "d " << d << " values " << values << " token " << first + j << " channel " << i;
        }
      }
    }
  }
}

// Rows of any type and strides arrive in the cache's exact rows, and nothing else is written.
TEST(MetalAppend, CopiesStridedRows) {
  for (Build build : {Build::fast, Build::check}) {
    const Module& m = Module::get("seal", build);
    const std::int64_t batch = 2, heads = 3, tokens = 5, dim = 80;
    for (DType from : kEveryDType) {
      for (DType to : kEveryDType) {
        const std::vector<float> x = cases::normal_rows(batch * tokens * heads, static_cast<int>(dim), 9);
        std::vector<std::uint8_t> bytes(x.size() * size_of(from));
        std::vector<float> held(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) {
          const std::uint16_t h = from == DType::f16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
          held[i] = from == DType::f32 ? x[i] : from == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
          if (from == DType::f32) std::memcpy(bytes.data() + i * 4, &x[i], 4);
          else std::memcpy(bytes.data() + i * 2, &h, 2);
        }
        const std::int64_t room = 9, offset = 2 * (dim + 1);
        std::vector<std::uint8_t> target(static_cast<std::size_t>(batch * heads * room * (dim + 1)) * size_of(to), 0xa5);
        const Buffer source(m, "from", bytes), out(m, "to", target, EMU_INOUT);
        // Physically [batch, tokens, heads, dim] to [batch, heads, room, dim + 1], rows 2 and on.
        const Buffer table(m, "append", std::vector<std::int64_t>{batch, heads, tokens, dim, static_cast<std::int64_t>(from), tokens * heads * dim, dim,
                                                                  heads * dim, static_cast<std::int64_t>(to), offset, heads * room * (dim + 1),
                                                                  room * (dim + 1), dim + 1});
        m.run("kv4_append", {96, static_cast<std::uint32_t>(tokens), static_cast<std::uint32_t>(batch * heads)}, {32, 1, 1},
              {source.data(), out.data(), table.data()}, 4);
        const std::vector<std::uint8_t> got = out.read();
        for (std::int64_t b = 0; b < batch; ++b)
          for (std::int64_t h = 0; h < heads; ++h)
            for (std::int64_t j = 0; j < tokens; ++j)
              for (std::int64_t c = 0; c < dim; ++c) {
                const float value = held[static_cast<std::size_t>(((b * tokens + j) * heads + h) * dim + c)];
                const std::size_t at = static_cast<std::size_t>(offset + ((b * heads + h) * room + j) * (dim + 1) + c) * size_of(to);
                const std::uint16_t half = to == DType::f16 ? f32_to_f16(value) : f32_to_bf16(value);
                std::memcpy(target.data() + at, to == DType::f32 ? static_cast<const void*>(&value) : &half, size_of(to));
              }
        ASSERT_EQ(got, target) << name_of(from) << " to " << name_of(to);
      }
    }
  }
}

// The device's order of codes is a permutation of the canonical one.
TEST(MetalOrder, RoundTrips) {
  for (int d : cases::kHeadDims) {
    Case c;
    c.key.dim = c.value.dim = d;
    c.key.mean = true;
    const PageSpec spec = on_metal(make_page(c.key, c.value));
    cases::Random random(static_cast<std::uint64_t>(d));
    std::vector<std::uint8_t> k(32u * static_cast<unsigned>(d)), v(k.size()), k2(k.size()), v2(k.size()), slice(spec.layout.head_bytes);
    for (auto& x : k) x = static_cast<std::uint8_t>(random.bits());
    for (auto& x : v) x = static_cast<std::uint8_t>(random.bits());
    apple::codes_from_canonical(spec, k.data(), v.data(), slice.data());
    apple::codes_to_canonical(spec, slice.data(), k2.data(), v2.data());
    EXPECT_EQ(k, k2);
    EXPECT_EQ(v, v2);
  }
}

}  // namespace
}  // namespace kv4
