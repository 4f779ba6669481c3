// The cache against its definition (cache_oracle.h): random sessions of append, attend, crop,
// select, repeat and clone; byte counts; errors.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cache_oracle.h"
#include "cases.h"
#include "kv4/cache.h"

namespace kv4 {
namespace {

constexpr oracle::Shape kShape{4, 2, 64};
// Relative to the largest output: the bound of the attention kernels.
constexpr double kTolerance = 1e-3;
// Codes of a page side that may lie within 1e-4 of a step from a decision boundary: 4,096 codes
// expect under one, and a page sealed from the wrong rows or lambda differs in hundreds.
constexpr int kBoundaryCodes = 5;

TensorView view(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
  return {x.data(), DType::f32, {b, h, t, d}, {h * t * d, t * d, d, 1}};
}
MutableTensorView into(std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
  return {x.data(), DType::f32, {b, h, t, d}, {h * t * d, t * d, d, 1}};
}

std::unique_ptr<Cache> make(const Recipe& recipe, const oracle::Shape& shape = kShape, int sliding_window = 0, DType dtype = DType::f32) {
  CacheConfig config;
  config.recipe = recipe;
  config.dtype = dtype;
  config.kv_heads = shape.kv_heads;
  config.head_dim_k = config.head_dim_v = shape.dim;
  config.sliding_window = sliding_window;
  std::unique_ptr<Cache> cache;
  const Status status = Cache::create(config, &cache);
  EXPECT_TRUE(status.ok()) << status.message();
  return cache;
}

// A cache and one oracle per sequence, driven together.
class Session {
 public:
  Session(const Recipe& recipe, std::vector<std::int32_t> starts, std::uint64_t seed, int sliding_window = 0)
      : cache_(make(recipe, kShape, sliding_window)), starts_(std::move(starts)), random_(seed), seed_(seed), window_(sliding_window) {
    for (std::int32_t start : starts_) oracles_.emplace_back(recipe, kShape, start);
  }

  void step(std::int64_t tokens) {
    const std::int64_t batch = static_cast<std::int64_t>(oracles_.size());
    const int d = kShape.dim;
    std::vector<float> k, v;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (int h = 0; h < kShape.kv_heads; ++h) {
        // The same channel statistics in every call, fresh tokens each time.
        const std::vector<float> all = cases::key_rows(static_cast<int>(tokens), d, 100 + static_cast<std::uint64_t>(h));
        const std::vector<float> noise = cases::normal_rows(tokens, d, random_.bits(), 0.5);
        for (std::size_t i = 0; i < all.size(); ++i) k.push_back(all[i] + noise[i]);
        const std::vector<float> values = cases::normal_rows(tokens, d, random_.bits());
        v.insert(v.end(), values.begin(), values.end());
      }
    }
    ASSERT_TRUE(cache_->append(view(k, batch, kShape.kv_heads, tokens, d), view(v, batch, kShape.kv_heads, tokens, d)).ok());
    const std::vector<float> q = cases::normal_rows(batch * kShape.q_heads * tokens, d, random_.bits(), 0.3);
    std::vector<float> out(static_cast<std::size_t>(batch) * kShape.q_heads * tokens * d, -77.0f);
    AttendArgs args;
    args.q = view(q, batch, kShape.q_heads, tokens, d);
    args.mask.start = starts_.data();
    for (int repeat = 0; repeat < 2; ++repeat) {  // a second call answers the same
      const Status status = cache_->attend(args, into(out, batch, kShape.q_heads, tokens, d));
      ASSERT_TRUE(status.ok()) << status.message();
    }

