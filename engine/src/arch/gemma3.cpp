// Gemma 3, text: layers with a sliding window and a RoPE base of their own between global ones, norms before and after
// attention and MLP, normalised heads, an embedding scaled by sqrt(channels).
#include <cmath>

#include "architecture.h"

namespace kv4::engine {
namespace {

constexpr std::int64_t kPattern = 6;        // five sliding layers, then a global one, where the metadata is silent
constexpr std::int64_t kLayersOf27B = 62;   // the one size whose scale is not that of its head dim

Status refine(const GgufFile& file, Config* c) {
  KV4_RETURN_IF_ERROR(file.optional_integer("gemma3.attention.sliding_window", &c->sliding_window));
  c->sliding_pattern = kPattern;
  KV4_RETURN_IF_ERROR(file.optional_integer("gemma3.attention.sliding_window_pattern", &c->sliding_pattern));
  if (c->sliding_window < 0 || c->sliding_window > (1 << 24))
    return invalid_argument("gemma3.attention.sliding_window", "0 to 16777216", std::to_string(c->sliding_window));
  if (c->sliding_pattern < 1)
    return invalid_argument("gemma3.attention.sliding_window_pattern", "1 or more", std::to_string(c->sliding_pattern));
  double cap = 0;
  KV4_RETURN_IF_ERROR(file.optional_real("gemma3.final_logit_softcapping", &cap));
  c->final_softcap = static_cast<float>(cap);
  if (c->layers == kLayersOf27B) c->attention_scale = 1.0f / std::sqrt(static_cast<float>(c->embedding / c->heads));
  return {};
}

void want(const Config& c, std::int64_t layer, std::vector<Wanted>* wanted) {
  want_common(c, layer, wanted);
  want_head_norms(c, layer, wanted);
  wanted->push_back({in_layer(layer, "post_attention_norm.weight"), {c.embedding}, Use::plain});
  wanted->push_back({in_layer(layer, "post_ffw_norm.weight"), {c.embedding}, Use::plain});
}

float embedding_scale(const Config& c) { return std::sqrt(static_cast<float>(c.embedding)); }

ggml_tensor* layer(const GraphBuilder& g, std::int64_t i, ggml_tensor* x) {
  const Config& c = g.config;
  ggml_tensor* normed = g.norm(x, in_layer(i, "attn_norm.weight"));
  const bool local = c.slides(i);
  const auto rope = [&](ggml_tensor* t) {
    return g.rope(t, true, local ? c.local_rope_base : c.rope_base, local ? c.local_rope_scale : c.rope_scale);
  };
  ggml_tensor* q = g.heads(normed, in_layer(i, "attn_q"), c.head_dim_k);
  ggml_tensor* k = g.heads(normed, in_layer(i, "attn_k"), c.head_dim_k);
  ggml_tensor* v = g.heads(normed, in_layer(i, "attn_v"), c.head_dim_v);
  q = rope(g.norm(q, in_layer(i, "attn_q_norm.weight")));
  k = rope(g.norm(k, in_layer(i, "attn_k_norm.weight")));
  ggml_tensor* y = g.answered(i, g.attend(i, q, k, v, c.attention_scale));
  y = ggml_add(g.context(), g.norm(y, in_layer(i, "post_attention_norm.weight")), g.answered(i, x));
  ggml_tensor* z = g.mlp(i, g.norm(y, in_layer(i, "ffn_norm.weight")), GraphBuilder::Gate::gelu);
  return ggml_add(g.context(), g.norm(z, in_layer(i, "post_ffw_norm.weight")), y);
}

}  // namespace

extern const Architecture kGemma3;
const Architecture kGemma3 = {"gemma3", refine, want, nullptr, embedding_scale, layer};

}  // namespace kv4::engine
