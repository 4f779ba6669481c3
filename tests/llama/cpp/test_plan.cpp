// Plans of masks, read back as attention reads them: every row sees exactly the cells that its mask shows.
#include "plan.h"

#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

#include "cases.h"

namespace kv4::llama {
namespace {

constexpr std::uint16_t kHidden = 0xfc00, kHalf = 0xb800;  // -infinity, -0.5

struct Scene {
  std::int64_t cells;
  int rows, streams = 1, first_stream = 0;
  std::int64_t blocks_of_stream = 0;
  std::vector<std::uint16_t> mask;
  std::vector<std::uint8_t> packed;

  Scene(std::int64_t cells_, int rows_, int streams_ = 1, int first = 0)
      : cells(cells_), rows(rows_), streams(streams_), first_stream(first), blocks_of_stream((cells_ + 63) / 64 + 1) {
    mask.assign(static_cast<std::size_t>(cells * rows * streams), kHidden);
    packed.assign(static_cast<std::size_t>(blocks_of_stream * (streams + first_stream)), 0);
  }
  std::uint16_t& at(int stream, int row, std::int64_t cell) {
    return mask[static_cast<std::size_t>((stream * rows + row) * cells + cell)];
  }
  void show(int stream, int row, std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c <= last; ++c) at(stream, row, c) = 0;
  }
  void pack(int stream, std::int64_t block) {
    packed[static_cast<std::size_t>((first_stream + stream) * blocks_of_stream + block)] = 1;
  }
  MaskRows rows_of() const {
    const std::size_t row = static_cast<std::size_t>(cells) * 2;
    return {reinterpret_cast<const std::byte*>(mask.data()),
            row,
            row * static_cast<std::size_t>(rows),
            cells,
            rows,
            streams};
  }
  Plan plan() const {
    Plan plan;
    plan.make(rows_of(), rows_of().digest(), packed.data(), blocks_of_stream, first_stream);
    return plan;
  }

  // Per row of the call: the cell, numbered across all streams' blocks, and the mask's value there.
  using Seen = std::vector<std::map<std::int64_t, std::uint16_t>>;
  Seen wanted() const {
    Seen seen(static_cast<std::size_t>(rows * streams));
    for (int s = 0; s < streams; ++s)
      for (int t = 0; t < rows; ++t)
        for (std::int64_t c = 0; c < cells; ++c)
          if (const std::uint16_t m = mask[static_cast<std::size_t>((s * rows + t) * cells + c)]; m != kHidden)
            seen[static_cast<std::size_t>(s * rows + t)][(first_stream + s) * blocks_of_stream * 64 + c] = m;
    return seen;
  }
  Seen read(const Plan& plan) const {
    Seen seen(static_cast<std::size_t>(rows * streams));
    std::size_t next = 0;
    for (const Plan::Part& part : plan.parts()) {
      EXPECT_EQ(part.begin, next);
      next = part.end;
      PagedBatch batch;
      Mask m;
      plan.apply(part, &batch, &m);
      EXPECT_EQ(batch.size, static_cast<int>(part.end - part.begin));
      for (int b = 0; b < batch.size; ++b) read_sequence(batch, m, b, &seen);
    }
    return seen;
  }

 private:
  void read_sequence(const PagedBatch& batch, const Mask& m, int b, Seen* seen) const {
    const std::int64_t length = batch.lengths[b], count = batch.queries[b + 1] - batch.queries[b];
    EXPECT_GE(length, count);
    EXPECT_LE(batch.sealed[b], length);
    for (std::int64_t p = 0; p < length; ++p) {
      const std::int32_t id = batch.pages[b * batch.pages_stride + p / 64];
      EXPECT_EQ(packed[static_cast<std::size_t>(id)] != 0, p < batch.sealed[b]) << "block " << id;
      if (batch.sinks != nullptr && p == 0 && batch.sealed[b] > 0) {
        EXPECT_EQ(batch.sinks[b], id);
      }
      for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t row = batch.queries[b] + t, position = length - count + t;
        std::uint16_t added = 0;
        bool visible = true;
        if (m.causal) {
          visible = p <= position && p >= m.start[b] && (m.window[b] == 0 || p > position - m.window[b]);
        } else {
          added = static_cast<const std::uint16_t*>(m.general)[row * m.general_stride[2] + p];
          visible = added != kHidden;
        }
        if (visible) (*seen)[static_cast<std::size_t>(row)][std::int64_t{id} * 64 + p % 64] = added;
      }
    }
  }
};