    for (std::int64_t b = 0; b < batch; ++b) {
      oracle::Sequence& o = oracles_[static_cast<std::size_t>(b)];
      const std::int64_t before = o.length();
      std::vector<oracle::Token> rows(static_cast<std::size_t>(tokens));
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (int h = 0; h < kShape.kv_heads; ++h) {
          const std::size_t at = static_cast<std::size_t>(((b * kShape.kv_heads + h) * tokens + t) * d);
          rows[static_cast<std::size_t>(t)].k.insert(rows[static_cast<std::size_t>(t)].k.end(), k.begin() + at, k.begin() + at + d);
          rows[static_cast<std::size_t>(t)].v.insert(rows[static_cast<std::size_t>(t)].v.end(), v.begin() + at, v.begin() + at + d);
        }
      }
      o.append(rows);
      const auto query = [&](std::int64_t t) {
        std::vector<double> row;
        for (int h = 0; h < kShape.q_heads; ++h) {
          const std::size_t at = static_cast<std::size_t>(((b * kShape.q_heads + h) * tokens + t) * d);
          row.insert(row.end(), q.begin() + at, q.begin() + at + d);
        }
        return row;
      };
      for (std::int64_t t = 0; t < tokens; ++t) o.record(before + t, query(t));
      adopt_codes(b, o);
      if (::testing::Test::HasFatalFailure()) return;
      const std::int64_t stride = std::max<std::int64_t>(1, tokens / 4);
      for (std::int64_t t = tokens - 1; t >= 0; t -= stride) {
        const std::vector<double> want = o.attend(before + t, query(t), 1 / std::sqrt(static_cast<double>(d)), window_);
        double top = 1e-6;
        for (double x : want) top = std::max(top, std::abs(x));
        for (int h = 0; h < kShape.q_heads; ++h)
          for (int c = 0; c < d; ++c)
            ASSERT_NEAR(out[static_cast<std::size_t>(((b * kShape.q_heads + h) * tokens + t) * d + c)], want[static_cast<std::size_t>(h) * d + c],
                        kTolerance * top)
                << "seed " << seed_ << ", sequence " << b << ", position " << before + t << ", head " << h << ", channel " << c;
      }
    }
  }

  void adopt_codes(std::int64_t b, oracle::Sequence& o) {
    const std::int64_t evicted = std::max<std::int64_t>(0, cache_->first() - o.body()) / kPageTokens;
    for (int p = 0; p < cache_->page_count(static_cast<int>(b)); ++p) {
      for (int h = 0; h < kShape.kv_heads; ++h) {
        std::vector<std::uint8_t> k(kPageTokens * kShape.dim / 2), v(k.size());
        std::vector<std::uint16_t> k_scales(kPageTokens), v_scales(kPageTokens);
        ASSERT_TRUE(cache_->page_codes(static_cast<int>(b), p, h, k, v).ok());
        ASSERT_TRUE(cache_->page_scales(static_cast<int>(b), p, h, k_scales, v_scales).ok());
        for (const bool key : {true, false}) {
          const auto codes = reference::from_canonical(key ? k.data() : v.data(), kPageTokens, kShape.dim);
          ASSERT_LE(o.adopt(evicted + p, key, h, codes, key ? k_scales : v_scales), kBoundaryCodes)
              << "seed " << seed_ << ", sequence " << b << ", page " << evicted + p << ", head " << h << (key ? ", keys" : ", values");
        }
      }
    }
  }

  void crop(std::int64_t n) {
    const Status status = cache_->crop(n);
    ASSERT_TRUE(status.ok()) << status.message();
    for (oracle::Sequence& o : oracles_) o.crop(n);
  }
  void select(const std::vector<std::int64_t>& rows) {
    ASSERT_TRUE(cache_->select(rows).ok());
    std::vector<oracle::Sequence> next;
    std::vector<std::int32_t> starts;
    for (std::int64_t r : rows) next.push_back(oracles_[static_cast<std::size_t>(r)]), starts.push_back(starts_[static_cast<std::size_t>(r)]);
    oracles_ = std::move(next);
    starts_ = std::move(starts);
  }
  void clone() { cache_ = cache_->clone(); }

