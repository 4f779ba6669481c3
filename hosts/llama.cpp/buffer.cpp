#include "buffer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string_view>
#include <utility>

#include "ggml-backend.h"
#include "mapping.h"
#include "settings.h"

namespace kv4::llama {
namespace {

constexpr std::size_t kAlignment = 4096;

std::atomic<int> g_buffers{0};

struct Buffer {
  Buffer() { ++g_buffers; }
  ~Buffer() { --g_buffers; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  Mapping memory;
  std::vector<std::unique_ptr<Cells>> cells;
  std::vector<std::unique_ptr<Layer>> layers;

  void report(const char* when) const {
    if (cells.empty()) return;
    std::size_t exact = 0, packed = 0, nominal = 0;
    for (const auto& layer : layers) layer->held(&exact, &packed);
    for (const auto& c : cells) {
      nominal += c->bytes;
      if (c->layer != nullptr) continue;
      for (std::int64_t b = 0; b < c->blocks(); ++b) exact += c->used(b) ? c->block_bytes() : 0;
    }
    // llama.cpp's programs drop log messages of level INFO.
    say(settings().verbose ? GGML_LOG_LEVEL_WARN : GGML_LOG_LEVEL_INFO,
        std::string(when) + ": the cache holds " + mebibytes(exact + packed) + " (exact " + mebibytes(exact) +
            ", packed " + mebibytes(packed) + ") of " + mebibytes(nominal) + " address space");
  }
};

bool ours(const ggml_tensor* t) {
  const ggml_backend_buffer_t buffer = root_of(t)->buffer;
  return buffer != nullptr && buffer->buft == buffer_type(nullptr);
}

// cache_k_l7, cache_v_l7, or with a tag between.
bool named_cache(const ggml_tensor* t) {
  const std::string_view name = t->name;
  const std::size_t layer = name.rfind("_l");
  if (t->op != GGML_OP_NONE || !name.starts_with("cache_") || layer == std::string_view::npos || layer < 7)
    return false;
  return name[layer - 1] == 'k' || name[layer - 1] == 'v';
}

// Of calls that cannot answer with an error.
bool said_ok(const Status& status) {
  if (!status.ok()) say(GGML_LOG_LEVEL_ERROR, status.message());
  return status.ok();
}

// Bytes [offset, offset + n) of the cells' memory, block by block: act(block, offset within it, bytes).
template <class Act>
void for_blocks(const Cells& c, std::size_t offset, std::size_t n, Act&& act) {
  const std::size_t stream = static_cast<std::size_t>(c.cells) * c.row_bytes;
  while (n > 0) {
    const std::size_t s = offset / stream, within = offset % stream, b = within / c.block_bytes(),
                      at = within % c.block_bytes();
    const std::size_t bytes = std::min({n, c.block_bytes() - at, stream - within});
    act(static_cast<std::int64_t>(s) * c.blocks_of_stream() + static_cast<std::int64_t>(b), at, bytes);
    offset += bytes;
    n -= bytes;
  }
}

void note_written(Cells& c, std::size_t offset, std::size_t n) {
  if (n == 0) return;
  for (std::size_t cell = offset / c.row_bytes; cell <= (offset + n - 1) / c.row_bytes; ++cell)
    c.wrote(static_cast<std::int64_t>(cell));
}

Status write(Cells& c, std::size_t offset, std::size_t n, const void* from) {
  if (n == 0) return {};
  const std::size_t first = offset / c.row_bytes, last = (offset + n - 1) / c.row_bytes;
  if (c.layer != nullptr)
    KV4_RETURN_IF_ERROR(
        c.layer->begin_write(static_cast<std::int64_t>(first), static_cast<std::int64_t>(last - first + 1)));
  std::memcpy(c.data + offset, from, n);
  note_written(c, offset, n);
  return {};
}

Status read(Cells& c, std::size_t offset, std::size_t n, void* to) {
  if (c.layer == nullptr) {
    std::memcpy(to, c.data + offset, n);
    return {};
  }
  Status status;
  auto* out = static_cast<std::byte*>(to);
  std::vector<std::byte> block;
  for_blocks(c, offset, n, [&](std::int64_t b, std::size_t at, std::size_t bytes) {
    if (c.layer->packed()[b] == 0) {
      std::memcpy(out, c.block(b) + at, bytes);
    } else {
      block.resize(c.block_bytes());
      if (Status s = c.layer->read(c, b, block.data()); !s.ok() && status.ok()) status = s;
      std::memcpy(out, block.data() + at, bytes);
    }
    out += bytes;
  });
  return status;
}

std::size_t offset_of(const ggml_tensor* t, const Cells& c) {
  return static_cast<std::size_t>(static_cast<const std::byte*>(t->data) - c.data);
}

// A view of all heads of some cells, from a stream's first on.
bool whole_rows(const ggml_tensor* view, const Cells& c) {
  const std::size_t element = ggml_type_size(view->type), stream = static_cast<std::size_t>(c.cells) * c.row_bytes;
  return view->nb[0] == element && view->nb[2] == ggml_row_size(view->type, view->ne[0]) &&
         view->nb[1] == c.row_bytes && view->view_offs % stream == 0 && (view->ne[3] == 1 || view->nb[3] == stream);
}

Buffer& of(ggml_backend_buffer_t buffer) { return *static_cast<Buffer*>(buffer->context); }

void free_buffer(ggml_backend_buffer_t buffer) {
  of(buffer).report("at the end");
  delete &of(buffer);
}

void* get_base(ggml_backend_buffer_t buffer) { return of(buffer).memory.data(); }

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* t) {
  if (t->view_src != nullptr || t->extra != nullptr || !named_cache(t)) return GGML_STATUS_SUCCESS;
  of(buffer).cells.push_back(std::make_unique<Cells>(*t));
  Cells* const cells = of(buffer).cells.back().get();
  t->extra = cells;
  // Rows of f32 are converted to f16 before attention, so that attention never gets the cache itself.
  DType dtype;
  if (!settings().exact && !dtype_of(t->type, &dtype)) {
    cells->stays_exact = true;
    say_once(GGML_LOG_LEVEL_WARN,
             std::string("not packed, stays exact: cache type: expected f16 or bf16; got ") + ggml_type_name(t->type));
  }
  return GGML_STATUS_SUCCESS;
}

void memset_tensor(ggml_backend_buffer_t, ggml_tensor* t, std::uint8_t value, std::size_t offset, std::size_t n) {
  if (Cells* c = cells_of(t)) {
    const std::vector<std::uint8_t> same(n, value);
    said_ok(write(*c, offset_of(t, *c) + offset, n, same.data()));
  } else {
    std::memset(static_cast<std::byte*>(t->data) + offset, value, n);
  }
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor* t, const void* data, std::size_t offset, std::size_t n) {
  if (Cells* c = cells_of(t)) said_ok(write(*c, offset_of(t, *c) + offset, n, data));
  else std::memcpy(static_cast<std::byte*>(t->data) + offset, data, n);
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor* t, void* data, std::size_t offset, std::size_t n) {
  if (Cells* c = cells_of(t)) said_ok(read(*c, offset_of(t, *c) + offset, n, data));
  else std::memcpy(data, static_cast<const std::byte*>(t->data) + offset, n);
}

// Whole streams of one layer, which is what llama.cpp copies a sequence by: codes and all, keys and values with the
// keys.
bool copy_stream(const ggml_tensor* from, ggml_tensor* to) {
  Cells *a = cells_of(from), *b = cells_of(to);
  if (a == nullptr || a != b || a->layer == nullptr || !a->layer->packs()) return false;
  const std::size_t stream = static_cast<std::size_t>(a->cells) * a->row_bytes, x = offset_of(from, *a),
                    y = offset_of(to, *a);
  if (x % stream != 0 || y % stream != 0 || ggml_nbytes(from) != stream || ggml_nbytes(to) != stream) return false;
  if (a == &a->layer->values()) return true;
  return said_ok(a->layer->copy_stream(static_cast<std::int64_t>(x / stream), static_cast<std::int64_t>(y / stream)));
}

bool cpy_tensor(ggml_backend_buffer_t, const ggml_tensor* from, ggml_tensor* to) { return copy_stream(from, to); }

void clear(ggml_backend_buffer_t buffer, std::uint8_t value) {
  Buffer& b = of(buffer);
  if (settings().verbose && !b.layers.empty()) b.report("cleared");
  for (const auto& layer : b.layers) layer->forget();
  for (const auto& c : b.cells) c->forget();
  if (value == 0) Mapping::release(b.memory.data(), b.memory.size());
  else std::memset(b.memory.data(), value, b.memory.size());
}

constexpr ggml_backend_buffer_i kBuffer = {
    .free_buffer = free_buffer,
    .get_base = get_base,
    .init_tensor = init_tensor,
    .memset_tensor = memset_tensor,
    .set_tensor = set_tensor,
    .get_tensor = get_tensor,
    .set_tensor_2d = nullptr,
    .get_tensor_2d = nullptr,
    .cpy_tensor = cpy_tensor,
    .clear = clear,
    .reset = nullptr,
};

// The allocator asks for the size of what it is about to make room for: whether the last was the cache's.
thread_local bool t_sized_cache = false;

const char* name(ggml_backend_buffer_type_t) { return "KV4"; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, std::size_t size) {
  if (!std::exchange(t_sized_cache, false))
    return ggml_backend_buft_alloc_buffer(
        ggml_backend_dev_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)), size);
  auto buffer = std::make_unique<Buffer>();
  if (!buffer->memory.reserve(size)) return nullptr;
  return ggml_backend_buffer_init(type, kBuffer, buffer.release(), size);
}

