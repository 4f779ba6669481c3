// When blocks are packed and unpacked, and their contents then.
#include "layer.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cache_tensors.h"

namespace kv4::llama {
namespace {

class LayerTest : public SettingsTest {};

std::vector<float> floats(const std::vector<std::byte>& rows) {
  std::vector<float> out(rows.size() / 2);
  ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t*>(rows.data()), out.data(),
                        static_cast<std::int64_t>(out.size()));
  return out;
}

// Squared error relative to the original's power.
double error_of(const std::vector<std::byte>& was, const std::vector<std::byte>& is) {
  const std::vector<float> a = floats(was), b = floats(is);
  double power = 0, error = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    power += static_cast<double>(a[i]) * a[i];
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  }
  return error / power;
}

TEST_F(LayerTest, ABlockIsPackedOnceItHasLeftTheWindow) {
  CacheLayer c;
  for (std::int64_t cell = 0; cell < 400; ++cell) {
    c.write(cell, 1);
    c.attend();
    // All cells below `cell` were written before it: those before the newest 64 are due.
    EXPECT_EQ(c.packed(), std::max<std::int64_t>(0, cell - 64) / 64) << cell;
  }
}

TEST_F(LayerTest, LayersThatReadTheSameCacheInAStepSeeTheSame) {
  CacheLayer c;
  c.write(0, 300);
  const std::vector<std::byte> rows = CacheLayer::bytes(c.k, 1);
  c.attend();
  c.attend();
  EXPECT_EQ(c.packed(), 0);
  EXPECT_EQ(CacheLayer::bytes(c.k, 1), rows);
  c.write(300, 1);
  EXPECT_EQ(c.packed(), 3);
}

TEST_F(LayerTest, SequencesThatWriteInTurnKeepAWindowEach) {
  CacheLayer c;
  c.write(0, 448);
  c.attend(3);
  c.write(448, 1);
  EXPECT_EQ(c.packed(), (448 - 3 * 64) / 64);
}

TEST_F(LayerTest, WhatWasNotAttendedToIsNotPacked) {
  CacheLayer c;
  c.write(0, 300);
  c.write(300, 10);
  EXPECT_EQ(c.packed(), 0);
}

TEST_F(LayerTest, PackedRowsAreTheRowsToFourBits) {
  CacheLayer c(512, 1, {6, 2, 128, 64});
  c.write(0, 384);
  std::vector<std::vector<std::byte>> k, v;
  for (std::int64_t b = 0; b < 6; ++b) k.push_back(CacheLayer::bytes(c.k, b)), v.push_back(CacheLayer::bytes(c.v, b));
  c.attend();
  c.write(384, 1);
  ASSERT_EQ(c.packed(), 5);
  const std::size_t k_sinks = 4 * c.k.row_bytes, v_sinks = 4 * c.v.row_bytes;
  for (std::int64_t b = 0; b < 5; ++b) {
    const std::vector<std::byte> k_now = c.read(c.k, b), v_now = c.read(c.v, b);
    const auto at = static_cast<std::size_t>(b);
    // Lloyd-Max with 16 levels leaves .0095 of a Gaussian's power, in 64 rows to within a twentieth of that; the keys'
    // lambda gives a little of it away for what queries weigh more.
    EXPECT_LT(error_of(k[at], k_now), 0.0095 * 1.2) << b;
    EXPECT_LT(error_of(v[at], v_now), 0.0095 * 1.1) << b;
    EXPECT_GT(error_of(k[at], k_now), 0.005) << b;
    EXPECT_GT(error_of(v[at], v_now), 0.005) << b;
    EXPECT_EQ(std::memcmp(k_now.data(), k[at].data(), k_sinks) == 0, b == 0) << b;
    EXPECT_EQ(std::memcmp(v_now.data(), v[at].data(), v_sinks) == 0, b == 0) << b;
  }
  EXPECT_EQ(CacheLayer::bytes(c.k, 5), k[5]);
  EXPECT_EQ(c.read(c.v, 5), v[5]);
}

TEST_F(LayerTest, UnpackedRowsAreThoseThatWereRead) {
  CacheLayer c;
  c.write(0, 300);
  c.attend();
  c.write(300, 1);
  ASSERT_EQ(c.packed(), 3);
  std::vector<std::vector<std::byte>> k, v;
  for (std::int64_t b = 0; b < 3; ++b) k.push_back(c.read(c.k, b)), v.push_back(c.read(c.v, b));
  ASSERT_TRUE(c.layer->expose(0, 2).ok());
  EXPECT_EQ(c.packed(), 1);
  ASSERT_TRUE(c.layer->expose_all().ok());
  EXPECT_EQ(c.packed(), 0);
  for (std::int64_t b = 0; b < 3; ++b) {
    EXPECT_EQ(CacheLayer::bytes(c.k, b), k[static_cast<std::size_t>(b)]) << b;
    EXPECT_EQ(CacheLayer::bytes(c.v, b), v[static_cast<std::size_t>(b)]) << b;
  }
}

