// kv4_page_format and the operations on a host's memory: conversions of arguments alone.
#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "capi/executor.h"
#include "capi/values.h"
#include "kv4/paged.h"

struct kv4_page_format {
  std::unique_ptr<kv4::PageFormat> format;
};

namespace kv4::capi {
namespace {

constexpr std::size_t kBatchSizes[] = {sizeof(kv4_paged_batch)};

static_assert(sizeof(void*) != 8 ||
                  (sizeof(kv4_page_memory) == 40 && sizeof(kv4_row_memory) == 64 && sizeof(kv4_page_range) == 24 &&
                   sizeof(kv4_page_limits) == 40 && sizeof(kv4_place) == 32 && sizeof(kv4_executor) == 24),
              "structs without a size never change");

kv4_paged_batch default_batch() {
  kv4_paged_batch batch = {};
  batch.size = sizeof batch;
  return batch;
}

Status batch_of(const kv4_paged_batch* given, PagedBatch* out) {
  kv4_paged_batch b = default_batch();
  KV4_RETURN_IF_ERROR(read_struct("batch", given, kBatchSizes, &b));
  const kv4_page_memory& p = b.page_memory;
  const kv4_row_memory& r = b.row_memory;
  *out = {.size = b.sequences,
          .queries = b.queries,
          .lengths = b.lengths,
          .sealed = b.sealed,
          .pages = b.pages,
          .pages_stride = b.pages_stride,
          .blocks = b.blocks,
          .blocks_stride = b.blocks_stride,
          .sinks = b.sinks,
          .sink_tokens = b.sink_tokens,
          .window = b.window,
          .page_memory = {static_cast<std::uint8_t*>(p.data), reinterpret_cast<std::uint8_t* const*>(p.chunks),
                          p.page_stride, p.head_stride, p.chunk_shift},
          .row_memory = {r.k, r.v, r.k_block_stride, r.v_block_stride, r.k_head_stride, r.v_head_stride, r.k_stride,
                         r.v_stride},
          .page_count = b.page_count,
          .block_count = b.block_count,
          .non_finite = b.non_finite,
          .lambda_k = b.lambda_k,
          .lambda_v = b.lambda_v,
          .lambda_k_stride = b.lambda_k_stride,
          .lambda_v_stride = b.lambda_v_stride,
          .most_queries = b.most_queries,
          .longest = b.longest,
          .all = b.all};
  return {};
}

// Executor, stream and workspace of a call; valid for its duration.
struct CallContext {
  std::optional<CallerExecutor> adapter;
  Place place;
  std::span<std::byte> workspace;

  Status read(const kv4_place* given) {
    if (given == nullptr) return {};
    if (given->workspace == nullptr && given->workspace_bytes > 0) return null_pointer("place.workspace");
    workspace = {static_cast<std::byte*>(given->workspace), given->workspace_bytes};
    place.stream = given->stream;
    return set_executor(given->executor);
  }
  Status set_executor(const kv4_executor* executor) {
    if (executor == nullptr) return {};
    KV4_RETURN_IF_ERROR(check_executor(*executor));
    place.executor = &adapter.emplace(*executor);
    return {};
  }
};

// Runs f(format, batch, context) where no pointer is null and all are valid.
template <class F>
kv4_status with_batch(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_place* place,
                      std::initializer_list<std::pair<const char*, const void*>> others, F&& f) noexcept {
  return guarded({{"format", format}, {"batch", batch}, {"place", place}}, [&]() -> Status {
    for (const auto& [name, p] : others)
      if (p == nullptr) return null_pointer(name);
    PagedBatch b;
    CallContext context;
    KV4_RETURN_IF_ERROR(batch_of(batch, &b));
    KV4_RETURN_IF_ERROR(context.read(place));
    return f(*format->format, b, context);
  });
}

PageRange range_of(const kv4_page_range& r) { return {r.begin, r.end, r.most}; }

template <class F>
std::size_t bytes_of(const kv4_page_format* format, F&& f) noexcept {
  return guard(std::size_t{0}, std::size_t{0}, [&] { return format == nullptr ? std::size_t{0} : f(*format->format); });
}

}  // namespace
}  // namespace kv4::capi

using namespace kv4::capi;

