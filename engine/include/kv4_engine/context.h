// One conversation with a model: tokens go in, logits come out. Not thread-safe; conversations with one model are independent.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "kv4/recipe.h"
#include "kv4/status.h"
#include "kv4_engine/model.h"

namespace kv4::engine {

enum class CacheKind : std::uint8_t {
  kv4,  // kv4's cache with the given recipe
  f16   // ggml's own attention over a float16 cache, for comparison
};

struct ContextOptions {
  CacheKind cache = CacheKind::kv4;
  Recipe recipe = Recipe::kv4();   // Recipe::exact(): a float16 cache of kv4's
  std::int64_t context = 4096;     // most tokens of the conversation
  int threads = 0;                 // 0: as many as the machine has cores
  int batch = 512;                 // tokens that go through the model at once
};

class Context {
 public:
  // Errors: invalid_argument for an option out of range; unsupported where kv4 has no kernel for the model's heads;
  // out_of_memory where the cache at `context` tokens would not fit beside what is in use.
  static Status create(std::shared_ptr<const Model> model, const ContextOptions& options, std::unique_ptr<Context>* out);
  ~Context();

  // Takes tokens in. logits() are then those after each of the last `answers` tokens (1 to their number).
  // stop: asked between operations; progress: tokens done, after each batch. Either may be null.
  // A call that fails or is stopped leaves the conversation as it was; *stopped (may be null) tells which.
  // Errors: invalid_argument for a token outside the vocabulary; out_of_range beyond the context; kv4's own.
  Status decode(std::span<const std::int32_t> tokens, std::int64_t answers = 1, const std::atomic<bool>* stop = nullptr,
                bool* stopped = nullptr, const std::function<void(std::int64_t)>& progress = nullptr);
  // [answers, vocabulary]; valid until the next call of decode.
  std::span<const float> logits() const;

  std::int64_t length() const;            // tokens held
  // Keeps the first `length` tokens. Errors: out_of_range, also where a sliding window let go of what it would need.
  Status crop(std::int64_t length);
  // Remembers the conversation as it is; rewind() takes it back there, to the bit and any number of times, until the next mark() or
  // the next decode() of more than a batch.
  Status mark();
  Status rewind();
  std::size_t cache_bytes() const;        // what the cache holds
  const ContextOptions& options() const;  // threads filled in
  const Model& model() const;

  struct State;
  State& state() { return *state_; }
  const State& state() const { return *state_; }

 private:
  explicit Context(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kv4::engine
