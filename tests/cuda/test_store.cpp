// Storing the rows of many sequences of one call.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cases.h"
#include "device.h"

namespace kv4 {
namespace {

using tests::DeviceBytes;
using tests::halves;

// Hundreds of sequences of 0 to 300 rows, which are searched for by row, against a share of the grid for each.
TEST(CudaStore, RowsThatFollowOneAnotherGoWhereThoseOfEachSequenceGo) {
  if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  constexpr std::int64_t kDims = 80, kSides = 3, kAlone = 5;  // kAlone: rows before the first sequence's, and behind
  for (const int sequences : {1, 31, 33, 700, 1100}) {
    SCOPED_TRACE(sequences);
    cases::Random random(static_cast<std::uint64_t>(sequences));
    std::vector<SequenceView> views(static_cast<std::size_t>(sequences));
    std::int64_t rows = kAlone;
    for (SequenceView& view : views) {
      view.input_row = rows;
      view.query_count = random.bits() % 50 == 0 ? 300 : static_cast<std::int64_t>(random.bits() % 4);
      rows += view.query_count;
    }
    rows += kAlone;
    const auto count = static_cast<std::size_t>(rows * kSides * kDims);
    std::vector<std::uint16_t> fresh = halves(random, count);
    fresh[count / 2] = 0x7c00;  // a row that is stored as zeros
    const DeviceBytes k(fresh), v(halves(random, count));
    std::vector<std::uint8_t> stored[2][2];
    for (const bool in_order : {false, true}) {
      const DeviceBytes to_k(count * 2, 0xee), to_v(count * 2, 0xee);
      for (SequenceView& view : views) {
        ExactRows& to = view.exact[1];
        to.k = to_k.as<std::uint16_t>() + view.input_row * kSides * kDims;
        to.v = to_v.as<std::uint16_t>() + view.input_row * kSides * kDims;
        to.k_stride = to.v_stride = kSides * kDims;
        to.k_head_stride = to.v_head_stride = kDims;
      }
      const DeviceBytes on_device(views);
      StoreJob job;
      job.k = {k.as(), DType::f16, {1, kSides, rows, kDims}, {0, rows * kDims, kDims, 1}};
      job.v = {v.as(), DType::f16, {1, kSides, rows, kDims}, {0, rows * kDims, kDims, 1}};
      job.sequences = {{on_device.as<SequenceView>(), views.size()}, true, 300};
      job.in_order = in_order;
      ASSERT_TRUE(cuda::backend()->store(job).ok());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      stored[in_order][0] = to_k.read();
      stored[in_order][1] = to_v.read();
    }
    EXPECT_EQ(stored[0][0], stored[1][0]);
    EXPECT_EQ(stored[0][1], stored[1][1]);
    const std::vector<std::uint8_t> nothing(count * 2, 0xee);
    EXPECT_NE(stored[1][0], nothing);
    const std::size_t alone = kAlone * kSides * kDims * 2;
    EXPECT_TRUE(std::equal(nothing.end() - static_cast<std::ptrdiff_t>(alone), nothing.end(),
                           stored[1][0].end() - static_cast<std::ptrdiff_t>(alone)));
  }
}

}  // namespace
}  // namespace kv4
