#include "backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "ggml-backend.h"
#include "kv4/cpu.h"
#include "kv4/version.h"
#include "mapping.h"
#include "settings.h"

namespace kv4::llama {
namespace {

// A stream of work: one of each llama.cpp context.
struct Context {
  ggml_backend_t cpu = nullptr;  // llama.cpp's own operations, on the rows where they lie
  Attention attention;
  std::vector<std::byte> graph_memory;
};

Context& of(ggml_backend_t backend) { return *static_cast<Context*>(backend->context); }

const char* backend_name(ggml_backend_t) { return "KV4"; }

void free_backend(ggml_backend_t backend) {
  ggml_backend_free(of(backend).cpu);
  delete &of(backend);
  delete backend;
}

ggml_status failed(const ggml_tensor* op, const Status& status) {
  say(GGML_LOG_LEVEL_ERROR, std::string(ggml_op_name(op->op)) + " of " + op->name + ": " + status.message());
  return status.code() == StatusCode::out_of_memory ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
}

ggml_status compute_on_cpu(Context& c, ggml_tensor* op) {
  c.graph_memory.resize(ggml_graph_overhead_custom(1, false) + ggml_tensor_overhead());
  ggml_context* memory = ggml_init({c.graph_memory.size(), c.graph_memory.data(), true});
  if (memory == nullptr) return GGML_STATUS_ALLOC_FAILED;
  ggml_cgraph* graph = ggml_new_graph_custom(memory, 1, false);
  ggml_graph_add_node(graph, op);
  const ggml_status status = ggml_backend_graph_compute(c.cpu, graph);
  ggml_free(memory);
  return status;
}

std::int64_t index_at(const ggml_tensor* ids, std::int64_t i) {
  const auto* p = static_cast<const std::byte*>(ids->data) + static_cast<std::size_t>(i) * ids->nb[0];
  if (ids->type == GGML_TYPE_I64) return *reinterpret_cast<const std::int64_t*>(p);
  return *reinterpret_cast<const std::int32_t*>(p);
}

// Few rows are converted here: a graph for the CPU's backend costs as much.
bool store_here(const ggml_tensor* op) {
  const ggml_tensor* rows = op->src[0];
  return op->type == GGML_TYPE_F16 && rows->type == GGML_TYPE_F32 && rows->nb[0] == sizeof(float) && rows->ne[2] == 1 &&
         rows->ne[3] == 1 && ggml_nelements(rows) <= 8192;
}

ggml_status set_rows(Context& c, ggml_tensor* op, Cells& cells) {
  const ggml_tensor *rows = op->src[0], *ids = op->src[1];
  const auto cell_of = [&](std::int64_t i) {
    return static_cast<std::int64_t>((op->view_offs + static_cast<std::size_t>(index_at(ids, i)) * op->nb[1]) /
                                     cells.row_bytes);
  };
  if (cells.layer != nullptr) {
    for (std::int64_t i = 0; i < ids->ne[0];) {
      // A run of cells is one write.
      const std::int64_t first = cell_of(i);
      std::int64_t n = 1;
      while (i + n < ids->ne[0] && cell_of(i + n) == first + n) ++n;
      if (const Status status = cells.layer->begin_write(first, n); !status.ok()) return failed(op, status);
      i += n;
    }
  }
  if (store_here(op)) {
    for (std::int64_t i = 0; i < rows->ne[1]; ++i)
      ggml_fp32_to_fp16_row(reinterpret_cast<const float*>(static_cast<const std::byte*>(rows->data) +
                                                           static_cast<std::size_t>(i) * rows->nb[1]),
                            reinterpret_cast<ggml_fp16_t*>(static_cast<std::byte*>(op->data) +
                                                           static_cast<std::size_t>(index_at(ids, i)) * op->nb[1]),
                            rows->ne[0]);
  } else if (const ggml_status status = compute_on_cpu(c, op); status != GGML_STATUS_SUCCESS) {
    return status;
  }
  for (std::int64_t i = 0; i < ids->ne[0]; ++i) cells.wrote(cell_of(i));
  return GGML_STATUS_SUCCESS;
}

// Anything else that reads or writes the cache (K-shift, copies, attention without FLASH_ATTN_EXT) has the blocks that
// it touches exact.
ggml_status on_exact_rows(Context& c, ggml_tensor* op) {
  std::vector<Layer*> touched;
  const auto expose = [&](const ggml_tensor* t) {
    Cells* cells = t == nullptr ? nullptr : cells_of(t);
    if (cells == nullptr || cells->layer == nullptr) return Status();
    touched.push_back(cells->layer);
    const CellRange range = range_of(t, *cells);
    return range.count == 0
               ? Status()
               : cells->layer->expose(cells->block_of(range.first), cells->block_of(range.first + range.count - 1) + 1);
  };
  for (const ggml_tensor* src : op->src)
    if (const Status status = expose(src); !status.ok()) return failed(op, status);
  if (const Status status = expose(op); !status.ok()) return failed(op, status);
  const ggml_status status = compute_on_cpu(c, op);
  if (status != GGML_STATUS_SUCCESS) return status;
  for (Layer* layer : touched)
    if (const Status settled = layer->settle(); !settled.ok()) return failed(op, settled);
  return GGML_STATUS_SUCCESS;
}

ggml_status compute(Context& c, ggml_tensor* op) {
  switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return GGML_STATUS_SUCCESS;
    case GGML_OP_SET_ROWS:
      if (Cells* cells = cells_of(op)) return set_rows(c, op, *cells);
      break;
    case GGML_OP_FLASH_ATTN_EXT:
      if (Layer* layer = layer_of(op)) {
        const Status status = c.attention.run(layer, op);
        return status.ok() ? GGML_STATUS_SUCCESS : failed(op, status);
      }
      break;
    default: break;
  }
  return on_exact_rows(c, op);
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph* graph) {
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* op = ggml_graph_node(graph, i);
    if ((op->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) continue;
    try {
      if (const ggml_status status = compute(of(backend), op); status != GGML_STATUS_SUCCESS) return status;
    } catch (const std::bad_alloc&) {
      return failed(op, error(StatusCode::out_of_memory, "tables", "free memory", "none"));
    }
  }
  return GGML_STATUS_SUCCESS;
}

constexpr ggml_backend_i kBackend = [] {
  ggml_backend_i all{};  // what is left out is optional
  all.get_name = backend_name;
  all.free = free_backend;
  all.graph_compute = graph_compute;
  return all;
}();

ggml_backend_dev_t cpu_device() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

// One team of threads: ggml's and kv4's regions run on the same. Before each step, that is, when a cache is where it
// will be.
void set_n_threads(ggml_backend_t backend, int n) {
  if (!holds_a_cache())
    say_once(GGML_LOG_LEVEL_WARN,
             "holds no cache: the model has none of keys and values, or llama.cpp keeps it to itself (-nkvo, or no "
             "layers offloaded: -ngl 0)");
  static_cast<void>(cpu::set_num_threads(std::max(1, n)));
  const auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), "ggml_backend_set_n_threads"));
  if (set != nullptr) set(of(backend).cpu, n);
}

