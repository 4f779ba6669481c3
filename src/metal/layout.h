// Order of the 4-bit codes in the pages of Apple GPUs, for host and device code. A SIMD-group of 32 lanes takes a page.
//
//   Keys: lane l owns tokens 2l and 2l + 1, so that scores need no sums across lanes. One 16-byte load of a lane, 512
//   contiguous bytes of a SIMD-group, holds 16 channels of both: 8 bytes of token 2l, then 8 of token 2l + 1.
//     byte(token, channel) = (channel / 16) * 512 + (token / 2) * 16 + token % 2 * 8 + channel % 16 / 2
//   Values: lanes own pairs of channels, and sum over tokens. One 16-byte load holds 16 tokens of a pair.
//     byte(token, channel) = (token / 16 * (dim / 2) + channel / 2) * 16 + token % 16
//
// As in the canonical order a byte is two neighbouring channels of one token, the even one in the low nibble: a table
// of 256 pairs of levels unpacks it with one look-up. No channel is padded; dim is a multiple of 16.
#ifndef KV4_METAL_LAYOUT_H
#define KV4_METAL_LAYOUT_H

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <stdint.h>
#endif

namespace kv4 {
namespace apple {

constexpr inline uint32_t key_byte(uint32_t token, uint32_t channel) {
  return channel / 16 * 512 + token / 2 * 16 + token % 2 * 8 + channel % 16 / 2;
}
constexpr inline uint32_t value_byte(uint32_t token, uint32_t channel, uint32_t dim) {
  return (token / 16 * (dim / 2) + channel / 2) * 16 + token % 16;
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_LAYOUT_H
