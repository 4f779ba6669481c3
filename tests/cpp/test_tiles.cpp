// Attention of many rows with a matrix unit, on any machine: the unit is simulated by loops over its registers, the
// rest is the portable instruction set. The queries' integers are those of the other path, so the partial states agree
// but for the rounding of weights and the order of float operations.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#define KV4_ISA portable
#include "cpu/standard_headers.h"

#include "cpu/portable/primitives.h"

#include "cpu/portable/dot.h"

#include "cpu/attend_tiles.inl"

#include "attend_scene.h"
#include "cases.h"
#include "guard.h"

namespace kv4 {
namespace {

using scene::Held;
using scene::Scene;
using scene::Shape;

// A simulated matrix unit that also detects use of unset registers and of an unconfigured or twice configured unit.
struct TilesState {
  bool configured = false, set[8] = {};
  int rows[8] = {};
  std::uint8_t bytes[8][1024];
  int products = 0, misuses = 0;
};
struct Tiles {
  static inline TilesState state;

  static void check(bool ok) { state.misuses += ok ? 0 : 1; }
  static void configure(int rows) {
    check(!state.configured && rows > 0 && rows <= 16);
    state.configured = true;
    std::fill_n(state.set, 8, false);
    for (int i = 0; i < 8; ++i) state.rows[i] = i < 5 ? rows : 16;
  }
  static void release() {
    check(state.configured);
    state.configured = false;
  }

  using I = cpu::portable::Isa::I;
  static constexpr int kVectors = 64 / cpu::portable::Isa::kLanes;
  template <bool kUnsigned>
  static void split(const I (&v)[kVectors], std::int8_t* high, std::int8_t* low) {
    std::int32_t x[64];
    std::memcpy(x, v, sizeof x);
    for (int i = 0; i < 64; ++i) {
      high[i] = static_cast<std::int8_t>(kUnsigned ? x[i] >> 8 : (x[i] + 128) >> 8);
      low[i] = static_cast<std::int8_t>(x[i]);
      check(x[i] == 256 * number<kUnsigned>(high[i]) + number<kUnsigned>(low[i]));
    }
  }
  template <bool kUnsigned>
  static int number(std::int8_t x) {
    return kUnsigned ? static_cast<std::uint8_t>(x) : x;
  }
  using Table = const Levels*;
  static Table table(const Levels& levels) { return &levels; }
  template <int B>
  static void unpack(const std::uint8_t* codes, const std::uint8_t* more, Table table, std::uint8_t* to) {
    constexpr int kFirst = cpu::first_plane(B), kSecond = B - kFirst;
    const auto read = [](int plane, const std::uint8_t* from, int lane, int position) {
      const cpu::Nibble at = cpu::plane_place(plane, 0, lane, position, cpu::kStepPositions);
      return from[at.byte] >> at.shift & ((1 << plane) - 1);
    };
    for (int lane = 0; lane < 16; ++lane) {
      for (int i = 0; i < cpu::kStepPositions; ++i) {
        int code = read(kFirst, codes, lane, i);
        if constexpr (kSecond > 0) code |= read(kSecond, more, lane, i) << kFirst;
        to[i / 4 * 64 + lane * 4 + i % 4] = static_cast<std::uint8_t>(table->table[static_cast<std::size_t>(code)]);
      }
    }
  }

