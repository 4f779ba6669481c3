// Converts codes of a head slice between a backend's order and the canonical one (format/page.h), in host memory. A
// backend defines where a code is (byte, low or high nibble) and its stored form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "backend/backend.h"

namespace kv4 {

// canonical [64][dim / 2] from codes; at(token, channel) is {byte, shift}, shift 0 or 4; from(stored) the code.
template <class At, class From>
void gather_codes(const std::uint8_t* codes, int dim, std::uint8_t* canonical, At at, From from) {
  const auto code = [&](int j, int c) {
    const auto n = at(j, c);
    return from(static_cast<std::uint32_t>(codes[n.byte] >> n.shift & 15));
  };
  for (int j = 0; j < kPageTokens; ++j)
    for (int c = 0; c < dim; c += 2) *canonical++ = static_cast<std::uint8_t>(code(j, c) | code(j, c + 1) << 4);
}

// `bytes` of codes from canonical, code 0 where no channel is; to(code) is what is stored.
template <class At, class To>
void scatter_codes(const std::uint8_t* canonical, int dim, std::uint8_t* codes, std::size_t bytes, At at, To to) {
  std::memset(codes, static_cast<int>(to(0u) * 0x11), bytes);
  const auto put = [&](int j, int c, std::uint32_t code) {
    const auto n = at(j, c);
    codes[n.byte] =
        static_cast<std::uint8_t>((codes[n.byte] & ~(15 << n.shift)) | static_cast<int>(to(code)) << n.shift);
  };
  for (int j = 0; j < kPageTokens; ++j) {
    for (int c = 0; c < dim; c += 2) {
      const std::uint8_t pair = *canonical++;
      put(j, c, pair & 15u);
      put(j, c + 1, pair >> 4u);
    }
  }
}

// A backend's order: Order::key(token, channel, spec.key.dim), Order::value(token, channel, spec.value.dim),
// Order::from, Order::to. k [64][head_dim_k / 2] and v [64][head_dim_v / 2] bytes; either may be null.
template <class Order>
void slice_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  if (k != nullptr)
    gather_codes(
        slice + spec.layout.k_codes, spec.key.dim, k, [d = spec.key.dim](int j, int c) { return Order::key(j, c, d); },
        Order::from);
  if (v != nullptr)
    gather_codes(
        slice + spec.layout.v_codes, spec.value.dim, v,
        [d = spec.value.dim](int j, int c) { return Order::value(j, c, d); }, Order::from);
}

template <class Order>
void slice_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  if (k != nullptr)
    scatter_codes(
        k, spec.key.dim, slice + spec.layout.k_codes, spec.layout.k_code_bytes,
        [d = spec.key.dim](int j, int c) { return Order::key(j, c, d); }, Order::to);
  if (v != nullptr)
    scatter_codes(
        v, spec.value.dim, slice + spec.layout.v_codes, spec.layout.v_code_bytes,
        [d = spec.value.dim](int j, int c) { return Order::value(j, c, d); }, Order::to);
}

}  // namespace kv4