std::size_t get_alignment(ggml_backend_buffer_type_t) { return kAlignment; }

std::size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor* t) {
  t_sized_cache = t->view_src == nullptr && named_cache(t);
  return ggml_nbytes(t);
}

bool is_host(ggml_backend_buffer_type_t) { return false; }

}  // namespace

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
  static ggml_backend_buffer_type type = {
      {name, alloc_buffer, get_alignment, nullptr, get_alloc_size, is_host}, device, nullptr};
  return &type;
}

bool holds_a_cache() { return g_buffers > 0; }

bool is_cache(const ggml_tensor* t) { return t != nullptr && ours(t) && named_cache(root_of(t)); }

bool is_other_state(const ggml_tensor* t) { return t != nullptr && ours(t) && !named_cache(root_of(t)); }

Cells* cells_of(const ggml_tensor* t) { return is_cache(t) ? static_cast<Cells*>(root_of(t)->extra) : nullptr; }

CellRange range_of(const ggml_tensor* view, const Cells& c) {
  const std::size_t offset = offset_of(view, c), n = ggml_nbytes(view);
  const auto first = static_cast<std::int64_t>(offset / c.row_bytes);
  return {first, n == 0 ? 0 : static_cast<std::int64_t>((offset + n - 1) / c.row_bytes) - first + 1};
}

