// The cache against its definition: random sessions (cache_session.h) of append, attend, crop,
// select, clone, save and load; byte counts; errors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache_session.h"

namespace kv4 {
namespace {

using namespace sessions;

class Sessions : public ::testing::TestWithParam<int> {};
TEST_P(Sessions, EveryQuerySeesWhatTheDefinitionSays) { random_session(GetParam()); }
INSTANTIATE_TEST_SUITE_P(Seeds, Sessions, ::testing::Range(0, kSeeds));

TEST(Cache, CropOfTheLastCallRestoresOneByOneDecoding) { crops_of_the_last_call(); }
TEST(Cache, SlidingWindowEvictsAndStaysRight) { sliding_window(); }
// A call of many windows passes tokens that were never sealed.
TEST(Cache, LongCallsEvictForGood) {
  for (const int sinks : {0, 4}) {
    Session s(with(sinks, 64), {0}, 10, 150);
    for (const std::int64_t tokens : {1000, 1, 700, 1}) {
      s.step(tokens);
      if (HasFatalFailure()) return;
      if (tokens > 1) continue;
      const std::int64_t first = s.cache().first(), length = s.cache().length();
      EXPECT_GT(first, length - 150 - kPageTokens);
      EXPECT_LE(first, length - 150 + 1);
      EXPECT_EQ(s.cache().crop(first + 148).code(), StatusCode::out_of_range);
      s.crop(first + 149);
      s.step(3);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Cache, RecordingEvictsNothing) { recording(); }

// Lambda stays fixed when the pages that it came from have left a sliding window.
TEST(Cache, LambdaIsFixedByTheFirstSealedPageForGood) {
  Session s(with(4, 64), {0}, 10, 100);
  EXPECT_FALSE([&] {
    s.step(60);
    return s.cache().lambda_fixed(0);
  }());
  bool fixed = false, without_pages = false;
  for (int i = 0; i < 200; ++i) {
    s.step(1);
    if (HasFatalFailure()) return;
    EXPECT_TRUE(s.cache().lambda_fixed(0) || !fixed) << i;
    fixed = s.cache().lambda_fixed(0);
    without_pages = without_pages || (fixed && s.cache().sealed_tokens(0) == 0);
    EXPECT_NE(lambda_of(s.cache(), 0).empty(), fixed) << i;
  }
  EXPECT_TRUE(fixed);
  EXPECT_TRUE(without_pages);
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

// Short texts, all exact: 1.3 times fp16 keys and values at most in each of a model's layers, which have rotations in
// common, whether they came one by one or at once.
TEST(Cache, ShortTextsTakeLittleMoreThanFp16) {
  for (const oracle::Shape& shape : {oracle::Shape{4, 1, 256}, oracle::Shape{14, 2, 64}, oracle::Shape{12, 2, 128}}) {
    for (const bool at_once : {false, true}) {
      auto cache = make(Recipe(), shape, 0, DType::bf16);
      const std::vector<std::uint16_t> rows(static_cast<std::size_t>(shape.kv_heads) * 128 * shape.dim, 0x3f80);
      const std::vector<float> q(static_cast<std::size_t>(shape.q_heads) * 128 * shape.dim, 0.1f);
      std::vector<float> out(q.size());
      for (const std::int64_t end : {30, 64, 100, 128}) {
        const std::int64_t tokens = at_once ? end - cache->length() : 1;
        while (cache->length() < end) {
          const TensorView x{
              rows.data(), DType::bf16, {1, shape.kv_heads, tokens, shape.dim}, {0, tokens * shape.dim, shape.dim, 1}};
          ASSERT_TRUE(cache->append(x, x).ok());
          AttendArgs args;
          args.q = view(q, 1, shape.q_heads, tokens, shape.dim);
          ASSERT_TRUE(cache->attend(args, into(out, 1, shape.q_heads, tokens, shape.dim)).ok());
        }
        const double fp16 = 2.0 * 2 * shape.kv_heads * shape.dim * static_cast<double>(end);
        double shared = 0;
        for (const SharedMemory& memory : cache->shared()) shared += static_cast<double>(memory.bytes);
        constexpr int kLayers = 18;
        EXPECT_LE(static_cast<double>(cache->nbytes()) - shared + shared / kLayers, 1.3 * fp16)
            << "head dim " << shape.dim << ", " << end << " tokens, at once: " << at_once;
      }
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
    // Attention is softmax attention over exactly the tokens held.
    for (int h = 0; h < kShape.q_heads; ++h) {
      const std::int64_t t = tokens - 1;
      const int kv = h / (kShape.q_heads / kShape.kv_heads);
      std::vector<double> want(d, 0.0);
      double sum = 0;
      for (std::int64_t j = 0; j < length; ++j) {
        double s = 0;
        for (int c2 = 0; c2 < d; ++c2)
          s += static_cast<double>(q[static_cast<std::size_t>((h * tokens + t) * d + c2)]) *
               keys[static_cast<std::size_t>((kv * length + j) * d + c2)];
        const double w = std::exp(s / std::sqrt(static_cast<double>(d)));
        sum += w;
        for (int c2 = 0; c2 < d; ++c2)
          want[static_cast<std::size_t>(c2)] += w * values[static_cast<std::size_t>((kv * length + j) * d + c2)];
      }
      for (int c2 = 0; c2 < d; ++c2)
        ASSERT_NEAR(out[static_cast<std::size_t>((h * tokens + t) * d + c2)], want[static_cast<std::size_t>(c2)] / sum,
                    1e-3);
    }
  };
  for (std::int64_t tokens : {1, 1, 61, 1, 1, 1, 70, 3}) step(*cache, tokens);
  fork = fork_of(*cache);  // both write into the open page, neither sees the other
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

// Rows of a long call are stored by several threads: each of them may find such rows, two of them the same token's.
TEST(Cache, NonFiniteRowsOfALongCallAreAllFound) {
  const int d = kShape.dim, heads = kShape.kv_heads, tokens = 6000;
  auto cache = make(Recipe::exact());
  std::vector<float> k = cases::normal_rows(heads * tokens, d, 1), v = k;
  const auto row = [&](std::vector<float>& x, int head, int token) {
    return x.begin() + (static_cast<std::ptrdiff_t>(head) * tokens + token) * d;
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int head = 0; head < heads; ++head) *row(k, head, 3) = *row(v, head, 3) = nan;
  *row(k, 0, 511) = nan;
  *row(v, heads - 1, 5999) = nan;
  ASSERT_TRUE(cache->append(view(k, 1, heads, tokens, d), view(v, 1, heads, tokens, d)).ok());
  const std::vector<float> q = cases::normal_rows(kShape.q_heads, d, 2);
  std::vector<float> out(q.size());
  AttendArgs args;
  args.q = view(q, 1, kShape.q_heads, 1, d);
  for (const std::int32_t start : {0, 4, 512}) {
    args.mask.start = &start;
    const Status status = cache->attend(args, into(out, 1, kShape.q_heads, 1, d));
    EXPECT_EQ(status.code(), StatusCode::non_finite);
    EXPECT_NE(status.message().find(start == 512 ? "v: expected finite" : "k: expected finite"), std::string::npos)
        << status.message();
  }
  ASSERT_TRUE(cache->crop(5999).ok());
  const std::int32_t start = 512;
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
  expect(cache->append(view(rows, 2, kShape.kv_heads, 30, d), view(rows, 2, kShape.kv_heads, 30, d)),
         StatusCode::invalid_argument, "k: ");
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

TEST(Cache, ReserveKeepsWhatIsHeld) {
  for (const Recipe& recipe : {Recipe(), Recipe::exact()}) {
    Session s(recipe, {0, 3}, 6);
    EXPECT_EQ(s.cache().reserve(10).code(), StatusCode::failed_precondition);
    s.step(100);
    EXPECT_EQ(s.cache().reserve(-1).code(), StatusCode::invalid_argument);
    ASSERT_TRUE(s.cache().reserve(300).ok());
    const std::size_t bytes = s.cache().nbytes();
    for (int i = 0; i < 6; ++i) s.step(50);
    if (HasFatalFailure()) return;
    if (recipe.seal == SealMode::never) {
      EXPECT_LE(s.cache().nbytes(), bytes + 4096) << "room was there";
    }
  }
}

TEST(Cache, BackendsAreNamed) {
  const std::vector<std::string> names = backends();
  EXPECT_NE(std::find(names.begin(), names.end(), "cpu"), names.end());
  EXPECT_EQ(why_not("cpu"), "");
  EXPECT_NE(why_not("cpu:1"), "");
  EXPECT_EQ(why_not("abacus"), "built without it");
  Session s(Recipe(), {0}, 7);
  s.step(5);
  const std::uint64_t version = s.cache().version();
  EXPECT_EQ(s.cache().advance().code(), StatusCode::unsupported) << "the host's memory is not captured";
  EXPECT_EQ(s.cache().version(), version);
  EXPECT_EQ(s.cache().length(), 5);
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