  // Rows beyond a register's configuration are unchanged in memory and 0 in the register.
  template <int kTile>
  static void zero() {
    check(state.configured);
    std::memset(state.bytes[kTile], 0, 1024);
    state.set[kTile] = true;
  }
  template <int kTile>
  static void load(const void* p) {
    zero<kTile>();
    std::memcpy(state.bytes[kTile], p, static_cast<std::size_t>(state.rows[kTile]) * 64);
  }
  template <int kTile>
  static void store(void* p) {
    check(state.configured && state.set[kTile]);
    std::memcpy(p, state.bytes[kTile], static_cast<std::size_t>(state.rows[kTile]) * 64);
  }
  template <bool kUnsigned, int kSums, int kRows, int kLevels>
  static void multiply() {
    check(state.configured && state.set[kSums] && state.set[kRows] && state.set[kLevels]);
    check(state.rows[kSums] == state.rows[kRows] && state.rows[kLevels] == 16);
    ++state.products;
    std::int32_t sums[16][16];
    std::int8_t rows[16][64], levels[16][64];
    std::memcpy(sums, state.bytes[kSums], sizeof sums);
    std::memcpy(rows, state.bytes[kRows], sizeof rows);
    std::memcpy(levels, state.bytes[kLevels], sizeof levels);
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n)
        for (int k = 0; k < 64; ++k) sums[m][n] += number<kUnsigned>(rows[m][k]) * levels[k / 4][4 * n + k % 4];
    std::memcpy(state.bytes[kSums], sums, sizeof sums);
  }
};

struct TileIsa : cpu::portable::Isa {
  using Tiles = kv4::Tiles;
};

// Partial states of a task with the memory that it needs, guarded.
struct Task {
  cpu::PagesTask task;
  std::vector<float> o, m, l;

  Task(const Scene& s, const std::vector<SequenceView>& views, const std::vector<float>& q, int rows, int heads,
       bool causal)
      : tiles_(cpu::portable::tiles_scratch<TileIsa>(s.spec(), rows)) {
    const PageSpec& spec = s.spec();
    const std::size_t k = static_cast<std::size_t>(cpu::pad_channels(spec.key.dim));
    const std::size_t v = static_cast<std::size_t>(cpu::pad_channels(spec.value.dim));
    const std::size_t n = static_cast<std::size_t>(rows), groups = static_cast<std::size_t>(spec.key.groups);
    o.assign(n * v, 0.0f);
    m.assign(n, -std::numeric_limits<float>::infinity());
    l.assign(n, 0.0f);
    codes_.resize(n * k * cpu::portable::Dot::kOctetBytes / 8);
    q_scale_.resize(n * groups);
    q_start_.resize(n * groups);
    constexpr std::size_t kPages = cpu::kPagesAtOnce;
    k_scale_.resize(kPages * groups * kPageTokens);
    v_scale_.resize(kPages * static_cast<std::size_t>(spec.value.groups) * kPageTokens);
    v_unit_.resize(kPages * static_cast<std::size_t>(spec.value.groups));
    mean_.resize(kPages * k);
    second_.resize(kPages * spec.second.rows * k);
    task.spec = &spec;
    task.pages = views[0].pages;
    task.memory = s.pages();
    task.last = task.page_count = views[0].page_count;
    task.last_page_tokens = views[0].last_page_tokens;
    task.position = views[0].pages_position;
    task.rows = rows;
    task.q = q.data();
    task.q_stride = static_cast<std::int64_t>(k);
    task.mask.heads = heads;
    task.mask.causal = causal;
    task.mask.query_position = views[0].query_position;
    task.states = {o.data(), m.data(), l.data(), static_cast<std::int64_t>(v)};
    task.q_codes = codes_.data();
    task.q_scale = q_scale_.data();
    task.q_start = q_start_.data();
    task.k_scale = k_scale_.data();
    task.v_scale = v_scale_.data();
    task.v_unit = v_unit_.data();
    task.mean = mean_.data();
    task.second = second_.data();
    task.tiles = tiles_.data();
  }
  Task(const Task&) = delete;
  bool intact() const { return tiles_.intact(); }