  Cache& cache() { return *cache_; }
  cases::Random& random() { return random_; }
  std::int64_t batch() const { return static_cast<std::int64_t>(oracles_.size()); }

 private:
  std::unique_ptr<Cache> cache_;
  std::vector<std::int32_t> starts_;
  std::vector<oracle::Sequence> oracles_;
  cases::Random random_;
  std::uint64_t seed_;
  int window_;
};

Recipe with(int sinks, int window) {
  Recipe r;
  r.sinks = sinks;
  r.window = window;
  return r;
}

class Sessions : public ::testing::TestWithParam<int> {};

TEST_P(Sessions, EveryQuerySeesWhatTheDefinitionSays) {
  const int seed = GetParam();
  const Recipe recipes[] = {Recipe(), with(0, 0), with(4, 0), with(1, 100), Recipe::exact()};
  Session s(recipes[seed % 5], {0, 7}, static_cast<std::uint64_t>(seed));
  constexpr int kSizes[] = {1, 1, 1, 2, 5, 17, 63, 64, 65, 130};
  s.step(20);
  for (int i = 0; i < 14; ++i) {
    s.step(kSizes[s.random().below(10)]);
    if (HasFatalFailure()) return;
    const int action = s.random().below(8);
    const std::int64_t length = s.cache().length();
    if (action == 0) s.crop(std::max<std::int64_t>(9, length - s.random().below(90)));
    if (action == 1) s.crop(length - s.random().below(6));
    if (action == 2) s.select({s.random().below(static_cast<int>(s.batch())), s.random().below(static_cast<int>(s.batch()))});
    if (action == 3) s.clone();
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, Sessions, ::testing::Range(0, 20));

TEST(Cache, CropOfTheLastCallRestoresOneByOneDecoding) {
  // Speculative decoding: drafts of 8 of which some are rejected, across many page boundaries.
  Session s(Recipe(), {0}, 5);
  s.step(100);
  for (int i = 0; i < 40; ++i) {
    s.step(8);
    s.crop(s.cache().length() - s.random().below(8));
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(s.cache().sealed_tokens(0), 64);
}

TEST(Cache, SlidingWindowEvictsAndStaysRight) {
  for (const Recipe& recipe : {Recipe(), with(4, 0), Recipe::exact()}) {
    Session s(recipe, {0}, 9, 150);
    std::size_t most = 0;
    s.step(40);
    for (int i = 0; i < 60; ++i) {
      s.step(1 + s.random().below(40));
      if (HasFatalFailure()) return;
      if (s.cache().length() > 500) most = std::max(most, s.cache().nbytes());
    }
    EXPECT_GT(s.cache().length(), 900);
    EXPECT_GT(s.cache().first(), s.cache().length() - 150 - 2 * kPageTokens - 40);
    // Everything visible and at most two pages and a call's tokens more.
    EXPECT_LT(most, (150u + 2 * 64 + 41 + 64) * 2 * 2 * 64 * 4 * 9 / 8 + 65536);
    EXPECT_EQ(s.cache().crop(s.cache().first() + 10).code(), StatusCode::out_of_range);
  }
}

TEST(Cache, RecordingEvictsNothing) {
  Session s(Recipe(), {0}, 3, 100);
  s.cache().record_past(true);
  for (int i = 0; i < 12; ++i) s.step(50);
  EXPECT_EQ(s.cache().first(), 0);
  s.crop(300);
  s.step(3);
  s.cache().record_past(false);
  s.step(1);
  s.step(1);
  EXPECT_GT(s.cache().first(), 0);
}

TEST(Cache, BytesAreThreeAndAHalfTimesFewer) {
  // Qwen2.5-1.5B's geometry in bfloat16, prefilled and then decoded for a while.
  const oracle::Shape shape{12, 2, 128};
  for (const auto& [tokens, ratio] : {std::pair{512, 2.0}, {4096, 3.4}}) {
    auto cache = make(Recipe(), shape, 0, DType::bf16);
    const std::vector<std::uint16_t> rows(static_cast<std::size_t>(shape.kv_heads) * tokens * shape.dim, 0x3f80);
    const std::vector<float> q(static_cast<std::size_t>(shape.q_heads) * shape.dim, 0.1f);
    std::vector<float> out(q.size());
    const auto append = [&](std::int64_t t) {
      const TensorView x{rows.data(), DType::bf16, {1, shape.kv_heads, t, shape.dim}, {0, t * shape.dim, shape.dim, 1}};
      ASSERT_TRUE(cache->append(x, x).ok());
      AttendArgs args;
      args.q = view(q, 1, shape.q_heads, 1, shape.dim);
      ASSERT_TRUE(cache->attend(args, into(out, 1, shape.q_heads, 1, shape.dim)).ok());
    };
    append(tokens - 70);
    for (int i = 0; i < 70; ++i) append(1);
    const double fp16 = 2.0 * 2 * shape.kv_heads * shape.dim * tokens;
    EXPECT_LE(static_cast<double>(cache->nbytes()), fp16 / ratio) << tokens;
    // A cropped cache really shrinks.
    const std::size_t before = cache->nbytes();
    ASSERT_TRUE(cache->crop(100).ok());
    if (tokens == 4096) {
      EXPECT_LT(cache->nbytes(), before / 2);
    }
  }
}

TEST(Cache, ArrivalSealsEveryVectorBeforeItIsSeen) {
  const int d = kShape.dim;
  auto cache = make(Recipe::paper());
  auto fork = std::unique_ptr<Cache>();
  cases::Random random(4);
  const auto step = [&](Cache& c, std::int64_t tokens) {
    const std::vector<float> k = cases::normal_rows(kShape.kv_heads * tokens, d, random.bits());
    const std::vector<float> v = cases::normal_rows(kShape.kv_heads * tokens, d, random.bits());
    const std::vector<float> q = cases::normal_rows(kShape.q_heads * tokens, d, random.bits());
    std::vector<float> out(static_cast<std::size_t>(kShape.q_heads) * tokens * d);
    ASSERT_TRUE(c.append(view(k, 1, kShape.kv_heads, tokens, d), view(v, 1, kShape.kv_heads, tokens, d)).ok());
    AttendArgs args;
    args.q = view(q, 1, kShape.q_heads, tokens, d);
    ASSERT_TRUE(c.attend(args, into(out, 1, kShape.q_heads, tokens, d)).ok());
    const std::int64_t length = c.length();
    ASSERT_EQ(c.sealed_tokens(0), length);
    ASSERT_EQ(c.exact_tokens(0), 0);
    std::vector<float> keys(static_cast<std::size_t>(kShape.kv_heads) * length * d), values(keys.size());
    ASSERT_TRUE(c.dense_keys(0, length, into(keys, 1, kShape.kv_heads, length, d)).ok());
    ASSERT_TRUE(c.dense_values(0, length, into(values, 1, kShape.kv_heads, length, d)).ok());
    // Held keys are within half the widest uniform step of the newest rows.
    for (int h = 0; h < kShape.kv_heads; ++h) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        double norm = 0, error = 0;
        for (int c2 = 0; c2 < d; ++c2) {
          const double x = k[static_cast<std::size_t>((h * tokens + t) * d + c2)];
          const double y = keys[static_cast<std::size_t>((h * length + length - tokens + t) * d + c2)];
          norm += x * x;
          error += (x - y) * (x - y);
        }
        // |error per channel| <= step / 2, step = max|x| / 7 <= |x| / 7, in an orthonormal basis.
        ASSERT_LE(std::sqrt(error), std::sqrt(static_cast<double>(d)) * std::sqrt(norm) / 14);
        ASSERT_GT(error, 0);
      }
    }
    // Attention is softmax attention over exactly what is held.
    for (int h = 0; h < kShape.q_heads; ++h) {
      const std::int64_t t = tokens - 1;
      const int kv = h / (kShape.q_heads / kShape.kv_heads);
      std::vector<double> want(d, 0.0);
      double sum = 0;
      for (std::int64_t j = 0; j < length; ++j) {
        double s = 0;
        for (int c2 = 0; c2 < d; ++c2)
          s += static_cast<double>(q[static_cast<std::size_t>((h * tokens + t) * d + c2)]) * keys[static_cast<std::size_t>((kv * length + j) * d + c2)];
        const double w = std::exp(s / std::sqrt(static_cast<double>(d)));
        sum += w;
        for (int c2 = 0; c2 < d; ++c2) want[static_cast<std::size_t>(c2)] += w * values[static_cast<std::size_t>((kv * length + j) * d + c2)];
      }
      for (int c2 = 0; c2 < d; ++c2)
        ASSERT_NEAR(out[static_cast<std::size_t>((h * tokens + t) * d + c2)], want[static_cast<std::size_t>(c2)] / sum, 1e-3);
    }
  };
  for (std::int64_t tokens : {1, 1, 61, 1, 1, 1, 70, 3}) step(*cache, tokens);
  fork = cache->clone();  // both write into the open page, neither sees the other
  step(*cache, 2);
  step(*fork, 5);
  ASSERT_TRUE(cache->crop(70).ok());
  step(*cache, 1);
  ASSERT_TRUE(cache->crop(64).ok());
  step(*cache, 66);
}

