// Memory that llama.cpp asks this backend for: the cache's tensors, each of which becomes Cells. Whatever else it asks
// for, attention's outputs and the recurrent state of hybrid models, is answered with the CPU's own memory.
#pragma once

#include <memory>
#include <vector>

#include "cells.h"
#include "ggml-backend-impl.h"
#include "layer.h"

namespace kv4::llama {

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device);

// The tensor whose memory a view shares.
inline const ggml_tensor* root_of(const ggml_tensor* t) { return t->view_src != nullptr ? t->view_src : t; }
// Whether anything of a cache lies in this backend's memory now.
bool holds_a_cache();
// Keys or values of the cache in this backend's memory; also while llama.cpp only counts memory and has none yet.
bool is_cache(const ggml_tensor* t);
// Other state of a model: beside the cache, or where llama.cpp only counts memory.
bool is_other_state(const ggml_tensor* t);
// The cells behind a tensor; null where it is none of the cache's, or has no memory yet.
Cells* cells_of(const ggml_tensor* t);
// The cells that the bytes of a view touch: the first, through all streams, and how many.
struct CellRange {
  std::int64_t first, count;
};
CellRange range_of(const ggml_tensor* view, const Cells& cells);

// The layer of keys and values that an attention reads; made at the first such attention. Null where llama.cpp's own
// attention has to serve it, over exact rows: the reason is said once.
Layer* layer_of(const ggml_tensor* attention);

}  // namespace kv4::llama
