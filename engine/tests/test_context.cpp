// A conversation: batches, threads, stopping, cropping, refusals.
#include <thread>

#include "kv4_engine/memory.h"
#include "kv4_engine/sampler.h"
#include "tiny_model.h"

namespace kv4::engine {
namespace {

class ContextTest : public EngineTest {};

TEST_F(ContextTest, BatchesAndThreadsChangeNothing) {
  for (const TinyModel& m : tiny_models()) {
    SCOPED_TRACE(m.architecture);
    const std::shared_ptr<const Model> model = load(m);
    const std::vector<std::int32_t> tokens = some_tokens(90);
    std::vector<float> first;
    for (const int threads : {1, 2, 3}) {
      for (const int batch : {90, 32, 1}) {
        ContextOptions options = exact(threads);
        options.batch = batch;
        const std::unique_ptr<Context> c = context(model, options);
        ASSERT_TRUE(c->decode(tokens, 3).ok());
        const std::vector<float> logits = copy(c->logits());
        ASSERT_EQ(logits.size(), static_cast<std::size_t>(3 * kTinyVocabulary));
        if (first.empty()) first = logits;
        double most = 0, worst = 0;
        for (std::size_t i = 0; i < logits.size(); ++i) {
          most = std::max(most, static_cast<double>(std::abs(first[i])));
          worst = std::max(worst, static_cast<double>(std::abs(first[i] - logits[i])));
        }
        // A float32 product's order of sums changes; a float16 of the cache may then round the other way.
        EXPECT_LT(worst, 4e-3 * most) << threads << " threads, batches of " << batch;
      }
    }
  }
}

TEST_F(ContextTest, AStoppedCallLeavesNoTrace) {
  const std::shared_ptr<const Model> model = load(tiny_models()[3]);
  ContextOptions at_once = packed();  // one batch, which the layers it came to take back themselves
  at_once.batch = 1024;
  for (const ContextOptions& options : {exact(), packed(), at_once}) {
    const std::unique_ptr<Context> c = context(model, options), untouched = context(model, options);
    const std::vector<std::int32_t> prompt = some_tokens(400), more = some_tokens(700, 6), next = some_tokens(3, 7);
    ASSERT_TRUE(c->decode(prompt).ok());
    ASSERT_TRUE(untouched->decode(prompt).ok());
    // Before the first operation, between batches, and in the middle of one.
    for (const int when : {0, 1, 2}) {
      std::atomic<bool> stop{when == 0};
      bool stopped = false;
      std::thread later;
      if (when == 2) later = std::thread([&] { stop.store(true); });
      ASSERT_TRUE(c->mark().ok());
      ASSERT_TRUE(c->decode(more, 1, &stop, &stopped, [&](std::int64_t) {
                     if (when == 1) stop.store(true);
                   }).ok());
      if (later.joinable()) later.join();
      EXPECT_TRUE(stopped || when != 0);
      if (!stopped) {  // it was done before
        ASSERT_TRUE(c->rewind().ok());
      }
      EXPECT_EQ(c->length(), 400);
    }
    ASSERT_TRUE(c->decode(next).ok());
    ASSERT_TRUE(untouched->decode(next).ok());
    EXPECT_EQ(copy(c->logits()), copy(untouched->logits()));
  }
}

TEST_F(ContextTest, RewindsToTheBit) {
  const std::shared_ptr<const Model> model = load(tiny_models()[3]);
  for (const ContextOptions& options : {exact(), packed()}) {
    const std::unique_ptr<Context> c = context(model, options);
    ASSERT_TRUE(c->decode(some_tokens(250)).ok());
    ASSERT_TRUE(c->mark().ok());
    std::vector<float> first;
    for (int again = 0; again < 3; ++again) {
      for (const std::int32_t token : some_tokens(100, 6)) ASSERT_TRUE(c->decode(std::vector{token}).ok());
      if (again == 0) first = copy(c->logits());
      EXPECT_EQ(copy(c->logits()), first);
      ASSERT_TRUE(c->rewind().ok());
      EXPECT_EQ(c->length(), 250);
    }
  }
}

TEST_F(ContextTest, ACroppedConversationGoesOnAsIfItHadEnded) {
  const std::shared_ptr<const Model> model = load(tiny_models()[1]);
  const std::vector<std::int32_t> tokens = some_tokens(90), other = some_tokens(30, 9);
  const std::unique_ptr<Context> c = context(model, exact()), fresh = context(model, exact());
  ASSERT_TRUE(c->decode(tokens).ok());
  ASSERT_TRUE(c->crop(50).ok());
  EXPECT_EQ(c->length(), 50);
  ASSERT_TRUE(c->decode(other).ok());
  ASSERT_TRUE(fresh->decode(std::span(tokens).first(50)).ok());
  ASSERT_TRUE(fresh->decode(other).ok());
  const std::vector<float> a = copy(c->logits()), b = copy(fresh->logits());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-3 * (1 + std::abs(b[i])));
  EXPECT_EQ(c->crop(81).code(), StatusCode::out_of_range);
  EXPECT_EQ(c->crop(-1).code(), StatusCode::out_of_range);
  EXPECT_EQ(c->length(), 80);
}

TEST_F(ContextTest, PackedBytesAreFewer) {
  TinyModel m = tiny_models()[0];
  const std::shared_ptr<const Model> model = load(m);
  const std::unique_ptr<Context> four = context(model, packed()), sixteen = context(model, exact());
  const std::vector<std::int32_t> tokens = some_tokens(1900);
  ASSERT_TRUE(four->decode(tokens).ok());
  ASSERT_TRUE(sixteen->decode(tokens).ok());
  ASSERT_TRUE(four->decode(some_tokens(1)).ok());  // seals what the prompt left due
  const double ratio = static_cast<double>(sixteen->cache_bytes()) / static_cast<double>(four->cache_bytes());
  EXPECT_GT(ratio, 2.0);
  EXPECT_GE(sixteen->cache_bytes(), static_cast<std::size_t>(2 * 2 * 2 * 2 * 64 * 1900));  // layers, sides, bytes, heads, channels, tokens
}

TEST_F(ContextTest, Refusals) {
  const std::shared_ptr<const Model> model = load(tiny_models()[0]);
  const auto refused = [&](const ContextOptions& options, const std::string& name) {
    std::unique_ptr<Context> c;
    const Status status = Context::create(model, options, &c);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(c, nullptr);
    EXPECT_EQ(status.message().substr(0, name.size() + 1), name + ":") << status.message();
  };
  ContextOptions o = exact();
  o.context = 2049;
  refused(o, "context");
  o = exact();
  o.threads = -1;
  refused(o, "threads");
  o = exact();
  o.batch = 0;
  refused(o, "batch");

  o = exact();
  o.context = 20;
  const std::unique_ptr<Context> c = context(model, o);
  const std::vector<std::int32_t> tokens = some_tokens(15);
  ASSERT_TRUE(c->decode(tokens).ok());
  EXPECT_EQ(c->decode(tokens).code(), StatusCode::out_of_range);
  EXPECT_EQ(c->length(), 15);
  for (const std::int32_t bad : {-1, static_cast<std::int32_t>(kTinyVocabulary)}) EXPECT_EQ(c->decode(std::vector{bad}).code(), StatusCode::invalid_argument);
  EXPECT_EQ(c->decode({}).code(), StatusCode::invalid_argument);
  EXPECT_EQ(c->decode(std::span(tokens).first(2), 3).code(), StatusCode::invalid_argument);
  EXPECT_EQ(c->length(), 15);
  EXPECT_TRUE(c->decode(std::span(tokens).first(5)).ok());
}

TEST(Memory, SaysWhatIsMissing) {
  if (available_memory() == 0) GTEST_SKIP() << "the system does not say how much memory is free";
  EXPECT_TRUE(check_memory("cache", 1).ok());
  const Status status = check_memory("cache", std::uint64_t{1} << 60);
  EXPECT_EQ(status.code(), StatusCode::out_of_memory);
  EXPECT_EQ(status.message().rfind("cache: expected 1099511627776 MiB of free memory; got ", 0), 0u) << status.message();
  EXPECT_GT(resident_memory(), std::uint64_t{1} << 20);
}

TEST(SamplerTest, DrawsWhatItSays) {
  const std::vector<float> logits = {0.0f, 3.0f, 2.5f, -1.0f, 2.9f};
  EXPECT_EQ(most_likely(logits), 1);
  const auto draw = [&](SamplerOptions o, int times) {
    std::unique_ptr<Sampler> s;
    EXPECT_TRUE(Sampler::create(o, &s).ok());
    std::vector<int> seen(logits.size());
    for (int i = 0; i < times; ++i) ++seen[static_cast<std::size_t>(s->sample(logits))];
    return seen;
  };
  EXPECT_EQ(draw({.temperature = 0}, 20)[1], 20);
  EXPECT_EQ(draw({.temperature = 2, .top_k = 1, .top_p = 1, .min_p = 0}, 20)[1], 20);
  const std::vector<int> two = draw({.temperature = 1, .top_k = 2, .top_p = 1, .min_p = 0, .seed = 3}, 400);
  EXPECT_EQ(two[1] + two[4], 400);
  EXPECT_GT(two[4], 100);
  const std::vector<int> likely = draw({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0.5f, .seed = 3}, 400);
  EXPECT_EQ(likely[0] + likely[3], 0);
  EXPECT_EQ(draw({.temperature = 1, .seed = 3}, 50), draw({.temperature = 1, .seed = 3}, 50));
  std::unique_ptr<Sampler> s;
  EXPECT_FALSE(Sampler::create({.temperature = -1}, &s).ok());
  EXPECT_FALSE(Sampler::create({.top_k = -1}, &s).ok());
  EXPECT_FALSE(Sampler::create({.top_p = 0}, &s).ok());
  EXPECT_FALSE(Sampler::create({.min_p = 1}, &s).ok());
}

}  // namespace
}  // namespace kv4::engine
