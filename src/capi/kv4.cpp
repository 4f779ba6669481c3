// The C ABI on top of the C++ API: conversions, no logic.
#include "kv4/kv4.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kv4/cache.h"
#include "kv4/cpu.h"
#include "kv4/version.h"

struct kv4_cache {
  std::unique_ptr<kv4::Cache> cache;
};

namespace {

// Of the calling thread: `said` is `last_error`, or a literal where there was no memory for more.
thread_local std::string last_error;
thread_local const char* said = "";

kv4_status answer(const kv4::Status& status) {
  last_error = status.message();
  said = last_error.c_str();
  return static_cast<kv4_status>(status.code());
}

void say_exception(const char* what) noexcept {
  try {
    last_error = kv4::invalid_argument("kv4", "no exception", what).message();
    said = last_error.c_str();
  } catch (...) {
    said = "kv4: expected no exception; got one";
  }
}

// f()'s result: the one way into the library. An exception ends here.
template <class R, class F>
R guard(R out_of_memory, R internal, F&& f) noexcept {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    said = "memory: expected free bytes; got none";
    return out_of_memory;
  } catch (const std::exception& e) {
    say_exception(e.what());
  } catch (...) {
    say_exception("one of another type than std::exception");
  }
  return internal;
}

kv4::Status null_pointer(const char* name) { return kv4::invalid_argument(name, "a pointer", "NULL"); }

// Runs f, which returns a Status, where every pointer is there.
template <class F>
kv4_status guarded(std::initializer_list<std::pair<const char*, const void*>> pointers, F&& f) noexcept {
  return guard(KV4_OUT_OF_MEMORY, KV4_INTERNAL, [&] {
    for (const auto& [name, p] : pointers)
      if (p == nullptr) return answer(null_pointer(name));
    return answer(f());
  });
}

// What a cache says of itself; 0 of none.
template <class F>
auto value_of(const kv4_cache* cache, F&& f) noexcept {
  using R = decltype(f(*cache->cache));
  return guard(R{}, R{}, [&] { return cache == nullptr ? R{} : f(*cache->cache); });
}

// Structs with a size.

// Where the struct ended in each version, the newest last.
constexpr std::size_t kConfigSizes[] = {offsetof(kv4_cache_config, backend), sizeof(kv4_cache_config)};
constexpr std::size_t kArgsSizes[] = {offsetof(kv4_attend_args, host_mask), sizeof(kv4_attend_args)};
// A size beyond is no newer version's but a number that nobody set.
constexpr std::size_t kLargestSize = 4096;

static_assert(sizeof(void*) != 8 || (sizeof(kv4_side_recipe) == 40 && sizeof(kv4_recipe) == 96 && sizeof(kv4_tensor) == 80),
              "structs without a size never change");

kv4::Status check_size(const char* name, std::size_t size, std::span<const std::size_t> known) {
  const bool fits = size > known.back() ? size <= kLargestSize : std::find(known.begin(), known.end(), size) != known.end();
  if (fits) return {};
  std::string sizes;
  for (const std::size_t one : known) sizes += std::to_string(one) + ", ";
  return kv4::invalid_argument(std::string(name) + ".size", "the struct's, as its init sets it (" + sizes + "or a newer version's)",
                               std::to_string(size));
}

// The part of `given` that its size says is there, over the defaults that *out holds.
template <class T>
kv4::Status read_struct(const char* name, const T* given, std::span<const std::size_t> known, T* out) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  std::size_t size = 0;
  std::memcpy(&size, bytes, sizeof size);
  KV4_RETURN_IF_ERROR(check_size(name, size, known));
  for (std::size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      return kv4::error(kv4::StatusCode::unsupported, name, "zeros behind the " + std::to_string(sizeof(T)) + " bytes that this version knows",
                        "a setting of a newer version at byte " + std::to_string(i));
  std::memcpy(out, bytes, std::min(size, sizeof(T)));
  return {};
}

template <class T>
kv4_status init_struct(const char* name, T* out, std::size_t size, std::span<const std::size_t> known, T (*defaults)()) noexcept {
  return guarded({{name, out}}, [&]() -> kv4::Status {
    KV4_RETURN_IF_ERROR(check_size(name, size, known));
    auto* bytes = reinterpret_cast<unsigned char*>(out);
    const T values = defaults();
    std::memset(bytes, 0, size);
    std::memcpy(bytes, &values, std::min(size, sizeof(T)));
    std::memcpy(bytes, &size, sizeof size);
    return {};
  });
}

