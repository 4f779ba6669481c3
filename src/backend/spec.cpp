#include "backend/spec.h"

#include <string>
#include <utility>

namespace kv4 {
namespace {

std::string shape_text(std::size_t have) { return std::to_string(have) + " values"; }

Status make_rotation(const SideRecipe& side, int dim, const std::vector<float>& matrix, const char* matrix_name,
                     std::shared_ptr<const Rotation>* out) {
  if (side.rotation != RotationKind::dense && !matrix.empty())
    return invalid_argument(matrix_name, "nothing, since the recipe's rotation is not 'dense'",
                            shape_text(matrix.size()));
  switch (side.rotation) {
    case RotationKind::identity: return Rotation::identity(dim, out);
    case RotationKind::srft: return Rotation::srft(dim, side.seed, out);
    case RotationKind::srht: return Rotation::srht(dim, side.seed, out);
    case RotationKind::householder:
      return Rotation::householder(dim, side.reflectors > 0 ? side.reflectors : dim / 2, side.seed, out);
    case RotationKind::dense: {
      const std::size_t count = static_cast<std::size_t>(dim) * dim;
      if (matrix.size() != count)
        return invalid_argument(matrix_name, std::to_string(dim) + " x " + std::to_string(dim) + " values",
                                shape_text(matrix.size()));
      return Rotation::dense(dim, matrix, out);
    }
  }
  return invalid_argument("recipe.rotation", "a known kind", std::to_string(static_cast<int>(side.rotation)));
}

Status make_side(const SideRecipe& recipe, int dim, const std::vector<float>& matrix, const char* matrix_name,
                 SideSpec* side) {
  side->dim = dim;
  side->group = recipe.group > 0 ? recipe.group : dim;
  side->groups = dim / side->group;
  side->levels = levels(recipe.levels, recipe.bits);
  side->scale = recipe.scale;
  side->mean = recipe.mean;
  return make_rotation(recipe, dim, matrix, matrix_name, &side->rotation);
}

}  // namespace

Status make_sides(const Recipe& recipe, int head_dim_k, int head_dim_v, const std::vector<float>& matrix_k,
                  const std::vector<float>& matrix_v, PageSpec* out) {
  out->value.values = true;
  KV4_RETURN_IF_ERROR(make_side(recipe.key, head_dim_k, matrix_k, "matrix_k", &out->key));
  return make_side(recipe.value, head_dim_v, matrix_v, "matrix_v", &out->value);
}

Status expect_plain_pages(const Recipe& recipe, const std::string& where, int least_bits) {
  for (const auto& [name, levels] :
       {std::pair{"recipe.key.levels", recipe.key.levels}, {"recipe.value.levels", recipe.value.levels}})
    if (levels == LevelKind::trellis)
      return error(StatusCode::unsupported, name, "lloyd_max or uniform " + where, "trellis");
  std::string widths;
  for (int bits = least_bits; bits < 4; ++bits) widths += std::to_string(bits) + (bits == 3 ? " or " : ", ");
  for (const auto& [name, bits] :
       {std::pair{"recipe.key.bits", recipe.key.bits}, {"recipe.value.bits", recipe.value.bits}})
    if (bits < least_bits || bits > 4)
      return error(StatusCode::unsupported, name, widths + "4 " + where, std::to_string(bits));
  if (recipe.refined != 0)
    return error(StatusCode::unsupported, "recipe.refined", "0 " + where, std::to_string(recipe.refined));
  return {};
}

Status Backend::supports_codes(const Recipe& recipe) const {
  return expect_plain_pages(recipe, std::string("on ") + name());
}

Status make_spec(const CacheConfig& config, Backend** backend, PageSpec* out) {
  const auto positive = [](const char* name, int value) {
    return value > 0 ? Status() : invalid_argument(name, "at least 1", std::to_string(value));
  };
  KV4_RETURN_IF_ERROR(positive("kv_heads", config.kv_heads));
  KV4_RETURN_IF_ERROR(positive("head_dim_k", config.head_dim_k));
  KV4_RETURN_IF_ERROR(positive("head_dim_v", config.head_dim_v));
  if (config.sliding_window < 0)
    return invalid_argument("sliding_window", "0 (none) or more", std::to_string(config.sliding_window));
  if (config.dtype != DType::f32 && config.dtype != DType::f16 && config.dtype != DType::bf16)
    return invalid_argument("dtype", "float32, float16 or bfloat16", std::to_string(static_cast<int>(config.dtype)));
  const Recipe& recipe = config.recipe;
  KV4_RETURN_IF_ERROR(validate(recipe));
  *backend = find_backend(config.backend);
  if (*backend == nullptr) {
    std::string names;
    for (const std::string& name : backends()) names += (names.empty() ? "" : ", ") + name;
    return invalid_argument("backend", "one of " + names, config.backend);
  }
  KV4_RETURN_IF_ERROR((*backend)->supports_rows(config.head_dim_k, config.head_dim_v, config.dtype, recipe.seal));
  if (recipe.seal == SealMode::never) return {};
  KV4_RETURN_IF_ERROR((*backend)->supports_codes(recipe));
  KV4_RETURN_IF_ERROR(validate(recipe, config.head_dim_k, config.head_dim_v));
  KV4_RETURN_IF_ERROR(make_sides(recipe, config.head_dim_k, config.head_dim_v, config.matrix_k, config.matrix_v, out));
  const auto u32 = [](int x) { return static_cast<std::uint32_t>(x); };
  const std::uint32_t channels_k = u32((*backend)->code_channels(config.head_dim_k)),
                      channels_v = u32((*backend)->code_channels(config.head_dim_v)), refined = u32(recipe.refined);
  out->layout = kv4_make_page_layout(u32(config.head_dim_k), u32(config.head_dim_v), u32(out->key.groups),
                                     u32(out->value.groups), out->key.mean, channels_k, channels_v,
                                     u32(recipe.key.bits), u32(recipe.value.bits), refined);
  out->second = kv4_make_second_layout(out->layout, channels_k, refined);
  out->second_levels = second_levels(recipe.key.levels);
  return (*backend)->supports(*out);
}

}  // namespace kv4
