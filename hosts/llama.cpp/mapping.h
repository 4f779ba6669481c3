// Address space that takes memory only where it is written, and gives it back.
#pragma once

#include <cstddef>
#include <utility>

namespace kv4::llama {

class Mapping {
 public:
  Mapping() = default;
  ~Mapping() { reset(); }
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  // Zeros, on a boundary of the system's pages. False where the system has no such address space.
  bool reserve(std::size_t bytes);
  void reset();
  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  // Gives back the system's pages that lie wholly within [p, p + bytes), which are zeros from then on.
  static void release(std::byte* p, std::size_t bytes);

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Bytes of memory that the machine has, and those that a program may still take.
void machine_memory(std::size_t* free, std::size_t* total);

}  // namespace kv4::llama
