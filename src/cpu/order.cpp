#include "cpu/order.h"

#include <cstring>

#include "backend/order.h"
#include "cpu/layout.h"

namespace kv4::cpu {
namespace {

struct Order {
  static Nibble key(int token, int channel, int dim) { return key_nibble(token, channel, pad_channels(dim)); }
  static Nibble value(int token, int channel, int /*dim*/) { return value_nibble(token, channel); }
  static std::uint32_t from(std::uint32_t stored) { return stored; }
  static std::uint32_t to(std::uint32_t code) { return code; }
};

bool fours(const PageSpec& spec) { return spec.key.levels.bits == 4 && spec.value.levels.bits == 4; }

// One side of a slice. Bits of its codes, [token][channel], the lowest first, are `bits` each in the canonical order.
struct Side {
  int bits, dim, padded;
  bool keys;
  std::size_t second;

  Side(const SideSpec& spec, bool of_keys)
      : bits(spec.levels.bits), dim(spec.dim), padded(pad_channels(spec.dim)), keys(of_keys),
        second(second_plane(bits, padded)) {}

  // f(byte of the side, bit in it, bits there, lowest bit of the code that lies there), of each plane.
  template <class F>
  void each_plane(int token, int channel, F f) const {
    const int low = first_plane(bits);
    for (int plane = low, from = 0; from < bits; from += plane, plane = bits - low) {
      const Nibble at = keys ? key_place(plane, token, channel, padded) : value_place(plane, token, channel);
      f(at.byte + (from > 0 ? second : 0), at.shift, plane, from);
    }
  }

  void gather(const std::uint8_t* codes, std::uint8_t* canonical) const {
    std::memset(canonical, 0, static_cast<std::size_t>(kPageTokens / 8 * bits) * static_cast<std::size_t>(dim));
    each([&](int token, int channel, std::size_t bit) {
      unsigned code = 0;
      each_plane(token, channel, [&](std::size_t byte, int shift, int plane, int from) {
        code |= (codes[byte] >> shift & ((1u << plane) - 1)) << from;
      });
      const unsigned at = code << bit % 8;
      canonical[bit / 8] = static_cast<std::uint8_t>(canonical[bit / 8] | at);
      if (at > 255) canonical[bit / 8 + 1] = static_cast<std::uint8_t>(at >> 8);
    });
  }

  void scatter(const std::uint8_t* canonical, std::uint8_t* codes) const {
    std::memset(codes, 0, static_cast<std::size_t>(kPageTokens / 8 * bits) * static_cast<std::size_t>(padded));
    each([&](int token, int channel, std::size_t bit) {
      unsigned code = canonical[bit / 8];
      if (bit % 8 + static_cast<unsigned>(bits) > 8) code |= static_cast<unsigned>(canonical[bit / 8 + 1]) << 8;
      code >>= bit % 8;
      each_plane(token, channel, [&](std::size_t byte, int shift, int plane, int from) {
        codes[byte] = static_cast<std::uint8_t>(codes[byte] | (code >> from & ((1u << plane) - 1)) << shift);
      });
    });
  }

 private:
  // f(token, channel, first of its canonical bits).
  template <class F>
  void each(F f) const {
    std::size_t bit = 0;
    for (int j = 0; j < kPageTokens; ++j)
      for (int c = 0; c < dim; ++c, bit += static_cast<std::size_t>(bits)) f(j, c, bit);
  }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  if (fours(spec)) return slice_to_canonical<Order>(spec, slice, k, v);
  if (k != nullptr) Side(spec.key, true).gather(slice + spec.layout.k_codes, k);
  if (v != nullptr) Side(spec.value, false).gather(slice + spec.layout.v_codes, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  if (fours(spec)) return slice_from_canonical<Order>(spec, k, v, slice);
  if (k != nullptr) Side(spec.key, true).scatter(k, slice + spec.layout.k_codes);
  if (v != nullptr) Side(spec.value, false).scatter(v, slice + spec.layout.v_codes);
}

}  // namespace kv4::cpu
