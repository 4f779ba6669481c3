// A 64-byte aligned buffer between guard bytes, filled with them too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace kv4::tests {

inline constexpr std::uint8_t kGuard = 0xa5;

class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : bytes_(bytes), block_(allocate(bytes)) {
    std::memset(block_.get(), kGuard, bytes + 2 * kEdge);
  }
  std::uint8_t* data() { return block_.get() + kEdge; }
  const std::uint8_t* data() const { return block_.get() + kEdge; }
  std::size_t size() const { return bytes_; }
  bool intact() const {
    for (std::size_t i = 0; i < kEdge; ++i)
      if (block_[i] != kGuard || block_[kEdge + bytes_ + i] != kGuard) return false;
    return true;
  }

 private:
  static constexpr std::size_t kEdge = 256;
  struct Free {
    void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  static std::uint8_t* allocate(std::size_t bytes) {
    return static_cast<std::uint8_t*>(::operator new(bytes + 2 * kEdge, std::align_val_t{64}));
  }
  std::size_t bytes_;
  std::unique_ptr<std::uint8_t[], Free> block_;
};

}  // namespace kv4::tests
