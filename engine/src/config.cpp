#include "config.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>

namespace kv4::engine {
namespace {

// No model comes near; a damaged file does, and would make the rest allocate it.
constexpr std::int64_t kMost = std::int64_t{1} << 24;

Status count(const GgufFile& file, const std::string& key, std::int64_t least, std::int64_t* out) {
  KV4_RETURN_IF_ERROR(file.integer(key, out));
  if (*out < least || *out > kMost)
    return invalid_argument(key, std::to_string(least) + " to " + std::to_string(kMost), std::to_string(*out));
  return {};
}

Status optional_count(const GgufFile& file, const std::string& key, std::int64_t least, std::int64_t* out) {
  return file.has(key) ? count(file, key, least, out) : Status();
}

Status number(const GgufFile& file, const std::string& key, float* out) {
  double value = *out;
  KV4_RETURN_IF_ERROR(file.optional_real(key, &value));
  if (!std::isfinite(value) || value < 0) return invalid_argument(key, "a number of 0 or more", std::to_string(value));
  *out = static_cast<float>(value);
  return {};
}

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

Status rope(const GgufFile& file, const std::string& prefix, Config* c) {
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.freq_base", &c->rope_base));
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.freq_base_swa", &c->local_rope_base));
  std::string kind = "linear";  // where a factor stands alone
  if (file.has(prefix + "rope.scaling.type")) KV4_RETURN_IF_ERROR(file.text(prefix + "rope.scaling.type", &kind));
  float factor = 0;
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.scale_linear", &factor));  // the key of older files
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.scaling.factor", &factor));
  if (kind != "none" && kind != "linear")
    return error(StatusCode::unsupported, prefix + "rope.scaling.type", "none or linear", kind);
  if (kind == "linear" && factor > 0) c->rope_scale = 1.0f / factor;
  if (!(c->rope_base > 0) || !(c->local_rope_base > 0))
    return invalid_argument(prefix + "rope.freq_base", "a positive number", std::to_string(c->rope_base));
  return {};
}

// Keys that architectures of llama.cpp's library have and those built here have not, with the value that leaves the model as it is.
struct Neutral {
  const char* key;
  double value;
  const char* expected;
};
constexpr Neutral kNeutral[] = {
    {"expert_count", 0, "no experts"},
    {"expert_used_count", 0, "no experts"},
    {"expert_shared_count", 0, "no experts"},
    {"nextn_predict_layers", 0, "0"},
    {"pooling_type", 0, "0, a model that writes text"},
    {"use_parallel_residual", 0, "false"},
    {"logit_scale", 1, "1"},
    {"residual_scale", 1, "1"},
    {"embedding_scale", 1, "1"},
    {"attn_logit_softcapping", 0, "0, none"},
    {"final_logit_softcapping", 0, "0, none"},
    {"attention.causal", 1, "true"},
    {"attention.max_alibi_bias", 0, "0, none"},
    {"attention.clamp_kqv", 0, "0, none"},
    {"attention.sliding_window", 0, "0, none"},
    {"rope.scaling.attn_factor", 1, "1"},
};
// Notes on where a model comes from.
constexpr const char* kNotes[] = {"tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"};

}  // namespace

Status refuse_unknown(const GgufFile& file, const Config& config) {
  const std::string prefix = config.architecture + ".";
  for (const std::string& key : file.unasked(prefix)) {
    const std::string name = key.substr(prefix.size());
    if (std::find(std::begin(kNotes), std::end(kNotes), name) != std::end(kNotes)) continue;
    const auto known = std::find_if(std::begin(kNeutral), std::end(kNeutral), [&](const Neutral& n) { return name == n.key; });
    if (known == std::end(kNeutral))
      return error(StatusCode::unsupported, key, "keys that the engine knows of " + config.architecture, "one that may change what the model computes");
    double value = 0;
    KV4_RETURN_IF_ERROR(file.number(key, &value));
    if (value != known->value) return error(StatusCode::unsupported, key, known->expected, number_text(value));
  }
  return {};
}

Status read_config(const GgufFile& file, Config* c) {
  KV4_RETURN_IF_ERROR(file.text("general.architecture", &c->architecture));
  std::string type = "model";
  if (file.has("general.type")) KV4_RETURN_IF_ERROR(file.text("general.type", &type));
  if (type != "model") return error(StatusCode::unsupported, "general.type", "model", type);
  std::int64_t parts = 1;
  KV4_RETURN_IF_ERROR(file.optional_integer("split.count", &parts));
  if (parts > 1) return error(StatusCode::unsupported, "split.count", "1, a model in one file", std::to_string(parts));
  const std::string prefix = c->architecture + ".";
  KV4_RETURN_IF_ERROR(count(file, prefix + "block_count", 1, &c->layers));
  KV4_RETURN_IF_ERROR(count(file, prefix + "embedding_length", 1, &c->embedding));
  KV4_RETURN_IF_ERROR(count(file, prefix + "feed_forward_length", 1, &c->feed_forward));
  KV4_RETURN_IF_ERROR(count(file, prefix + "attention.head_count", 1, &c->heads));
  c->kv_heads = c->heads;
  KV4_RETURN_IF_ERROR(optional_count(file, prefix + "attention.head_count_kv", 1, &c->kv_heads));
  if (c->heads % c->kv_heads != 0)
    return invalid_argument(prefix + "attention.head_count_kv", "a divisor of " + std::to_string(c->heads), std::to_string(c->kv_heads));
  c->head_dim_k = c->embedding / c->heads;
  KV4_RETURN_IF_ERROR(optional_count(file, prefix + "attention.key_length", 2, &c->head_dim_k));
  c->head_dim_v = c->head_dim_k;
  KV4_RETURN_IF_ERROR(optional_count(file, prefix + "attention.value_length", 2, &c->head_dim_v));
  c->rope_dim = c->head_dim_k;
  KV4_RETURN_IF_ERROR(optional_count(file, prefix + "rope.dimension_count", 2, &c->rope_dim));
  if (c->rope_dim > c->head_dim_k || c->rope_dim % 2 != 0)
    return invalid_argument(prefix + "rope.dimension_count", "an even number up to " + std::to_string(c->head_dim_k),
                            std::to_string(c->rope_dim));
  KV4_RETURN_IF_ERROR(count(file, prefix + "context_length", 1, &c->context));
  const std::string eps = prefix + "attention.layer_norm_rms_epsilon";
  KV4_RETURN_IF_ERROR(number(file, eps, &c->norm_eps));
  if (!file.has(eps)) return invalid_argument(eps, "a number in the model's metadata", "no such key");
  KV4_RETURN_IF_ERROR(rope(file, prefix, c));
  const ggml_tensor* rows = file.tensor("token_embd.weight");
  if (rows == nullptr) return invalid_argument("token_embd.weight", "a tensor of the model", "none of this name");
  c->vocabulary = rows->ne[1];
  std::int64_t tokens = c->vocabulary;
  KV4_RETURN_IF_ERROR(file.optional_integer(prefix + "vocab_size", &tokens));
  if (tokens != c->vocabulary)
    return invalid_argument(prefix + "vocab_size", std::to_string(c->vocabulary) + ", as many as token_embd.weight has rows", std::to_string(tokens));
  c->attention_scale = 1.0f / std::sqrt(static_cast<float>(c->head_dim_k));
  return {};
}

}  // namespace kv4::engine
