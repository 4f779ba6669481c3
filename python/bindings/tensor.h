// Tensors of the host language as pointers, shapes and strides: torch's by its own methods
// (no DLPack capsule, so that decoding stays cheap), everything else by DLPack or the buffer protocol.
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
  std::string element_name;  // as the host calls it, only where element is other
  int rank = 0;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> stride{};
  nb::ndarray<> owner;  // keeps memory of a converted array alive, which may be the export's own
};

constexpr int kHost = -1;
// Where tensors of a backend lie, by the name of one that there is.
int device_of(const std::string& backend);

// Throws ValueError naming `name` for anything that is no tensor of at most 4 axes on `device`: kHost or a CUDA
// device's number. Read-only ones are welcome: nothing is written to it.
Tensor tensor(nb::handle x, const char* name, int device = kHost);
// One that the call writes to. Throws also where its memory is read-only, or where autograd follows it.
Tensor writable_tensor(nb::handle x, const char* name, int device = kHost);

// A 4-D float tensor; throws ValueError otherwise.
TensorView float_view(const Tensor& t, const char* name);
MutableTensorView mutable_float_view(const Tensor& t, const char* name);

// A contiguous vector of `element` with `count` entries (count < 0: any).
void check_vector(const Tensor& t, const char* name, Element element, const char* element_name, std::int64_t count);

const char* name_of(Element e);
// str(x). A surrogate by itself, which UTF-8 cannot hold, is escaped.
std::string text(nb::handle x);
std::string shape_text(const Tensor& t);

// Raises the Python exception that fits a failed status.
void raise_if_error(const Status& status);

}  // namespace kv4::python