TEST(Cache, NonFiniteRowsAreRefusedOnlyWhenSeen) {
  const int d = kShape.dim;
  auto cache = make(Recipe());
  std::vector<float> k = cases::normal_rows(kShape.kv_heads * 10, d, 1), v = k;
  for (int c = 0; c < 3 * d; ++c) {  // head 0, tokens 0 ... 2
    k[static_cast<std::size_t>(c)] = std::numeric_limits<float>::quiet_NaN();
    v[static_cast<std::size_t>(c)] = std::numeric_limits<float>::infinity();
  }
  ASSERT_TRUE(cache->append(view(k, 1, kShape.kv_heads, 10, d), view(v, 1, kShape.kv_heads, 10, d)).ok());
  const std::vector<float> q = cases::normal_rows(kShape.q_heads, d, 2);
  std::vector<float> out(q.size());
  AttendArgs args;
  args.q = view(q, 1, kShape.q_heads, 1, d);
  const Status status = cache->attend(args, into(out, 1, kShape.q_heads, 1, d));
  EXPECT_EQ(status.code(), StatusCode::non_finite);
  EXPECT_NE(status.message().find("k: expected finite values"), std::string::npos) << status.message();
  const std::int32_t start = 3;
  args.mask.start = &start;
  ASSERT_TRUE(cache->attend(args, into(out, 1, kShape.q_heads, 1, d)).ok());
  for (float x : out) EXPECT_TRUE(std::isfinite(x));
}

