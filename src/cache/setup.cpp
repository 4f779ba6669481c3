#include "cache/setup.h"

#include <cmath>
#include <string>

#include "backend/spec.h"

namespace kv4 {
namespace {

// Positive finite numbers, one per head and channel, where the recipe asks for them.
Status check_lambda(const char* name, bool wanted, const std::vector<float>& values, int heads, int dim) {
  const std::string have = std::to_string(values.size()) + " values";
  if (!wanted)
    return values.empty() ? Status()
                          : invalid_argument(name, "nothing, since the recipe's lambda is not 'given'", have);
  const std::size_t count = static_cast<std::size_t>(heads) * static_cast<std::size_t>(dim);
  if (values.size() != count)
    return invalid_argument(name, std::to_string(heads) + " x " + std::to_string(dim) + " values", have);
  for (std::size_t i = 0; i < count; ++i)
    if (!(values[i] > 0) || !std::isfinite(values[i]))
      return invalid_argument(name, "positive finite values",
                              std::to_string(values[i]) + " at index " + std::to_string(i));
  return {};
}

}  // namespace

Status Setup::make(const CacheConfig& config, std::shared_ptr<const Setup>* out) {
  auto setup = std::make_shared<Setup>();
  setup->config = config;
  KV4_RETURN_IF_ERROR(make_spec(config, &setup->backend, &setup->spec));
  setup->policy = ledger::Policy::of(config.recipe, config.sliding_window);
  setup->shape = {config.kv_heads, config.head_dim_k, config.head_dim_v, config.dtype};
  const SideRecipe &key = config.recipe.key, &value = config.recipe.value;
  KV4_RETURN_IF_ERROR(check_lambda("lambda_k", setup->seals() && key.lambda == LambdaMode::given, config.lambda_k,
                                   config.kv_heads, config.head_dim_k));
  KV4_RETURN_IF_ERROR(check_lambda("lambda_v", setup->seals() && value.lambda == LambdaMode::given, config.lambda_v,
                                   config.kv_heads, config.head_dim_v));
  Backend* const backend = setup->backend;
  backend->set_stream(nullptr);  // the stream of this thread's last call may no longer exist
  for (const auto& [name, values, block] :
       {std::tuple{"lambda_k", &config.lambda_k, &setup->given_k}, {"lambda_v", &config.lambda_v, &setup->given_v}})
    KV4_RETURN_IF_ERROR(Block::copy_of(*backend, name, values->data(), values->size() * sizeof(float), block));
  if (setup->given_k || setup->given_v)
    KV4_RETURN_IF_ERROR(backend->wait());  // other streams, not ordered after this one, will read it
  *out = std::move(setup);
  return {};
}

}  // namespace kv4