 private:
  std::vector<std::uint8_t> codes_;
  std::vector<float> q_scale_, k_scale_, v_scale_, v_unit_, mean_, second_;
  std::vector<std::int32_t> q_start_;
  tests::Guarded tiles_;
};

// How queries see and weigh the tokens.
struct Sight {
  bool causal = false;
  std::int64_t window = 0;
  double spread = 0.2;  // of the numbers of a query: 20 leaves most pages next to nothing
};

void expect_same(const Shape& shape, int page_tokens, const cases::Rows& count, const Sight& sight) {
  const Scene s(shape, {Held{0, page_tokens, 0, 0}}, false);
  const std::vector<SequenceView> views = s.views(count.queries);
  const int rows = count.queries * count.group, padded = cpu::pad_channels(shape.dim_k);
  std::vector<float> q = cases::normal_rows(rows, padded, shape.seed, sight.spread);
  for (int r = 0; r < rows; ++r) std::fill(q.begin() + r * padded + shape.dim_k, q.begin() + (r + 1) * padded, 0.0f);
  Task vectors(s, views, q, rows, count.group, sight.causal), tiles(s, views, q, rows, count.group, sight.causal);
  vectors.task.mask.window = tiles.task.mask.window = sight.window;
  Tiles::state = TilesState();
  cpu::portable::attend_pages<cpu::portable::Isa>(vectors.task);
  EXPECT_EQ(Tiles::state.products, 0);
  cpu::portable::attend_any_rows<TileIsa>(tiles.task);
  EXPECT_GT(Tiles::state.products, 0);
  EXPECT_EQ(Tiles::state.misuses, 0);
  EXPECT_FALSE(Tiles::state.configured);
  EXPECT_TRUE(tiles.intact());
  // Scores are the same numbers but for the mean's sum; l and o differ by a few roundings of their terms. The integers
  // of the weights are others: a unit of them is the 32512th of a page's largest or the 65535th of a few pages'.
  // Independent errors of a deviation of .41 units, of each token, times levels of about 60, add up to four deviations.
  const double unit = 1.5 / 68 / cpu::portable::Dot::kLimit;
  const double rounding = 4 * 0.41 * 60 * unit * std::sqrt(page_tokens);
  const std::size_t stride = static_cast<std::size_t>(vectors.task.states.o_stride);
  for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
    ASSERT_NEAR(tiles.m[r], vectors.m[r], 1e-6 * std::max(1.0f, std::abs(vectors.m[r]))) << "row " << r;
    ASSERT_NEAR(tiles.l[r], vectors.l[r], 4e-6 * vectors.l[r]) << "row " << r;
    for (int c = 0; c < shape.dim_v; ++c) {
      const std::size_t i = r * stride + static_cast<std::size_t>(c);
      ASSERT_NEAR(tiles.o[i], vectors.o[i], 1e-5 * vectors.l[r] + rounding) << "row " << r << " channel " << c;
    }
  }
}