TEST(Cache, ErrorsNameTheArgumentAndChangeNothing) {
  const int d = kShape.dim;
  auto cache = make(Recipe());
  const std::vector<float> rows = cases::normal_rows(2 * kShape.kv_heads * 30, d, 1);
  std::vector<float> out(static_cast<std::size_t>(kShape.q_heads) * 30 * d);
  const TensorView good = view(rows, 1, kShape.kv_heads, 30, d);
  AttendArgs args;
  args.q = view(rows, 1, kShape.q_heads, 1, d);
  EXPECT_EQ(cache->attend(args, into(out, 1, kShape.q_heads, 1, d)).code(), StatusCode::failed_precondition);
  ASSERT_TRUE(cache->append(good, good).ok());
  const std::uint64_t version = cache->version();
  const auto expect = [&](const Status& status, StatusCode code, const std::string& begins) {
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_EQ(status.message().rfind(begins, 0), 0u) << status.message();
    EXPECT_NE(status.message().find("expected"), std::string::npos);
    EXPECT_NE(status.message().find("got"), std::string::npos);
    EXPECT_EQ(cache->length(), 30);
    EXPECT_EQ(cache->version(), version);
  };
  TensorView bad = good;
  bad.dtype = DType::f16;
  expect(cache->append(bad, good), StatusCode::invalid_argument, "k: ");
  expect(cache->append(good, bad), StatusCode::invalid_argument, "v: ");
  bad = view(rows, 1, kShape.kv_heads, 30, d - 1);
  expect(cache->append(bad, good), StatusCode::invalid_argument, "k: ");
  expect(cache->append(good, view(rows, 1, kShape.kv_heads, 29, d)), StatusCode::invalid_argument, "v: ");
  expect(cache->append(view(rows, 2, kShape.kv_heads, 30, d), view(rows, 2, kShape.kv_heads, 30, d)), StatusCode::invalid_argument, "k: ");
  bad = good;
  bad.stride[3] = 2;
  expect(cache->append(bad, good), StatusCode::invalid_argument, "k: ");
  AttendArgs wrong = args;
  wrong.q = view(rows, 1, 3, 1, d);
  expect(cache->attend(wrong, into(out, 1, 3, 1, d)), StatusCode::invalid_argument, "q: ");
  wrong.q = view(rows, 1, kShape.q_heads, 31, d);
  expect(cache->attend(wrong, into(out, 1, kShape.q_heads, 31, d)), StatusCode::invalid_argument, "q: ");
  expect(cache->attend(args, into(out, 1, kShape.q_heads, 2, d)), StatusCode::invalid_argument, "out: ");
  expect(cache->crop(-1), StatusCode::out_of_range, "length: ");
  expect(cache->crop(31), StatusCode::out_of_range, "length: ");
  const std::int64_t rows_bad[] = {0, 1};
  expect(cache->select(rows_bad), StatusCode::out_of_range, "rows: ");
  expect(cache->repeat(0), StatusCode::invalid_argument, "times: ");
  std::vector<float> nan_query(rows.begin(), rows.begin() + kShape.q_heads * d);
  nan_query[5] = std::numeric_limits<float>::quiet_NaN();
  wrong.q = view(nan_query, 1, kShape.q_heads, 1, d);
  expect(cache->attend(wrong, into(out, 1, kShape.q_heads, 1, d)), StatusCode::non_finite, "q: ");
}

