// Python tensors as pointers, shapes and strides: torch's through its own methods (cheaper per decode step
// than a DLPack capsule), all others through DLPack or the buffer protocol.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <string>

#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4::python {

namespace nb = nanobind;

enum class Element : std::uint8_t { f32, f16, bf16, boolean, i32, i64, byte, other };

struct Tensor {
  void* data = nullptr;
  Element element = Element::other;
  std::string element_name;  // the tensor library's name for it, if element is other
  int rank = 0;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> stride{};
  nb::ndarray<> owner;  // keeps the memory of an exported array alive
};

constexpr int kHost = -1;
// The device of a backend's tensors, by the backend's name.
int device_of(const std::string& backend);

// Throws ValueError naming `name` for anything that is no tensor of at most 4 axes on `device`: kHost or a CUDA
// device's number. Read-only tensors are accepted.
Tensor tensor(nb::handle x, const char* name, int device = kHost);
// A tensor to be written to. Also throws if it is read-only or requires grad.
Tensor writable_tensor(nb::handle x, const char* name, int device = kHost);

// A 4-D float tensor; throws ValueError otherwise.
TensorView float_view(const Tensor& t, const char* name);
MutableTensorView mutable_float_view(const Tensor& t, const char* name);

// A contiguous vector of `element` with `count` entries (count < 0: any).
void check_vector(const Tensor& t, const char* name, Element element, const char* element_name, std::int64_t count);

const char* name_of(Element e);
// str(x), with lone surrogates, which UTF-8 cannot encode, escaped.
std::string text(nb::handle x);
std::string shape_text(const Tensor& t);

// Throws a failed status as a Python exception.
void raise_if_error(const Status& status);

}  // namespace kv4::python
