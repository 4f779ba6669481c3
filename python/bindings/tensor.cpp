#include "tensor.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <optional>

namespace kv4::python {
namespace {

// Interned once: these attributes are read on every decode step.
struct Names {
  nb::object data_ptr = nb::str("data_ptr"), shape = nb::str("shape"), stride = nb::str("stride"),
             dtype = nb::str("dtype"), is_cpu = nb::str("is_cpu"), is_cuda = nb::str("is_cuda"),
             get_device = nb::str("get_device"), requires_grad = nb::str("requires_grad");
};

const Names& names() {
  static const Names* n = new Names();  // leaked: must not be destroyed after Python's finalisation
  return *n;
}

[[noreturn]] void bad(const char* name, const std::string& expected, const std::string& got) {
  raise_if_error(invalid_argument(name, expected, got));
  throw std::bad_alloc();  // not reached
}

Element element_of_torch(nb::handle dtype, std::string* other) {
  // torch's dtype objects are singletons.
  static PyObject* seen[5] = {};
  for (int i = 0; i < 5; ++i)
    if (seen[i] == dtype.ptr()) return static_cast<Element>(i);
  static constexpr const char* kNames[5] = {"torch.float32", "torch.float16", "torch.bfloat16", "torch.bool",
                                            "torch.int32"};
  const std::string full = text(dtype);
  for (int i = 0; i < 5; ++i) {
    if (full == kNames[i]) {
      seen[i] = dtype.inc_ref().ptr();
      return static_cast<Element>(i);
    }
  }
  if (full == "torch.int64") return Element::i64;
  if (full == "torch.uint8" || full == "torch.int8") return Element::byte;
  *other = full.rfind("torch.", 0) == 0 ? full.substr(6) : full;
  return Element::other;
}

void read_tuple(nb::handle tuple, int rank, std::array<std::int64_t, 4>* out) {
  for (int i = 0; i < rank; ++i) {
    (*out)[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple.ptr(), i));
    if ((*out)[i] == -1 && PyErr_Occurred()) throw nb::python_error();
  }
}

std::string place_text(int device) {
  return device == kHost ? "a tensor on the CPU" : "a tensor on cuda:" + std::to_string(device);
}

bool is_on(nb::handle x, int device) {
  const Names& n = names();
  if (device == kHost) return !nb::getattr(x, n.is_cpu, nb::none()).is(nb::bool_(false));
  if (!nb::getattr(x, n.is_cuda, nb::bool_(false)).is(nb::bool_(true))) return false;
  const nb::object index = nb::steal(PyObject_CallMethodObjArgs(x.ptr(), n.get_device.ptr(), nullptr));
  if (!index.is_valid()) throw nb::python_error();
  return PyLong_AsLong(index.ptr()) == device;
}

Tensor from_torch(nb::handle x, const char* name, int device, bool written) {
  const Names& n = names();
  Tensor t;
  if (!is_on(x, device)) bad(name, place_text(device), "device " + text(nb::object(nb::getattr(x, "device"))));
  if (written && nb::getattr(x, n.requires_grad, nb::bool_(false)).is(nb::bool_(true)))
    bad(name, "a tensor that does not require grad, since writing to it has none", "one that does");
  const nb::object shape = nb::getattr(x, n.shape);
  t.rank = static_cast<int>(PyTuple_Size(shape.ptr()));
  if (t.rank < 0) throw nb::python_error();
  if (t.rank > 4) bad(name, "at most 4 axes", std::to_string(t.rank));
  read_tuple(shape, t.rank, &t.shape);
  const nb::object stride = nb::steal(PyObject_CallMethodObjArgs(x.ptr(), n.stride.ptr(), nullptr));
  if (!stride.is_valid()) throw nb::python_error();
  read_tuple(stride, t.rank, &t.stride);
  const nb::object pointer = nb::steal(PyObject_CallMethodObjArgs(x.ptr(), n.data_ptr.ptr(), nullptr));
  if (!pointer.is_valid()) throw nb::python_error();
  t.data = PyLong_AsVoidPtr(pointer.ptr());
  if (PyErr_Occurred()) throw nb::python_error();
  t.element = element_of_torch(nb::getattr(x, n.dtype), &t.element_name);
  return t;
}

template <class Array>
std::optional<nb::ndarray<>> array_of(nb::handle x) {
  try {
    return nb::ndarray<>(nb::cast<Array>(x).handle());
  } catch (const nb::cast_error&) {
    return std::nullopt;
  }
}

bool gives_buffer(nb::handle x, int flags) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(x.ptr(), &buffer, flags) != 0) {
    PyErr_Clear();
    return false;
  }
  PyBuffer_Release(&buffer);
  return true;
}