extern "C" {

kv4_status kv4_paged_batch_init(kv4_paged_batch* batch, size_t size) {
  return init_struct("batch", batch, size, kBatchSizes, default_batch);
}

kv4_status kv4_page_format_create(const kv4_cache_config* given, kv4_page_format** out) {
  return guarded({{"config", given}, {"out", out}}, [&]() -> kv4::Status {
    kv4::CacheConfig config;
    KV4_RETURN_IF_ERROR(config_of(given, &config));
    auto handle = std::make_unique<kv4_page_format>();
    KV4_RETURN_IF_ERROR(kv4::PageFormat::create(config, &handle->format));
    *out = handle.release();
    return {};
  });
}
void kv4_page_format_destroy(kv4_page_format* format) {
  guard(0, 0, [&] {
    delete format;
    return 0;
  });
}
size_t kv4_page_format_head_bytes(const kv4_page_format* format) {
  return bytes_of(format, [](const kv4::PageFormat& f) { return f.head_bytes(); });
}
size_t kv4_page_format_page_bytes(const kv4_page_format* format) {
  return bytes_of(format, [](const kv4::PageFormat& f) { return f.page_bytes(); });
}
size_t kv4_page_format_block_bytes(const kv4_page_format* format) {
  return bytes_of(format, [](const kv4::PageFormat& f) { return f.block_bytes(); });
}
kv4_status kv4_page_format_workspace_bytes(const kv4_page_format* format, const kv4_page_limits* limits,
                                           const kv4_executor* executor, size_t* out) {
  return guarded({{"format", format}, {"limits", limits}, {"out", out}}, [&]() -> kv4::Status {
    CallContext context;
    KV4_RETURN_IF_ERROR(context.set_executor(executor));
    const kv4::PageFormat::Limits l{limits->sequences,    limits->q_heads, limits->most_pages,
                                    limits->most_queries, limits->longest, limits->all};
    return format->format->workspace_bytes(l, out, context.place);
  });
}

kv4_status kv4_paged_prepare(const kv4_page_format* format, const kv4_place* place) {
  return guarded({{"format", format}, {"place", place}}, [&]() -> kv4::Status {
    CallContext context;
    KV4_RETURN_IF_ERROR(context.read(place));
    return format->format->prepare(context.workspace, context.place);
  });
}
kv4_status kv4_paged_store(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_tensor* k,
                           const kv4_tensor* v, const kv4_place* place) {
  return with_batch(format, batch, place, {{"k", k}, {"v", v}},
                    [&](const kv4::PageFormat& f, const kv4::PagedBatch& b, const CallContext& context) -> kv4::Status {
                      kv4::TensorView keys, values;
                      KV4_RETURN_IF_ERROR(view_of("k", *k, &keys));
                      KV4_RETURN_IF_ERROR(view_of("v", *v, &values));
                      return f.store(b, keys, values, context.workspace, context.place);
                    });
}
kv4_status kv4_paged_seal(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_page_range* range,
                          const kv4_place* place) {
  return with_batch(format, batch, place, {{"range", range}},
                    [&](const kv4::PageFormat& f, const kv4::PagedBatch& b, const CallContext& context) {
                      return f.seal(b, range_of(*range), context.workspace, context.place);
                    });
}
kv4_status kv4_paged_dequantise(const kv4_page_format* format, const kv4_paged_batch* batch,
                                const kv4_page_range* range, const kv4_place* place) {
  return with_batch(format, batch, place, {{"range", range}},
                    [&](const kv4::PageFormat& f, const kv4::PagedBatch& b, const CallContext& context) {
                      return f.dequantise(b, range_of(*range), context.workspace, context.place);
                    });
}
kv4_status kv4_paged_attend(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_attend_args* args,
                            const kv4_tensor* out, const kv4_place* place) {
  return with_batch(format, batch, place, {{"args", args}, {"out", out}},
                    [&](const kv4::PageFormat& f, const kv4::PagedBatch& b, const CallContext& context) -> kv4::Status {
                      kv4::AttendArgs call;
                      kv4::MutableTensorView view;
                      KV4_RETURN_IF_ERROR(args_of(args, &call));
                      KV4_RETURN_IF_ERROR(view_of("out", *out, &view));
                      return f.attend(b, call, view, context.workspace, context.place);
                    });
}
kv4_status kv4_paged_step(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_tensor* k,
                          const kv4_tensor* v, const kv4_page_range* range, const kv4_attend_args* args,
                          const kv4_tensor* out, const kv4_place* place) {
  return with_batch(format, batch, place, {{"k", k}, {"v", v}, {"args", args}, {"out", out}},
                    [&](const kv4::PageFormat& f, const kv4::PagedBatch& b, const CallContext& context) -> kv4::Status {
                      kv4::TensorView keys, values;
                      kv4::AttendArgs call;
                      kv4::MutableTensorView view;
                      KV4_RETURN_IF_ERROR(view_of("k", *k, &keys));
                      KV4_RETURN_IF_ERROR(view_of("v", *v, &values));
                      KV4_RETURN_IF_ERROR(args_of(args, &call));
                      KV4_RETURN_IF_ERROR(view_of("out", *out, &view));
                      const kv4::PageRange pages = range != nullptr ? range_of(*range) : kv4::PageRange();
                      return f.step(b, keys, values, pages, call, view, context.workspace, context.place);
                    });
}
kv4_status kv4_paged_attend_partial(const kv4_page_format* format, const kv4_paged_batch* batch,
                                    const kv4_attend_args* args, float* o, float* m, float* l, const kv4_place* place) {
  return with_batch(format, batch, place, {{"args", args}},
                    [&](const kv4::PageFormat& f, const kv4::PagedBatch& b, const CallContext& context) -> kv4::Status {
                      kv4::AttendArgs call;
                      KV4_RETURN_IF_ERROR(args_of(args, &call));
                      return f.attend_partial(b, call, {o, m, l}, context.workspace, context.place);
                    });
}
kv4_status kv4_paged_learn_lambda(const kv4_page_format* format, const kv4_tensor* q, const kv4_tensor* k,
                                  float* lambda, const kv4_place* place) {
  return guarded({{"format", format}, {"q", q}, {"k", k}, {"lambda", lambda}}, [&]() -> kv4::Status {
    kv4::TensorView queries, keys;
    CallContext context;
    KV4_RETURN_IF_ERROR(view_of("q", *q, &queries));
    KV4_RETURN_IF_ERROR(view_of("k", *k, &keys));
    KV4_RETURN_IF_ERROR(context.read(place));
    return format->format->learn_lambda(queries, keys, lambda, context.place);
  });
}

}  // extern "C"
