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

// Codes of any width, in planes. places(token, channel, f) calls f(byte, shift, width, low) for each part of a code:
// its bits [low, low + width) lie in `byte` from `shift` on. Bits of the canonical codes are counted from the lowest of
// the first byte.
template <class Places, class From>
void gather_planes(const std::uint8_t* codes, int bits, int dim, std::uint8_t* canonical, Places places, From from) {
  std::memset(canonical, 0, static_cast<std::size_t>(kPageTokens / 8 * bits) * static_cast<std::size_t>(dim));
  std::size_t bit = 0;
  for (int j = 0; j < kPageTokens; ++j)
    for (int c = 0; c < dim; ++c, bit += static_cast<std::size_t>(bits)) {
      unsigned stored = 0;
      places(j, c, [&](std::size_t byte, int shift, int width, int low) {
        stored |= (codes[byte] >> shift & ((1u << width) - 1)) << low;
      });
      const unsigned at = from(stored) << bit % 8;
      canonical[bit / 8] = static_cast<std::uint8_t>(canonical[bit / 8] | at);
      if (at > 255) canonical[bit / 8 + 1] = static_cast<std::uint8_t>(at >> 8);
    }
}

// `bytes` of codes, code 0 where no channel is.
template <class Places, class To>
void scatter_planes(const std::uint8_t* canonical, int bits, int dim, std::uint8_t* codes, std::size_t bytes,
                    Places places, To to) {
  std::memset(codes, 0, bytes);
  const int padded = static_cast<int>(bytes) / (kPageTokens / 8 * bits);
  const auto bits_at = [&](int j, int c) {
    if (c >= dim) return 0u;
    const std::size_t bit = static_cast<std::size_t>(j * dim + c) * static_cast<std::size_t>(bits);
    unsigned code = canonical[bit / 8];
    if (bit % 8 + static_cast<unsigned>(bits) > 8) code |= static_cast<unsigned>(canonical[bit / 8 + 1]) << 8;
    return code >> bit % 8 & ((1u << bits) - 1);
  };
  for (int j = 0; j < kPageTokens; ++j)
    for (int c = 0; c < padded; ++c) {
      const unsigned stored = to(bits_at(j, c));
      places(j, c, [&](std::size_t byte, int shift, int width, int low) {
        codes[byte] = static_cast<std::uint8_t>(codes[byte] | (stored >> low & ((1u << width) - 1)) << shift);
      });
    }
}

// One side of a slice. Order: a backend's, places of codes of 4 bits by Order::key and Order::value(token, channel,
// dim) as {byte, shift}, of others by Order::places<kKeys>(side) as gather_planes takes them, absent where there are
// none; stored forms by Order::from and Order::to(code, half), half of the levels.
template <class Order, bool kKeys>
void side_to_canonical(const SideSpec& side, const std::uint8_t* codes, std::uint8_t* canonical) {
  const int d = side.dim, bits = side.levels.bits;
  const auto half = static_cast<std::uint32_t>(side.levels.half());
  const auto from = [half](std::uint32_t stored) { return Order::from(stored, half); };
  if constexpr (requires { Order::template places<kKeys>(side); })
    if (bits != 4) return gather_planes(codes, bits, d, canonical, Order::template places<kKeys>(side), from);
  const auto at = [d](int j, int c) {
    if constexpr (kKeys) return Order::key(j, c, d);
    else return Order::value(j, c, d);
  };
  gather_codes(codes, d, canonical, at, from);
}

// `bytes` of codes.
template <class Order, bool kKeys>
void side_from_canonical(const SideSpec& side, const std::uint8_t* canonical, std::uint8_t* codes, std::size_t bytes) {
  const int d = side.dim, bits = side.levels.bits;
  const auto half = static_cast<std::uint32_t>(side.levels.half());
  const auto to = [half](std::uint32_t code) { return Order::to(code, half); };
  if constexpr (requires { Order::template places<kKeys>(side); })
    if (bits != 4) return scatter_planes(canonical, bits, d, codes, bytes, Order::template places<kKeys>(side), to);
  const auto at = [d](int j, int c) {
    if constexpr (kKeys) return Order::key(j, c, d);
    else return Order::value(j, c, d);
  };
  scatter_codes(canonical, d, codes, bytes, at, to);
}

// k [64][head_dim_k] and v [64][head_dim_v] codes of the sides' bits; either may be null.
template <class Order>
void slice_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  if (k != nullptr) side_to_canonical<Order, true>(spec.key, slice + spec.layout.k_codes, k);
  if (v != nullptr) side_to_canonical<Order, false>(spec.value, slice + spec.layout.v_codes, v);
}

template <class Order>
void slice_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  const kv4_page_layout& l = spec.layout;
  if (k != nullptr) side_from_canonical<Order, true>(spec.key, k, slice + l.k_codes, l.k_code_bytes);
  if (v != nullptr) side_from_canonical<Order, false>(spec.value, v, slice + l.v_codes, l.v_code_bytes);
}

}  // namespace kv4