TEST_F(LayerTest, AWriteUnpacksItsBlockAndNoOther) {
  CacheLayer c;
  c.write(0, 400);
  c.attend();
  c.write(400, 1);
  ASSERT_EQ(c.packed(), 5);
  const std::vector<std::byte> before = c.read(c.k, 2);
  c.write(2 * 64 + 10, 3);
  EXPECT_EQ(c.packed(), 4);
  EXPECT_EQ(c.layer->packed()[2], 0);
  // The rest of the block is unchanged.
  const std::vector<std::byte> now = CacheLayer::bytes(c.k, 2);
  EXPECT_EQ(std::memcmp(now.data(), before.data(), 10 * c.k.row_bytes), 0);
  EXPECT_EQ(std::memcmp(now.data() + 13 * c.k.row_bytes, before.data() + 13 * c.k.row_bytes, 51 * c.k.row_bytes), 0);
  EXPECT_NE(std::memcmp(now.data() + 10 * c.k.row_bytes, before.data() + 10 * c.k.row_bytes, 3 * c.k.row_bytes), 0);
  // It counts as newest until others are written.
  c.attend();
  c.write(401, 50);
  EXPECT_EQ(c.layer->packed()[2], 0);
  c.attend();
  c.write(451, 30);
  EXPECT_EQ(c.layer->packed()[2], 0);
  c.attend();
  c.write(481, 1);
  EXPECT_EQ(c.layer->packed()[2], 1);
}

TEST_F(LayerTest, ABlockWithInfinityStaysExact) {
  CacheLayer c;
  c.write(0, 300);
  const ggml_fp16_t infinity = ggml_fp32_to_fp16(INFINITY);
  std::memcpy(c.v.data + 100 * c.v.row_bytes, &infinity, sizeof infinity);
  c.attend();
  c.write(300, 1);
  EXPECT_EQ(c.packed(), 2);
  EXPECT_EQ(c.layer->packed()[1], 0);
}

TEST_F(LayerTest, ACopiedStreamIsTheSameAndStaysTheSame) {
  CacheLayer c(512, 2);
  c.write(0, 300);
  c.attend();
  c.write(300, 1);
  ASSERT_EQ(c.packed(), 3);
  ASSERT_TRUE(c.layer->copy_stream(0, 1).ok());
  EXPECT_EQ(c.packed(), 6);
  const auto same = [&](std::int64_t blocks) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      EXPECT_EQ(c.layer->packed()[b], c.layer->packed()[8 + b]) << b;
      EXPECT_EQ(c.read(c.k, b), c.read(c.k, 8 + b)) << b;
      EXPECT_EQ(c.read(c.v, b), c.read(c.v, 8 + b)) << b;
    }
  };
  same(8);
  // A write to one does not affect the other.
  c.write(0, 1);
  EXPECT_EQ(c.layer->packed()[0], 0);
  EXPECT_EQ(c.layer->packed()[8], 1);
  // Copied back, empty blocks included, over the old contents.
  c.write(301, 200);
  ASSERT_TRUE(c.layer->copy_stream(1, 0).ok());
  same(8);
  EXPECT_FALSE(c.k.used(6));
}

TEST_F(LayerTest, HeldBytesAreThoseOfPagesAndExactBlocks) {
  CacheLayer c;
  std::size_t exact = 0, packed = 0;
  c.layer->held(&exact, &packed);
  EXPECT_EQ(exact + packed, 0u);
  c.write(0, 300);
  c.attend();
  c.write(300, 1);
  c.layer->held(&exact, &packed);
  // 64 codes of 4 bits and a scale for keys and for values, and the keys' mean: 4.5 bits a value of 64 channels, in
  // pages of 64-byte heads.
  EXPECT_EQ(packed, 3 * c.layer->format().page_bytes());
  EXPECT_NEAR(static_cast<double>(c.layer->format().page_bytes()), 64 * 64 * 2 * 0.5 + 64 * 2 * 2 + 64 * 2, 63);
  EXPECT_EQ(exact, 2 * (64 * 2 * 64 * 2) + 4 * (64 * 2 * 2));  // two blocks of keys and values, and the sinks
}

