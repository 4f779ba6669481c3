#include "capi/values.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

namespace kv4::capi {
namespace {

// Where the struct ended in each version, the newest last.
constexpr std::size_t kSizesOfConfig[] = {offsetof(kv4_cache_config, backend), offsetof(kv4_cache_config, bits_k),
                                          offsetof(kv4_cache_config, refined), sizeof(kv4_cache_config)};
constexpr std::size_t kSizesOfArgs[] = {offsetof(kv4_attend_args, host_mask), sizeof(kv4_attend_args)};

static_assert(sizeof(void*) != 8 ||
                  (sizeof(kv4_side_recipe) == 40 && sizeof(kv4_recipe) == 96 && sizeof(kv4_tensor) == 80),
              "structs without a size never change");

// Checks that no axis is negative and that the distance of any two elements, in bytes, fits an int64.
Status check_extent(const std::string& name, const int64_t (&shape)[4], const int64_t (&stride)[4], std::size_t bytes) {
  const auto list = [](const int64_t(&x)[4]) {
    return "[" + std::to_string(x[0]) + ", " + std::to_string(x[1]) + ", " + std::to_string(x[2]) + ", " +
           std::to_string(x[3]) + "]";
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::int64_t left = kMost / static_cast<std::int64_t>(bytes), count = left;
  bool fits = true;
  for (const int64_t n : shape) {
    if (n < 0) return invalid_argument(name + ".shape", "axes of 0 or more", list(shape));
    if (n > 0) count /= n;
    fits &= count > 0;
  }
  for (std::size_t i = 0; i < 4 && fits; ++i) {
    if (shape[i] < 2) continue;
    const std::int64_t steps = shape[i] - 1;
    fits = stride[i] != std::numeric_limits<std::int64_t>::min() && std::abs(stride[i]) <= left / steps;
    if (fits) left -= std::abs(stride[i]) * steps;
  }
  return fits ? Status()
              : invalid_argument(name + ".stride", "distances of 63 bits", list(stride) + " over shape " + list(shape));
}

template <class View>
Status view_as(const char* name, const kv4_tensor& t, View* out) {
  KV4_RETURN_IF_ERROR(dtype_of((std::string(name) + ".dtype").c_str(), t.dtype, &out->dtype));
  KV4_RETURN_IF_ERROR(check_extent(name, t.shape, t.stride, size_of(out->dtype)));
  const bool empty = std::find(std::begin(t.shape), std::end(t.shape), 0) != std::end(t.shape);
  if (t.data == nullptr && !empty) return null_pointer((std::string(name) + ".data").c_str());
  out->data = t.data;
  for (int i = 0; i < 4; ++i) {
    out->shape[i] = t.shape[i];
    out->stride[i] = t.stride[i];
  }
  return {};
}

Status side_of(const kv4_side_recipe& s, SideRecipe* out) {
  KV4_RETURN_IF_ERROR(in_range("recipe.rotation", s.rotation, 4));
  KV4_RETURN_IF_ERROR(in_range("recipe.levels", s.levels, 2));
  KV4_RETURN_IF_ERROR(in_range("recipe.scale", s.scale, 1));
  KV4_RETURN_IF_ERROR(in_range("recipe.lambda", s.lambda, 2));
  out->rotation = static_cast<RotationKind>(s.rotation);
  out->reflectors = s.reflectors;
  out->seed = s.seed;
  out->group = s.group;
  out->levels = static_cast<LevelKind>(s.levels);
  out->scale = static_cast<ScaleRule>(s.scale);
  out->mean = s.mean != 0;
  out->lambda = static_cast<LambdaMode>(s.lambda);
  return {};
}

kv4_side_recipe side_from(const SideRecipe& s) {
  return {static_cast<int32_t>(s.rotation),
          s.reflectors,
          s.seed,
          s.group,
          static_cast<int32_t>(s.levels),
          static_cast<int32_t>(s.scale),
          s.mean ? 1 : 0,
          static_cast<int32_t>(s.lambda)};
}

// Copies the caller's [rows, columns] floats, sizes already checked. A pointer where the recipe uses none is an error.
Status take(const char* name, const float* from, bool wanted, const char* otherwise, int32_t rows, int32_t columns,
            std::vector<float>* to) {
  if (from == nullptr) return {};
  if (!wanted) return invalid_argument(name, std::string("NULL, since the recipe's ") + otherwise, "a pointer");
  to->assign(from, from + static_cast<std::int64_t>(rows) * columns);
  return {};
}

Status mask_of(const kv4_attend_args& a, Mask* out) {
  Mask& m = *out;
  m.causal = a.causal != 0;
  m.offset = a.offset;
  m.start = a.start;
  m.window = a.window;
  KV4_RETURN_IF_ERROR(in_range("mask_kind", a.mask_kind, 2));
  m.kind = static_cast<Mask::General>(a.mask_kind);
  if (m.kind == Mask::General::none) return {};
  if (a.mask == nullptr) return null_pointer("mask");
  if (m.kind == Mask::General::additive) KV4_RETURN_IF_ERROR(dtype_of("mask_dtype", a.mask_dtype, &m.general_dtype));
  const std::size_t bytes = m.kind == Mask::General::boolean ? 1 : size_of(m.general_dtype);
  const int64_t shape[4] = {a.q.shape[0], a.q.shape[1], a.q.shape[2], a.columns};
  KV4_RETURN_IF_ERROR(check_extent("mask", shape, a.mask_stride, bytes));
  if (a.host_mask != nullptr) KV4_RETURN_IF_ERROR(check_extent("host_mask", shape, a.host_mask_stride, bytes));
  m.general = a.mask;
  m.columns = a.columns;
  m.host_general = a.host_mask;
  for (int i = 0; i < 4; ++i) {
    m.general_stride[i] = a.mask_stride[i];
    m.host_general_stride[i] = a.host_mask_stride[i];
  }
  return {};
}

}  // namespace

const std::span<const std::size_t> kConfigSizes = kSizesOfConfig, kArgsSizes = kSizesOfArgs;

Status in_range(const char* name, int32_t value, int32_t last, int32_t first) {
  if (value >= first && value <= last) return {};
  return invalid_argument(name, "a value from " + std::to_string(first) + " to " + std::to_string(last),
                          std::to_string(value));
}

Status dtype_of(const char* name, int32_t value, DType* out) {
  KV4_RETURN_IF_ERROR(in_range(name, value, 2));
  *out = static_cast<DType>(value);
  return {};
}

Status view_of(const char* name, const kv4_tensor& t, TensorView* out) { return view_as(name, t, out); }
Status view_of(const char* name, const kv4_tensor& t, MutableTensorView* out) { return view_as(name, t, out); }

kv4_recipe recipe_from(const Recipe& r) {
  return {side_from(r.key), side_from(r.value), static_cast<int32_t>(r.seal), r.sinks, r.window};
}

kv4_cache_config default_config() {
  kv4_cache_config config = {};
  config.size = sizeof config;
  config.recipe = recipe_from(Recipe::kv4());
  return config;
}

Status config_of(const kv4_cache_config* given, CacheConfig* out) {
  kv4_cache_config c = default_config();
  KV4_RETURN_IF_ERROR(read_struct("config", given, kConfigSizes, &c));
  constexpr int32_t kMostHeads = 65536, kMost = std::numeric_limits<int32_t>::max();
  Recipe& recipe = out->recipe;
  KV4_RETURN_IF_ERROR(side_of(c.recipe.key, &recipe.key));
  KV4_RETURN_IF_ERROR(side_of(c.recipe.value, &recipe.value));
  if (c.bits_k != 0) recipe.key.bits = c.bits_k;
  if (c.bits_v != 0) recipe.value.bits = c.bits_v;
  recipe.refined = c.refined;
  KV4_RETURN_IF_ERROR(in_range("recipe.seal", c.recipe.seal, 2));
  recipe.seal = static_cast<SealMode>(c.recipe.seal);
  recipe.sinks = c.recipe.sinks;
  recipe.window = c.recipe.window;
  KV4_RETURN_IF_ERROR(dtype_of("dtype", c.dtype, &out->dtype));
  KV4_RETURN_IF_ERROR(in_range("kv_heads", c.kv_heads, kMostHeads, 1));
  KV4_RETURN_IF_ERROR(in_range("head_dim_k", c.head_dim_k, kMost, 1));
  KV4_RETURN_IF_ERROR(in_range("head_dim_v", c.head_dim_v, kMost, 1));
  KV4_RETURN_IF_ERROR(validate(recipe, c.head_dim_k, c.head_dim_v));
  out->kv_heads = c.kv_heads;
  out->head_dim_k = c.head_dim_k;
  out->head_dim_v = c.head_dim_v;
  out->sliding_window = c.sliding_window;
  const bool seals = recipe.seal != SealMode::never;
  const auto lambda = [&](const char* name, const float* from, const SideRecipe& side, int32_t dim,
                          std::vector<float>* to) {
    return take(name, from, seals && side.lambda == LambdaMode::given, "lambda is not 'given'", c.kv_heads, dim, to);
  };
  const auto matrix = [&](const char* name, const float* from, const SideRecipe& side, int32_t dim,
                          std::vector<float>* to) {
    return take(name, from, seals && side.rotation == RotationKind::dense, "rotation is not 'dense'", dim, dim, to);
  };
  KV4_RETURN_IF_ERROR(lambda("lambda_k", c.lambda_k, recipe.key, c.head_dim_k, &out->lambda_k));
  KV4_RETURN_IF_ERROR(lambda("lambda_v", c.lambda_v, recipe.value, c.head_dim_v, &out->lambda_v));
  KV4_RETURN_IF_ERROR(matrix("matrix_k", c.matrix_k, recipe.key, c.head_dim_k, &out->matrix_k));
  KV4_RETURN_IF_ERROR(matrix("matrix_v", c.matrix_v, recipe.value, c.head_dim_v, &out->matrix_v));
  if (c.backend != nullptr) out->backend = c.backend;
  return {};
}

kv4_attend_args default_args() {
  kv4_attend_args args = {};
  args.size = sizeof args;
  args.causal = 1;
  return args;
}

Status args_of(const kv4_attend_args* given, AttendArgs* out) {
  kv4_attend_args a = default_args();
  KV4_RETURN_IF_ERROR(read_struct("args", given, kArgsSizes, &a));
  KV4_RETURN_IF_ERROR(view_of("q", a.q, &out->q));
  out->scale = a.scale;
  out->softcap = a.softcap;
  out->sinks = a.sinks;
  return mask_of(a, &out->mask);
}

}  // namespace kv4::capi