// Values.

kv4::Status in_range(const char* name, int32_t value, int32_t last, int32_t first = 0) {
  if (value >= first && value <= last) return {};
  return kv4::invalid_argument(name, "a value from " + std::to_string(first) + " to " + std::to_string(last), std::to_string(value));
}

kv4::Status dtype_of(const char* name, int32_t value, kv4::DType* out) {
  KV4_RETURN_IF_ERROR(in_range(name, value, 2));
  *out = static_cast<kv4::DType>(value);
  return {};
}

// No axis is negative, and the distance of any two elements, of `bytes` each, fits the type that holds distances.
kv4::Status check_extent(const std::string& name, const int64_t (&shape)[4], const int64_t (&stride)[4], std::size_t bytes) {
  const auto list = [](const int64_t(&x)[4]) {
    return "[" + std::to_string(x[0]) + ", " + std::to_string(x[1]) + ", " + std::to_string(x[2]) + ", " + std::to_string(x[3]) + "]";
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::int64_t left = kMost / static_cast<std::int64_t>(bytes), count = left;
  bool fits = true;
  for (const int64_t n : shape) {
    if (n < 0) return kv4::invalid_argument(name + ".shape", "axes of 0 or more", list(shape));
    if (n > 0) count /= n;
    fits &= count > 0;
  }
  for (std::size_t i = 0; i < 4 && fits; ++i) {
    if (shape[i] < 2) continue;
    const std::int64_t steps = shape[i] - 1;
    fits = stride[i] != std::numeric_limits<std::int64_t>::min() && std::abs(stride[i]) <= left / steps;
    if (fits) left -= std::abs(stride[i]) * steps;
  }
  return fits ? kv4::Status() : kv4::invalid_argument(name + ".stride", "distances of 63 bits", list(stride) + " over shape " + list(shape));
}

template <class View>
kv4::Status view_of(const char* name, const kv4_tensor& t, View* out) {
  KV4_RETURN_IF_ERROR(dtype_of((std::string(name) + ".dtype").c_str(), t.dtype, &out->dtype));
  KV4_RETURN_IF_ERROR(check_extent(name, t.shape, t.stride, kv4::size_of(out->dtype)));
  const bool empty = std::find(std::begin(t.shape), std::end(t.shape), 0) != std::end(t.shape);
  if (t.data == nullptr && !empty) return null_pointer((std::string(name) + ".data").c_str());
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

kv4_cache_config default_config() {
  kv4_cache_config config = {};
  config.size = sizeof config;
  config.recipe = recipe_from(kv4::Recipe::kv4());
  return config;
}

// The caller's [rows, columns] floats, whose sizes are known to be such; nothing is read where the recipe wants none.
kv4::Status take(const char* name, const float* from, bool wanted, const char* otherwise, int32_t rows, int32_t columns,
                 std::vector<float>* to) {
  if (from == nullptr) return {};
  if (!wanted) return kv4::invalid_argument(name, std::string("NULL, since the recipe's ") + otherwise, "a pointer");
  to->assign(from, from + static_cast<std::int64_t>(rows) * columns);
  return {};
}

// Every number is checked before an array is read by it.
kv4::Status config_of(const kv4_cache_config& c, kv4::CacheConfig* out) {
  constexpr int32_t kMostHeads = 65536, kMost = std::numeric_limits<int32_t>::max();
  kv4::Recipe& recipe = out->recipe;
  KV4_RETURN_IF_ERROR(side_of(c.recipe.key, &recipe.key));
  KV4_RETURN_IF_ERROR(side_of(c.recipe.value, &recipe.value));
  KV4_RETURN_IF_ERROR(in_range("recipe.seal", c.recipe.seal, 2));
  recipe.seal = static_cast<kv4::SealMode>(c.recipe.seal);
  recipe.sinks = c.recipe.sinks;
  recipe.window = c.recipe.window;
  KV4_RETURN_IF_ERROR(dtype_of("dtype", c.dtype, &out->dtype));
  KV4_RETURN_IF_ERROR(in_range("kv_heads", c.kv_heads, kMostHeads, 1));
  KV4_RETURN_IF_ERROR(in_range("head_dim_k", c.head_dim_k, kMost, 1));
  KV4_RETURN_IF_ERROR(in_range("head_dim_v", c.head_dim_v, kMost, 1));
  KV4_RETURN_IF_ERROR(kv4::validate(recipe, c.head_dim_k, c.head_dim_v));
  out->kv_heads = c.kv_heads;
  out->head_dim_k = c.head_dim_k;
  out->head_dim_v = c.head_dim_v;
  out->sliding_window = c.sliding_window;
  const bool seals = recipe.seal != kv4::SealMode::never;
  const auto lambda = [&](const char* name, const float* from, const kv4::SideRecipe& side, int32_t dim, std::vector<float>* to) {
    return take(name, from, seals && side.lambda == kv4::LambdaMode::given, "lambda is not 'given'", c.kv_heads, dim, to);
  };
  const auto matrix = [&](const char* name, const float* from, const kv4::SideRecipe& side, int32_t dim, std::vector<float>* to) {
    return take(name, from, seals && side.rotation == kv4::RotationKind::dense, "rotation is not 'dense'", dim, dim, to);
  };
  KV4_RETURN_IF_ERROR(lambda("lambda_k", c.lambda_k, recipe.key, c.head_dim_k, &out->lambda_k));
  KV4_RETURN_IF_ERROR(lambda("lambda_v", c.lambda_v, recipe.value, c.head_dim_v, &out->lambda_v));
  KV4_RETURN_IF_ERROR(matrix("matrix_k", c.matrix_k, recipe.key, c.head_dim_k, &out->matrix_k));
  KV4_RETURN_IF_ERROR(matrix("matrix_v", c.matrix_v, recipe.value, c.head_dim_v, &out->matrix_v));
  if (c.backend != nullptr) out->backend = c.backend;
  return {};
}

kv4::Status mask_of(const kv4_attend_args& a, kv4::Mask* out) {
  kv4::Mask& m = *out;
  m.causal = a.causal != 0;
  m.offset = a.offset;
  m.start = a.start;
  m.window = a.window;
  KV4_RETURN_IF_ERROR(in_range("mask_kind", a.mask_kind, 2));
  m.kind = static_cast<kv4::Mask::General>(a.mask_kind);
  if (m.kind == kv4::Mask::General::none) return {};
  if (a.mask == nullptr) return null_pointer("mask");
  if (m.kind == kv4::Mask::General::additive) KV4_RETURN_IF_ERROR(dtype_of("mask_dtype", a.mask_dtype, &m.general_dtype));
  const std::size_t bytes = m.kind == kv4::Mask::General::boolean ? 1 : kv4::size_of(m.general_dtype);
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

kv4_attend_args default_args() {
  kv4_attend_args args = {};
  args.size = sizeof args;
  args.causal = 1;
  return args;
}

kv4::Status args_of(const kv4_attend_args* given, kv4::AttendArgs* out) {
  kv4_attend_args a = default_args();
  KV4_RETURN_IF_ERROR(read_struct("args", given, kArgsSizes, &a));
  KV4_RETURN_IF_ERROR(view_of("q", a.q, &out->q));
  out->scale = a.scale;
  out->softcap = a.softcap;
  out->sinks = a.sinks;
  return mask_of(a, &out->mask);
}

// What a callback returned. One of another language may raise all the same.
template <class F>
kv4::Status answer_of(const char* name, F&& call) {
  kv4_status status = KV4_OK;
  try {
    status = call();
  } catch (const std::exception& e) {
    return kv4::invalid_argument(name, "a status", std::string("an exception: ") + e.what());
  } catch (...) {
    return kv4::invalid_argument(name, "a status", "an exception");
  }
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

kv4_recipe kv4_recipe_default(void) {
  return guard(kv4_recipe{}, kv4_recipe{}, [] { return recipe_from(kv4::Recipe::kv4()); });
}
kv4_recipe kv4_recipe_paper(void) {
  return guard(kv4_recipe{}, kv4_recipe{}, [] { return recipe_from(kv4::Recipe::paper()); });
}
kv4_recipe kv4_recipe_exact(void) {
  return guard(kv4_recipe{}, kv4_recipe{}, [] { return recipe_from(kv4::Recipe::exact()); });
}

const char* kv4_version(void) { return KV4_VERSION; }
const char* kv4_last_error(void) { return said; }

kv4_status kv4_cache_config_init(kv4_cache_config* config, size_t size) {
  return init_struct("config", config, size, kConfigSizes, default_config);
}
kv4_status kv4_attend_args_init(kv4_attend_args* args, size_t size) {
  return init_struct("args", args, size, kArgsSizes, default_args);
}

kv4_status kv4_cache_create(const kv4_cache_config* given, kv4_cache** out) {
  return guarded({{"config", given}, {"out", out}}, [&]() -> kv4::Status {
    kv4_cache_config c = default_config();
    kv4::CacheConfig config;
    KV4_RETURN_IF_ERROR(read_struct("config", given, kConfigSizes, &c));
    KV4_RETURN_IF_ERROR(config_of(c, &config));
    auto handle = std::make_unique<kv4_cache>();
    KV4_RETURN_IF_ERROR(kv4::Cache::create(config, &handle->cache));
    *out = handle.release();
    return {};
  });
}

void kv4_cache_destroy(kv4_cache* cache) {
  guard(0, 0, [&] {
    delete cache;
    return 0;
  });
}

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
    KV4_RETURN_IF_ERROR(args_of(args, &call));
    KV4_RETURN_IF_ERROR(view_of("out", *out, &view));
    return cache->cache->attend(call, view);
  });
}

kv4_status kv4_cache_attend_partial(kv4_cache* cache, const kv4_attend_args* args, int64_t upto, float* o, float* m, float* l) {
  return guarded({{"cache", cache}, {"args", args}}, [&]() -> kv4::Status {
    kv4::AttendArgs call;
    KV4_RETURN_IF_ERROR(args_of(args, &call));
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
  return guarded({{"cache", cache}, {"rows", rows}}, [&]() -> kv4::Status {
    constexpr auto kMost = static_cast<size_t>(std::numeric_limits<int32_t>::max());
    if (count > kMost) return kv4::invalid_argument("count", "at most " + std::to_string(kMost) + " rows", std::to_string(count));
    return cache->cache->select({rows, count});
  });
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
    return cache->cache->save([&](std::span<const std::byte> x) { return answer_of("sink", [&] { return sink(context, x.data(), x.size()); }); });
  });
}
kv4_status kv4_cache_load(kv4_cache* cache, kv4_source source, void* context) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    if (source == nullptr) return null_pointer("source");
    return cache->cache->load([&](std::span<std::byte> x) { return answer_of("source", [&] { return source(context, x.data(), x.size()); }); });
  });
}
kv4_status kv4_cache_dense_keys(const kv4_cache* cache, int64_t first, int64_t count, const kv4_tensor* out) {
  return guarded({{"cache", cache}, {"out", out}}, [&] { return dense(cache, true, first, count, *out); });
}
kv4_status kv4_cache_dense_values(const kv4_cache* cache, int64_t first, int64_t count, const kv4_tensor* out) {
  return guarded({{"cache", cache}, {"out", out}}, [&] { return dense(cache, false, first, count, *out); });
}

