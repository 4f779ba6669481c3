// ggml's threads, lent to kv4: all of them enter a custom operation; the first one leads and calls kv4, the others take their
// shares of each of its parallel loops until the leader leaves. A pool of kv4's own would fight ggml's for the cores.
//
// One epoch is one thing to do for every follower: a loop's share, or to leave. Followers count epochs, so that one that arrives
// late misses none; ggml's barrier after each operation keeps two operations apart.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kv4/cpu.h"

namespace kv4::engine {

class Team final : public cpu::Executor {
 public:
  // Before a graph is computed on `threads` threads, none of which is inside lead() or follow().
  void reset(int threads) {
    epoch_.store(0, std::memory_order_relaxed);
    pending_.store(0, std::memory_order_relaxed);
    seen_.assign(static_cast<std::size_t>(threads), {});
  }

  // By thread 0 of `threads`: runs f, which may call kv4.
  template <class F>
  void lead(int threads, F&& f) {
    threads_ = threads;
    cpu::Executor* before = cpu::set_executor(this);
    f();
    cpu::set_executor(before);
    body_ = nullptr;
    epoch_.fetch_add(1, std::memory_order_release);
  }

  // By every other one; returns when the leader has left.
  void follow(int thread) {
    std::uint64_t& seen = seen_[static_cast<std::size_t>(thread)].epoch;
    for (;;) {
      wait([&] { return epoch_.load(std::memory_order_acquire) != seen; });
      ++seen;
      if (body_ == nullptr) return;
      body_(context_, thread);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  int threads() const override { return threads_; }
  void run(void (*body)(void* context, int thread), void* context) override {
    body_ = body;
    context_ = context;
    pending_.store(threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    body(context, 0);
    wait([&] { return pending_.load(std::memory_order_acquire) == 0; });
  }

 private:
  struct alignas(64) Seen {
    std::uint64_t epoch = 0;
  };

  // Loops come microseconds apart, so it spins; where there are more threads than cores, it makes way.
  template <class Done>
  static void wait(Done&& done) {
    for (int i = 0; !done(); ++i) {
      if (i >= 4096) {
        std::this_thread::yield();
        continue;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }

  alignas(64) std::atomic<std::uint64_t> epoch_{0};
  alignas(64) std::atomic<int> pending_{0};
  int threads_ = 1;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::vector<Seen> seen_;
};

}  // namespace kv4::engine