// Whether memory is read-only, which DLPack before 1.0 cannot express: asked through the buffer protocol, if supported.
bool is_read_only(nb::handle x) {
  return PyObject_CheckBuffer(x.ptr()) && !gives_buffer(x, PyBUF_STRIDES | PyBUF_WRITABLE) &&
         gives_buffer(x, PyBUF_STRIDES);
}

nb::ndarray<> find_array(nb::handle x, const char* name, bool written) {
  const char* expected = "a tensor (torch, or anything that speaks DLPack)";
  std::optional<nb::ndarray<>> array;
  if (!written || !is_read_only(x)) array = array_of<nb::ndarray<>>(x);
  if (array) return *array;
  array = array_of<nb::ndarray<nb::ro>>(x);
  if (!array) bad(name, expected, text(x.type()));
  if (written) bad(name, "a tensor that can be written to", "a read-only " + text(x.type()));
  return *array;
}

std::string dtype_text(const nb::dlpack::dtype& d) {
  static constexpr const char* kKinds[] = {"int", "uint", "float", "an opaque dtype of ", "bfloat", "complex", "bool"};
  return (d.code < std::size(kKinds) ? kKinds[d.code] : "another dtype of ") + std::to_string(d.bits);
}

Tensor from_dlpack(nb::handle x, const char* name, int device, bool written) {
  const nb::ndarray<> array = find_array(x, name, written);
  Tensor t;
  const bool there = device == kHost ? array.device_type() == nb::device::cpu::value
                                     : array.device_type() == nb::device::cuda::value && array.device_id() == device;
  if (!there)
    bad(name, place_text(device),
        "device type " + std::to_string(array.device_type()) + ", number " + std::to_string(array.device_id()));
  if (array.ndim() > 4) bad(name, "at most 4 axes", std::to_string(array.ndim()));
  t.rank = static_cast<int>(array.ndim());
  for (int i = 0; i < t.rank; ++i) {
    t.shape[i] = static_cast<std::int64_t>(array.shape(i));
    t.stride[i] = array.stride(i);
  }
  t.data = array.data();
  const nb::dlpack::dtype d = array.dtype();
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return d.code == static_cast<std::uint8_t>(code) && d.bits == bits && d.lanes == 1;
  };
  if (is(nb::dlpack::dtype_code::Float, 32)) t.element = Element::f32;
  else if (is(nb::dlpack::dtype_code::Float, 16)) t.element = Element::f16;
  else if (is(nb::dlpack::dtype_code::Bfloat, 16)) t.element = Element::bf16;
  else if (is(nb::dlpack::dtype_code::Bool, 8)) t.element = Element::boolean;
  else if (is(nb::dlpack::dtype_code::Int, 32)) t.element = Element::i32;
  else if (is(nb::dlpack::dtype_code::Int, 64)) t.element = Element::i64;
  else if (is(nb::dlpack::dtype_code::UInt, 8) || is(nb::dlpack::dtype_code::Int, 8)) t.element = Element::byte;
  else t.element_name = dtype_text(d);
  t.owner = array;
  return t;
}

