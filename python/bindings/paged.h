// kv4._core.PageFormat: the operations on memory that a host owns.
#pragma once

#include <nanobind/nanobind.h>

namespace kv4::python {

void bind_paged(nanobind::module_& m);

}  // namespace kv4::python
