#include "cpu/threads.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kv4/cpu.h"

namespace kv4::cpu {
namespace {

std::atomic<int> g_threads{0};  // 0: the runtime's own number

}  // namespace

int num_threads() {
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
#ifdef _OPENMP
  // The whole team even for fewer tasks: libgomp ends the threads that a smaller team leaves over
  // and must start them again for the next call, torch's included.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t t = 0; t < tasks; ++t) body(context, t, omp_get_thread_num());
#else
  std::atomic<std::int64_t> next{0};
  auto work = [&](int thread) {
    for (std::int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, t, thread);
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads && i < tasks; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& t : pool) t.join();
#endif
}

}  // namespace kv4::cpu