DType float_type(const Tensor& t, const char* name) {
  switch (t.element) {
    case Element::f32: return DType::f32;
    case Element::f16: return DType::f16;
    case Element::bf16: return DType::bf16;
    default:
      bad(name, "dtype float32, float16 or bfloat16",
          t.element == Element::other ? t.element_name : name_of(t.element));
  }
}

Tensor read(nb::handle x, const char* name, int device, bool written) {
  if (nb::hasattr(x, names().data_ptr)) return from_torch(x, name, device, written);
  return from_dlpack(x, name, device, written);
}

template <class View>
View view(const Tensor& t, const char* name) {
  if (t.rank != 4) bad(name, "4 axes [batch, heads, tokens, channels]", "shape " + shape_text(t));
  View out{t.data, float_type(t, name), t.shape, t.stride};
  if (std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end())
    out.stride[3] = 1;  // numpy gives an empty one zeros
  return out;
}

}  // namespace

std::string text(nb::handle x) {
  nb::object string = nb::steal(PyObject_Str(x.ptr()));
  if (!string.is_valid()) throw nb::python_error();
  Py_ssize_t bytes = 0;
  const char* utf8 = PyUnicode_AsUTF8AndSize(string.ptr(), &bytes);
  if (utf8 == nullptr) {
    PyErr_Clear();
    string = nb::steal(PyObject_ASCII(string.ptr()));
    utf8 = string.is_valid() ? PyUnicode_AsUTF8AndSize(string.ptr(), &bytes) : nullptr;
    if (utf8 == nullptr) throw nb::python_error();
  }
  return {utf8, static_cast<std::size_t>(bytes)};
}

const char* name_of(Element e) {
  static constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "bool",
                                           "int32",   "int64",   "a byte",   "another dtype"};
  return kNames[static_cast<int>(e)];
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int i = 0; i < t.rank; ++i) text += (i > 0 ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

int device_of(const std::string& backend) {
  const std::size_t colon = backend.find(':');
  if (backend.substr(0, colon) == "cpu") return kHost;
  return colon == std::string::npos ? 0 : std::stoi(backend.substr(colon + 1));
}

Tensor tensor(nb::handle x, const char* name, int device) { return read(x, name, device, false); }
Tensor writable_tensor(nb::handle x, const char* name, int device) { return read(x, name, device, true); }

TensorView float_view(const Tensor& t, const char* name) { return view<TensorView>(t, name); }
MutableTensorView mutable_float_view(const Tensor& t, const char* name) { return view<MutableTensorView>(t, name); }

void check_vector(const Tensor& t, const char* name, Element element, const char* element_name, std::int64_t count) {
  if (t.element != element)
    bad(name, std::string("dtype ") + element_name, t.element == Element::other ? t.element_name : name_of(t.element));
  std::int64_t have = 1;
  bool contiguous = true;
  for (int i = t.rank; i-- > 0;) {
    contiguous &= t.shape[i] <= 1 || t.stride[i] == have;
    have *= t.shape[i];
  }
  if (!contiguous) bad(name, "a contiguous tensor", "strides that are not");
  if (count >= 0 && have != count) bad(name, std::to_string(count) + " values", "shape " + shape_text(t));
}

void raise_if_error(const Status& status) {
  const char* text = status.message().c_str();
  switch (status.code()) {
    case StatusCode::ok: return;
    case StatusCode::invalid_argument:
    case StatusCode::non_finite:
    case StatusCode::data_loss: throw nb::value_error(text);
    case StatusCode::out_of_range: throw nb::index_error(text);
    case StatusCode::out_of_memory: PyErr_SetString(PyExc_MemoryError, text); throw nb::python_error();
    case StatusCode::unsupported: PyErr_SetString(PyExc_NotImplementedError, text); throw nb::python_error();
    case StatusCode::failed_precondition: PyErr_SetString(PyExc_RuntimeError, text); throw nb::python_error();
  }
}

}  // namespace kv4::python
