// Attention of many query rows at once over sealed pages: chunked prefill and verification. Their rows take
// other paths than decoding: several tiles of rows, matrix instructions where there are some.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "attend_call.h"
#include "attend_scene.h"
#include "cases.h"

namespace kv4 {
namespace {

using scene::Attend;
using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;

class Rows : public Attend {};

TEST_F(Rows, EveryHeadDimAndRowCount) {
  std::uint64_t seed = 20000;
  for (int d : cases::kHeadDims) {
    for (const cases::Rows& rows : cases::kQueryRows) {
      SCOPED_TRACE("head_dim " + std::to_string(d) + ", " + std::to_string(rows.queries) + " queries, group " +
                   std::to_string(rows.group));
      Shape shape;
      shape.kv_heads = 1;
      shape.dim_k = shape.dim_v = d;
      shape.group = rows.group;
      shape.mean = seed % 4 != 0;
      shape.seed = seed++;
      // The last page is full or not, and the first queries see a part of the pages.
      const Scene s(shape, {Held{4, seed % 2 == 0 ? 128 : 109, 20, 0}});
      const Call call(s, rows.queries, static_cast<DType>(seed % 3));
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

// Scale groups and dimensions that fill no whole product of 64 channels, unlike for keys and values.
TEST_F(Rows, EveryFormat) {
  struct Format {
    int dim_k, dim_v, group_k, group_v;
    LevelKind levels;
  };
  const Format formats[] = {
      {34, 46, 0, 0, LevelKind::lloyd_max},    {46, 34, 0, 0, LevelKind::uniform},
      {128, 96, 32, 32, LevelKind::uniform},   {96, 80, 48, 16, LevelKind::lloyd_max},
      {160, 112, 80, 0, LevelKind::lloyd_max}, {512, 512, 0, 0, LevelKind::lloyd_max},
      {64, 128, 16, 64, LevelKind::lloyd_max}, {256, 192, 128, 96, LevelKind::lloyd_max},
  };
  std::uint64_t seed = 21000;
  for (const Format& f : formats) {
    SCOPED_TRACE("head dims " + std::to_string(f.dim_k) + " and " + std::to_string(f.dim_v));
    Shape shape;
    shape.kv_heads = 1;
    shape.group = 3;
    shape.dim_k = f.dim_k;
    shape.dim_v = f.dim_v;
    shape.scale_group_k = f.group_k;
    shape.scale_group_v = f.group_v;
    shape.levels = f.levels;
    shape.lambda = seed % 2 == 0;
    shape.seed = seed++;
    const Scene s(shape, {Held{2, 100, 3, 0}});
    check(s, Call(s, 11));
    if (HasFatalFailure()) return;
  }
}

TEST_F(Rows, Masks) {
  Shape shape;
  shape.group = 5;
  shape.dim_k = shape.dim_v = 80;
  shape.seed = 22000;
  const Scene s(shape, {Held{4, 190, 9, 0}, Held{0, 128, 30, 0}, Held{3, 0, 20, 0}});
  constexpr int kQueries = 7;
  {
    SCOPED_TRACE("no mask");
    Call call(s, kQueries);
    call.args.mask.causal = false;
    check(s, call);
  }
  for (std::int32_t window : {1, 20, 64, 100}) {
    SCOPED_TRACE("window " + std::to_string(window));
    Call call(s, kQueries);
    call.windows({window, 2 * window, 0});
    call.starts({0, 70, 5});
    check(s, call);
  }
  for (Mask::General kind : {Mask::General::boolean, Mask::General::additive}) {
    SCOPED_TRACE(kind == Mask::General::boolean ? "boolean" : "additive");
    Call call(s, kQueries, DType::bf16, 4.0);
    call.args.softcap = 5.0f;
    call.args.scale = 0.2f;
    call.with_sinks();
    call.general(kind, DType::f16, 203, true, true);
    check(s, call);
    call.args.mask.causal = false;
    call.args.mask.columns = 150;  // what lies beyond is hidden
    call.args.mask.offset = 5;
    check(s, call);
  }
}

// Rows that see nothing among rows that do, in every place of a tile.
TEST_F(Rows, SomeRowsSeeNothing) {
  Shape shape;
  shape.kv_heads = 1;
  shape.dim_k = shape.dim_v = 64;
  shape.seed = 23000;
  const Scene s(shape, {Held{0, 128, 0, 0}});
  Call call(s, 40);  // the last 40 of 128 positions
  for (std::int32_t start : {90, 104, 127, 128}) {
    SCOPED_TRACE("start " + std::to_string(start));
    call.starts({start});
    check(s, call);
    every_isa([&] {
      Status status;
      const std::vector<double> out = run(s, call, &status);
      ASSERT_TRUE(status.ok());
      for (int t = 0; t < start - 88 && t < 40; ++t)
        for (int c = 0; c < 64; ++c) ASSERT_EQ(out[static_cast<std::size_t>(t * 64 + c)], 0.0) << t;
    });
  }
}

// Peaked weights: pages that gain nothing leave the sums of others alone.
TEST_F(Rows, PeakedScoresOverManyPages) {
  Shape shape;
  shape.kv_heads = 1;
  shape.group = 2;
  shape.seed = 24000;
  const Scene s(shape, {Held{4, 512, 70, 0}});
  check(s, Call(s, 9, DType::f32, 30.0));
  shape.bias = 100;
  const Scene biased(shape, {Held{4, 512, 70, 0}});
  check(biased, Call(biased, 9));
}

// More rows than a work item holds, a ragged batch, tokens split over threads.
TEST_F(Rows, RaggedBatch) {
  Shape shape;
  shape.group = 7;
  shape.dim_k = shape.dim_v = 64;
  shape.seed = 25000;
  const Scene s(shape, {Held{4, 1024, 64, 0}, Held{0, 64, 23, 17}, Held{4, 640, 127, 1000}});
  check(s, Call(s, 21));
}

TEST_F(Rows, NonFiniteQueriesAreRefusedWhereTheySeeAToken) {
  Shape shape;
  shape.kv_heads = 1;
  shape.dim_k = shape.dim_v = 64;
  shape.seed = 26000;
  const Scene s(shape, {Held{0, 128, 0, 0}});
  for (double bad : {static_cast<double>(NAN), scene::kInfinity, 1e38}) {
    Call call(s, 20, DType::f32);
    for (std::int64_t c = 0; c < 64; ++c) call.set_query(0, 0, 3, c, bad);
    every_isa([&] {
      Status status;
      run(s, call, &status);
      EXPECT_EQ(status.code(), StatusCode::non_finite) << bad;
    });
    call.starts({112});  // query 3 is at position 111
    every_isa([&] {
      Status status;
      const std::vector<double> out = run(s, call, &status);
      ASSERT_TRUE(status.ok()) << status.message();
      for (double x : out) ASSERT_TRUE(std::isfinite(x));
    });
  }
}

}  // namespace
}  // namespace kv4
