#include "cpu/threads.h"

#include <atomic>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kv4/cpu.h"

namespace kv4::cpu {
namespace {

std::atomic<int> g_threads{0};  // 0: the runtime's own number
thread_local Executor* t_executor = nullptr;

// Tasks in order of their number, each to whichever thread is free.
struct Queue {
  std::int64_t tasks;
  void (*body)(void*, std::int64_t, int);
  void* context;
  std::atomic<std::int64_t> next{0};

  void work(int thread) {
    for (std::int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, t, thread);
  }
};

}  // namespace

Executor* set_executor(Executor* executor) { return std::exchange(t_executor, executor); }

int num_threads() {
  if (t_executor != nullptr) return t_executor->threads();
  const int n = g_threads.load(std::memory_order_relaxed);
  if (n > 0) return n;
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  const unsigned hardware = std::thread::hardware_concurrency();
  return hardware == 0 ? 1 : static_cast<int>(hardware);
#endif
}

Status set_num_threads(int n) {
  if (n < 1) return invalid_argument("num_threads", "at least 1", std::to_string(n));
  g_threads.store(n, std::memory_order_relaxed);
  return {};
}

void parallel_for(std::int64_t tasks, int threads, void (*body)(void*, std::int64_t, int), void* context) {
  if (threads <= 1 || tasks <= 1) {
    for (std::int64_t t = 0; t < tasks; ++t) body(context, t, 0);
    return;
  }
  if (t_executor != nullptr) {
    Queue queue{tasks, body, context};
    t_executor->run([](void* q, int thread) { static_cast<Queue*>(q)->work(thread); }, &queue);
    return;
  }
#ifdef _OPENMP
  // The whole team even for fewer tasks: libgomp ends the threads that a smaller team leaves over
  // and must start them again for the next call, torch's included.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t t = 0; t < tasks; ++t) body(context, t, omp_get_thread_num());
#else
  Queue queue{tasks, body, context};
  std::vector<std::thread> pool;
  for (int i = 1; i < threads && i < tasks; ++i) pool.emplace_back([&queue, i] { queue.work(i); });
  queue.work(0);
  for (std::thread& t : pool) t.join();
#endif
}

}  // namespace kv4::cpu
