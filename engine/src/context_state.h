// What a conversation holds.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "ggml_ptr.h"
#include "kv4_engine/context.h"
#include "store.h"

namespace kv4::engine {

struct Context::State {
  // A graph serves every batch of `tokens` tokens and `answers` rows of logits while the store's key stays the same.
  struct Graph {
    std::int64_t tokens = 0, answers = 0, key = -1;
    GgmlContext context;
    ggml_cgraph* graph = nullptr;
    GgmlAllocator allocator;
    ggml_tensor *ids = nullptr, *positions = nullptr, *answered = nullptr, *logits = nullptr;
  };

  Status build(std::int64_t tokens, std::int64_t answers, Graph* out);
  // One batch, of whose last tokens `answers` are answered; *done is false where it was stopped.
  Status run(std::span<const std::int32_t> tokens, std::int64_t answers, bool* done);
  std::uint64_t most_cache_bytes() const;

  std::shared_ptr<const Model> model;
  ContextOptions options;
  std::unique_ptr<Store> store;
  GgmlBackend backend;
  Graph graphs[2];  // of one token, of several
  const std::atomic<bool>* stop = nullptr;
  std::vector<float> logits;
};

}  // namespace kv4::engine
