// The C ABI on top of the C++ API: conversions, no logic.
#include "kv4/kv4.h"

#include <array>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "kv4/cache.h"
#include "kv4/cpu.h"
#include "kv4/version.h"

struct kv4_cache {
  std::unique_ptr<kv4::Cache> cache;
};

namespace {

thread_local std::string last_error;

kv4_status answer(const kv4::Status& status) {
  last_error = status.message();
  return static_cast<kv4_status>(status.code());
}

kv4::Status null_pointer(const char* name) { return kv4::invalid_argument(name, "a pointer", "NULL"); }

// Runs f where every pointer is there; running out of memory becomes a status.
template <class F>
kv4_status guarded(std::initializer_list<std::pair<const char*, const void*>> pointers, F&& f) {
  for (const auto& [name, p] : pointers)
    if (p == nullptr) return answer(null_pointer(name));
  try {
    return answer(f());
  } catch (const std::bad_alloc&) {
    return answer(kv4::error(kv4::StatusCode::out_of_memory, "memory", "free bytes", "none"));
  }
}

kv4::Status in_range(const char* name, int value, int last) {
  if (value >= 0 && value <= last) return {};
  return kv4::invalid_argument(name, "a value from 0 to " + std::to_string(last), std::to_string(value));
}

kv4::Status dtype_of(const char* name, int32_t value, kv4::DType* out) {
  KV4_RETURN_IF_ERROR(in_range(name, value, 2));
  *out = static_cast<kv4::DType>(value);
  return {};
}

template <class View>
kv4::Status view_of(const char* name, const kv4_tensor& t, View* out) {
  KV4_RETURN_IF_ERROR(dtype_of(name, t.dtype, &out->dtype));
  out->data = t.data;
  for (int i = 0; i < 4; ++i) {
    out->shape[i] = t.shape[i];
    out->stride[i] = t.stride[i];
  }
  return {};
}

kv4::Status side_of(const kv4_side_recipe& s, kv4::SideRecipe* out) {
  KV4_RETURN_IF_ERROR(in_range("recipe.rotation", s.rotation, 4));
  KV4_RETURN_IF_ERROR(in_range("recipe.levels", s.levels, 1));
  KV4_RETURN_IF_ERROR(in_range("recipe.scale", s.scale, 1));
  KV4_RETURN_IF_ERROR(in_range("recipe.lambda", s.lambda, 2));
  out->rotation = static_cast<kv4::RotationKind>(s.rotation);
  out->reflectors = s.reflectors;
  out->seed = s.seed;
  out->group = s.group;
  out->levels = static_cast<kv4::LevelKind>(s.levels);
  out->scale = static_cast<kv4::ScaleRule>(s.scale);
  out->mean = s.mean != 0;
  out->lambda = static_cast<kv4::LambdaMode>(s.lambda);
  return {};
}

kv4_side_recipe side_from(const kv4::SideRecipe& s) {
  return {static_cast<int32_t>(s.rotation), s.reflectors, s.seed, s.group, static_cast<int32_t>(s.levels),
          static_cast<int32_t>(s.scale), s.mean ? 1 : 0, static_cast<int32_t>(s.lambda)};
}

kv4_recipe recipe_from(const kv4::Recipe& r) {
  return {side_from(r.key), side_from(r.value), static_cast<int32_t>(r.seal), r.sinks, r.window};
}

kv4::Status args_of(const kv4_attend_args& a, kv4::AttendArgs* out) {
  KV4_RETURN_IF_ERROR(view_of("q", a.q, &out->q));
  KV4_RETURN_IF_ERROR(in_range("mask_kind", a.mask_kind, 2));
  out->scale = a.scale;
  out->softcap = a.softcap;
  out->sinks = a.sinks;
  kv4::Mask& m = out->mask;
  m.causal = a.causal != 0;
  m.offset = a.offset;
  m.start = a.start;
  m.window = a.window;
  m.kind = static_cast<kv4::Mask::General>(a.mask_kind);
  m.general = a.mask;
  if (m.kind == kv4::Mask::General::additive) KV4_RETURN_IF_ERROR(dtype_of("mask_dtype", a.mask_dtype, &m.general_dtype));
  for (int i = 0; i < 4; ++i) m.general_stride[i] = a.mask_stride[i];
  m.columns = a.columns;
  m.host_general = a.host_mask;
  for (int i = 0; i < 4; ++i) m.host_general_stride[i] = a.host_mask_stride[i];
  return {};
}

// What a callback returned.
kv4::Status answer_of(const char* name, kv4_status status) {
  if (status == KV4_OK) return {};
  const bool known = status > KV4_OK && status <= KV4_DATA_LOSS;
  return kv4::error(known ? static_cast<kv4::StatusCode>(status) : kv4::StatusCode::invalid_argument, name, "KV4_OK",
                    "status " + std::to_string(static_cast<int>(status)));
}

kv4::Status dense(const kv4_cache* cache, bool keys, int64_t first, int64_t count, const kv4_tensor& out) {
  kv4::MutableTensorView view;
  KV4_RETURN_IF_ERROR(view_of("out", out, &view));
  return keys ? cache->cache->dense_keys(first, count, view) : cache->cache->dense_values(first, count, view);
}

}  // namespace

