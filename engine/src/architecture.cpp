#include "architecture.h"

namespace kv4::engine {

extern const Architecture kLlama, kQwen2, kQwen3, kGemma3;

std::span<const Architecture* const> architectures() {
  static const Architecture* const all[] = {&kLlama, &kQwen2, &kQwen3, &kGemma3};
  return all;
}

Status find_architecture(const std::string& name, const Architecture** out) {
  std::string known;
  for (const Architecture* a : architectures()) {
    if (name == a->name) {
      *out = a;
      return {};
    }
    known += (known.empty() ? "" : ", ") + std::string(a->name);
  }
  return error(StatusCode::unsupported, "general.architecture", "one of " + known, name);
}

void want_common(const Config& c, std::int64_t layer, std::vector<Wanted>* wanted) {
  const auto matrix = [&](const char* name, std::int64_t in, std::int64_t out) {
    wanted->push_back({in_layer(layer, name) + ".weight", {in, out}, Use::multiply});
    wanted->push_back({in_layer(layer, name) + ".bias", {out}, Use::plain, true});
  };
  wanted->push_back({in_layer(layer, "attn_norm.weight"), {c.embedding}, Use::plain});
  wanted->push_back({in_layer(layer, "ffn_norm.weight"), {c.embedding}, Use::plain});
  matrix("attn_q", c.embedding, c.heads * c.head_dim_k);
  matrix("attn_k", c.embedding, c.kv_heads * c.head_dim_k);
  matrix("attn_v", c.embedding, c.kv_heads * c.head_dim_v);
  matrix("attn_output", c.heads * c.head_dim_v, c.embedding);
  matrix("ffn_gate", c.embedding, c.feed_forward);
  matrix("ffn_up", c.embedding, c.feed_forward);
  matrix("ffn_down", c.feed_forward, c.embedding);
}

void want_head_norms(const Config& c, std::int64_t layer, std::vector<Wanted>* wanted) {
  wanted->push_back({in_layer(layer, "attn_q_norm.weight"), {c.head_dim_k}, Use::plain});
  wanted->push_back({in_layer(layer, "attn_k_norm.weight"), {c.head_dim_k}, Use::plain});
}

std::vector<Wanted> wanted_tensors(const Architecture& architecture, const Config& config, const GgufFile& file) {
  std::vector<Wanted> wanted;
  wanted.push_back({"token_embd.weight", {config.embedding, config.vocabulary}, Use::rows});
  wanted.push_back({"output_norm.weight", {config.embedding}, Use::plain});
  // Where the output matrix is the embedding, a second copy may lie in the order that products want.
  const std::string output = file.tensor("output.weight") != nullptr ? "output.weight" : "token_embd.weight";
  wanted.push_back({"output.weight", {config.embedding, config.vocabulary}, Use::multiply, false, output});
  wanted.push_back({"output.bias", {config.vocabulary}, Use::plain, true});
  if (architecture.want_outside != nullptr) architecture.want_outside(config, &wanted);
  for (std::int64_t i = 0; i < config.layers; ++i) architecture.want(config, i, &wanted);
  return wanted;
}

ggml_tensor* GraphBuilder::norm(ggml_tensor* x, const std::string& name) const {
  return ggml_mul(context_, ggml_rms_norm(context_, x, config.norm_eps), weight(name));
}

ggml_tensor* GraphBuilder::linear(ggml_tensor* x, const std::string& name) const {
  ggml_tensor* y = ggml_mul_mat(context_, weight(name + ".weight"), x);
  ggml_tensor* bias = weight(name + ".bias");
  return bias == nullptr ? y : ggml_add(context_, y, bias);
}

ggml_tensor* GraphBuilder::heads(ggml_tensor* x, const std::string& name, std::int64_t head_dim) const {
  ggml_tensor* y = linear(x, name);
  return ggml_reshape_3d(context_, y, head_dim, y->ne[0] / head_dim, tokens_);
}

ggml_tensor* GraphBuilder::rope(ggml_tensor* x, bool neox, float base, float scale, ggml_tensor* factors) const {
  // The last five arguments are YaRN's, without effect at an extrapolation factor of 0.
  return ggml_rope_ext(context_, x, positions_, factors, static_cast<int>(config.rope_dim), neox ? GGML_ROPE_TYPE_NEOX : 0,
                       static_cast<int>(config.context), base, scale, 0.0f, 1.0f, 32.0f, 1.0f);
}

ggml_tensor* GraphBuilder::attend(std::int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, float scale) const {
  return linear(store_.attend(context_, graph_, layer, q, k, v, scale), in_layer(layer, "attn_output"));
}

ggml_tensor* GraphBuilder::mlp(std::int64_t layer, ggml_tensor* x, Gate gate) const {
  ggml_tensor* up = linear(x, in_layer(layer, "ffn_up"));
  ggml_tensor* open = linear(x, in_layer(layer, "ffn_gate"));
  ggml_tensor* inner = gate == Gate::silu ? ggml_swiglu_split(context_, open, up) : ggml_geglu_split(context_, open, up);
  return linear(inner, in_layer(layer, "ffn_down"));
}

ggml_tensor* GraphBuilder::attend_and_feed(std::int64_t layer, ggml_tensor* x, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) const {
  ggml_tensor* y = answered(layer, attend(layer, q, k, v, config.attention_scale));
  y = ggml_add(context_, y, answered(layer, x));
  return ggml_add(context_, mlp(layer, norm(y, in_layer(layer, "ffn_norm.weight")), Gate::silu), y);
}

ggml_tensor* GraphBuilder::answered(std::int64_t layer, ggml_tensor* x) const {
  return layer + 1 == config.layers && answered_ != nullptr ? ggml_get_rows(context_, x, answered_) : x;
}

}  // namespace kv4::engine
