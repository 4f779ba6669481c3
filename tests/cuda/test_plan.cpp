// How attention is laid out on devices, by what a block of threads may have of shared memory there. Needs no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>

#include "cases.h"
#include "cuda/attend_tuning.h"
#include "cuda/attend_wide.h"

namespace kv4::cuda {
namespace {

// Bytes a CTA may ask for, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr Chip kA100 = {108, 163 * 1024, 80}, kL40 = {142, 99 * 1024, 89}, kH100 = {132, 227 * 1024, 90};

AttendPlan plan_of(const Chip& chip, int dim, int group, int queries, const Load& load = {}) {
  AttendParams p;
  p.batch = 3;
  p.kv_heads = 2;
  p.group = group;
  p.queries = queries;
  p.dim = dim;
  return plan_attend(p, chip, load);
}

struct Expected {
  Chip chip;
  Room room;
};

TEST(CudaPlan, EveryHeadDimAndRowsFitTheDevice) {
  for (const Expected& e : {Expected{kA100, Room::middle}, Expected{kL40, Room::small}, Expected{kH100, Room::large}})
    for (const int dim : kv4::cases::kHeadDims)
      for (const int group : {1, 4, 8, 9, 16}) {
        SCOPED_TRACE(::testing::Message() << "code " << e.chip.code << ", d " << dim << ", group " << group);
        ASSERT_TRUE(has_dim(dim));
        const AttendPlan plan = plan_of(e.chip, dim, group, 1);
        EXPECT_EQ(plan.room, e.room);
        EXPECT_TRUE(runs_in(plan.room, e.chip.code));
        EXPECT_EQ(plan.segment_blocks, 1);  // 12 at most: every segment has multiprocessors of its own
        EXPECT_EQ(plan.ctas, e.chip.multiprocessors);
        EXPECT_EQ(plan.early, e.chip.code >= 90);
        EXPECT_GT(plan.scratch, 0u);
        with_dim(dim, [&](auto d) {
          constexpr int kDim = decltype(d)::value;
          const Readers kind = plan.fused_ctas == 0 && plan.teams ? Readers::twos : Readers::warps;
          const Fit used = fit<kDim>(plan.room, plan.segment_blocks, kind);
          EXPECT_EQ(used.readers, plan.readers_per_cta);
          EXPECT_GE(used.readers, 4);  // one to a scheduler
          EXPECT_GE(used.depth, 2);    // the keys and the values of a page
          const int queues = main_shared<kDim>(kind, used.readers, used.depth, plan.segment_blocks);
          EXPECT_LE(queues + kOffsetsBytes, e.chip.shared);
          EXPECT_GE(plan.most_sequences, 1023);
          EXPECT_LE(queues + 4 * (plan.most_sequences + 1), e.chip.shared);
          return true;
        });
      }
}

TEST(CudaPlan, OneKernelFitsTheDevice) {
  for (const int dim : kv4::cases::kHeadDims)
    with_dim(dim, [](auto d) {
      constexpr int kDim = decltype(d)::value;
      for (int blocks = 1; blocks <= most_segment_blocks(kDim); ++blocks)
        for (const Readers kind : {Readers::warps, Readers::twos, Readers::fours}) {
          if ((kind == Readers::twos) != (kDim >= kLargeDim)) continue;  // not compiled
          SCOPED_TRACE(::testing::Message()
                       << "d " << kDim << ", blocks " << blocks << ", members " << members_of(kind));
          const Fit f = fused_fit<kDim>(kind, blocks);
          EXPECT_EQ(f.readers, kind == Readers::fours  ? kFours
                               : kind == Readers::twos ? kTwos
                               : blocks == 1           ? Tuning<kDim>::kFused
                                                       : Tuning<kDim>::kWarps[blocks - 1]);
          EXPECT_GE(f.depth, std::max(2, members_of(kind)));
          EXPECT_LE(fused_warps(kind, f.readers) * 32, 1024);
          EXPECT_LE(fused_shared<kDim>(kind, f.readers, f.depth, blocks) + kFusedStaticBytes, kH100.shared);
        }
      return true;
    });
}

// plan_of's call has 6 segments: 22 CTAs of 132 for each, of 11 warps or 3 teams.
TEST(CudaPlan, OneKernelWhereSegmentsAreFewAndEven) {
  EXPECT_EQ(plan_of(kH100, 128, 4, 1).fused_ctas, 22);
  EXPECT_EQ(plan_of(kA100, 128, 4, 1).fused_ctas, 0);  // nobody fills its queues
  EXPECT_EQ(plan_of(kL40, 128, 4, 1).fused_ctas, 0);
  // 3 sequences of 2,420 items are 10 rounds of warps for both ways; one alone 10 and 4.
  EXPECT_EQ(plan_of(kH100, 128, 4, 1, {2420, 3 * 2420}).fused_ctas, 22);
  EXPECT_EQ(plan_of(kH100, 128, 4, 1, {2420, 2420 + 2}).fused_ctas, 0);
  // Two rounds of teams are 132 items.
  EXPECT_TRUE(plan_of(kH100, 128, 4, 1, {132, 3 * 132}).teams);
  EXPECT_FALSE(plan_of(kH100, 128, 4, 1, {133, 3 * 133}).teams);
  EXPECT_EQ(plan_of(kH100, 128, 4, 1, {133, 3 * 133}).fused_ctas, 22);
  // At d = 256 only one segment that keeps the whole device busy: plan_of's call never.
  EXPECT_EQ(plan_of(kH100, 256, 4, 1, {1540, 3 * 1540}).fused_ctas, 0);
  AttendParams p;
  p.batch = p.kv_heads = p.group = p.queries = 1;
  p.dim = 256;
  EXPECT_EQ(plan_attend(p, kH100, {2000, 2000}).fused_ctas, 132);
  EXPECT_FALSE(plan_attend(p, kH100, {2000, 2000}).teams);
  EXPECT_EQ(plan_attend(p, kH100, {70, 70}).fused_ctas, 0);
  // Three kernels: four rounds of 4 teams a CTA are 2,112 items, of 6 segments 352 each.
  EXPECT_TRUE(plan_of(kH100, 256, 4, 1, {352, 3 * 352}).teams);
  EXPECT_FALSE(plan_of(kH100, 256, 4, 1, {353, 3 * 353}).teams);
  EXPECT_FALSE(plan_of(kA100, 256, 4, 1, {70, 3 * 70}).teams);
  // 64 queries of 1 head are 8 segments of 8 rows, 48 in all; of 8 heads 32 of 16 rows, more than multiprocessors.
  EXPECT_EQ(plan_of(kH100, 128, 1, 64).fused_ctas, 2);
  EXPECT_EQ(plan_of(kH100, 128, 8, 64).fused_ctas, 0);
}

TEST(CudaPlan, TwoBlocksOfRowsShareAPageWhereSegmentsAreMany) {
  EXPECT_EQ(plan_of(kH100, 128, 4, 32).segment_blocks, 1);  // 16 blocks, 96 in all, of 132 multiprocessors
  EXPECT_EQ(plan_of(kH100, 128, 4, 33).segment_blocks, 2);  // 17, 102
  EXPECT_EQ(plan_of(kA100, 128, 4, 26).segment_blocks, 1);  // 13, 78 of 108
  EXPECT_EQ(plan_of(kA100, 128, 4, 28).segment_blocks, 2);  // 14, 84
  EXPECT_EQ(plan_of(kH100, 256, 16, 2048).segment_blocks, 1);
}

TEST(CudaPlan, ManyRowsReadPagesInTiles) {
  Chip chip = kH100;
  chip.wgmma = true;
  AttendParams p;
  p.batch = 1;
  p.kv_heads = 8;
  p.group = 4;
  p.dim = 128;
  p.k_copy_bytes = 4480;
  const auto splits = [&](int queries, const Load& load = {512, 512}) {
    p.queries = queries;
    return plan_attend(p, chip, load).wide_splits;
  };
  EXPECT_EQ(splits(512), 1);  // 16 tiles of each head, 128 in all, of 132 multiprocessors
  EXPECT_EQ(splits(64), 8);   // 2 of each
  EXPECT_EQ(splits(16), 16);  // one, half full
  EXPECT_EQ(splits(2048), 1);
  EXPECT_EQ(splits(15), 0);  // 60 rows
  EXPECT_EQ(splits(512, {kWideItems - 1, kWideItems - 1}), 0);
  // What serves any call of so many queries, and fewer, serves those whose pages are divided most.
  p.queries = 600;
  const std::size_t most = most_scratch(p, chip);
  for (const int queries : {1, 16, 31, 32, 33, 63, 64, 65, 100, 128, 300, 512, 600}) {
    p.queries = queries;
    EXPECT_LE(plan_attend(p, chip, {512, 512}).scratch, most) << queries;
  }
  p.kv_heads = 2;
  EXPECT_EQ(splits(16), 0);  // 128 rows of all heads
  EXPECT_EQ(splits(32), 66);
  p.mask.kind = Mask::General::boolean;
  EXPECT_EQ(splits(512), 0);
  p.mask.kind = Mask::General::none;
  p.dim = 256;
  EXPECT_EQ(splits(512), 0);
  p.dim = 128;
  p.k_copy_bytes = 0;  // nothing is sealed
  EXPECT_EQ(splits(512), 0);
  p.k_copy_bytes = 4480;
  chip.wgmma = false;
  EXPECT_EQ(splits(512), 0);
}

TEST(CudaPlan, NoMoreIsLeftOutThanMust) {
  for (const int dim : kv4::cases::kHeadDims)
    with_dim(dim, [](auto d) {
      constexpr int kDim = decltype(d)::value;
      using T = Tuning<kDim>;
      for (int blocks = 1; blocks <= most_segment_blocks(kDim); ++blocks) {
        SCOPED_TRACE(::testing::Message() << "d " << kDim << ", blocks " << blocks);
        const int warps = T::kWarps[blocks - 1], depth = T::kDepth[blocks - 1];
        const Fit large = fit<kDim>(Room::large, blocks);
        EXPECT_EQ(large.readers, warps);
        EXPECT_EQ(large.depth, depth);
        for (const Room room : {Room::small, Room::middle}) {
          const Fit f = fit<kDim>(room, blocks);
          const int most = room_bytes(room) - kOffsetsBytes;
          if (f.depth < depth) {
            EXPECT_GT(main_shared<kDim>(Readers::warps, f.readers, f.depth + 1, blocks), most);
          }
          if (f.readers < warps) {
            EXPECT_GT(main_shared<kDim>(Readers::warps, f.readers + 1, 2, blocks), most);
          }
        }
      }
      return true;
    });
}

TEST(CudaPlan, RoomFollowsTheCodeThatRuns) {
  EXPECT_EQ(room_of({132, 227 * 1024, 80}), Room::middle);  // code for 8.0 alone, on 9.0
  EXPECT_EQ(room_of({84, 99 * 1024, 80}), Room::small);     // on 8.6
  EXPECT_EQ(room_of({16, 163 * 1024, 87}), Room::middle);
  EXPECT_EQ(room_of({148, 227 * 1024, 100}), Room::large);
  // Refused: code for 9.0 with 99 KB, none at all, one before 8.0.
  EXPECT_EQ(room_of({170, 99 * 1024, 90}), Room::none);
  EXPECT_EQ(room_of({170, 99 * 1024, 120}), Room::none);
  EXPECT_EQ(room_of({}), Room::none);
  EXPECT_EQ(room_of({80, 96 * 1024, 75}), Room::none);
  // What is asked for is compiled there.
  for (const int code : {80, 86, 87, 89, 90, 100, 120})
    for (const int kib : {99, 163, 227}) {
      const Room room = room_of({1, kib * 1024, code});
      EXPECT_TRUE(room == Room::none || runs_in(room, code)) << code << " " << kib;
    }
}

TEST(CudaPlan, WithoutRoomNothingIsQueued) {
  AttendParams p;
  p.batch = p.kv_heads = p.group = p.queries = 1;
  p.dim = 128;
  const AttendPlan plan = plan_attend(p, {170, 99 * 1024, 120}, {});
  EXPECT_EQ(plan.readers_per_cta, 0);
  EXPECT_EQ(plan.most_sequences, 0);
  std::array<unsigned char, 1> scratch;
  EXPECT_EQ(launch_attend(p, plan, scratch.data(), nullptr), cudaErrorNoKernelImageForDevice);
}

}  // namespace
}  // namespace kv4::cuda
