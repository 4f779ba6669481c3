// What the Metal host in Python (kv4.metal) asks of the library: tables of numbers for the kernels, and lambda.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "kv4/recipe.h"
#include "kv4/types.h"

namespace kv4::python {

void bind_metal(nanobind::module_& m);

// Conversions of module.cpp; they raise ValueError naming the field.
Recipe read_recipe(nanobind::handle recipe);
DType read_dtype(const std::string& name);
std::vector<float> read_floats(nanobind::handle x, const char* name);

}  // namespace kv4::python
