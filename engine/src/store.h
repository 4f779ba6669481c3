// The keys and values of one conversation, in whichever form.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "config.h"
#include "kv4/cache.h"
#include "kv4/recipe.h"
#include "kv4/status.h"
#include "ggml_ptr.h"

namespace kv4::engine {

class Store {
 public:
  virtual ~Store() = default;

  // Adds to a graph: tokens' keys and values go in, their queries are answered. q [head_dim_k, heads, tokens],
  // k [head_dim_k, kv_heads, tokens], v [head_dim_v, kv_heads, tokens], f32. The result is [head_dim_v * heads, tokens].
  virtual ggml_tensor* attend(ggml_context* context, ggml_cgraph* graph, std::int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                              float scale) = 0;
  // A graph for `tokens` after those held serves as long as this number does.
  virtual std::int64_t graph_key(std::int64_t tokens) const = 0;
  // What attend() reads of a graph besides its arguments: made before the layers, filled before each run.
  virtual void make_inputs(ggml_context* context, std::int64_t tokens) = 0;
  virtual void fill_inputs(std::int64_t tokens) = 0;

  // Around each run of a graph of `tokens` tokens on `threads` threads.
  virtual void begin(int threads) = 0;
  virtual bool failed() const = 0;  // asked between operations, from any thread
  // What went wrong; where `ran` is false or something did, the store is as it was before begin().
  virtual Status end(std::int64_t tokens, bool ran) = 0;

  // Keeps what is held now, at the cost of what is added after it; rewind() goes back there, to the bit. One mark at a time.
  virtual Status mark() = 0;
  virtual Status rewind() = 0;
  virtual void forget_mark() = 0;

  virtual std::int64_t length() const = 0;
  virtual Status crop(std::int64_t length) = 0;
  virtual std::size_t nbytes() const = 0;

  // The whole of it as bytes, and back into an empty store of the same configuration.
  virtual Status save(const kv4::Sink& sink) const = 0;
  virtual Status load(const kv4::Source& source) = 0;
};

// Caches of kv4, one a layer, in float16 where they are exact. Errors: those of Cache::create.
Status make_kv4_store(const Config& config, const Recipe& recipe, std::unique_ptr<Store>* out);
// ggml's own: float16 tensors of `context` tokens, flash attention. Errors: out_of_memory.
Status make_f16_store(const Config& config, std::int64_t context, std::unique_ptr<Store>* out);

}  // namespace kv4::engine
