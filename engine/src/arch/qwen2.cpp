// Qwen2 and Qwen2.5: biases on Q, K and V.
#include "architecture.h"

namespace kv4::engine {
namespace {

ggml_tensor* layer(const GraphBuilder& g, std::int64_t i, ggml_tensor* x) {
  const Config& c = g.config;
  ggml_tensor* normed = g.norm(x, in_layer(i, "attn_norm.weight"));
  const auto rope = [&](ggml_tensor* t) { return g.rope(t, true, c.rope_base, c.rope_scale); };
  ggml_tensor* q = rope(g.heads(normed, in_layer(i, "attn_q"), c.head_dim_k));
  ggml_tensor* k = rope(g.heads(normed, in_layer(i, "attn_k"), c.head_dim_k));
  ggml_tensor* v = g.heads(normed, in_layer(i, "attn_v"), c.head_dim_v);
  return g.attend_and_feed(i, x, q, k, v);
}

}  // namespace

extern const Architecture kQwen2;
const Architecture kQwen2 = {"qwen2", nullptr, want_common, nullptr, nullptr, layer};

}  // namespace kv4::engine
