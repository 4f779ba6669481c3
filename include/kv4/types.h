// Element types and strided views of the host's tensors. The library never owns them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kv4 {

enum class DType : std::uint8_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr std::size_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }
constexpr const char* name_of(DType t) {
  return t == DType::f32 ? "float32" : t == DType::f16 ? "float16" : "bfloat16";
}

// A read-only 4-D tensor [batch, heads, tokens, channels]. Strides are in elements, one per
// axis; the channel stride must be 1. The batch, head and token strides may be anything,
// 0 and negative included: prefill tensors are often physically [batch, tokens, heads, channels].
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> stride{};

  const void* at(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return static_cast<const std::byte*>(data) +
           (b * stride[0] + h * stride[1] + t * stride[2]) * static_cast<std::int64_t>(size_of(dtype));
  }
};

struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> stride{};

  void* at(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return static_cast<std::byte*>(data) +
           (b * stride[0] + h * stride[1] + t * stride[2]) * static_cast<std::int64_t>(size_of(dtype));
  }
};

}  // namespace kv4