bool all_plain(const Plan& plan) {
  for (const Plan::Part& p : plan.parts())
    if (!p.plain) return false;
  return true;
}

TEST(Plan, RowsThatEndWithTheirOwnCellNeedNoMask) {
  for (const std::int64_t before : {0, 1, 63, 64, 200}) {
    for (const int rows : {1, 2, 64, 70}) {
      Scene scene(before + rows + 5, rows);
      for (int t = 0; t < rows; ++t) scene.show(0, t, 0, before + t);
      for (std::int64_t b = 0; b < before / 64; ++b) scene.pack(0, b);
      const Plan plan = scene.plan();
      EXPECT_TRUE(all_plain(plan));
      EXPECT_EQ(plan.sequences_of_stream(), 1);
      EXPECT_EQ(scene.read(plan), scene.wanted()) << before << " and " << rows;
    }
  }
}

TEST(Plan, ASlidingWindowIsABeginningThatMoves) {
  for (const std::int64_t window : {1, 30, 64, 100}) {
    for (const int rows : {1, 3, 90}) {
      Scene scene(400, rows);
      for (int t = 0; t < rows; ++t) scene.show(0, t, std::max<std::int64_t>(0, 250 + t - window + 1), 250 + t);
      scene.pack(0, 2);
      const Plan plan = scene.plan();
      EXPECT_TRUE(all_plain(plan)) << window << " and " << rows;
      EXPECT_EQ(scene.read(plan), scene.wanted()) << window << " and " << rows;
    }
  }
}

TEST(Plan, APackedBlockBehindAnExactOneIsReadFirst) {
  Scene scene(300, 2);
  for (int t = 0; t < 2; ++t) scene.show(0, t, 0, 280 + t);
  scene.pack(0, 1);
  scene.pack(0, 3);
  const Plan plan = scene.plan();
  EXPECT_FALSE(all_plain(plan));
  EXPECT_EQ(scene.read(plan), scene.wanted());
}

TEST(Plan, InterleavedSequencesReadTheirOwnBlocksAlone) {
  // Two sequences alternate by 64 cells, then by one cell.
  Scene scene(64 * 8, 2);
  for (int s = 0; s < 2; ++s)
    for (std::int64_t b = s; b < 6; b += 2) scene.show(0, s, b * 64, b * 64 + 63);
  for (int s = 0; s < 2; ++s) scene.show(0, s, 6 * 64 + s, 6 * 64 + s);
  for (std::int64_t b = 0; b < 5; ++b) scene.pack(0, b);
  const Plan plan = scene.plan();
  EXPECT_EQ(plan.sequences_of_stream(), 2);
  EXPECT_EQ(plan.limits().longest, 4 * 64);  // three own blocks and the shared one
  EXPECT_EQ(scene.read(plan), scene.wanted());
}

TEST(Plan, StreamsHaveTheirOwnBlocks) {
  Scene scene(200, 1, 3, 2);
  scene.show(0, 0, 0, 150);
  scene.show(1, 0, 0, 10);
  scene.show(2, 0, 0, 199);
  scene.pack(0, 0);
  scene.pack(2, 0);
  scene.pack(2, 1);
  const Plan plan = scene.plan();
  EXPECT_EQ(plan.sequences_of_stream(), 1);
  EXPECT_EQ(scene.read(plan), scene.wanted());
}

TEST(Plan, WhatAMaskAddsReachesAttention) {
  Scene scene(130, 2);
  for (int t = 0; t < 2; ++t) scene.show(0, t, 0, 120 + t);
  scene.at(0, 1, 70) = kHalf;
  const Plan plan = scene.plan();
  EXPECT_FALSE(all_plain(plan));
  EXPECT_EQ(scene.read(plan), scene.wanted());
}

TEST(Plan, ARowThatSeesNothingHasABlockAllOfWhichIsHidden) {
  Scene scene(128, 3);
  scene.show(0, 1, 64, 100);
  const Plan plan = scene.plan();
  EXPECT_EQ(scene.read(plan), scene.wanted());
  EXPECT_GT(plan.limits().longest, 0);
}