size_t kv4_cache_nbytes(const kv4_cache* cache) {
  return value_of(cache, [](const kv4::Cache& c) { return c.nbytes(); });
}
int64_t kv4_cache_length(const kv4_cache* cache) {
  return value_of(cache, [](const kv4::Cache& c) { return c.length(); });
}
int64_t kv4_cache_first(const kv4_cache* cache) {
  return value_of(cache, [](const kv4::Cache& c) { return c.first(); });
}
int32_t kv4_cache_batch(const kv4_cache* cache) {
  return value_of(cache, [](const kv4::Cache& c) { return c.batch(); });
}

kv4_status kv4_set_num_threads(int32_t threads) {
  return guarded({}, [&] { return kv4::cpu::set_num_threads(threads); });
}
int32_t kv4_num_threads(void) {
  return guard(1, 1, [] { return kv4::cpu::num_threads(); });
}
kv4_status kv4_force_isa(const char* isa) {
  return guarded({}, [&] { return kv4::cpu::force_isa(isa == nullptr ? "" : isa); });
}
const char* kv4_active_isa(void) {
  return guard("", "", [] {
    static thread_local std::string name;
    name = kv4::cpu::active_isa();
    if (name.empty()) answer(kv4::cpu::check_isa());
    return name.c_str();
  });
}

}  // extern "C"
