// Outputs whose elements overlap each other or an input are refused by name and left unchanged.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "kv4/cache.h"

namespace kv4 {
namespace {

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDim = 64, kTokens = 300, kQueries = 3;

std::array<std::int64_t, 4> rows_of(std::int64_t heads, std::int64_t tokens, std::int64_t width = kDim) {
  return {heads * tokens * width, tokens * width, width, 1};
}

class Output : public ::testing::Test {
 protected:
  void SetUp() override {
    CacheConfig config;
    config.kv_heads = kKvHeads;
    config.head_dim_k = config.head_dim_v = kDim;
    ASSERT_TRUE(Cache::create(config, &cache_).ok());
    const std::vector<float> k = cases::key_rows(kKvHeads * kTokens, kDim, 1);
    const TensorView view{k.data(), DType::f32, {1, kKvHeads, kTokens, kDim}, rows_of(kKvHeads, kTokens)};
    ASSERT_TRUE(cache_->append(view, view).ok());
    q_ = cases::normal_rows(kHeads * kQueries, kDim, 3);
    args_.q = {q_.data(), DType::f32, {1, kHeads, kQueries, kDim}, rows_of(kHeads, kQueries)};
  }

  void refused(const Status& status, const std::string& begins) {
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.message().rfind(begins, 0), 0u) << status.message();
    EXPECT_EQ(q_, cases::normal_rows(kHeads * kQueries, kDim, 3));
  }
  MutableTensorView view(void* data, const std::array<std::int64_t, 4>& stride) const {
    return {data, DType::f32, {1, kHeads, kQueries, kDim}, stride};
  }

  std::unique_ptr<Cache> cache_;
  std::vector<float> q_;
  AttendArgs args_;
};

TEST_F(Output, EveryElementHasAPlaceOfItsOwn) {
  std::vector<float> out(kHeads * kQueries * kDim, 7.0f);
  const std::vector<float> before = out;
  for (const std::array<std::int64_t, 4>& stride : {std::array<std::int64_t, 4>{0, 0, kDim, 1},
                                                    {0, kQueries * kDim, 0, 1},
                                                    {0, kDim, kDim, 1},
                                                    {0, kDim, kDim - 1, 1},
                                                    {0, 1, kDim, 1},
                                                    {0, -kDim, kDim, 1}}) {
    refused(cache_->attend(args_, view(out.data(), stride)),
            "out: expected a place of its own for every element; got strides [0, ");
    refused(cache_->dense_keys(0, kQueries, {out.data(), DType::f32, {1, kKvHeads, kQueries, kDim}, stride}),
            "out: expected a place of its own for every element");
    refused(cache_->dense_values(0, kQueries, {out.data(), DType::f32, {1, kKvHeads, kQueries, kDim}, stride}),
            "out: expected a place of its own for every element");
  }
  refused(cache_->dense_keys(0, kQueries,
                             {nullptr, DType::f32, {1, kKvHeads, kQueries, kDim}, rows_of(kKvHeads, kQueries)}),
          "out: expected data; got a null pointer");
  EXPECT_EQ(out, before);
}

TEST_F(Output, AnyOrderOfAxesAndAnyPaddingIsTaken) {
  std::vector<float> want(kHeads * kQueries * kDim), wide(kHeads * kQueries * 100);
  ASSERT_TRUE(cache_->attend(args_, view(want.data(), rows_of(kHeads, kQueries))).ok());
  const auto same = [&](float* data, std::int64_t head, std::int64_t token) {
    const Status status = cache_->attend(args_, view(data, {0, head, token, 1}));
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::int64_t h = 0; h < kHeads; ++h)
      for (std::int64_t t = 0; t < kQueries; ++t)
        for (std::int64_t c = 0; c < kDim; ++c)
          ASSERT_EQ(data[h * head + t * token + c], want[(h * kQueries + t) * kDim + c]);
  };
  same(wide.data(), kDim, kHeads * kDim);                          // tokens outside
  same(wide.data(), kQueries * 100, 100);                          // padded rows
  same(wide.data() + (kQueries - 1) * 100, kQueries * 100, -100);  // backwards
}

TEST_F(Output, SharesNoMemoryWithTheQueries) {
  refused(cache_->attend(args_, view(q_.data(), rows_of(kHeads, kQueries))),
          "out: expected memory of its own; got memory that q shares");
  std::vector<float> o(kHeads * kQueries * kDim, 7.0f), m(kHeads * kQueries, 7.0f), l(kHeads * kQueries, 7.0f);
  const auto partial = [&](const PartialState& state) { return cache_->attend_partial(args_, kTokens, state); };
  refused(partial({q_.data(), m.data(), l.data()}), "o: expected memory of its own; got memory that q shares");
  refused(partial({o.data(), q_.data() + 5, l.data()}), "m: expected memory of its own; got memory that q shares");
  refused(partial({o.data(), m.data(), q_.data() + q_.size() - 1}),
          "l: expected memory of its own; got memory that q shares");
  refused(partial({o.data(), o.data() + o.size() - 1, l.data()}),
          "m: expected memory of its own; got memory that o shares");
  refused(partial({o.data(), m.data(), m.data()}), "l: expected memory of its own; got memory that m shares");
  EXPECT_EQ(o, std::vector<float>(o.size(), 7.0f));
  EXPECT_EQ(m, std::vector<float>(m.size(), 7.0f));
  EXPECT_TRUE(partial({o.data(), m.data(), l.data()}).ok());
}

// A fused buffer: query and output of a token side by side.
TEST_F(Output, LiesBesideTheQueriesInOneBuffer) {
  std::vector<float> want(kHeads * kQueries * kDim), fused(kHeads * kQueries * 2 * kDim);
  ASSERT_TRUE(cache_->attend(args_, view(want.data(), rows_of(kHeads, kQueries))).ok());
  for (std::int64_t row = 0; row < kHeads * kQueries; ++row)
    std::copy_n(q_.data() + row * kDim, kDim, fused.data() + row * 2 * kDim);
  AttendArgs args;
  args.q = {fused.data(), DType::f32, {1, kHeads, kQueries, kDim}, rows_of(kHeads, kQueries, 2 * kDim)};
  const Status status = cache_->attend(args, view(fused.data() + kDim, rows_of(kHeads, kQueries, 2 * kDim)));
  ASSERT_TRUE(status.ok()) << status.message();
  for (std::int64_t row = 0; row < kHeads * kQueries; ++row)
    for (std::int64_t c = 0; c < kDim; ++c) ASSERT_EQ(fused[(row * 2 + 1) * kDim + c], want[row * kDim + c]);
  refused(cache_->attend(args, view(fused.data() + kDim - 1, rows_of(kHeads, kQueries, 2 * kDim))),
          "out: expected memory of its own");
}

}  // namespace
}  // namespace kv4
