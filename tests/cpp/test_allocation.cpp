// Decoding allocates nothing once it is under way: every operator new of this program is counted. Without OpenMP a call
// that takes several threads starts them, which allocates: such a build is held to one.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "allocations.h"
#include "cases.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"

namespace {
std::atomic<long> g_allocations{0};
thread_local long t_until_failure = 0;
thread_local bool t_failed = false;

void* counted(std::size_t bytes, std::size_t alignment) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  if (t_until_failure > 0 && --t_until_failure == 0) {
    t_failed = true;
    return nullptr;
  }
  if (bytes == 0) bytes = 1;
  return alignment <= alignof(std::max_align_t)
             ? std::malloc(bytes)
             : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
void* or_throw(void* p) {
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(std::size_t n) { return or_throw(counted(n, 0)); }
void* operator new[](std::size_t n) { return or_throw(counted(n, 0)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return counted(n, 0); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return counted(n, 0); }
void* operator new(std::size_t n, std::align_val_t a) { return or_throw(counted(n, static_cast<std::size_t>(a))); }
void* operator new[](std::size_t n, std::align_val_t a) { return or_throw(counted(n, static_cast<std::size_t>(a))); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return counted(n, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace kv4 {

namespace allocations {
long count() { return g_allocations.load(); }
void fail_at(long n) {
  t_until_failure = n;
  t_failed = false;
}
bool failed() {
  t_until_failure = 0;
  return t_failed;
}
}  // namespace allocations

namespace {

TEST(Allocation, DecodeAttentionAllocatesNothing) {
  constexpr int kHeads = 12, kKvHeads = 2, kDim = 128, kPrompt = 4000;
  const int threads = cpu::num_threads();
  if (!KV4_TESTS_OPENMP) {
    ASSERT_TRUE(cpu::set_num_threads(1).ok());
  }
  CacheConfig config;
  config.dtype = DType::f32;
  config.kv_heads = kKvHeads;
  config.head_dim_k = config.head_dim_v = kDim;
  std::unique_ptr<Cache> cache;
  ASSERT_TRUE(Cache::create(config, &cache).ok());
  const std::vector<float> rows = cases::normal_rows(kKvHeads * kPrompt, kDim, 1);
  const std::vector<float> q = cases::normal_rows(kHeads, kDim, 2);
  std::vector<float> out(q.size());
  const auto step = [&](std::int64_t tokens) {
    const TensorView x{rows.data(), DType::f32, {1, kKvHeads, tokens, kDim}, {0, tokens * kDim, kDim, 1}};
    ASSERT_TRUE(cache->append(x, x).ok());
  };
  const auto attend = [&] {
    AttendArgs args;
    args.q = {q.data(), DType::f32, {1, kHeads, 1, kDim}, {kHeads * kDim, kDim, kDim, 1}};
    ASSERT_TRUE(cache->attend(args, {out.data(), DType::f32, args.q.shape, args.q.stride}).ok());
  };
  step(kPrompt);
  attend();
  step(1);
  attend();
  step(1);
  ASSERT_GT(cache->sealed_tokens(0), 3000);
  ASSERT_GT(g_allocations.load(), 0);
  const long before = g_allocations.load();
  attend();
  EXPECT_EQ(g_allocations.load(), before);
  ASSERT_TRUE(cpu::set_num_threads(threads).ok());
}

}  // namespace
}  // namespace kv4
