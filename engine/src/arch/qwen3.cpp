// Qwen3, dense: each head of queries and keys is normalised before RoPE.
#include "architecture.h"

namespace kv4::engine {
namespace {

void want(const Config& c, std::int64_t layer, std::vector<Wanted>* wanted) {
  want_common(c, layer, wanted);
  want_head_norms(c, layer, wanted);
}

ggml_tensor* layer(const GraphBuilder& g, std::int64_t i, ggml_tensor* x) {
  const Config& c = g.config;
  ggml_tensor* normed = g.norm(x, in_layer(i, "attn_norm.weight"));
  const auto rope = [&](ggml_tensor* t) { return g.rope(t, true, c.rope_base, c.rope_scale); };
  ggml_tensor* q = g.heads(normed, in_layer(i, "attn_q"), c.head_dim_k);
  ggml_tensor* k = g.heads(normed, in_layer(i, "attn_k"), c.head_dim_k);
  ggml_tensor* v = g.heads(normed, in_layer(i, "attn_v"), c.head_dim_v);
  q = rope(g.norm(q, in_layer(i, "attn_q_norm.weight")));
  k = rope(g.norm(k, in_layer(i, "attn_k_norm.weight")));
  return g.attend_and_feed(i, x, q, k, v);
}

}  // namespace

extern const Architecture kQwen3;
const Architecture kQwen3 = {"qwen3", nullptr, want, nullptr, nullptr, layer};

}  // namespace kv4::engine
