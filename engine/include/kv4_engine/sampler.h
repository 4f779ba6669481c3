// From logits to the next token, by llama.cpp's library: top-k, top-p, min-p, temperature, then a draw.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kv4/status.h"

namespace kv4::engine {

struct SamplerOptions {
  float temperature = 0.8f;  // 0: the most likely token
  int top_k = 40;            // 0: all
  float top_p = 0.95f;       // 1: all
  float min_p = 0.05f;       // 0: all
  std::uint32_t seed = 0;    // the same seed gives the same tokens for the same logits
};

class Sampler {
 public:
  // Errors: invalid_argument for an option out of range.
  static Status create(const SamplerOptions& options, std::unique_ptr<Sampler>* out);
  ~Sampler();
  std::int32_t sample(std::span<const float> logits);

 private:
  struct State;
  explicit Sampler(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// The most likely token; the first of equals.
std::int32_t most_likely(std::span<const float> logits);

}  // namespace kv4::engine
