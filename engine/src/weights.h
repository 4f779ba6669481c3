// The model's weights in memory. A matrix that is multiplied goes into the first buffer type of the CPU backend that takes
// it, which may keep an order of its own (ggml repacks quantised matrices for its fastest kernels).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ggml_ptr.h"
#include "gguf_file.h"
#include "kv4/status.h"

namespace kv4::engine {

enum class Use : std::uint8_t {
  multiply,  // the left side of a matrix product
  rows,      // looked up by row
  plain      // added or multiplied element by element
};

// A tensor that an architecture asks for.
struct Wanted {
  std::string name;
  std::vector<std::int64_t> shape;  // ggml's order: the contiguous axis first
  Use use = Use::multiply;
  bool optional = false;
  std::string source = {};  // the tensor of the file it comes from; "" where it is `name`
};

class Weights {
 public:
  // progress: share of the bytes done, 0 to 1; may be null. Errors: invalid_argument for a missing tensor or another shape;
  // unsupported for a type without a kernel, or a tensor of the file that is not wanted; out_of_memory.
  static Status load(const GgufFile& file, const std::vector<Wanted>& wanted, const std::function<void(double)>& progress,
                     std::unique_ptr<Weights>* out);

  ggml_tensor* find(const std::string& name) const {
    const auto it = tensors_.find(name);
    return it == tensors_.end() ? nullptr : it->second;
  }
  std::size_t nbytes() const;

 private:
  struct Place {
    ggml_backend_buffer_type_t type = nullptr;
    GgmlContext context;
    GgmlBuffer buffer;
  };
  std::vector<Place> places_;
  std::map<std::string, ggml_tensor*> tensors_;
};

}  // namespace kv4::engine
