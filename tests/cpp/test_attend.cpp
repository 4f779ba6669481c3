// Attention kernels of every instruction set against float64 attention over the dequantised cache, within
// the bounds of attend_call.h.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "attend_call.h"
#include "attend_scene.h"
#include "backend/backend.h"
#include "cpu/isa.h"
#include "guard.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"

namespace kv4 {
namespace {

using scene::Attend;
using scene::bounds;
using scene::Call;
using scene::Held;
using scene::kInfinity;
using scene::kUlp;
using scene::Scene;
using scene::Shape;

TEST_F(Attend, EveryHeadDimAndGroup) {
  std::uint64_t seed = 1;
  for (int d : cases::kHeadDims) {
    for (int group : cases::kQueryHeadsPerKvHead) {
      SCOPED_TRACE("head_dim " + std::to_string(d) + ", group " + std::to_string(group));
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = group;
      shape.kv_heads = 1 + static_cast<int>(seed % 2);
      shape.dtype = static_cast<DType>(seed % 3);
      shape.seed = seed++;
      const Scene s(shape, {Held::of(200)});
      const Call call(s, 1, static_cast<DType>(seed % 3));
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(Attend, EveryTokenCount) { scene::every_token_count(check); }

TEST_F(Attend, OnlyPagesAndAPartOfOne) {
  std::uint64_t seed = 2000;
  for (int tokens : {1, 17, 63, 64, 65, 130}) {
    Shape shape;
    shape.dim_k = 96;
    shape.dim_v = 64;
    shape.group = 3;
    shape.mean = seed % 2 == 0;
    shape.seed = seed++;
    SCOPED_TRACE(tokens);
    const Scene s(shape, {Held{0, tokens, 0, 0}});
    const Call call(s, 1);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

// Dimensions that are no multiple of 16 or of any lane count, groups, levels, no lambda, no mean.
TEST_F(Attend, EveryFormat) {
  struct Format {
    int dim_k, dim_v, group_k, group_v;
    LevelKind levels;
    bool mean, lambda;
  };
  const Format formats[] = {
      {34, 46, 0, 0, LevelKind::lloyd_max, true, true},       {46, 34, 0, 0, LevelKind::uniform, true, false},
      {128, 96, 32, 32, LevelKind::lloyd_max, true, true},    {64, 128, 32, 64, LevelKind::uniform, false, true},
      {256, 256, 128, 64, LevelKind::lloyd_max, true, false}, {512, 512, 0, 0, LevelKind::lloyd_max, true, true},
      {112, 160, 0, 32, LevelKind::lloyd_max, false, false},  {192, 320, 64, 0, LevelKind::lloyd_max, true, true},
  };
  std::uint64_t seed = 3000;
  for (const Format& f : formats) {
    SCOPED_TRACE("head dims " + std::to_string(f.dim_k) + " and " + std::to_string(f.dim_v));
    Shape shape;
    shape.kv_heads = 1;
    shape.group = 5;
    shape.dim_k = f.dim_k;
    shape.dim_v = f.dim_v;
    shape.scale_group_k = f.group_k;
    shape.scale_group_v = f.group_v;
    shape.levels = f.levels;
    shape.mean = f.mean;
    shape.lambda = f.lambda;
    shape.seed = seed++;
    const Scene s(shape, {Held{4, 100, 20, 0}});
    const Call call(s, 2);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

TEST_F(Attend, ExactRowsOfAnyHeadDim) {
  std::uint64_t seed = 4000;
  for (int d : {1, 8, 20, 33, 64, 80}) {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      SCOPED_TRACE("head dim " + std::to_string(d) + " " + name_of(dtype));
      Shape shape;
      shape.dim_k = d;
      shape.dim_v = d == 33 ? 20 : d;
      shape.group = 3;
      shape.dtype = dtype;
      shape.lambda = false;
      shape.seed = seed++;
      const Scene s(shape, {Held{5, 0, 70, 0}});
      const Call call(s, 9);
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(Attend, LongPrefillOverExactRows) {
  Shape shape;
  shape.kv_heads = 1;
  shape.group = 3;
  shape.dim_k = shape.dim_v = 64;
  shape.seed = 5000;
  const Scene s(shape, {Held{0, 0, 300, 0}});
  Call call(s, 300);
  check(s, call);
  call.windows({40});
  check(s, call);
}

TEST_F(Attend, ChunksOverPages) {
  std::uint64_t seed = 5100;
  for (int queries : {2, 5, 64}) {
    for (int group : {1, 6, 7}) {
      SCOPED_TRACE(std::to_string(queries) + " queries, group " + std::to_string(group));
      Shape shape;
      shape.kv_heads = 1;
      shape.group = group;
      shape.dim_k = shape.dim_v = 64;
      shape.seed = seed++;
      const Scene s(shape, {Held{4, 128, 40, 0}});  // 64 queries begin inside the pages
      Call call(s, queries);
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

class Masks : public Attend {
 protected:
  static constexpr int kQueries = 6;
  Masks() {
    shape_.group = 3;
    shape_.dim_k = shape_.dim_v = 64;
    shape_.seed = 6000;
    scene_ =
        std::make_unique<Scene>(shape_, std::vector<Held>{Held{4, 128, 30, 0}, Held{3, 190, 9, 0}, Held{0, 0, 40, 0}});
  }
  Shape shape_;
  std::unique_ptr<Scene> scene_;
};

TEST_F(Masks, None) {
  Call call(*scene_, kQueries);
  call.args.mask.causal = false;
  check(*scene_, call);
}
TEST_F(Masks, Causal) { check(*scene_, Call(*scene_, kQueries)); }
TEST_F(Masks, Start) {
  Call call(*scene_, kQueries);
  call.starts({70, 1, 33});
  check(*scene_, call);
  call.args.mask.offset = 2;
  check(*scene_, call);
}
TEST_F(Masks, Window) {
  for (std::int32_t w : {1, 20, 64, 100}) {
    Call call(*scene_, kQueries);
    call.windows({w, 2 * w, 0});
    check(*scene_, call);
    call.args.mask.causal = false;
    check(*scene_, call);
  }
}
TEST_F(Masks, General) {
  for (bool per_head : {false, true}) {
    for (bool per_query : {false, true}) {
      for (int kind = 0; kind < 4; ++kind) {
        SCOPED_TRACE(kind);
        Call call(*scene_, kQueries);
        call.general(kind == 0 ? Mask::General::boolean : Mask::General::additive,
                     static_cast<DType>(kind == 0 ? 0 : kind - 1), 202, per_head, per_query);
        check(*scene_, call);
        call.args.mask.causal = false;
        call.args.mask.columns = 150;  // what lies beyond is hidden
        call.args.mask.offset = 5;
        check(*scene_, call);
        if (HasFatalFailure()) return;
      }
    }
  }
}
TEST_F(Masks, AllTogetherWithSoftcapAndSinks) {
  for (Mask::General kind : {Mask::General::none, Mask::General::boolean, Mask::General::additive}) {
    Call call(*scene_, kQueries, DType::f16, 4.0);
    call.args.softcap = 5.0f;
    call.args.scale = 0.2f;
    call.with_sinks();
    call.starts({6, 0, 3});
    call.windows({130, 90, 20});
    if (kind != Mask::General::none) call.general(kind, DType::bf16, 202, true, true);
    check(*scene_, call);
  }
}

TEST_F(Attend, SoftcapAndSinks) {
  Shape shape;
  shape.seed = 7000;
  shape.group = 4;
  const Scene s(shape, {Held{4, 128, 70, 0}});
  Call call(s, 1, DType::f32, 3.0);
  call.with_sinks();
  check(s, call);
  call.args.softcap = 30.0f;
  check(s, call);
  call.args.sinks = nullptr;
  check(s, call);
  // A sink far above every score takes everything; no overflow on the way.
  call.sinks.assign(call.sinks.size(), 500.0f);
  call.args.sinks = call.sinks.data();
  check(s, call);
}

TEST_F(Attend, LargeMeansAndPeakedScores) {
  Shape shape;
  shape.seed = 8000;
  shape.group = 2;
  shape.bias = 100;
  const Scene biased(shape, {Held{4, 512, 70, 0}});
  check(biased, Call(biased, 1));
  shape.bias = 0;
  const Scene peaked(shape, {Held{4, 512, 70, 0}});
  check(peaked, Call(peaked, 1, DType::f32, 30.0));
}

TEST_F(Attend, RaggedBatchInTheMiddleOfASequence) {
  Shape shape;
  shape.seed = 9000;
  shape.group = 7;
  shape.kv_heads = 2;
  shape.dim_k = shape.dim_v = 64;
  const Scene s(shape, {Held{4, 1024, 64, 0}, Held{1, 0, 0, 0}, Held{0, 64, 3, 17}, Held{4, 640, 127, 1000}});
  check(s, Call(s, 1));
}

// What an fp16 cache of the same tokens would be asked for: far inside the one part in a thousand.
TEST_F(Attend, RelativeErrorOfARow) {
  Shape shape;
  shape.seed = 9100;
  shape.group = 4;
  const Scene s(shape, {Held::of(1000)});
  const Call call(s, 1);
  const std::vector<reference::DenseTokens> dense = s.dense();
  const std::vector<std::int64_t> position{s.length(0) - 1};
  const reference::Attention expected = reference::attend(call.args, 2, 128, dense, position);
  every_isa([&] {
    Status status;
    const std::vector<double> out = run(s, call, &status);
    ASSERT_TRUE(status.ok());
    for (std::size_t row = 0; row < out.size(); row += 128) {
      double largest = 0, error = 0;
      for (std::size_t c = row; c < row + 128; ++c) {
        largest = std::max(largest, std::abs(expected.out[c]));
        error = std::max(error, std::abs(out[c] - expected.out[c]));
      }
      EXPECT_LE(error, 1e-3 * largest) << "row " << row / 128;
    }
  });
}

TEST_F(Attend, FullyMaskedRowsAreZero) {
  Shape shape;
  shape.seed = 10000;
  shape.dim_k = shape.dim_v = 64;
  const Scene s(shape, {Held{2, 64, 5, 0}, Held{0, 64, 5, 0}});
  Call call(s, 3);
  call.with_sinks();
  call.starts({100, 68});  // sequence 0 sees nothing; of sequence 1 the last query sees one token
  check(s, call);
  every_isa([&] {
    Status status;
    const std::vector<double> out = run(s, call, &status);
    ASSERT_TRUE(status.ok());
    const std::size_t rows = static_cast<std::size_t>(call.args.q.shape[1]) * 3;
    for (std::size_t i = 0; i < rows * 64; ++i) ASSERT_EQ(out[i], 0.0);
  });
}

TEST_F(Attend, NonFiniteQueries) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (double bad : {static_cast<double>(NAN), kInfinity, -kInfinity}) {
      Shape shape;
      shape.seed = 11000;
      shape.dim_k = shape.dim_v = 64;
      const Scene s(shape, {Held{2, 64, 5, 0}, Held{0, 64, 5, 0}});
      Call call(s, 2, dtype);
      call.starts({100, 0});
      for (std::int64_t t = 0; t < 2; ++t) call.set_query(0, 1, t, 13, bad);
      const Call clean(s, 2, dtype);
      every_isa([&] {
        Status status;
        const std::vector<double> out = run(s, call, &status);  // sees nothing, reaches nothing
        ASSERT_TRUE(status.ok()) << status.message();
        for (double x : out) ASSERT_TRUE(std::isfinite(x));
        const std::vector<std::int32_t> starts = {67, 0};
        Call seeing(s, 2, dtype);
        seeing.starts(starts);
        seeing.set_query(0, 1, 1, 13, bad);
        run(s, seeing, &status);
        EXPECT_EQ(status.code(), StatusCode::non_finite);
      });
      if (HasFatalFailure()) return;
    }
  }
}

// Finite queries whose scores overflow are reported, not answered.
TEST_F(Attend, OverflowingScoresAreRefused) {
  Shape shape;
  shape.seed = 11500;
  shape.dim_k = shape.dim_v = 64;
  const Scene s(shape, {Held{2, 64, 5, 0}});
  const Call call(s, 1, DType::f32, 1e38);
  every_isa([&] {
    Status status;
    run(s, call, &status);
    EXPECT_EQ(status.code(), StatusCode::non_finite);
  });
}

// An infinite score is never taken for a hidden token's, whichever its sign, and a hidden one never counts.
TEST_F(Attend, InfiniteScoresAreRefusedUnlessHidden) {
  constexpr int kDim = 64;
  for (const float key : {-10.0f, 10.0f}) {
    CacheConfig config;
    config.recipe = Recipe::exact();
    config.kv_heads = 1;
    config.head_dim_k = config.head_dim_v = kDim;
    std::unique_ptr<Cache> cache;
    ASSERT_TRUE(Cache::create(config, &cache).ok());
    // Token 0 overflows, token 1 scores 0.
    std::vector<float> k(2 * kDim, 0.0f), v(2 * kDim, 3.0f), out(kDim);
    std::fill_n(k.begin(), kDim, key);
    std::fill_n(v.begin(), kDim, 5.0f);
    const std::vector<float> q(kDim, 1e38f);
    const std::array<std::int64_t, 4> two{1, 1, 2, kDim}, one{1, 1, 1, kDim}, stride{2 * kDim, 2 * kDim, kDim, 1};
    ASSERT_TRUE(cache->append({k.data(), DType::f32, two, stride}, {v.data(), DType::f32, two, stride}).ok());
    const float hidden[2] = {-std::numeric_limits<float>::infinity(), 0.0f};
    AttendArgs args;
    args.q = {q.data(), DType::f32, one, stride};
    AttendArgs masked = args;
    masked.mask.kind = Mask::General::additive;
    masked.mask.general = hidden;
    masked.mask.columns = 2;
    masked.mask.general_stride[3] = 1;
    every_isa([&] {
      EXPECT_EQ(cache->attend(args, {out.data(), DType::f32, one, stride}).code(), StatusCode::non_finite) << key;
      ASSERT_TRUE(cache->attend(masked, {out.data(), DType::f32, one, stride}).ok()) << key;
      for (float x : out) EXPECT_EQ(x, 3.0f);
    });
  }
}

class Partial : public Attend {
 protected:
  struct State {
    std::vector<float> o, m, l;
    State(std::int64_t rows, int dim)
        : o(static_cast<std::size_t>(rows * dim)), m(static_cast<std::size_t>(rows)),
          l(static_cast<std::size_t>(rows)) {}
    PartialState view() { return {o.data(), m.data(), l.data()}; }
  };
};

TEST_F(Partial, PartsMergeToTheWhole) {
  Shape shape;
  shape.seed = 12000;
  shape.group = 3;
  shape.dim_k = 128;
  shape.dim_v = 64;
  const Scene s(shape, {Held{4, 256, 70, 0}, Held{4, 64, 80, 0}});
  Call call(s, 3);
  call.with_sinks();
  call.starts({0, 200});  // sequence 1: nothing is visible
  const std::int64_t heads = call.args.q.shape[1], rows = 2 * heads * 3;
  const std::vector<reference::DenseTokens> dense = s.dense();
  const std::vector<std::int64_t> position{s.length(0) - 3, s.length(1) - 3};
  const reference::Attention expected = reference::attend(call.args, 2, 64, dense, position);
  const std::vector<double> bound = bounds(s, call, dense, expected);
  every_isa([&] {
    State whole(rows, 64), merged(rows, 64), part(rows, 64);
    std::fill(merged.m.begin(), merged.m.end(), -std::numeric_limits<float>::infinity());
    const std::vector<SequenceView> views = s.views(3);
    AttendJob job = s.job(call.args, views);
    job.partial = whole.view();
    ASSERT_TRUE(find_backend("cpu")->attend(job).ok());
    for (int i = 0; i < 3; ++i) {  // sinks, pages, window: each alone
      std::vector<SequenceView> only = views;
      for (SequenceView& v : only) {
        if (i != 0) v.exact[0].count = 0;
        if (i != 1) v.page_count = 0;
        if (i != 2) v.exact[1].count = 0;
      }
      AttendJob piece = s.job(call.args, only);
      piece.partial = part.view();
      ASSERT_TRUE(find_backend("cpu")->attend(piece).ok());
      merge(merged.view(), part.view(), rows, 64);
    }
    for (State* state : {&whole, &merged}) {
      for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
        if (expected.l[r] == 0) {
          EXPECT_EQ(state->l[r], 0.0f);
          EXPECT_EQ(state->m[r], -std::numeric_limits<float>::infinity());
          continue;
        }
        // m is the largest score to within the rounding of q', and l exp(m) the sum of exponentials.
        EXPECT_NEAR(state->m[r], expected.m[r], 1e-3);
        EXPECT_NEAR(state->m[r] + std::log(state->l[r]), expected.m[r] + std::log(expected.l[r]), 1e-3);
      }
      std::vector<float> out(static_cast<std::size_t>(rows) * 64);
      MutableTensorView view;
      view.data = out.data();
      view.shape = {2, heads, 3, 64};
      view.stride = {heads * 3 * 64, 3 * 64, 64, 1};
      finish(state->view(), call.args.sinks, view);
      for (std::size_t i = 0; i < out.size(); ++i)
        ASSERT_NEAR(out[i], expected.out[i], bound[i] + 8 * kUlp * std::abs(expected.out[i])) << i;
    }
  });
}

// Two tokens with scores 0 and x: the state holds exp(x) as it was computed.
TEST_F(Partial, Exponential) {
  constexpr int kRows = 2001, kDim = 8;
  std::vector<float> q(kRows * kDim, 0.0f), k(2 * kDim, 0.0f), v(2 * kDim, 0.0f);
  for (int t = 0; t < kRows; ++t) q[static_cast<std::size_t>(t) * kDim] = -80.0f * static_cast<float>(t) / (kRows - 1);
  k[kDim] = 1.0f;
  v[kDim] = 1.0f;
  AttendJob job;
  job.args.q = {q.data(), DType::f32, {1, 1, kRows, kDim}, {0, 0, kDim, 1}};
  job.args.scale = 1.0f;
  job.args.mask.causal = false;
  job.kv_heads = 1;
  job.head_dim_k = job.head_dim_v = kDim;
  SequenceView view;
  view.exact[0] = {.k = k.data(), .v = v.data(), .k_stride = kDim, .v_stride = kDim, .count = 2};
  view.query_count = kRows;
  job.sequences.views = {&view, 1};
  every_isa([&] {
    State state(kRows, kDim);
    job.partial = state.view();
    ASSERT_TRUE(find_backend("cpu")->attend(job).ok());
    for (std::size_t t = 0; t < kRows; ++t) {
      // The score's own rounding, in units of log2 and back, and 2^-22 of the polynomial.
      const double x = q[t * kDim], relative = std::abs(x) * 0x1p-23 + 0x1p-22;
      ASSERT_NEAR(state.o[t * kDim], std::exp(x), std::exp(x) * relative) << x;
      ASSERT_EQ(state.m[t], 0.0f);
    }
  });
}

// All products at their largest, at the largest head dim: even tokens score 1, odd ones -1.
TEST_F(Attend, LargestSumsStayInRange) {
  constexpr int d = kMaxHeadDim;
  PageSpec spec;
  for (SideSpec* side : {&spec.key, &spec.value}) {
    side->dim = side->group = d;
    side->groups = 1;
    side->levels = levels(LevelKind::lloyd_max);
    ASSERT_TRUE(Rotation::identity(d, &side->rotation).ok());
  }
  spec.layout = kv4_make_page_layout(d, d, 1, 1, false, d, d);
  std::vector<std::uint8_t> codes(kPageTokens * d / 2), page(spec.layout.head_bytes);
  for (int j = 0; j < kPageTokens; ++j)
    std::memset(codes.data() + j * d / 2, j % 2 == 0 ? 0xff : 0x00, d / 2);  // levels 127 and -127
  ASSERT_TRUE(find_backend("cpu")->codes_from_canonical(spec, codes.data(), codes.data(), page.data()).ok());
  const std::uint16_t step = f32_to_f16(0x1p-7f);
  for (int j = 0; j < kPageTokens; ++j) {
    std::memcpy(page.data() + spec.layout.k_scales + j * 2, &step, 2);
    std::memcpy(page.data() + spec.layout.v_scales + j * 2, &step, 2);
  }
  const std::vector<float> q(d, 3.0f);
  std::vector<float> out(d);
  const std::int32_t id = 0;
  SequenceView view;
  view.pages = &id;
  view.query_count = 1;
  view.page_count = 1;
  view.query_position = kPageTokens - 1;
  AttendJob job;
  job.args.q = {q.data(), DType::f32, {1, 1, 1, d}, {0, 0, 0, 1}};
  job.args.scale = 1.0f / (3 * d * 127 * 0x1p-7f);
  job.spec = &spec;
  job.kv_heads = 1;
  job.head_dim_k = job.head_dim_v = d;
  job.sequences.views = {&view, 1};
  job.pages.data = page.data();
  job.out = {out.data(), DType::f32, {1, 1, 1, d}, {0, 0, 0, 1}};
  every_isa([&] {
    ASSERT_TRUE(find_backend("cpu")->attend(job).ok());
    // The weights take two values: the smaller is off by at most half a unit of the larger / 32512.
    for (float x : out) ASSERT_NEAR(x, 127 * 0x1p-7 * std::tanh(1.0), 127 * 0x1p-7 * (0.5 / 32512 + 16 * kUlp));
  });
}

TEST_F(Partial, EmptyStateIsNeutral) {
  State a(2, 3), empty(2, 3);
  a.o = {1, 2, 3, 4, 5, 6};
  a.m = {0.5f, -100.0f};
  a.l = {2, 3};
  const State before = a;
  std::fill(empty.m.begin(), empty.m.end(), -std::numeric_limits<float>::infinity());
  std::fill(empty.o.begin(), empty.o.end(), std::numeric_limits<float>::quiet_NaN());
  merge(a.view(), empty.view(), 2, 3);
  EXPECT_EQ(a.o, before.o);
  EXPECT_EQ(a.m, before.m);
  EXPECT_EQ(a.l, before.l);
  merge(empty.view(), a.view(), 2, 3);
  EXPECT_EQ(empty.o, before.o);
  EXPECT_EQ(empty.m, before.m);
  EXPECT_EQ(empty.l, before.l);
}

TEST(CpuBackend, RefusesWithAReason) {
  Shape shape;
  const Scene s(shape, {Held{1, 0, 0, 0}});
  PageSpec spec = s.spec();
  EXPECT_TRUE(find_backend("cpu")->supports(spec).ok());
  spec.key.dim = 33;
  Status status = find_backend("cpu")->supports(spec);
  EXPECT_EQ(status.code(), StatusCode::unsupported);
  EXPECT_NE(status.message().find("head_dim_k"), std::string::npos);
  spec = s.spec();
  spec.value.dim = 514;
  status = find_backend("cpu")->supports(spec);
  EXPECT_NE(status.message().find("head_dim_v"), std::string::npos);
  spec = s.spec();
  spec.key.group = 8;
  spec.key.groups = 16;
  EXPECT_EQ(find_backend("cpu")->supports(spec).code(), StatusCode::unsupported);
}

}  // namespace
}  // namespace kv4
