// kv4._core.Ledger: the policy of one sequence, for hosts whose arrays Python holds.
#pragma once

#include <nanobind/nanobind.h>

namespace kv4::python {

void bind_ledger(nanobind::module_& m);

}  // namespace kv4::python
