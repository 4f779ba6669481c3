// kv4_cache: conversions of arguments alone.
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "capi/values.h"

struct kv4_cache {
  std::unique_ptr<kv4::Cache> cache;
};

namespace kv4::capi {
namespace {

// A property of a cache; 0 for a null handle.
template <class F>
auto value_of(const kv4_cache* cache, F&& f) noexcept {
  using R = decltype(f(*cache->cache));
  return guard(R{}, R{}, [&] { return cache == nullptr ? R{} : f(*cache->cache); });
}

// The Status of a callback. One written in C++ may throw.
template <class F>
Status callback_status(const char* name, F&& call) {
  kv4_status status = KV4_OK;
  try {
    status = call();
  } catch (const std::exception& e) {
    return invalid_argument(name, "a status", std::string("an exception: ") + e.what());
  } catch (...) {
    return invalid_argument(name, "a status", "an exception");
  }
  if (status == KV4_OK) return {};
  const bool known = status > KV4_OK && status <= KV4_DATA_LOSS;
  return error(known ? static_cast<StatusCode>(status) : StatusCode::invalid_argument, name, "KV4_OK",
               "status " + std::to_string(static_cast<int>(status)));
}

Status dense(const kv4_cache* cache, bool keys, int64_t first, int64_t count, const kv4_tensor& out) {
  MutableTensorView view;
  KV4_RETURN_IF_ERROR(view_of("out", out, &view));
  return keys ? cache->cache->dense_keys(first, count, view) : cache->cache->dense_values(first, count, view);
}

// At most as many rows as a cache may have sequences.
Status check_count(size_t count) {
  constexpr auto kMost = static_cast<size_t>(std::numeric_limits<int32_t>::max());
  return count <= kMost
             ? Status()
             : invalid_argument("count", "at most " + std::to_string(kMost) + " rows", std::to_string(count));
}

Status rows_of(const kv4_row_count* rows, size_t count, std::vector<RowCount>* out) {
  KV4_RETURN_IF_ERROR(check_count(count));
  for (size_t i = 0; i < count; ++i) out->push_back({rows[i].row, rows[i].tokens});
  return {};
}

}  // namespace
}  // namespace kv4::capi

using namespace kv4::capi;

extern "C" {

kv4_status kv4_cache_create(const kv4_cache_config* given, kv4_cache** out) {
  return guarded({{"config", given}, {"out", out}}, [&]() -> kv4::Status {
    kv4::CacheConfig config;
    KV4_RETURN_IF_ERROR(config_of(given, &config));
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

kv4_status kv4_cache_attend_partial(kv4_cache* cache, const kv4_attend_args* args, int64_t upto, float* o, float* m,
                                    float* l) {
  return guarded({{"cache", cache}, {"args", args}}, [&]() -> kv4::Status {
    kv4::AttendArgs call;
    KV4_RETURN_IF_ERROR(args_of(args, &call));
    return cache->cache->attend_partial(call, upto, {o, m, l});
  });
}

kv4_status kv4_cache_append_rows(kv4_cache* cache, const kv4_row_count* rows, size_t count, const kv4_tensor* k,
                                 const kv4_tensor* v) {
  return guarded({{"cache", cache}, {"rows", rows}, {"k", k}, {"v", v}}, [&]() -> kv4::Status {
    std::vector<kv4::RowCount> counts;
    kv4::TensorView keys, values;
    KV4_RETURN_IF_ERROR(rows_of(rows, count, &counts));
    KV4_RETURN_IF_ERROR(view_of("k", *k, &keys));
    KV4_RETURN_IF_ERROR(view_of("v", *v, &values));
    return cache->cache->append(counts, keys, values);
  });
}

kv4_status kv4_cache_attend_rows(kv4_cache* cache, const kv4_row_count* rows, size_t count, const kv4_attend_args* args,
                                 const kv4_tensor* out) {
  return guarded({{"cache", cache}, {"rows", rows}, {"args", args}, {"out", out}}, [&]() -> kv4::Status {
    std::vector<kv4::RowCount> counts;
    kv4::AttendArgs call;
    kv4::MutableTensorView view;
    KV4_RETURN_IF_ERROR(rows_of(rows, count, &counts));
    KV4_RETURN_IF_ERROR(args_of(args, &call));
    KV4_RETURN_IF_ERROR(view_of("out", *out, &view));
    return cache->cache->attend(counts, call, view);
  });
}

kv4_status kv4_cache_attend_partial_rows(kv4_cache* cache, const kv4_row_count* rows, size_t count,
                                         const kv4_attend_args* args, const int64_t* upto, float* o, float* m,
                                         float* l) {
  return guarded({{"cache", cache}, {"rows", rows}, {"args", args}, {"upto", upto}}, [&]() -> kv4::Status {
    std::vector<kv4::RowCount> counts;
    kv4::AttendArgs call;
    KV4_RETURN_IF_ERROR(rows_of(rows, count, &counts));
    KV4_RETURN_IF_ERROR(args_of(args, &call));
    return cache->cache->attend_partial(counts, call, {upto, count}, {o, m, l});
  });
}

kv4_status kv4_cache_add(kv4_cache* cache, int32_t count) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->add(count); });
}
kv4_status kv4_cache_remove(kv4_cache* cache, const int64_t* rows, size_t count) {
  return guarded({{"cache", cache}, {"rows", rows}}, [&]() -> kv4::Status {
    KV4_RETURN_IF_ERROR(check_count(count));
    return cache->cache->remove({rows, count});
  });
}
kv4_status kv4_cache_extend(kv4_cache* cache, const kv4_cache* other) {
  return guarded({{"cache", cache}, {"other", other}}, [&] { return cache->cache->extend(*other->cache); });
}
kv4_status kv4_cache_crop_row(kv4_cache* cache, int32_t row, int64_t length) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->crop(row, length); });
}
kv4_status kv4_cache_erase(kv4_cache* cache, int32_t row, int64_t first, int64_t count) {
  return guarded({{"cache", cache}}, [&] { return cache->cache->erase(row, first, count); });
}
kv4_status kv4_cache_row_length(const kv4_cache* cache, int32_t row, int64_t* out) {
  return guarded({{"cache", cache}, {"out", out}}, [&]() -> kv4::Status {
    const int32_t batch = cache->cache->batch();
    if (row < 0 || row >= batch)
      return kv4::error(kv4::StatusCode::out_of_range, "row", "0 to " + std::to_string(batch - 1), std::to_string(row));
    *out = cache->cache->length(row);
    return {};
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
    KV4_RETURN_IF_ERROR(check_count(count));
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
    return cache->cache->save([&](std::span<const std::byte> x) {
      return callback_status("sink", [&] { return sink(context, x.data(), x.size()); });
    });
  });
}
kv4_status kv4_cache_load(kv4_cache* cache, kv4_source source, void* context) {
  return guarded({{"cache", cache}}, [&]() -> kv4::Status {
    if (source == nullptr) return null_pointer("source");
    return cache->cache->load([&](std::span<std::byte> x) {
      return callback_status("source", [&] { return source(context, x.data(), x.size()); });
    });
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

}  // extern "C"