const char* device_name(ggml_backend_dev_t) { return "KV4"; }
const char* device_description(ggml_backend_dev_t) { return "4-bit KV cache, kv4 " KV4_VERSION; }
void device_memory(ggml_backend_dev_t, std::size_t* free, std::size_t* total) { machine_memory(free, total); }
// Without a real GPU beside it, llama.cpp gives an integrated one the cache; an accelerator would not get it.
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_IGPU; }
void device_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = device_name(device);
  props->description = device_description(device);
  props->type = device_type(device);
  props->caps.mmap_support = true;
  device_memory(device, &props->memory_free, &props->memory_total);
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char*) {
  static const ggml_guid guid = {0x6b, 0x76, 0x34, 0x2d, 0x67, 0x67, 0x6d, 0x6c,
                                 0x2d, 0x63, 0x61, 0x63, 0x68, 0x65, 0x2d, 0x31};
  auto context = std::make_unique<Context>();
  context->cpu = ggml_backend_dev_init(cpu_device(), nullptr);
  if (context->cpu == nullptr) return nullptr;
  return new ggml_backend{const_cast<ggml_guid*>(&guid), kBackend, device, context.release()};
}

bool reads_cache(const ggml_tensor* op) {
  for (const ggml_tensor* src : op->src)
    if (is_cache(src)) return true;
  return false;
}

