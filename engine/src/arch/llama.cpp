// Llama 2 and 3, SmolLM2, Mistral and others of this shape. Neighbouring channels form RoPE's pairs: the conversion to GGUF permutes Q and K.
// Llama 3.1 and later bring a divisor for the angle of each pair.
#include "architecture.h"

namespace kv4::engine {
namespace {

void want_outside(const Config& c, std::vector<Wanted>* wanted) {
  wanted->push_back({"rope_freqs.weight", {c.rope_dim / 2}, Use::plain, true});
}

ggml_tensor* layer(const GraphBuilder& g, std::int64_t i, ggml_tensor* x) {
  const Config& c = g.config;
  ggml_tensor* normed = g.norm(x, in_layer(i, "attn_norm.weight"));
  const auto rope = [&](ggml_tensor* t) { return g.rope(t, false, c.rope_base, c.rope_scale, g.weight("rope_freqs.weight")); };
  ggml_tensor* q = rope(g.heads(normed, in_layer(i, "attn_q"), c.head_dim_k));
  ggml_tensor* k = rope(g.heads(normed, in_layer(i, "attn_k"), c.head_dim_k));
  ggml_tensor* v = g.heads(normed, in_layer(i, "attn_v"), c.head_dim_v);
  return g.attend_and_feed(i, x, q, k, v);
}

}  // namespace

extern const Architecture kLlama;
const Architecture kLlama = {"llama", nullptr, want_common, want_outside, nullptr, layer};

}  // namespace kv4::engine