Layer* layer_of(const ggml_tensor* op) {
  const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
  Cells *keys = cells_of(k), *values = cells_of(v);
  if (keys == nullptr || values == nullptr || keys->stays_exact || values->stays_exact || settings().exact)
    return nullptr;
  float scale_bias_cap[3];
  std::memcpy(scale_bias_cap, op->op_params, sizeof scale_bias_cap);
  const Geometry geometry{static_cast<int>(q->ne[2]), static_cast<int>(k->ne[2]), static_cast<int>(k->ne[0]),
                          static_cast<int>(v->ne[0])};
  std::string why;
  if (scale_bias_cap[1] != 0.0f) why = "ALiBi, a bias that grows with distance";
  if (q->type != GGML_TYPE_F32 || (mask != nullptr && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1)))
    why = "queries other than f32, or a mask other than f16 and one for all heads";
  if (keys != values && (!whole_rows(k, *keys) || !whole_rows(v, *values)))
    why = "heads that do not follow one another";
  Layer* layer = keys->layer;
  if (why.empty() && layer == nullptr && values->layer == nullptr) {
    std::unique_ptr<Layer> made;
    const Status status = Layer::create(*keys, *values, geometry, &made);
    if (!status.ok()) {
      why = status.message();
    } else {
      layer = keys->layer = values->layer = made.get();
      of(root_of(k)->buffer).layers.push_back(std::move(made));
    }
  }
  if (why.empty() && (layer == nullptr || layer != values->layer || layer->geometry() != geometry))
    why = "a cache that is read in more than one way";
  if (why.empty()) return layer->packs() ? layer : nullptr;
  for (Cells* c : {keys, values}) {
    c->stays_exact = true;
    if (c->layer != nullptr) c->layer->keep_exact();
  }
  say_once(GGML_LOG_LEVEL_WARN, "not packed, stays exact: " + why, " (first seen in " + keys->name + ")");
  return nullptr;
}

}  // namespace kv4::llama
