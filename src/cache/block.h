// A block of the backend's memory.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "backend/backend.h"

namespace kv4 {

class Block {
 public:
  // Errors: out_of_memory naming `what`.
  static Status make(Backend& backend, const char* what, std::size_t bytes, std::shared_ptr<Block>* out) {
    std::shared_ptr<Block> made(new Block(backend, bytes));
    made->memory_ = backend.alloc(bytes);
    if (made->memory_ == nullptr)
      return error(StatusCode::out_of_memory, what, std::to_string(bytes) + " free bytes", "none");
    *out = std::move(made);
    return {};
  }
  // A copy of host memory; null for 0 bytes.
  static Status copy_of(Backend& backend, const char* what, const void* from, std::size_t bytes,
                        std::shared_ptr<Block>* out) {
    out->reset();
    if (bytes == 0) return {};
    KV4_RETURN_IF_ERROR(make(backend, what, bytes, out));
    return backend.copy((*out)->memory_, from, bytes);
  }
  ~Block() {
    if (memory_ != nullptr) backend_.free(memory_, bytes_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  Block(Backend& backend, std::size_t bytes) : backend_(backend), bytes_(bytes) {}

  Backend& backend_;
  void* memory_ = nullptr;
  std::size_t bytes_;
};

}  // namespace kv4
