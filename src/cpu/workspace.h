// Memory that calls of the CPU backend reuse: it grows and is never given back before the calling thread
// ends. Each calling thread has its own, with one arena per worker, so that no lock is needed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace kv4::cpu {

class Buffer {
 public:
  // At least `bytes` of 64-byte aligned memory; what it held is lost where it grows. False where there is none.
  bool reserve(std::size_t bytes) {
    if (bytes <= bytes_) return true;
    memory_.reset();
    bytes_ = 0;
    memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}, std::nothrow)));
    if (memory_ == nullptr) return false;
    bytes_ = bytes;
    return true;
  }
  std::byte* data() const { return memory_.get(); }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Delete> memory_;
  std::size_t bytes_ = 0;
};

// Hands out 64-byte aligned arrays of one buffer, or only adds up their sizes where base is null.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(std::size_t count) {
    T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  std::size_t bytes_ = 0;
};

}  // namespace kv4::cpu
