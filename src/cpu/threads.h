// Threads of the CPU backend. With OpenMP the pool is the process's own libgomp, which torch
// shares: a second pool would fight its spinning workers for the cores. Without OpenMP (the
// thread-sanitiser build: libgomp is not instrumented) each call starts std::threads. A caller that lends
// threads of its own (kv4::cpu::Executor) is served by those alone.
#pragma once

#include <cstdint>

namespace kv4::cpu {

// Runs body(context, task, thread) for every task in [0, tasks), on `threads` threads (those of
// num_threads(), or 1: the calling thread), tasks handed out in order; returns when all are done.
// thread < threads.
void parallel_for(std::int64_t tasks, int threads, void (*body)(void* context, std::int64_t task, int thread),
                  void* context);

template <class F>
void parallel_for(std::int64_t tasks, int threads, F&& f) {
  parallel_for(
      tasks, threads, [](void* context, std::int64_t task, int thread) { (*static_cast<F*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace kv4::cpu
