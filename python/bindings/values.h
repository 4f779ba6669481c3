// Shared by the bindings: conversions of Python values, numpy arrays, and the Python Cache object.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kv4/cache.h"
#include "tensor.h"

namespace kv4::python {

// They raise ValueError naming the field.
Recipe read_recipe(nb::handle recipe);
Recipe read_recipe(nb::handle recipe, int head_dim_k, int head_dim_v);  // its widths, where it has a budget of bits
DType read_dtype(const std::string& name);
std::vector<float> read_floats(nb::handle x, const char* name);

// A numpy array that owns `values`; 1-D if no shape is given.
template <class T>
nb::object array(std::vector<T> values, std::vector<std::size_t> shape = {}) {
  if (shape.empty()) shape = {values.size()};
  auto* kept = new std::vector<T>(std::move(values));
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(kept->data(), shape.size(), shape.data(), owner));
}

// Adapts a Python file's write or readinto to the library's Sink or Source for one call. Exceptions they raise are
// re-raised after the call returns.
void write_to(const nb::callable& write, const std::function<Status(const Sink&)>& call);
void read_from(const nb::callable& readinto, const std::function<Status(const Source&)>& call);

struct PyCache {
  std::unique_ptr<Cache> cache;
  int device = kHost;  // where its tensors are

  int row(int r) const {
    if (r < 0 || r >= cache->batch())
      raise_if_error(
          error(StatusCode::out_of_range, "row", "0 to " + std::to_string(cache->batch() - 1), std::to_string(r)));
    return r;
  }
};

}  // namespace kv4::python
