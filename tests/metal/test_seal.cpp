// Sealing and dequantising by the Metal kernels, emulated, against the float64 definition, by the CPU's rule of
// equality (seal_case.h).
#include <gtest/gtest.h>

#include <algorithm>
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

// Pages with two identical heads, in one array or in chunks of one page.
struct Pool {
  static constexpr int kPages = 3, kHeads = 2;
  explicit Pool(const PageSpec& spec, bool chunks = false) : head_bytes(spec.layout.head_bytes) {
    PageMemory memory;
    memory.head_stride = static_cast<std::int64_t>(head_bytes);
    memory.page_stride = kHeads * memory.head_stride;
    bytes.assign(kPages * kHeads * head_bytes, 0xcd);
    for (std::int64_t i = 0; i < kPages && chunks; ++i) at.push_back((i + 1) % kPages * memory.page_stride);
    places = apple::page_table(memory, at);
  }
  // The slices of page `id` hold the same bytes, and no other page was written.
  std::vector<std::uint8_t> slice(std::size_t id) const {
    const std::size_t page = at.empty() ? id * kHeads * head_bytes : static_cast<std::size_t>(at[id]);
    const auto from = bytes.begin() + static_cast<std::ptrdiff_t>(page);
    const std::vector<std::uint8_t> first(from, from + static_cast<std::ptrdiff_t>(head_bytes));
    EXPECT_TRUE(std::equal(first.begin(), first.end(), from + static_cast<std::ptrdiff_t>(head_bytes))) << "heads";
    const auto untouched = [&](std::size_t begin, std::size_t end) {
      EXPECT_EQ(std::count(bytes.begin() + static_cast<std::ptrdiff_t>(begin),
                           bytes.begin() + static_cast<std::ptrdiff_t>(end), 0xcd),
                static_cast<std::ptrdiff_t>(end - begin));
    };
    untouched(0, page);
    untouched(page + kHeads * head_bytes, bytes.size());
    return first;
  }

  std::size_t head_bytes;
  std::vector<std::uint8_t> bytes;
  std::vector<std::int64_t> at, places;
};

// Seals tokens [first, first + count) of one side into page 1.
void seal_side(const Module& m, const PageSpec& spec, const Inputs& in, bool values, int first, int count, Pool* pool,
               std::uint64_t seed, int hidden = 0) {
  const SideSpec& side = values ? spec.value : spec.key;
  const Rows& rows = values ? *in.v : *in.k;
  std::vector<float> weights = values ? in.lambda_v : in.lambda_k;
  weights.insert(weights.end(), weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(weights.size()));
  SealJob job = in.job(first, count);
  job.page = 1;
  job.hidden = static_cast<std::uint8_t>(hidden);
  std::vector<std::int64_t> table;
  apple::add_job(&table, job, values, {first * rows.stride, first, weights.empty() ? apple::kNowhere : 0});
  const Buffer data = rows.dtype == DType::f32 ? Buffer(m, "rows", rows.f32) : Buffer(m, "rows", rows.f16);
  const Buffer skip(m, "skip", in.skip), lambda(m, "lambda", weights),
      matrix(m, "matrix", apple::sealing_matrix(*side.rotation));
  const Buffer pages(m, "pages", pool->bytes, EMU_INOUT), jobs(m, "jobs", table);
  const Buffer sides(m, "side", apple::side_table(spec, values, pool->places)),
      levels(m, "levels", apple::level_table(side));
  m.run(
      "kv4_seal", {kThreads, Pool::kHeads, 1}, {kThreads, 1, 1},
      {data.data(), skip.data(), lambda.data(), matrix.data(), jobs.data(), sides.data(), levels.data(), pages.data()},
      seed);
  pool->bytes = pages.read();
}

Codes codes_of(const PageSpec& spec, const std::vector<std::uint8_t>& slice) {
  std::vector<std::uint8_t> k(32u * static_cast<unsigned>(spec.key.dim)),
      v(32u * static_cast<unsigned>(spec.value.dim));
  apple::codes_to_canonical(spec, slice.data(), k.data(), v.data());
  return {reference::from_canonical(k.data(), kPageTokens, spec.key.dim),
          reference::from_canonical(v.data(), kPageTokens, spec.value.dim)};
}

void check(const Case& c, Build build, std::uint64_t seed) {
  SCOPED_TRACE(testing::Message() << name_of(build) << ": " << c);
  const Module& m = Module::get("seal", build);
  const Inputs in(c);
  const PageSpec spec = on_metal(in.spec);
  Pool pool(spec);
  for (bool values : {false, true}) seal_side(m, spec, in, values, 0, kPageTokens, &pool, seed);
  const std::vector<std::uint8_t> slice = pool.slice(1);
  const Codes codes = codes_of(spec, slice);
  check_side(spec.key, *in.k, in.skip.data(), {in.lambda_k.begin(), in.lambda_k.end()}, codes.key,
             read_u16(slice.data() + spec.layout.k_scales, kPageTokens),
             spec.key.mean ? read_u16(slice.data() + spec.layout.k_mean, spec.key.dim) : std::vector<std::uint16_t>{});
  check_side(spec.value, *in.v, in.skip.data(), {in.lambda_v.begin(), in.lambda_v.end()}, codes.value,
             read_u16(slice.data() + spec.layout.v_scales, kPageTokens), {});
}