TEST_F(LayerTest, ForgettingLeavesNothingAndGoesOn) {
  CacheLayer c;
  c.write(0, 300);
  c.attend();
  c.write(300, 1);
  c.layer->forget();
  c.k.forget();
  c.v.forget();
  std::size_t exact = 0, packed = 0;
  c.layer->held(&exact, &packed);
  EXPECT_EQ(exact + packed, 0u);
  c.write(0, 200);
  c.attend();
  c.write(200, 1);
  EXPECT_EQ(c.packed(), 2);
}

TEST_F(LayerTest, ALayerThatStaysExactUnpacksAndPacksNoMore) {
  CacheLayer c;
  c.write(0, 300);
  c.attend();
  c.write(300, 1);
  const std::vector<std::byte> read = c.read(c.k, 1);
  c.layer->keep_exact();
  EXPECT_FALSE(c.layer->packs());
  EXPECT_EQ(c.packed(), 0);
  EXPECT_EQ(CacheLayer::bytes(c.k, 1), read);
  c.attend();
  c.write(301, 200);
  EXPECT_EQ(c.packed(), 0);
}

TEST_F(LayerTest, WhatTurnsPackedKeysHasThemPackedAgain) {
  CacheLayer c;
  c.write(0, 300);
  c.attend();
  ASSERT_TRUE(c.layer->settle().ok());
  EXPECT_EQ(c.packed(), 0);  // nothing was packed before
  c.write(300, 1);
  ASSERT_TRUE(c.layer->expose_all().ok());
  ASSERT_TRUE(c.layer->settle().ok());
  EXPECT_EQ(c.packed(), 3);
}

TEST_F(LayerTest, LambdaFollowsQueries) {
  // Of two layers with the same rows, the one whose queries have one large channel has that channel's error smaller.
  double error[2] = {0, 0};
  for (const bool loud : {false, true}) {
    CacheLayer c(512, 1, {1, 1, 64, 64});
    c.write(0, 300);
    std::vector<float> q(64, 1.0f);
    if (loud) q[5] = 100;
    c.layer->attended({q.data(), DType::f32, {1, 1, 1, 64}, {0, 64, 64, 1}}, 1);
    const std::vector<float> was = floats(CacheLayer::bytes(c.k, 1));
    c.write(300, 1);
    const std::vector<float> is = floats(c.read(c.k, 1));
    for (std::size_t i = 5; i < was.size(); i += 64)
      error[loud ? 1 : 0] += (static_cast<double>(was[i]) - is[i]) * (static_cast<double>(was[i]) - is[i]);
  }
  EXPECT_LT(error[1], error[0] / 4);
}

TEST_F(LayerTest, SaysWhatItDoesNotServe) {
  const auto refused = [](Cells& k, Cells& v, const Geometry& g) {
    std::unique_ptr<Layer> layer;
    const Status status = Layer::create(k, v, g, &layer);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(layer, nullptr);
    return status.message();
  };
  CacheTensor k("cache_k_l0", GGML_TYPE_F16, 128, 256, 1), v("cache_v_l0", GGML_TYPE_F16, 128, 256, 1);
  Cells keys(*k.tensor), values(*v.tensor);
  EXPECT_EQ(refused(keys, keys, {2, 1, 128, 128}),
            "cache: expected values of their own; got values that are a part of the keys");
  EXPECT_EQ(refused(keys, values, {2, 1, 64, 64}),
            "heads: expected rows of 1 KV heads of 64 and 64; got 128 and 128 channels");
  CacheTensor q8("cache_v_l0", GGML_TYPE_Q8_0, 128, 256, 1), wide("cache_v_l0", GGML_TYPE_F32, 128, 256, 1);
  for (const CacheTensor* t : {&q8, &wide}) {
    Cells other(*t->tensor);
    EXPECT_NE(refused(keys, other, {2, 1, 128, 128})
                  .find("cache type: expected f16 or bf16 for keys and values alike; got f16 and "),
              std::string::npos);
  }
  CacheTensor odd_k("cache_k_l0", GGML_TYPE_F16, 128, 100, 1), odd_v("cache_v_l0", GGML_TYPE_F16, 128, 100, 1);
  Cells short_k(*odd_k.tensor), short_v(*odd_v.tensor);
  EXPECT_EQ(refused(short_k, short_v, {2, 1, 128, 128}),
            "cells: expected keys and values alike, a multiple of 64; got 100 and 100");
  CacheTensor tiny_k("cache_k_l0", GGML_TYPE_F16, 16, 256, 1), tiny_v("cache_v_l0", GGML_TYPE_F16, 16, 256, 1);
  Cells few_k(*tiny_k.tensor), few_v(*tiny_v.tensor);
  EXPECT_EQ(refused(few_k, few_v, {2, 1, 16, 16}).rfind("head_dim", 0), 0u);
}

}  // namespace
}  // namespace kv4::llama
