// Small configurations for fuzzing saved caches; together they have every kind of block. Inputs refer to them by index,
// so new ones are added at the end.
#pragma once

#include <vector>

#include "kv4/cache.h"

namespace kv4::fuzz {

inline std::vector<CacheConfig> saved_configs() {
  std::vector<CacheConfig> list;
  const auto add = [&](const Recipe& recipe, int dim_k, int dim_v, DType dtype = DType::f32, int sliding_window = 0) {
    CacheConfig& c = list.emplace_back();
    c.recipe = recipe;
    c.dtype = dtype;
    c.kv_heads = 1;
    c.head_dim_k = dim_k;
    c.head_dim_v = dim_v;
    c.sliding_window = sliding_window;
  };
  Recipe pages = Recipe::kv4();
  pages.sinks = 1;
  pages.window = 0;
  add(pages, 32, 32, DType::bf16);
  add(Recipe::exact(), 2, 3);
  add(Recipe::paper(), 32, 32);
  add(pages, 32, 32, DType::bf16, 70);
  add(Recipe::paper(), 32, 32, DType::bf16, 70);
  add(Recipe::exact(), 2, 3, DType::f32, 40);
  Recipe given = pages;
  given.key.lambda = given.value.lambda = LambdaMode::given;
  given.key.group = 32;
  given.value.rotation = RotationKind::dense;
  add(given, 64, 32, DType::f16);
  list.back().lambda_k.assign(64, 0.5f);
  list.back().lambda_v.assign(32, 2.0f);
  list.back().matrix_v.assign(32 * 32, 0.0f);
  for (int i = 0; i < 32; ++i) list.back().matrix_v[static_cast<std::size_t>(33 * i)] = 1.0f;
  add(Recipe::kv4(), 32, 32);
  Recipe widths = pages;
  widths.key.bits = 3;
  widths.value.bits = 8;
  add(widths, 32, 32, DType::bf16);
  widths.key.bits = 6;
  widths.value.bits = 2;
  add(widths, 34, 32, DType::f16, 70);
  Recipe refined = pages;
  refined.refined = 1;
  add(refined, 32, 32, DType::bf16);
  refined.refined = 2;
  refined.key.group = 32;
  refined.key.bits = 3;
  add(refined, 64, 32, DType::f16, 70);
  return list;
}

}  // namespace kv4::fuzz
