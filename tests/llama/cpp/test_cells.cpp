// Tracking which cells were written, and when.
#include "cells.h"

#include <gtest/gtest.h>

#include "cache_tensors.h"

namespace kv4::llama {
namespace {

TEST(Cells, BlocksAreNumberedThroughAllStreams) {
  CacheTensor t("cache_k_l3", GGML_TYPE_F16, 8, 192, 3);
  const Cells cells(*t.tensor);
  EXPECT_EQ(cells.name, "cache_k_l3");
  EXPECT_EQ(cells.layer_number(), 3);
  EXPECT_EQ(cells.blocks(), 9);
  EXPECT_EQ(cells.block_of(191), 2);
  EXPECT_EQ(cells.block_of(192), 3);
  EXPECT_EQ(cells.block(4) - cells.data, (192 + 64) * 16);
}

TEST(Cells, ABlockSettlesOnceItIsWhole) {
  CacheTensor t("cache_k_l0", GGML_TYPE_F16, 8, 192, 2);
  Cells cells(*t.tensor);
  for (std::int64_t c = 0; c < 64; ++c) {
    EXPECT_FALSE(cells.settled(0, 0));
    cells.wrote(c);
  }
  EXPECT_TRUE(cells.settled(0, 0));
  EXPECT_FALSE(cells.settled(0, 1));
  cells.wrote(192);  // streams count their writes separately
  EXPECT_FALSE(cells.settled(0, 1));
  cells.wrote(64);
  EXPECT_TRUE(cells.settled(0, 1));
  cells.wrote(5);  // again
  EXPECT_FALSE(cells.settled(0, 1));
  EXPECT_TRUE(cells.used(1));
  EXPECT_FALSE(cells.used(2));
  cells.forget();
  EXPECT_FALSE(cells.used(0));
  EXPECT_FALSE(cells.settled(0, 0));
}

TEST(Cells, HistoryGoesWithACopy) {
  CacheTensor t("cache_k_l0", GGML_TYPE_F16, 8, 128, 2);
  Cells cells(*t.tensor);
  for (std::int64_t c = 0; c < 70; ++c) cells.wrote(c);
  for (std::int64_t b = 0; b < 2; ++b) cells.take_history(2 + b, cells, b);
  EXPECT_TRUE(cells.settled(2, 6));
  EXPECT_FALSE(cells.settled(2, 7));
  EXPECT_TRUE(cells.used(3));
  EXPECT_FALSE(cells.settled(3, 0));
}

TEST(Cells, OneValueThatIsNotFiniteIsFound) {
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16}) {
    CacheTensor t("cache_k_l0", type, 8, 128, 1);
    const Cells cells(*t.tensor);
    const std::size_t size = ggml_type_size(type);
    for (const float bad : {INFINITY, -INFINITY, NAN}) {
      for (const std::size_t at : {std::size_t{0}, std::size_t{64 * 8 - 1}}) {
        std::byte* p = cells.block(1) + at * size;
        if (type == GGML_TYPE_F16) *reinterpret_cast<ggml_fp16_t*>(p) = ggml_fp32_to_fp16(bad);
        else *reinterpret_cast<ggml_bf16_t*>(p) = ggml_fp32_to_bf16(bad);
        EXPECT_FALSE(cells.finite(1)) << ggml_type_name(type) << bad << at;
        EXPECT_TRUE(cells.finite(0));
        std::fill(p, p + size, std::byte{0});
        EXPECT_TRUE(cells.finite(1));
      }
    }
  }
}

TEST(Cells, RowsThatKv4KnowsHaveADtype) {
  DType dtype = DType::f32;
  EXPECT_TRUE(dtype_of(GGML_TYPE_F16, &dtype));
  EXPECT_EQ(dtype, DType::f16);
  EXPECT_TRUE(dtype_of(GGML_TYPE_BF16, &dtype));
  EXPECT_EQ(dtype, DType::bf16);
  EXPECT_FALSE(dtype_of(GGML_TYPE_F32, &dtype));
  EXPECT_FALSE(dtype_of(GGML_TYPE_Q8_0, &dtype));
}

}  // namespace
}  // namespace kv4::llama
