// Architectures: which tensors a model has and how a layer is computed from them. Each is one file in arch/ and one line in
// architectures().
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "config.h"
#include "gguf_file.h"
#include "store.h"
#include "weights.h"

namespace kv4::engine {

// A graph of `tokens` tokens, while it is being built.
class GraphBuilder {
 public:
  GraphBuilder(const Config& config, const Weights& weights, Store& store, ggml_context* context, ggml_cgraph* graph, std::int64_t tokens)
      : config(config), weights_(weights), store_(store), context_(context), graph_(graph), tokens_(tokens) {}

  const Config& config;
  ggml_context* context() const { return context_; }
  void set_inputs(ggml_tensor* positions, ggml_tensor* answered) {
    positions_ = positions;
    answered_ = answered;
  }

  ggml_tensor* weight(const std::string& name) const { return weights_.find(name); }
  // Root mean square normalisation, times the weight of this name.
  ggml_tensor* norm(ggml_tensor* x, const std::string& name) const;
  // NAME.weight x + NAME.bias, the bias where the model has one.
  ggml_tensor* linear(ggml_tensor* x, const std::string& name) const;
  // A projection as heads: [head_dim, heads, tokens].
  ggml_tensor* heads(ggml_tensor* x, const std::string& name, std::int64_t head_dim) const;
  // Rotary embedding. neox: channel i pairs with i + rope_dim / 2; else with its neighbour. factors: divides each pair's angle; may be null.
  ggml_tensor* rope(ggml_tensor* x, bool neox, float base, float scale, ggml_tensor* factors = nullptr) const;
  // Keys and values into the cache, the queries' answers, through the output projection.
  ggml_tensor* attend(std::int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, float scale) const;
  // The rest of a layer without further norms: attention, then the MLP with SiLU, each added to what it was given.
  ggml_tensor* attend_and_feed(std::int64_t layer, ggml_tensor* x, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) const;
  enum class Gate : std::uint8_t { silu, gelu };
  ggml_tensor* mlp(std::int64_t layer, ggml_tensor* x, Gate gate) const;
  // In the last layer, after attention: the tokens alone whose logits are asked for.
  ggml_tensor* answered(std::int64_t layer, ggml_tensor* x) const;

 private:
  const Weights& weights_;
  Store& store_;
  ggml_context* context_;
  ggml_cgraph* graph_;
  std::int64_t tokens_;
  ggml_tensor* positions_ = nullptr;
  ggml_tensor* answered_ = nullptr;  // null: all of them
};

inline std::string in_layer(std::int64_t layer, const char* name) { return "blk." + std::to_string(layer) + "." + name; }

struct Architecture {
  const char* name;  // general.architecture
  // What the metadata says beyond the common keys; null: nothing.
  Status (*refine)(const GgufFile& file, Config* config);
  // A layer's tensors.
  void (*want)(const Config& config, std::int64_t layer, std::vector<Wanted>* wanted);
  // Tensors outside the layers beyond the common ones; null: none.
  void (*want_outside)(const Config& config, std::vector<Wanted>* wanted);
  float (*embedding_scale)(const Config& config);  // null: 1
  ggml_tensor* (*layer)(const GraphBuilder& g, std::int64_t layer, ggml_tensor* x);
};

// Those that are built, by name.
std::span<const Architecture* const> architectures();
// Errors: unsupported with the list of those that are built.
Status find_architecture(const std::string& name, const Architecture** out);

// Q, K, V, output and MLP matrices with optional biases, and the two norms that all have.
void want_common(const Config& config, std::int64_t layer, std::vector<Wanted>* wanted);
// Norms of each head of queries and keys.
void want_head_norms(const Config& config, std::int64_t layer, std::vector<Wanted>* wanted);

// Every tensor of a model.
std::vector<Wanted> wanted_tensors(const Architecture& architecture, const Config& config, const GgufFile& file);

}  // namespace kv4::engine
