#include "cache/setup.h"

#include <cmath>
#include <string>

#include "backend/spec.h"

namespace kv4 {
namespace {

// Positive finite numbers, one per head and channel, where the recipe asks for them.
Status check_lambda(const char* name, bool wanted, const std::vector<float>& values, int heads, int dim) {
  const std::string have = std::to_string(values.size()) + " values";
  if (!wanted) return values.empty() ? Status() : invalid_argument(name, "nothing, since the recipe's lambda is not 'given'", have);
  const std::size_t count = static_cast<std::size_t>(heads) * static_cast<std::size_t>(dim);
  if (values.size() != count) return invalid_argument(name, std::to_string(heads) + " x " + std::to_string(dim) + " values", have);
  for (std::size_t i = 0; i < count; ++i)
    if (!(values[i] > 0) || !std::isfinite(values[i]))
      return invalid_argument(name, "positive finite values", std::to_string(values[i]) + " at index " + std::to_string(i));
  return {};
}

Status check(const CacheConfig& config) {
  for (const auto& [name, value] : {std::pair{"kv_heads", config.kv_heads}, {"head_dim_k", config.head_dim_k}, {"head_dim_v", config.head_dim_v}})
    if (value < 1) return invalid_argument(name, "at least 1", std::to_string(value));
  if (config.sliding_window < 0) return invalid_argument("sliding_window", "0 (none) or more", std::to_string(config.sliding_window));
  KV4_RETURN_IF_ERROR(check_dtype("dtype", config.dtype));
  const Recipe& recipe = config.recipe;
  KV4_RETURN_IF_ERROR(validate(recipe));
  const bool seals = recipe.seal != SealMode::never;
  KV4_RETURN_IF_ERROR(check_lambda("lambda_k", seals && recipe.key.lambda == LambdaMode::given, config.lambda_k, config.kv_heads, config.head_dim_k));
  return check_lambda("lambda_v", seals && recipe.value.lambda == LambdaMode::given, config.lambda_v, config.kv_heads, config.head_dim_v);
}

Status make_spec(const CacheConfig& config, const Backend& backend, PageSpec* spec) {
  KV4_RETURN_IF_ERROR(validate(config.recipe, config.head_dim_k, config.head_dim_v));
  KV4_RETURN_IF_ERROR(make_sides(config.recipe, config.head_dim_k, config.head_dim_v, config.matrix_k, config.matrix_v, spec));
  const auto u32 = [](int x) { return static_cast<std::uint32_t>(x); };
  spec->layout = kv4_make_page_layout(u32(config.head_dim_k), u32(config.head_dim_v), u32(spec->key.groups), u32(spec->value.groups), spec->key.mean,
                                      u32(backend.code_channels(config.head_dim_k)), u32(backend.code_channels(config.head_dim_v)));
  return backend.supports(*spec);
}

}  // namespace

Status check_dtype(const char* name, DType dtype) {
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return {};
  return invalid_argument(name, "dtype float32, float16 or bfloat16", std::to_string(static_cast<int>(dtype)));
}

Status Setup::make(const CacheConfig& config, std::shared_ptr<const Setup>* out) {
  KV4_RETURN_IF_ERROR(check(config));
  auto setup = std::make_shared<Setup>();
  setup->config = config;
  setup->policy = ledger::Policy::of(config.recipe, config.sliding_window);
  setup->shape = {config.kv_heads, config.head_dim_k, config.head_dim_v, config.dtype};
  Backend* const backend = setup->backend = find_backend(config.backend);
  if (backend == nullptr) {
    std::string names;
    for (const std::string& name : backends()) names += (names.empty() ? "" : ", ") + name;
    return invalid_argument("backend", "one of " + names, config.backend);
  }
  KV4_RETURN_IF_ERROR(backend->supports_rows(config.head_dim_k, config.head_dim_v, config.dtype, config.recipe.seal));
  backend->set_stream(nullptr);  // not that of this thread's last call, which may be gone
  for (const auto& [name, values, block] : {std::tuple{"lambda_k", &config.lambda_k, &setup->given_k}, {"lambda_v", &config.lambda_v, &setup->given_v}})
    KV4_RETURN_IF_ERROR(Block::copy_of(*backend, name, values->data(), values->size() * sizeof(float), block));
  if (setup->given_k || setup->given_v) KV4_RETURN_IF_ERROR(backend->wait());  // read on streams that know nothing of this one
  if (setup->seals()) KV4_RETURN_IF_ERROR(make_spec(config, *backend, &setup->spec));
  *out = std::move(setup);
  return {};
}

}  // namespace kv4
