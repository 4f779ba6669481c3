// Used by the Metal host in Python (kv4.metal): kernel argument tables, lambda, and saved caches.
#pragma once

#include <nanobind/nanobind.h>

#include "backend/backend.h"

namespace kv4::python {

// Both sides' settings and the layout of a page, for a head dim.
struct Metal {
  PageSpec spec;
  DType dtype = DType::f32;
  int kv_heads = 0;
  int dim = 0;
  bool seals = true;
};

void bind_metal(nanobind::module_& m);
void bind_saved(nanobind::module_& m);

}  // namespace kv4::python
