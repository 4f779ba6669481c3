#include "config.h"

#include <cmath>

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

Status rope(const GgufFile& file, const std::string& prefix, Config* c) {
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.freq_base", &c->rope_base));
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.freq_base_swa", &c->local_rope_base));
  std::string kind = "none";
  if (file.has(prefix + "rope.scaling.type")) KV4_RETURN_IF_ERROR(file.text(prefix + "rope.scaling.type", &kind));
  float factor = 1;
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.scaling.factor", &factor));
  KV4_RETURN_IF_ERROR(number(file, prefix + "rope.scale_linear", &factor));  // the key of older files
  if (kind != "none" && kind != "linear")
    return error(StatusCode::unsupported, prefix + "rope.scaling.type", "none or linear", kind);
  if (kind == "linear" || file.has(prefix + "rope.scale_linear")) c->rope_scale = factor > 0 ? 1.0f / factor : 1.0f;
  if (!(c->rope_base > 0) || !(c->local_rope_base > 0))
    return invalid_argument(prefix + "rope.freq_base", "a positive number", std::to_string(c->rope_base));
  return {};
}

}  // namespace

Status read_config(const GgufFile& file, Config* c) {
  KV4_RETURN_IF_ERROR(file.text("general.architecture", &c->architecture));
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
  KV4_RETURN_IF_ERROR(number(file, prefix + "attention.layer_norm_rms_epsilon", &c->norm_eps));
  KV4_RETURN_IF_ERROR(rope(file, prefix, c));
  const ggml_tensor* rows = file.tensor("token_embd.weight");
  if (rows == nullptr) return invalid_argument("token_embd.weight", "a tensor of the model", "none of this name");
  c->vocabulary = rows->ne[1];
  c->attention_scale = 1.0f / std::sqrt(static_cast<float>(c->head_dim_k));
  return {};
}

}  // namespace kv4::engine
