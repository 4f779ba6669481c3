// Attention by the Metal kernels, emulated, against float64 attention over the dequantised cache, on the CPU's cases and
// within the CPU's bounds: the Metal kernels compute in float and round neither queries nor weights.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

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
  const reference::Attention expected = reference::attend(call.args, s.shape().kv_heads, s.shape().dim_v, dense, position);
  const Ran ran = MetalScene(s).run(call, options);
  scene::expect_within(s, call, ran.out, expected, scene::bounds(s, call, dense, expected));
  double worst = 0;
  for (std::size_t i = 0; i < ran.out.size(); ++i)
    worst = std::max(worst, std::abs(ran.out[i] - expected.out[i]) / std::max(1.0, std::abs(expected.out[i])));
  if (call.out_dtype == DType::f32) {
    EXPECT_LT(worst, 2e-3);
  }
}

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

// `step`: every how many cases; the checker is slow.
void every_head_dim_and_group(Build build, int step) {
  std::uint64_t seed = 1;
  int n = 0;
  for (int d : cases::kHeadDims) {
    for (int group : {1, 2, 3, 4, 6, 7, 8, 9, 12, 16}) {
      if (n++ % step != 0) continue;
      SCOPED_TRACE("head_dim " + std::to_string(d) + ", group " + std::to_string(group));
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = group;
      shape.kv_heads = 1 + n % 2;
      shape.dtype = kDTypes[n % 3];
      shape.seed = seed++;
      const Scene s(shape, {Held::of(200)});
      const Call call(s, 1, static_cast<DType>(n / 2 % 3));
      check(s, call, {build, static_cast<std::uint64_t>(n), 8, false});
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(MetalAttend, EveryHeadDimAndGroup) { every_head_dim_and_group(Build::fast, 1); }
TEST(MetalAttend, EveryHeadDimAndGroupChecked) { every_head_dim_and_group(Build::check, 7); }

TEST(MetalAttend, EveryTokenCount) {
  scene::every_token_count([](const Scene& s, const Call& call) { check(s, call); });
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

TEST(MetalAttend, OnlyPagesAndAPartOfOne) {
  std::uint64_t seed = 2000;
  for (int tokens : {1, 17, 63, 64, 65, 130, 640, 1000}) {
    Shape shape;
    shape.dim_k = shape.dim_v = seed % 2 == 0 ? 96 : 128;
    shape.group = 3;
    shape.mean = seed % 3 != 0;
    shape.levels = seed % 3 == 1 ? LevelKind::uniform : LevelKind::lloyd_max;
    shape.lambda = seed % 4 != 2;
    shape.seed = seed++;
    SCOPED_TRACE(tokens);
    const Scene s(shape, {Held{0, tokens, 0, 0}});
    const Call call(s, 1);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

TEST(MetalAttend, OnlyExactRows) {
  std::uint64_t seed = 2500;
  for (int tokens : {1, 63, 64, 65, 130, 700}) {
    Shape shape;
    shape.dim_k = shape.dim_v = seed % 2 == 0 ? 80 : 128;
    shape.group = 4;
    shape.dtype = kDTypes[seed % 3];
    shape.seed = seed++;
    SCOPED_TRACE(tokens);
    const Scene s(shape, {Held{0, 0, tokens, 0}});
    const Call call(s, 1);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

// Several queries: verification of drafts, chunks of a prompt.
TEST(MetalAttend, ManyQueries) {
  std::uint64_t seed = 3000;
  for (int queries : {2, 5, 9, 33}) {
    for (int group : {1, 4, 6}) {
      Shape shape;
      shape.dim_k = shape.dim_v = seed % 3 == 0 ? 256 : 128;
      shape.group = group;
      shape.kv_heads = 1;
      shape.dtype = kDTypes[seed % 3];
      shape.seed = seed++;
      SCOPED_TRACE(std::to_string(queries) + " queries, group " + std::to_string(group));
      const Scene s(shape, {Held{4, 320, 90, 0}});
      const Call call(s, queries, shape.dtype);
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(MetalAttend, RaggedBatchWithStartsAndWindows) {
  std::uint64_t seed = 4000;
  for (Build build : {Build::fast, Build::check}) {
    for (int queries : {1, 7}) {
      if (build == Build::check && queries > 1) continue;
      Shape shape;
      shape.group = 4;
      shape.seed = seed++;
      const Scene s(shape, {Held{4, 640, 70, 0}, Held{0, 0, 40, 3}, Held{4, 128, 127, 20}, Held{2, 0, 9, 0},
                            Held{0, build == Build::check ? 320 : 2048, 64, 0}});
      Call call(s, queries);
      call.starts({5, 10, 25, 0, 100});
      call.windows({200, 0, 64, 4, 1000});
      call.with_sinks();
      check(s, call, {build, seed, 32, false});
      if (HasFatalFailure()) return;
    }
  }
}

TEST(MetalAttend, GeneralMasksAndSoftcap) {
  std::uint64_t seed = 5000;
  for (Build build : {Build::fast, Build::check}) {
    for (Mask::General kind : {Mask::General::boolean, Mask::General::additive}) {
      for (DType dtype : kDTypes) {
        if (kind == Mask::General::boolean && dtype != DType::f32) continue;
        for (bool wide : {false, true}) {
          if (build == Build::check && !wide) continue;
          Shape shape;
          shape.group = 3;
          shape.seed = seed++;
          const Scene s(shape, {Held{4, 200, 50, 0}, Held{4, 64, 66, 30}});
          Call call(s, 3);
          call.general(kind, dtype, 254, wide, wide);
          call.args.softcap = wide ? 3.0f : 0.0f;
          call.args.scale = 0.2f;
          check(s, call, {build, seed, 8, false});
          if (HasFatalFailure()) return;
        }
      }
    }
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

// A row that sees nothing is 0, whatever the cache holds.
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

// The mean adds hundreds to every score of a page; the softmax must not notice.
TEST(MetalAttend, LargeMeans) {
  Shape shape;
  shape.bias = 30;
  shape.group = 6;
  shape.seed = 77;
  const Scene s(shape, {Held{4, 1024, 64, 0}});
  const Call call(s, 1);
  check(s, call);
}

// Any number of splits gives the same output, and each may be empty.
TEST(MetalAttend, SplitsDoNotMatter) {
  Shape shape;
  shape.group = 5;
  shape.kv_heads = 1;
  shape.seed = 79;
  const Scene s(shape, {Held{4, 1280, 90, 0}, Held{4, 64, 70, 0}});
  const Call call(s, 1);
  for (int cores : {1, 8, 40}) {
    SCOPED_TRACE(cores);
    check(s, call, {Build::fast, static_cast<std::uint64_t>(cores), cores, false});
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
  const std::vector<float> rows = scene.run(call, {Build::fast, 0, 8, true}).partial;
  const std::vector<reference::DenseTokens> dense = s.dense();
  const std::vector<std::int64_t> position = {s.length(0) - 3, s.length(1) - 3};
  const reference::Attention expected = reference::attend(call.args, shape.kv_heads, 128, dense, position);
  ASSERT_EQ(rows.size() / 130, whole.size() / 128);
  for (std::size_t r = 0; r < rows.size() / 130; ++r) {
    ASSERT_NEAR(rows[r * 130 + 128], expected.m[r], 1e-4);
    ASSERT_NEAR(rows[r * 130 + 129], expected.l[r], 1e-4 * expected.l[r]);
    for (std::size_t c = 0; c < 128; ++c) ASSERT_NEAR(rows[r * 130 + c] / rows[r * 130 + 129], whole[r * 128 + c], 1e-5) << r << " " << c;
  }
}

// 136 bytes a token at d = 128, read once for all query heads of a KV head: what twice the pages add in the same splits.
TEST(MetalAttend, ReadsEachByteOnce) {
  std::uint64_t bytes[2];
  for (int twice = 0; twice < 2; ++twice) {
    Shape shape;
    shape.group = 6;
    shape.kv_heads = 1;
    shape.seed = 90;
    const Scene s(shape, {Held{0, 2048 << twice, 0, 0}}, false);
    bytes[twice] = MetalScene(s).run(Call(s, 1), {Build::check, 0, 1, false}).attend.device_read_unique;
  }
  // A page's head slice, its place in the page table, and nothing else.
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
