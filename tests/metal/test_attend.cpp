// Attention by the Metal kernels, emulated, against float64 attention over the dequantised cache, on the CPU's cases
// and within the CPU's bounds: the Metal kernels compute in float and round neither queries nor weights.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attend_cases.h"
#include "scene.h"

namespace kv4 {
namespace {

using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;
using tests::Build;
using tests::MetalScene;
using tests::Options;
using tests::Ran;

void check(const Scene& s, const Call& call, const Options& options = {}) {
  SCOPED_TRACE(name_of(options.build));
  const std::vector<reference::DenseTokens> dense = s.dense();
  std::vector<std::int64_t> position;
  for (int b = 0; b < s.batch(); ++b) position.push_back(s.length(b) - call.args.q.shape[2]);
  const reference::Attention expected =
      reference::attend(call.args, s.shape().kv_heads, s.shape().dim_v, dense, position);
  const Ran ran = MetalScene(s).run(call, options);
  scene::expect_within(s, call, ran.out, expected, scene::bounds(s, call, dense, expected));
  double worst = 0;
  for (std::size_t i = 0; i < ran.out.size(); ++i)
    worst = std::max(worst, std::abs(ran.out[i] - expected.out[i]) / std::max(1.0, std::abs(expected.out[i])));
  if (call.out_dtype == DType::f32) {
    EXPECT_LT(worst, 2e-3);
  }
}

// One check of a scene in one build, with its own seed for the order of lanes.
auto in(Build build) {
  return [build, seed = std::uint64_t{0}](const Scene& s, const Call& call) mutable {
    check(s, call, {.build = build, .seed = ++seed});
  };
}

TEST(MetalAttend, EveryHeadDimAndGroup) { scene::every_head_dim_and_group(scene::kEveryDType, 1, in(Build::fast)); }
TEST(MetalAttend, EveryHeadDimAndGroupChecked) {
  scene::every_head_dim_and_group(scene::kEveryDType, 7, in(Build::check));
}
TEST(MetalAttend, EveryTokenCount) { scene::every_token_count(in(Build::fast)); }
TEST(MetalAttend, OnlyPagesAndAPartOfOne) { scene::pages_and_a_part_of_one(in(Build::fast)); }
TEST(MetalAttend, ManyQueries) { scene::many_queries(scene::kEveryDType, {2, 5, 9, 33}, in(Build::fast)); }
TEST(MetalAttend, RaggedBatchWithStartsAndWindows) { scene::ragged_batch({1, 7}, 2048, in(Build::fast)); }
TEST(MetalAttend, RaggedBatchChecked) { scene::ragged_batch({1}, 320, in(Build::check)); }
TEST(MetalAttend, GeneralMasksAndSoftcap) { scene::general_masks({false, true}, in(Build::fast)); }
TEST(MetalAttend, GeneralMasksChecked) { scene::general_masks({true}, in(Build::check)); }
TEST(MetalAttend, LargeMeans) { scene::large_means(in(Build::fast)); }

// Scattered chunks of pages and blocks of exact rows give bit-identical results to contiguous arrays.
TEST(MetalAttend, ChunksOfPagesAndBlocksOfRowsDoNotMatter) {
  Shape shape;
  shape.group = 3;
  shape.seed = 4200;
  const Scene s(shape, {Held{4, 640, 200, 0}, Held{0, 64, 64, 7}, Held{2, 1000, 0, 0}, Held{0, 0, 65, 0}});
  const Call call(s, 2);
  const MetalScene scene(s);
  const std::vector<double> whole = scene.run(call, {}).out;
  for (const Build build : {Build::fast, Build::check})
    for (const bool chunks : {false, true})
      for (const bool blocks : {false, true}) {
        SCOPED_TRACE(testing::Message() << name_of(build) << (chunks ? ", chunks" : "") << (blocks ? ", blocks" : ""));
        EXPECT_EQ(scene.run(call, {.build = build, .chunks = chunks, .blocks = blocks}).out, whole);
      }
}

// Each sequence attends with its newest rows only, from an input of another index; other outputs are untouched.
TEST(MetalAttend, SequencesWithRowsOfTheirOwn) {
  const std::vector<std::int64_t> counts = {9, 1, 4, 0, 7};
  for (const Mask::General kind : {Mask::General::none, Mask::General::additive}) {
    Shape shape;
    shape.group = 2;
    shape.rotation = RotationKind::srht;
    shape.seed = 4300;
    const Scene s(
        shape, {Held{4, 640, 70, 0}, Held{0, 0, 40, 3}, Held{4, 128, 127, 20}, Held{2, 0, 9, 0}, Held{0, 320, 64, 0}});
    Call call(s, 9);
    call.starts({5, 10, 25, 0, 100});
    call.windows({200, 0, 64, 4, 1000});
    if (kind != Mask::General::none) call.general(kind, DType::f16, 700, true, true);
    const AttendArgs given = call.args;
    // The reference reads the inputs in reverse order.
    const std::int64_t last = s.batch() - 1;
    call.args.q.data = call.args.q.at(last, 0, 0);
    call.args.q.stride[0] = -given.q.stride[0];
    call.args.mask.general = call.mask.data() + last * given.mask.general_stride[0] * 2;
    call.args.mask.general_stride[0] = -given.mask.general_stride[0];
    const std::vector<reference::DenseTokens> dense = s.dense();
    std::vector<std::int64_t> position;
    for (int b = 0; b < s.batch(); ++b) position.push_back(s.length(b) - 9);
    reference::Attention expected = reference::attend(call.args, shape.kv_heads, shape.dim_v, dense, position);
    for (const Build build : {Build::fast, Build::check}) {
      SCOPED_TRACE(name_of(build));
      Options options{.build = build};
      options.args = &given;
      options.change = [&](SequenceView& view, int b) {
        view.query_count = counts[static_cast<std::size_t>(b)];
        view.input = static_cast<std::int32_t>(last - b);
        view.input_row = 9 - view.query_count;
        view.query_position = s.length(b) - view.query_count;
      };
      const Ran ran = MetalScene(s).run(call, options);
      const std::size_t rows = ran.out.size() / 128, per_sequence = rows / counts.size();
      for (std::size_t row = 0; row < rows; ++row)
        if (static_cast<std::int64_t>(row % 9) < 9 - counts[row / per_sequence])
          std::fill_n(expected.out.begin() + static_cast<std::ptrdiff_t>(row * 128), 128, 0.0);
      scene::expect_within(s, call, ran.out, expected, scene::bounds(s, call, dense, expected));
    }
  }
}

// Hidden first tokens of the first page are read from their exact rows only.
TEST(MetalAttend, HiddenTokensOfTheFirstPageAreReadFromExactRows) {
  for (const int sinks : {1, 40, 63}) {
    Shape shape;
    shape.dtype = DType::f32;
    shape.seed = 4400;
    const Scene s(shape, {Held{0, 200, 40, 0}}), other(shape, {Held{sinks, 0, 0, 0}});
    const Call call(s, 2);
    std::vector<reference::DenseTokens> dense = s.dense();
    const reference::DenseTokens exact = other.dense()[0];
    std::vector<float> k, v;  // [kv_heads, sinks, 128]
    for (std::size_t h = 0; h < 2; ++h) {
      k.insert(k.end(), exact.k[h].begin(), exact.k[h].end());
      v.insert(v.end(), exact.v[h].begin(), exact.v[h].end());
      std::copy(exact.k[h].begin(), exact.k[h].end(), dense[0].k[h].begin());
      std::copy(exact.v[h].begin(), exact.v[h].end(), dense[0].v[h].begin());
    }
    const reference::Attention expected =
        reference::attend(call.args, 2, 128, dense, std::vector<std::int64_t>{s.length(0) - 2});
    Options options{.build = Build::check};
    options.sinks_k = k;
    options.sinks_v = v;
    options.change = [&](SequenceView& view, int) {
      view.pages_hidden = sinks;
      view.exact[0].count = sinks;
      view.exact[0].k_stride = view.exact[0].v_stride = 128;
      view.exact[0].k_head_stride = view.exact[0].v_head_stride = sinks * 128;
    };
    const Ran ran = MetalScene(s).run(call, options);
    scene::expect_within(s, call, ran.out, expected, scene::bounds(s, call, dense, expected));
  }
}

TEST(MetalAttend, EveryRotationKind) {
  std::uint64_t seed = 1500;
  for (RotationKind kind : {RotationKind::identity, RotationKind::srht, RotationKind::householder}) {
    Shape shape;
    shape.group = 2;
    shape.rotation = kind;
    shape.seed = seed++;
    const Scene s(shape, {Held{4, 200, 70, 0}});
    SCOPED_TRACE(static_cast<int>(kind));
    check(s, Call(s, 1));
    if (HasFatalFailure()) return;
  }
}

TEST(MetalAttend, OnlyExactRows) {
  std::uint64_t seed = 2500;
  for (int tokens : {1, 63, 64, 65, 130, 700}) {
    Shape shape;
    shape.dim_k = shape.dim_v = seed % 2 == 0 ? 80 : 128;
    shape.group = 4;
    shape.dtype = scene::kEveryDType[seed % 3];
    shape.seed = seed++;
    SCOPED_TRACE(tokens);
    const Scene s(shape, {Held{0, 0, tokens, 0}});
    const Call call(s, 1);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

TEST(MetalAttend, NotCausal) {
  Shape shape;
  shape.group = 2;
  shape.seed = 5500;
  const Scene s(shape, {Held{4, 320, 60, 0}});
  Call call(s, 3);
  call.args.mask.causal = false;
  check(s, call);
}

// A fully masked row gives 0, whatever the cache holds.
TEST(MetalAttend, RowsThatSeeNothing) {
  Shape shape;
  shape.group = 2;
  shape.seed = 5600;
  const Scene s(shape, {Held{4, 128, 70, 0}, Held{4, 64, 70, 0}});
  Call call(s, 2);
  call.starts({500, 0});
  call.with_sinks();
  const Ran ran = MetalScene(s).run(call, {});
  const std::size_t half = ran.out.size() / 2;
  for (std::size_t i = 0; i < half; ++i) ASSERT_EQ(ran.out[i], 0.0);
  check(s, call);
}

// The output does not depend on the number of splits, some of which may be empty.
TEST(MetalAttend, SplitsDoNotMatter) {
  Shape shape;
  shape.group = 5;
  shape.kv_heads = 1;
  shape.seed = 79;
  const Scene s(shape, {Held{4, 1280, 90, 0}, Held{4, 64, 70, 0}});
  const Call call(s, 1);
  for (int cores : {1, 8, 40}) {
    SCOPED_TRACE(cores);
    check(s, call, {.seed = static_cast<std::uint64_t>(cores), .cores = cores});
    if (HasFatalFailure()) return;
  }
}

TEST(MetalAttend, LongContexts) {
  for (int tokens : {16384, 65536}) {
    Shape shape;
    shape.group = 4;
    shape.kv_heads = 1;
    shape.seed = static_cast<std::uint64_t>(tokens);
    const Scene s(shape, {Held::of(tokens)});
    const Call call(s, 1);
    SCOPED_TRACE(tokens);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

TEST(MetalAttend, PartialStatesGiveTheWhole) {
  Shape shape;
  shape.group = 4;
  shape.seed = 88;
  const Scene s(shape, {Held{4, 640, 70, 0}, Held{4, 64, 100, 0}});
  const Call call(s, 3);
  const MetalScene scene(s);
  const std::vector<double> whole = scene.run(call, {}).out;
  const std::vector<float> rows = scene.run(call, {.partial = true}).partial;
  const std::vector<reference::DenseTokens> dense = s.dense();
  const std::vector<std::int64_t> position = {s.length(0) - 3, s.length(1) - 3};
  const reference::Attention expected = reference::attend(call.args, shape.kv_heads, 128, dense, position);
  ASSERT_EQ(rows.size() / 130, whole.size() / 128);
  for (std::size_t r = 0; r < rows.size() / 130; ++r) {
    ASSERT_NEAR(rows[r * 130 + 128], expected.m[r], 1e-4);
    ASSERT_NEAR(rows[r * 130 + 129], expected.l[r], 1e-4 * expected.l[r]);
    for (std::size_t c = 0; c < 128; ++c)
      ASSERT_NEAR(rows[r * 130 + c] / rows[r * 130 + 129], whole[r * 128 + c], 1e-5) << r << " " << c;
  }
}

// 136 bytes a token at d = 128, read once for all query heads of a KV head: what twice the pages add in the same
// splits.
TEST(MetalAttend, ReadsEachByteOnce) {
  std::uint64_t bytes[2];
  for (int twice = 0; twice < 2; ++twice) {
    Shape shape;
    shape.group = 6;
    shape.kv_heads = 1;
    shape.seed = 90;
    const Scene s(shape, {Held{0, 2048 << twice, 0, 0}}, false);
    bytes[twice] = MetalScene(s).run(Call(s, 1), {.build = Build::check, .cores = 1}).attend.device_read_unique;
  }
  // Exactly a page's head slice and its id.
  EXPECT_EQ(bytes[1] - bytes[0], 32u * (64 * 136 + 4));
}

TEST(MetalTables, RefusalsSayWhy) {
  PageSpec spec;
  spec.key.dim = spec.value.dim = 112;
  spec.key.groups = spec.value.groups = 1;
  EXPECT_EQ(apple::supports(spec).message(), "head_dim_k: expected 64, 80, 96, 128 or 256 on Metal; got 112");
  spec.key.dim = spec.value.dim = 128;
  EXPECT_TRUE(apple::supports(spec).ok());
  spec.value.dim = 64;
  EXPECT_EQ(apple::supports(spec).message(), "head_dim_v: expected head_dim_k, 128; got 64");
  spec.value.dim = 128;
  spec.key.group = 32;
  spec.key.groups = 4;
  EXPECT_EQ(apple::supports(spec).message(), "recipe.k.group: expected one scale per vector on Metal; got 32");
}

}  // namespace
}  // namespace kv4
