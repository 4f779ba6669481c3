// Threads that a caller lends: the same results as from the process's own, and no other thread at work.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "kv4/cache.h"
#include "kv4/cpu.h"

namespace kv4 {
namespace {

constexpr int kThreads = 3, kHeads = 2, kQueryHeads = 8, kDim = 64;

class Lent : public cpu::Executor {
 public:
  int threads() const override { return kThreads; }
  void run(void (*body)(void*, int), void* context) override {
    ++runs;
    std::vector<std::thread> others;
    for (int i = 1; i < kThreads; ++i)
      others.emplace_back([=, this] {
        remember();
        body(context, i);
      });
    remember();
    body(context, 0);
    for (std::thread& t : others) t.join();
  }
  int runs = 0;
  std::set<std::thread::id> ids;

 private:
  void remember() {
    const std::lock_guard lock(mutex_);
    ids.insert(std::this_thread::get_id());
  }
  std::mutex mutex_;
};

TensorView view(const std::vector<float>& data, int heads, int tokens) {
  return {data.data(), DType::f32, {1, heads, tokens, kDim}, {heads * tokens * kDim, tokens * kDim, kDim, 1}};
}

// A prompt, then steps of one token: what each call answered.
std::vector<float> session() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  CacheConfig config;
  config.kv_heads = kHeads;
  config.head_dim_k = config.head_dim_v = kDim;
  std::unique_ptr<Cache> cache;
  EXPECT_TRUE(Cache::create(config, &cache).ok());
  std::vector<float> all;
  for (const int tokens : {700, 1, 1, 1}) {
    std::vector<float> k(static_cast<std::size_t>(kHeads * tokens * kDim)), v(k.size()),
        q(static_cast<std::size_t>(kQueryHeads * tokens * kDim));
    for (std::vector<float>* x : {&k, &v, &q})
      for (float& e : *x) e = normal(random);
    EXPECT_TRUE(cache->append(view(k, kHeads, tokens), view(v, kHeads, tokens)).ok());
    std::vector<float> out(q.size());
    AttendArgs args;
    args.q = view(q, kQueryHeads, tokens);
    const TensorView shape = args.q;
    EXPECT_TRUE(cache->attend(args, {out.data(), DType::f32, shape.shape, shape.stride}).ok());
    EXPECT_TRUE(cache->seal().ok());
    all.insert(all.end(), out.begin(), out.end());
  }
  EXPECT_GT(cache->page_count(0), 0);
  return all;
}

TEST(Executor, ServesCallsOfItsThreadAlone) {
  const int before = cpu::num_threads();
  ASSERT_TRUE(cpu::set_num_threads(kThreads).ok());
  const std::vector<float> own = session();
  ASSERT_TRUE(cpu::set_num_threads(before).ok());

  Lent lent;
  EXPECT_EQ(cpu::set_executor(&lent), nullptr);
  EXPECT_EQ(cpu::num_threads(), kThreads);
  int elsewhere = 0;
  std::thread([&] { elsewhere = cpu::num_threads(); }).join();
  EXPECT_EQ(elsewhere, before);
  const std::vector<float> shared = session();
  EXPECT_EQ(cpu::set_executor(nullptr), &lent);
  EXPECT_EQ(cpu::num_threads(), before);

  EXPECT_EQ(shared, own);
  EXPECT_GE(lent.runs, 4);  // at least one for every call of attend
  const int runs = lent.runs;
  session();
  EXPECT_EQ(lent.runs, runs);
}

}  // namespace
}  // namespace kv4
