// ggml's threads, lent to kv4: all of them enter a custom operation; the first one leads and calls kv4, the others take their
// shares of each of its parallel loops until the leader leaves. A pool of kv4's own would fight ggml's for the cores.
//
// One epoch is one thing to do: a loop, or to leave. A follower's share of a loop is claimed once, by the follower, or by the
// leader once it has done its own: what a follower that comes late, or whose core another program has, would have done is done
// by then, and the leader waits for nobody who has not begun. ggml's barrier after each operation keeps two operations apart.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kv4/cpu.h"

namespace kv4::engine {

class Team final : public cpu::Executor {
 public:
  // Before a graph is computed on `threads` threads, none of which is inside lead() or follow().
  void reset(int threads) {
    epoch_.store(0, std::memory_order_relaxed);
    pending_.store(0, std::memory_order_relaxed);
    claims_ = std::vector<Claim>(static_cast<std::size_t>(threads));
  }

  // By thread 0 of `threads`: runs f, which may call kv4.
  template <class F>
  void lead(int threads, F&& f) {
    threads_ = threads;
    cpu::Executor* before = cpu::set_executor(this);
    f();
    cpu::set_executor(before);
    body_ = nullptr;
    publish();
  }

  // By every other one; returns when the leader has left.
  void follow(int thread) {
    for (std::uint64_t seen = claims_[static_cast<std::size_t>(thread)].epoch.load(std::memory_order_relaxed);;) {
      await(epoch_, [&](std::uint64_t epoch) { return epoch != seen; });
      seen = epoch_.load(std::memory_order_acquire);
      if (!claim(thread, seen)) continue;  // the leader has done it
      if (body_ == nullptr) return;
      body_(context_, thread);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

  int threads() const override { return threads_; }
  void run(void (*body)(void* context, int thread), void* context) override {
    body_ = body;
    context_ = context;
    pending_.store(threads_ - 1, std::memory_order_relaxed);
    const std::uint64_t epoch = publish();
    body(context, 0);
    for (int i = 1; i < threads_; ++i) {
      if (!claim(i, epoch)) continue;
      body(context, i);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
    await(pending_, [](int pending) { return pending == 0; });
  }

 private:
  struct alignas(64) Claim {
    std::atomic<std::uint64_t> epoch{0};  // the newest whose share is taken
  };

  std::uint64_t publish() {
    const std::uint64_t epoch = epoch_.fetch_add(1, std::memory_order_release) + 1;
    epoch_.notify_all();
    return epoch;
  }
  // Whether the caller is who does that thread's share of the epoch. While it does, no later epoch begins.
  bool claim(int thread, std::uint64_t epoch) {
    std::uint64_t before = epoch - 1;
    return claims_[static_cast<std::size_t>(thread)].epoch.compare_exchange_strong(before, epoch, std::memory_order_acq_rel);
  }

  // Loops come microseconds apart, so it spins for a while; then it sleeps, and leaves its core to others.
  template <class T, class Done>
  static void await(const std::atomic<T>& value, Done&& done) {
    for (int i = 0; i < 2048; ++i) {
      if (done(value.load(std::memory_order_acquire))) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    for (T now = value.load(std::memory_order_acquire); !done(now); now = value.load(std::memory_order_acquire)) value.wait(now, std::memory_order_acquire);
  }

  alignas(64) std::atomic<std::uint64_t> epoch_{0};
  alignas(64) std::atomic<int> pending_{0};
  int threads_ = 1;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::vector<Claim> claims_;
};

}  // namespace kv4::engine