TEST(Cache, CreateRefusesWhatNoKernelServes) {
  CacheConfig config;
  config.kv_heads = 2;
  config.head_dim_k = config.head_dim_v = 64;
  std::unique_ptr<Cache> cache;
  const auto expect = [&](const CacheConfig& c, StatusCode code, const std::string& word) {
    const Status status = Cache::create(c, &cache);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
    EXPECT_EQ(cache, nullptr);
  };
  CacheConfig bad = config;
  bad.kv_heads = 0;
  expect(bad, StatusCode::invalid_argument, "kv_heads");
  bad = config;
  bad.head_dim_k = 20;
  expect(bad, StatusCode::unsupported, "head_dim_k");
  bad = config;
  bad.backend = "abacus";
  expect(bad, StatusCode::invalid_argument, "backend");
  bad = config;
  bad.lambda_k = {1.0f};
  expect(bad, StatusCode::invalid_argument, "lambda_k");
  bad = config;
  bad.recipe.key.lambda = LambdaMode::given;
  expect(bad, StatusCode::invalid_argument, "lambda_k");
  bad = config;
  bad.recipe.window = -1;
  expect(bad, StatusCode::invalid_argument, "window");
  CacheConfig odd = config;  // an exact cache serves any head dim
  odd.recipe = Recipe::exact();
  odd.head_dim_k = 21;
  odd.head_dim_v = 7;
  EXPECT_TRUE(Cache::create(odd, &cache).ok());
}

}  // namespace
}  // namespace kv4