extern "C" {

kv4_recipe kv4_recipe_default(void) { return recipe_from(kv4::Recipe::kv4()); }
kv4_recipe kv4_recipe_paper(void) { return recipe_from(kv4::Recipe::paper()); }
kv4_recipe kv4_recipe_exact(void) { return recipe_from(kv4::Recipe::exact()); }

const char* kv4_version(void) { return KV4_VERSION; }
const char* kv4_last_error(void) { return last_error.c_str(); }

kv4_status kv4_cache_create(const kv4_cache_config* c, kv4_cache** out) {
  return guarded({{"config", c}, {"out", out}}, [&]() -> kv4::Status {
    kv4::CacheConfig config;
    KV4_RETURN_IF_ERROR(side_of(c->recipe.key, &config.recipe.key));
    KV4_RETURN_IF_ERROR(side_of(c->recipe.value, &config.recipe.value));
    KV4_RETURN_IF_ERROR(in_range("recipe.seal", c->recipe.seal, 2));
    config.recipe.seal = static_cast<kv4::SealMode>(c->recipe.seal);
    config.recipe.sinks = c->recipe.sinks;
    config.recipe.window = c->recipe.window;
    KV4_RETURN_IF_ERROR(dtype_of("dtype", c->dtype, &config.dtype));
    config.kv_heads = c->kv_heads;
    config.head_dim_k = c->head_dim_k;
    config.head_dim_v = c->head_dim_v;
    config.sliding_window = c->sliding_window;
    const auto take = [](const float* from, std::int64_t rows, std::int64_t columns, std::vector<float>* to) {
      if (from != nullptr && rows > 0 && columns > 0) to->assign(from, from + rows * columns);
    };
    take(c->lambda_k, c->kv_heads, c->head_dim_k, &config.lambda_k);
    take(c->lambda_v, c->kv_heads, c->head_dim_v, &config.lambda_v);
    take(c->matrix_k, c->head_dim_k, c->head_dim_k, &config.matrix_k);
    take(c->matrix_v, c->head_dim_v, c->head_dim_v, &config.matrix_v);
    if (c->backend != nullptr) config.backend = c->backend;
    auto handle = std::make_unique<kv4_cache>();
    KV4_RETURN_IF_ERROR(kv4::Cache::create(config, &handle->cache));
    *out = handle.release();
    return {};
  });
}

void kv4_cache_destroy(kv4_cache* cache) { delete cache; }

kv4_status kv4_cache_append(kv4_cache* cache, const kv4_tensor* k, const kv4_tensor* v) {
  return guarded({{"cache", cache}, {"k", k}, {"v", v}}, [&]() -> kv4::Status {
    kv4::TensorView keys, values;
    KV4_RETURN_IF_ERROR(view_of("k", *k, &keys));
    KV4_RETURN_IF_ERROR(view_of("v", *v, &values));
    return cache->cache->append(keys, values);
  });
}

kv4_status kv4_cache_attend(kv4_cache* cache, const kv4_attend_args* args, const kv4_tensor* out) {
  return guarded({{"cache", cache}, {"args", args}, {"out", out}}, [&]() -> kv4::Status {
    kv4::AttendArgs call;
    kv4::MutableTensorView view;
    KV4_RETURN_IF_ERROR(args_of(*args, &call));
    KV4_RETURN_IF_ERROR(view_of("out", *out, &view));
    return cache->cache->attend(call, view);
  });
}

kv4_status kv4_cache_attend_partial(kv4_cache* cache, const kv4_attend_args* args, int64_t upto, float* o, float* m, float* l) {
  return guarded({{"cache", cache}, {"args", args}}, [&]() -> kv4::Status {
    kv4::AttendArgs call;
    KV4_RETURN_IF_ERROR(args_of(*args, &call));
    return cache->cache->attend_partial(call, upto, {o, m, l});
  });
}

kv4_status kv4_cache_seal(kv4_cache* cache) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->seal(); });
}
kv4_status kv4_cache_set_stream(kv4_cache* cache, void* stream) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    cache->cache->set_stream(stream);
    return {};
  });
}
kv4_status kv4_cache_reserve(kv4_cache* cache, int64_t tokens) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->reserve(tokens); });
}
kv4_status kv4_cache_advance(kv4_cache* cache) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->advance(); });
}
kv4_status kv4_cache_crop(kv4_cache* cache, int64_t length) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->crop(length); });
}
kv4_status kv4_cache_select(kv4_cache* cache, const int64_t* rows, size_t count) {
  return guarded({{"cache", cache}, {"rows", rows}}, [&] { return cache->cache->select({rows, count}); });
}
kv4_status kv4_cache_repeat(kv4_cache* cache, int32_t times) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->repeat(times); });
}
kv4_status kv4_cache_reset(kv4_cache* cache) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    cache->cache->reset();
    return {};
  });
}
kv4_status kv4_cache_clone(const kv4_cache* cache, kv4_cache** out) {
  return guarded({{"cache", cache}, {"out", out}}, [&]() -> kv4::Status {
    auto handle = std::make_unique<kv4_cache>();
    KV4_RETURN_IF_ERROR(cache->cache->clone(&handle->cache));
    *out = handle.release();
    return {};
  });
}
kv4_status kv4_cache_record_past(kv4_cache* cache, int32_t on) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    cache->cache->record_past(on != 0);
    return {};
  });
}
kv4_status kv4_cache_save(const kv4_cache* cache, kv4_sink sink, void* context) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    if (sink == nullptr) return null_pointer("sink");
    return cache->cache->save([&](std::span<const std::byte> x) { return answer_of("sink", sink(context, x.data(), x.size())); });
  });
}
kv4_status kv4_cache_load(kv4_cache* cache, kv4_source source, void* context) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    if (source == nullptr) return null_pointer("source");
    return cache->cache->load([&](std::span<std::byte> x) { return answer_of("source", source(context, x.data(), x.size())); });
  });
}
kv4_status kv4_cache_dense_keys(const kv4_cache* cache, int64_t first, int64_t count, const kv4_tensor* out) {
  return guarded({{"cache", cache}, {"out", out}}, [&] { return dense(cache, true, first, count, *out); });
}
kv4_status kv4_cache_dense_values(const kv4_cache* cache, int64_t first, int64_t count, const kv4_tensor* out) {
  return guarded({{"cache", cache}, {"out", out}}, [&] { return dense(cache, false, first, count, *out); });
}

size_t kv4_cache_nbytes(const kv4_cache* cache) { return cache == nullptr ? 0 : cache->cache->nbytes(); }
int64_t kv4_cache_length(const kv4_cache* cache) { return cache == nullptr ? 0 : cache->cache->length(); }
int64_t kv4_cache_first(const kv4_cache* cache) { return cache == nullptr ? 0 : cache->cache->first(); }
int32_t kv4_cache_batch(const kv4_cache* cache) { return cache == nullptr ? 0 : cache->cache->batch(); }

kv4_status kv4_set_num_threads(int32_t threads) { return answer(kv4::cpu::set_num_threads(threads)); }
int32_t kv4_num_threads(void) { return kv4::cpu::num_threads(); }
kv4_status kv4_force_isa(const char* isa) { return answer(kv4::cpu::force_isa(isa == nullptr ? "" : isa)); }
const char* kv4_active_isa(void) {
  static thread_local std::string name;
  name = kv4::cpu::active_isa();
  return name.c_str();
}

}  // extern "C"
