// Order of the 4-bit codes in the CPU's pages. One order serves every instruction set: a
// register of 16, 32 or 64 bytes holds, per 32-bit lane, 4 codes of one token (keys) or of
// one channel (values), so integer dot products accumulate with no horizontal sum.
//
// Keys, channels padded to dp (multiple of 16): tokens in blocks of 16, channels in blocks of 8.
//   byte(block b, octet o, token t, i) = b * 16 * dp/2 + o * 64 + t * 4 + i     t < 16, i < 4
//   holds channel 8o + i in the low nibble and channel 8o + 4 + i in the high nibble.
// Values, channels padded to dp: channels in blocks of 16, tokens in blocks of 8.
//   byte(block b, octet o, channel c, i) = b * 512 + o * 64 + c * 4 + i         c < 16, i < 4
//   holds token 8o + i in the low nibble and token 8o + 4 + i in the high nibble.
#pragma once

#include <cstddef>

#include "kv4/recipe.h"

namespace kv4::cpu {

constexpr int pad_channels(int d) { return (d + 15) / 16 * 16; }

struct Nibble {
  std::size_t byte;
  int shift;  // 0 or 4
};

constexpr Nibble key_nibble(int token, int channel, int padded) {
  return {static_cast<std::size_t>(token / 16) * 8 * padded + static_cast<std::size_t>(channel / 8) * 64 +
              static_cast<std::size_t>(token % 16) * 4 + channel % 4,
          channel % 8 < 4 ? 0 : 4};
}

constexpr Nibble value_nibble(int token, int channel) {
  return {static_cast<std::size_t>(channel / 16) * (kPageTokens / 8) * 64 + static_cast<std::size_t>(token / 8) * 64 +
              static_cast<std::size_t>(channel % 16) * 4 + token % 4,
          token % 8 < 4 ? 0 : 4};
}

}  // namespace kv4::cpu
