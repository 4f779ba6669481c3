// Attention over pages with codes of 2 and 3 bits on a CUDA device, on the CPU's cases and within the CPU's bounds.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attend_device.h"

namespace kv4 {
namespace {

using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;
using scene::Widths;

// Scenes made while a test runs have its widths.
class CudaNarrow : public tests::CudaAttend, public testing::WithParamInterface<Widths> {
 protected:
  void SetUp() override {
    CudaAttend::SetUp();
    scene::widths_of_shapes = GetParam();
  }
  void TearDown() override { scene::widths_of_shapes = Widths(); }
};

TEST_P(CudaNarrow, EveryHeadDimAndGroup) { scene::every_head_dim_and_group(tests::kHalves, 1, check); }
TEST_P(CudaNarrow, OnlyPagesAndAPartOfOne) { scene::pages_and_a_part_of_one(check); }
TEST_P(CudaNarrow, ManyQueries) { scene::many_queries(tests::kHalves, {2, 9, 64}, check); }
TEST_P(CudaNarrow, RaggedBatchWithStartsAndWindows) { scene::ragged_batch({1, 7}, 2048, check); }
TEST_P(CudaNarrow, GeneralMasksAndSoftcap) { scene::general_masks({false, true}, check); }
TEST_P(CudaNarrow, LargeMeans) { scene::large_means(check); }

// Pages in chunks, exact rows in blocks, sequences with queries of their own.
TEST_P(CudaNarrow, ChunksAndBlocks) {
  std::uint64_t seed = 9400;
  for (const int d : cases::kHeadDims)
    for (const int group : {3, 9}) {
      SCOPED_TRACE(testing::Message() << "d " << d << ", group " << group);
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = group;
      shape.dtype = group == 3 ? DType::bf16 : DType::f16;
      shape.seed = seed++;
      const Scene s(shape, {{4, 320, 90, 0}, {0, 0, 300, 7}, {0, 640, 64, 0}, {64, 65, 128, 0}});
      check_with(s, Call(s, 4), {group == 3 ? 2 : 0, true}, {4, 1, 0, 3});
      if (HasFatalFailure()) return;
    }
}

INSTANTIATE_TEST_SUITE_P(Bits, CudaNarrow,
                         testing::Values(Widths{2, 2}, Widths{3, 2}, Widths{2, 3}, Widths{4, 2}, Widths{3, 4},
                                         Widths{3, 3}),
                         [](const auto& info) {
                           return "K" + std::to_string(info.param.k) + "V" + std::to_string(info.param.v);
                         });

}  // namespace
}  // namespace kv4