TEST(Plan, WithoutAMaskAllIsSeen) {
  Scene scene(100, 2);
  for (int t = 0; t < 2; ++t) scene.show(0, t, 0, 99);
  MaskRows none = scene.rows_of();
  none.data = nullptr;
  Plan plan;
  plan.make(none, none.digest(), scene.packed.data(), scene.blocks_of_stream, 0);
  EXPECT_EQ(scene.read(plan), scene.wanted());
}

TEST(Plan, SinksAreReadWhereAStreamsFirstBlockIsPackedAndSeen) {
  Scene scene(64 * 6, 2);
  scene.show(0, 0, 0, 64 * 2 + 10);       // starts in the first block
  scene.show(0, 1, 64 * 3, 64 * 4 + 10);  // another sequence, in later blocks
  for (const std::int64_t b : {0, 1, 3}) scene.pack(0, b);
  const Plan plan = scene.plan();
  ASSERT_EQ(plan.parts().size(), 2u);
  for (const Plan::Part& part : plan.parts()) {
    PagedBatch batch;
    Mask mask;
    plan.apply(part, &batch, &mask);
    EXPECT_EQ(batch.sinks != nullptr, part.begin == 0);
  }
  EXPECT_EQ(scene.read(plan), scene.wanted());
}

// Sequences with interleaved runs of cells, some with a window, some blocks packed: the plan always agrees with the
// masks.
TEST(Plan, RandomMasksComeBackAsTheyWere) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    cases::Random random(seed);
    const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random.bits() % n); };
    const int rows = static_cast<int>(1 + below(5)), streams = static_cast<int>(1 + below(3));
    Scene scene(1 + below(500), rows, streams, static_cast<int>(below(2)));
    const std::int64_t sequences = 1 + below(4), run = 1 + below(100), window = below(3) == 0 ? 1 + below(150) : 0;
    for (int s = 0; s < streams; ++s) {
      for (int t = 0; t < rows; ++t) {
        const std::int64_t own = below(static_cast<std::uint64_t>(sequences)),
                           last = below(static_cast<std::uint64_t>(scene.cells));
        for (std::int64_t c = 0; c <= last; ++c)
          if (c / run % sequences == own && (window == 0 || c > last - window))
            scene.at(s, t, c) = below(200) == 0 ? kHalf : 0;
      }
      for (std::int64_t b = 0; b < scene.blocks_of_stream - 1; ++b)
        if (below(2) == 0) scene.pack(s, b);
    }
    ASSERT_EQ(scene.read(scene.plan()), scene.wanted()) << "seed " << seed;
  }
}

TEST(MaskRows, TheDigestIsOfWhatRowsHoldAndNotOfWhereTheyLie) {
  for (const std::int64_t cells : {1, 15, 16, 17, 130}) {
    Scene scene(cells, 2, 2), other = scene;
    EXPECT_EQ(scene.rows_of().digest(), other.rows_of().digest());
    for (std::uint16_t& x : other.mask) {
      const std::uint16_t was = std::exchange(x, 0);
      ASSERT_NE(scene.rows_of().digest(), other.rows_of().digest());
      x = was;
    }
  }
  // Two sequences exchanged.
  Scene a(64, 1), b(64, 1);
  a.at(0, 0, 3) = 0, b.at(0, 0, 19) = 0;
  EXPECT_NE(a.rows_of().digest(), b.rows_of().digest());
}

TEST(Plan, HoldsForTheSameMaskAndTheSamePackedBlocks) {
  Scene scene(200, 2);
  for (int t = 0; t < 2; ++t) scene.show(0, t, 0, 150 + t);
  scene.pack(0, 0);
  const Plan plan = scene.plan();
  const auto holds = [&] {
    return plan.holds(scene.rows_of(), scene.rows_of().digest(), scene.packed.data(), scene.blocks_of_stream,
                      scene.first_stream);
  };
  EXPECT_TRUE(holds());
  scene.pack(0, 1);
  EXPECT_FALSE(holds());
  scene.packed[1] = 0;
  scene.at(0, 1, 3) = kHidden;
  EXPECT_FALSE(holds());
  scene.at(0, 1, 3) = 0;
  EXPECT_TRUE(holds());
  EXPECT_FALSE(plan.holds(scene.rows_of(), scene.rows_of().digest(), scene.packed.data(), scene.blocks_of_stream, 1));
}

}  // namespace
}  // namespace kv4::llama