// Which kind of RoPE was applied to the keys that are written.
void note_rotary_pairs(const ggml_tensor* op) {
  Cells* cells = cells_of(op);
  const ggml_tensor* t = op->src[0];
  while (t != nullptr &&
         (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_CONT))
    t = t->src[0];
  if (cells != nullptr && t != nullptr && t->op == GGML_OP_ROPE)
    cells->neighbours = t->op_params[2] == GGML_ROPE_TYPE_NORMAL ? t->op_params[1] : 0;
}

// Whatever touches the cache; nothing else, so that weights and their operations stay where llama.cpp has them.
bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
  switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return true;
    case GGML_OP_FLASH_ATTN_EXT:
      if (!is_cache(op->src[1]) || !is_cache(op->src[2])) return false;
      layer_of(op);
      return true;
    case GGML_OP_SET_ROWS: note_rotary_pairs(op); break;
    case GGML_OP_MUL_MAT:
      if (!is_cache(op->src[0])) return false;
      // Not while llama.cpp only counts memory, with its log muted.
      if (cells_of(op->src[0]) != nullptr)
        say_once(GGML_LOG_LEVEL_WARN, "flash attention is off: the cache stays exact; -fa on packs it");
      return true;
    default: break;
  }
  if (is_other_state(op) || std::any_of(op->src, op->src + GGML_MAX_SRC, is_other_state)) return true;
  return (is_cache(op) || reads_cache(op)) && ggml_backend_dev_supports_op(cpu_device(), op);
}

bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return type == buffer_type(nullptr) || ggml_backend_buft_is_host(type);
}

constexpr ggml_backend_device_i kDevice = {
    .get_name = device_name,
    .get_description = device_description,
    .get_memory = device_memory,
    .get_type = device_type,
    .get_props = device_props,
    .init_backend = init_backend,
    .get_buffer_type = buffer_type,
    .get_host_buffer_type = nullptr,
    .buffer_from_host_ptr = nullptr,
    .supports_op = supports_op,
    .supports_buft = supports_buft,
    .offload_op = nullptr,
    .event_new = nullptr,
    .event_free = nullptr,
    .event_synchronize = nullptr,
};

const char* registry_name(ggml_backend_reg_t) { return "KV4"; }
std::size_t device_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t device_at(ggml_backend_reg_t registry, std::size_t) {
  static ggml_backend_device device = {kDevice, registry, nullptr};
  return &device;
}
void* proc_address(ggml_backend_reg_t, const char* name) {
  return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void*>(set_n_threads) : nullptr;
}

// Numbers of operations and the layout of what backends hand over change from one release of ggml to the next.
Status check_ggml() {
  const char* const version = ggml_version();
  if (std::strcmp(version, KV4_GGML_VERSION) != 0)
    return error(StatusCode::unsupported, "ggml", KV4_GGML_VERSION ", for which this was built", version);
  const struct {
    ggml_op op;
    const char* name;
  } used[] = {{GGML_OP_NONE, "NONE"},
              {GGML_OP_VIEW, "VIEW"},
              {GGML_OP_RESHAPE, "RESHAPE"},
              {GGML_OP_PERMUTE, "PERMUTE"},
              {GGML_OP_TRANSPOSE, "TRANSPOSE"},
              {GGML_OP_SET_ROWS, "SET_ROWS"},
              {GGML_OP_FLASH_ATTN_EXT, "FLASH_ATTN_EXT"},
              {GGML_OP_MUL_MAT, "MUL_MAT"}};
  for (const auto& [op, name] : used)
    if (std::strcmp(ggml_op_name(op), name) != 0)
      return error(StatusCode::unsupported, "ggml", std::string("operation ") + name, ggml_op_name(op));
  return {};
}

Status open() {
  KV4_RETURN_IF_ERROR(check_ggml());
  KV4_RETURN_IF_ERROR(read_settings(&settings()));
  return cpu::check_isa();
}

}  // namespace

ggml_backend_reg_t registry() {
  static ggml_backend_reg registry = {
      GGML_BACKEND_API_VERSION, {registry_name, device_count, device_at, proc_address}, nullptr};
  if (const Status status = open(); !status.ok()) {
    say(GGML_LOG_LEVEL_ERROR, status.message() + "; llama.cpp goes on with its own cache");
    return nullptr;
  }
  buffer_type(device_at(&registry, 0));
  return &registry;
}

}  // namespace kv4::llama

extern "C" {

GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void) { return kv4::llama::registry(); }
// Any processor: kv4 finds the best that this one has as it runs.
GGML_BACKEND_API int ggml_backend_score(void) { return 1; }
}
