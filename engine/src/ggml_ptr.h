// Owners of ggml's objects.
#pragma once

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>

#include <memory>

namespace kv4::engine {

struct GgmlFree {
  void operator()(ggml_context* p) const { ggml_free(p); }
  void operator()(ggml_backend* p) const { ggml_backend_free(p); }
  void operator()(ggml_backend_buffer* p) const { ggml_backend_buffer_free(p); }
  void operator()(ggml_gallocr* p) const { ggml_gallocr_free(p); }
};
using GgmlContext = std::unique_ptr<ggml_context, GgmlFree>;
using GgmlBackend = std::unique_ptr<ggml_backend, GgmlFree>;
using GgmlBuffer = std::unique_ptr<ggml_backend_buffer, GgmlFree>;
using GgmlAllocator = std::unique_ptr<ggml_gallocr, GgmlFree>;

// A context that holds `tensors` descriptions and no data; null without memory.
inline GgmlContext describe(std::size_t tensors, std::size_t graph_nodes = 0) {
  std::size_t bytes = tensors * ggml_tensor_overhead();
  if (graph_nodes > 0) bytes += ggml_graph_overhead_custom(graph_nodes, false);
  return GgmlContext(ggml_init({.mem_size = bytes, .mem_buffer = nullptr, .no_alloc = true}));
}

}  // namespace kv4::engine