TEST(TilesPath, EveryHeadDimAndRowCount) {
  std::uint64_t seed = 1;
  for (int d : cases::kHeadDims) {
    for (const cases::Rows& rows : cases::kQueryRows) {
      SCOPED_TRACE("head_dim " + std::to_string(d) + ", " + std::to_string(rows.queries) + " queries, group " +
                   std::to_string(rows.group));
      Shape shape;
      shape.kv_heads = 1;
      shape.dim_k = shape.dim_v = d;
      shape.mean = seed % 3 != 0;
      shape.seed = seed++;
      expect_same(shape, seed % 2 == 0 ? 192 : 130, rows, {.causal = seed % 4 < 2});
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(TilesPath, ScaleGroups) {
  Shape shape;
  shape.kv_heads = 1;
  std::uint64_t seed = 100;
  for (int group_k : {16, 32, 48, 96, 192}) {
    for (int group_v : {16, 48, 96}) {
      SCOPED_TRACE(std::to_string(group_k) + " and " + std::to_string(group_v));
      shape.dim_k = 192;
      shape.dim_v = 96;
      shape.scale_group_k = group_k;
      shape.scale_group_v = group_v;
      shape.seed = seed++;
      expect_same(shape, seed % 2 == 0 ? 100 : 500, {seed % 3 == 0 ? 7 : 19, 1}, {});
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(TilesPath, RefinedKeys) {
  std::uint64_t seed = 300;
  for (int refined : {1, 2}) {
    for (const cases::Rows& rows : cases::kQueryRows) {
      SCOPED_TRACE(std::to_string(refined) + " refined, " + std::to_string(rows.queries) + " queries");
      Shape shape;
      shape.kv_heads = 1;
      shape.dim_k = seed % 2 == 0 ? 80 : 256;
      shape.bits = {seed % 3 == 0 ? 3 : 4, 4, refined};
      shape.seed = seed++;
      expect_same(shape, 192, rows, {.causal = seed % 4 < 2});
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

// Pages are taken a few at a time, and what is due of some is done beside the next.
TEST(TilesPath, ManyPages) {
  Shape shape;
  shape.kv_heads = 1;
  std::uint64_t seed = 500;
  for (int tokens : {64, 256, 257, 321, 1000, 768}) {
    for (int rows : {1, 2, 6, 8, 9, 17}) {
      SCOPED_TRACE(std::to_string(tokens) + " tokens, " + std::to_string(rows) + " rows");
      shape.dim_k = seed % 2 == 0 ? 128 : 96;
      shape.dim_v = seed % 3 == 0 ? 64 : 128;
      shape.bits = {seed % 5 == 0 ? 3 : 4, seed % 7 == 0 ? 6 : 4, seed % 4 == 0 ? 1 : 0};
      shape.scale_group_k = seed % 6 == 0 ? 32 : 0;
      shape.seed = seed++;
      expect_same(shape, tokens, {rows, 1}, {.causal = seed % 2 == 0});
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

// Pages without a visible token, and pages whose weights are too small to count, are left out.
TEST(TilesPath, PagesThatGainNothing) {
  Shape shape;
  shape.kv_heads = 1;
  std::uint64_t seed = 700;
  for (double spread : {0.2, 20.0}) {
    for (std::int64_t window : {0, 1, 100, 700}) {
      for (const cases::Rows& rows : {cases::Rows{1, 6}, cases::Rows{2, 1}, cases::Rows{600, 1}, cases::Rows{20, 3}}) {
        SCOPED_TRACE(std::to_string(spread) + ", window " + std::to_string(window) + ", " +
                     std::to_string(rows.queries) + " queries");
        shape.dim_k = seed % 2 == 0 ? 64 : 128;
        shape.seed = seed++;
        expect_same(shape, 1200, rows, {.causal = true, .window = window, .spread = spread});
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// All products at their largest: nothing overflows at the largest head dim.
TEST(TilesPath, LargestSums) {
  Shape shape;
  shape.kv_heads = 1;
  shape.dim_k = shape.dim_v = kMaxHeadDim;
  shape.mean = false;
  const Scene s(shape, {Held{0, 64, 0, 0}}, false);
  const std::vector<SequenceView> views = s.views(1);
  std::uint8_t* page = page_at(s.pages(), views[0].pages[0]);
  std::memset(page + s.spec().layout.k_codes, 0xff, kMaxHeadDim / 2 * kPageTokens);  // level 127
  std::memset(page + s.spec().layout.v_codes, 0x00, kMaxHeadDim / 2 * kPageTokens);  // level -127
  const std::uint16_t one = f32_to_f16(1.0f);
  for (std::uint32_t j = 0; j < kPageTokens; ++j) {
    std::memcpy(page + s.spec().layout.k_scales + j * 2, &one, 2);
    std::memcpy(page + s.spec().layout.v_scales + j * 2, &one, 2);
  }
  const float score = 3.0f, x = score / (127.0f * kMaxHeadDim);
  const std::vector<float> q(static_cast<std::size_t>(16 * kMaxHeadDim), x);
  Task task(s, views, q, 16, 16, false);
  cpu::portable::attend_any_rows<TileIsa>(task.task);
  for (std::size_t r = 0; r < 16; ++r) {
    EXPECT_NEAR(task.m[r], score, 1e-6 * score);
    EXPECT_NEAR(task.l[r], kPageTokens, 1e-4);
    for (std::size_t c = 0; c < kMaxHeadDim; ++c)
      ASSERT_NEAR(task.o[r * kMaxHeadDim + c], -127.0 * kPageTokens, 127.0 * kPageTokens * 1e-6);
  }
}

}  // namespace
}  // namespace kv4
