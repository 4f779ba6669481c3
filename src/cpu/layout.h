// Order of the codes in the CPU's pages. One order serves every instruction set: a register of 16, 32 or 64 bytes
// holds, per 32-bit lane, 4 codes of one token (keys) or of one channel (values), so that integer dot products
// accumulate with no horizontal sum.
//
// A side has blocks of 16 lanes (tokens of keys, channels of values), which sum over positions (channels, padded to a
// multiple of 16; tokens). Codes lie in planes of 8, 4, 2 or 1 bits: those of 3 bits in 2 + 1, of 6 in 4 + 2, the low
// bits first, and the second plane of a side behind its whole first one. In a plane a block has 16 positions at a time
// in 32 bytes for each of its bits. Position p = 4 r + i of those 16 and lane l are, with n = 4 l + i,
//
//   8 bits   byte 64 r + n
//   4        byte 64 (r / 2) + n   from bit 4 (r % 2) on
//   2        byte n                from bit 2 r on
//   1        byte n % 32           bit 2 r + n / 32
//
// so that r counts registers of 64 bytes, each had by a shift. At 4 bits:
//
// Keys, channels padded to dp: tokens in blocks of 16, channels in blocks of 8.
//   byte(block b, octet o, token t, i) = b * 16 * dp/2 + o * 64 + t * 4 + i     t < 16, i < 4
//   holds channel 8o + i in the low nibble and channel 8o + 4 + i in the high nibble.
// Values, channels padded to dp: channels in blocks of 16, tokens in blocks of 8.
//   byte(block b, octet o, channel c, i) = b * 512 + o * 64 + c * 4 + i         c < 16, i < 4
//   holds token 8o + i in the low nibble and token 8o + 4 + i in the high nibble.
#pragma once

#include <cstddef>

#include "kv4/recipe.h"

namespace kv4::cpu {

constexpr int kStepPositions = 16;  // that a plane holds side by side

constexpr int pad_channels(int d) { return (d + 15) / 16 * 16; }

// Codes as kernels are compiled for them: of a width, whose number this is, and more than that by kTrellis where they
// are a trellis's.
constexpr int kTrellis = 16;
constexpr bool is_trellis(int coding) { return coding >= kTrellis; }
constexpr int bits_of(int coding) { return coding % kTrellis; }

// Bits of a code in the first plane; the others are in the second.
constexpr int first_plane(int coding) {
  const int bits = bits_of(coding);
  return bits == 3 ? 2 : bits == 6 ? 4 : bits;
}
constexpr int later_plane(int coding) { return bits_of(coding) - first_plane(coding); }
// Bytes of 16 lanes by 16 positions in a plane of so many bits.
constexpr int step_bytes(int plane) { return 32 * plane; }
// Where the second plane of a side begins, in bytes from its first.
constexpr std::size_t second_plane(int bits, int padded) {
  return static_cast<std::size_t>(kPageTokens / 8 * first_plane(bits)) * static_cast<std::size_t>(padded);
}

// A code's byte within its plane, and the lowest of its bits there.
struct Nibble {
  std::size_t byte;
  int shift;
};

// positions: of a block.
constexpr Nibble plane_place(int plane, int block, int lane, int position, int positions) {
  const int r = position % 16 / 4, n = 4 * lane + position % 4;
  const std::size_t step = static_cast<std::size_t>(block) * (positions / kStepPositions) + position / kStepPositions;
  const std::size_t at = step * static_cast<std::size_t>(step_bytes(plane));
  switch (plane) {
    case 8: return {at + 64 * r + n, 0};
    case 4: return {at + 64 * (r / 2) + n, 4 * (r % 2)};
    case 2: return {at + n, 2 * r};
    default: return {at + n % 32, 2 * r + n / 32};
  }
}
constexpr Nibble key_place(int plane, int token, int channel, int padded) {
  return plane_place(plane, token / 16, token % 16, channel, padded);
}
constexpr Nibble value_place(int plane, int token, int channel) {
  return plane_place(plane, channel / 16, channel % 16, token, kPageTokens);
}

constexpr Nibble key_nibble(int token, int channel, int padded) { return key_place(4, token, channel, padded); }
constexpr Nibble value_nibble(int token, int channel) { return value_place(4, token, channel); }

}  // namespace kv4::cpu
