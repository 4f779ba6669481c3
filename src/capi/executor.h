// A C program's kv4_executor as the CPU backend's Executor.
#pragma once

#include "kv4/cpu.h"
#include "kv4/kv4.h"

namespace kv4::capi {

class CallerExecutor final : public cpu::Executor {
 public:
  explicit CallerExecutor(const kv4_executor& executor) : executor_(executor) {}
  int threads() const override { return executor_.threads; }
  void run(void (*body)(void* context, int thread), void* context) override {
    executor_.run(executor_.context, body, context);
  }

 private:
  const kv4_executor executor_;
};

// Errors: invalid_argument naming the field.
Status check_executor(const kv4_executor& executor);

}  // namespace kv4::capi