// One case in one build, with its own seed for the order of lanes.
auto in(Build build) {
  return [build, seed = std::uint64_t{0}](const Case& c) mutable { check(c, build, seed++); };
}

TEST(MetalSeal, MatchesReference) { every_dim_and_rotation(1, in(Build::fast)); }
TEST(MetalSeal, MatchesReferenceChecked) { every_dim_and_rotation(7, in(Build::check)); }
TEST(MetalSeal, LargeKeyBias) { large_key_bias(in(Build::fast)); }

// A page filled in parts, as tokens arrive, equals one filled at once, at any address.
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
      Pool whole(spec), parts(spec, true);
      for (bool values : {false, true}) {
        seal_side(m, spec, in, values, 0, kPageTokens, &whole, 3);
        int first = 0;
        for (int count : {1, 6, 25, 32}) {
          seal_side(m, spec, in, values, first, count, &parts, 5);
          first += count;
        }
      }
      EXPECT_EQ(whole.slice(1), parts.slice(1)) << "d " << d;
    }
  }
}

TEST(MetalSeal, HiddenRowsAreMaskedOnes) {
  Case c;
  c.key = {256, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, true, true};
  c.value.dim = 256;
  Inputs in(c);
  const PageSpec spec = on_metal(in.spec);
  const Module& m = Module::get("seal", Build::check);
  Pool hidden(spec), skipped(spec, true);
  for (bool values : {false, true}) seal_side(m, spec, in, values, 0, kPageTokens, &hidden, 1, 4);
  std::fill_n(in.skip.begin(), 4, 1);
  for (bool values : {false, true}) seal_side(m, spec, in, values, 0, kPageTokens, &skipped, 2);
  EXPECT_EQ(hidden.slice(1), skipped.slice(1));
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
      Pool pool(spec, true);
      for (bool values : {false, true}) seal_side(m, spec, in, values, 0, kPageTokens, &pool, 0);
      const std::vector<std::uint8_t> slice = pool.slice(1);
      const Codes codes = codes_of(spec, slice);
      const int first = 5, count = 51;
      for (bool values : {false, true}) {
        const SideSpec& s = values ? spec.value : spec.key;
        const std::vector<float>& weights = values ? in.lambda_v : in.lambda_k;
        const std::vector<double> lambda(weights.begin(), weights.end());
        DequantiseJob job;
        job.page = 1;
        job.first = first;
        job.count = count;
        job.k_stride = job.v_stride = d + 2;
        job.k_head_stride = job.v_head_stride = 60 * (d + 2);
        std::vector<std::int64_t> jobs_table;
        apple::add_job(&jobs_table, job, values, {3, -1, 0});
        std::vector<float> both = weights;
        both.insert(both.end(), weights.begin(), weights.end());
        const Buffer pages(m, "pages", pool.bytes), weight(m, "lambda", both),
            matrix(m, "matrix", apple::output_matrix(*s.rotation));
        const Buffer jobs(m, "jobs", jobs_table);
        const Buffer table(m, "side", apple::side_table(spec, values, pool.places)),
            levels(m, "levels", apple::level_table(s));
        const Buffer out(m, "out", nullptr, static_cast<std::size_t>(3 + (60 + count) * (d + 2)) * 4, EMU_OUTPUT);
        m.run("kv4_dequantise", {kThreads, kPageTokens, Pool::kHeads}, {kThreads, 1, 1},
              {pages.data(), weight.data(), matrix.data(), jobs.data(), table.data(), levels.data(), out.data()}, 11);
        const std::vector<std::uint16_t> scales =
            read_u16(slice.data() + (values ? spec.layout.v_scales : spec.layout.k_scales), kPageTokens);
        const std::vector<std::uint16_t> mean = read_u16(slice.data() + spec.layout.k_mean, d);
        const std::vector<double> expected = reference::dequantise(s, values ? codes.value.data() : codes.key.data(),
                                                                   scales.data(), values ? nullptr : mean.data(),
                                                                   kPageTokens, lambda.data());
        const std::vector<float> got = out.read<float>();
        for (int j = 0; j < count; ++j) {
          double norm = 0;
          const auto at = [&](int i) { return static_cast<std::size_t>((first + j) * d + i); };
          for (int i = 0; i < d; ++i) norm += std::pow(expected[at(i)] * lambda[static_cast<std::size_t>(i)], 2);
          // A sum of d products in float; their magnitudes sum to at most the row's norm times sqrt(d).
          for (int i = 0; i < d; ++i)
            for (int h = 0; h < Pool::kHeads; ++h)
              ASSERT_NEAR(got[static_cast<std::size_t>(3 + (60 * h + j) * (d + 2) + i)], expected[at(i)],
                          d * 0x1p-24 * std::sqrt(norm) / lambda[static_cast<std::size_t>(i)])
                  << "d " << d << " values " << values << " token " << first + j << " channel " << i;
        }
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
    std::vector<std::uint8_t> k(32u * static_cast<unsigned>(d)), v(k.size()), k2(k.size()), v2(k.size()),
        slice(spec.layout.head_bytes);
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
