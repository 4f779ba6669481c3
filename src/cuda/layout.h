// Order of the 4-bit codes in the pages of CUDA devices, for host and device code.
//
// A warp multiplies by mma.m16n8k32 (s8): queries are A, codes become B. Lane 4g + t (g < 8, t < 4) of a B
// fragment holds column g and rows 4t ... 4t+3 and 16+4t ... 16+4t+3: one 32-bit word of 8 codes becomes
// one fragment, with no exchange between lanes. Words are stored four fragments at a time, so that a lane
// reads them with one 16-byte load and a warp 512 contiguous bytes:
//
//   word(fragment f, lane) = (f / 4) * 128 + lane * 4 + f % 4
//
//   Keys, channels padded to a multiple of 32: fragment f = (token / 8) * (padded / 32) + channel / 32,
//   column = token, nibble n of lane 4g + t: token g, channel 4t + n % 4 + 16 (n / 4) of the fragment.
//   Values: fragment f = (channel / 8) * 2 + token / 8 % 2, column = channel; the scores' accumulators hold
//   tokens 2t and 2t+1 of every 8, and are the next product's A as they lie if nibble n of lane 4g + t is
//   channel g, token 16 (n / 2) + 8 (f % 2) + 2t + n % 2.
//
// A nibble holds sign and magnitude: bit 3 is set for levels below 0, the others count magnitudes from the smallest.
// prmt, the byte look-up, reads one of 8 bytes by the three low bits of a nibble, and spreads that byte's sign (0 for
// a magnitude) where the fourth is set: one look-up gives the positive levels and zeros, one of the word with its
// sign bits flipped the negative levels' magnitudes and zeros. The two are multiplied apart and subtracted.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "recipe/levels.h"

#ifdef __CUDACC__
#define KV4_HOST_DEVICE __host__ __device__
#else
#define KV4_HOST_DEVICE
#endif

namespace kv4::cuda {

constexpr int kLanes = 32;

// Whether code for this architecture has bulk copies (and a warp that asks for them): from 9.0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

// Channels that codes are stored for.
KV4_HOST_DEVICE constexpr int pad_channels(int d) { return (d + 31) / 32 * 32; }

struct Nibble {
  uint32_t word;
  int shift;  // 0, 4, ..., 28
};

KV4_HOST_DEVICE constexpr uint32_t word_index(int fragment, int lane) {
  return static_cast<uint32_t>(fragment / 4 * 128 + lane * 4 + fragment % 4);
}

KV4_HOST_DEVICE constexpr Nibble key_nibble(int token, int channel, int padded) {
  const int row = channel % 32;
  return {word_index(token / 8 * (padded / 32) + channel / 32, token % 8 * 4 + row % 16 / 4),
          (row % 4 + row / 16 * 4) * 4};
}

KV4_HOST_DEVICE constexpr Nibble value_nibble(int token, int channel) {
  return {word_index(channel / 8 * 2 + token / 8 % 2, channel % 8 * 4 + token % 8 / 2),
          (token / 16 * 2 + token % 2) * 4};
}
// The token of nibble n of lane 4g + t: value_nibble's inverse.
KV4_HOST_DEVICE constexpr int value_token(int fragment, int t, int n) {
  return n / 2 * 16 + fragment % 2 * 8 + 2 * t + n % 2;
}

// The order of a page's tokens once eight value codes of a word are 16-bit floats, even nibbles before odd ones, and
// words of a channel follow one another by fragment and t: position j = 8 q + i holds token 16 (i % 4) + 8 (q / 4) + 2
// (q % 4)
// + i / 4.
KV4_HOST_DEVICE constexpr int token_of(int j) { return j % 4 * 16 + j / 32 * 8 + j / 8 % 4 * 2 + j % 8 / 4; }
KV4_HOST_DEVICE constexpr int column_of(int token) {
  return (token / 8 % 2 * 4 + token % 8 / 2) * 8 + token / 16 + token % 2 * 4;
}
static_assert(token_of(column_of(37)) == 37 && token_of(column_of(62)) == 62);

// Codes 8 ... 15 are the levels from 0 up, 7 ... 0 those from the one below 0 down (types of Levels in
// recipe/levels.h).
KV4_HOST_DEVICE constexpr uint32_t to_stored(uint32_t code) { return code < 8 ? 15 - code : code - 8; }
KV4_HOST_DEVICE constexpr uint32_t from_stored(uint32_t nibble) { return nibble < 8 ? nibble + 8 : 15 - nibble; }

// Magnitudes for the look-up, four bytes a word: those of levels from 0 up, and of levels below 0.
struct Tables {
  uint32_t positive[2], negative[2];
};

KV4_HOST_DEVICE inline Tables make_tables(const int8_t levels[16]) {
  Tables t = {};
  for (int i = 0; i < 8; ++i) {
    t.positive[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(levels[8 + i])) << i % 4 * 8;
    t.negative[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(-levels[7 - i])) << i % 4 * 8;
  }
  return t;
}
// Whether levels of both signs have the same magnitudes.
KV4_HOST_DEVICE inline bool even_levels(const Tables& t) {
  return t.positive[0] == t.negative[0] && t.positive[1] == t.negative[1];
}

}  // namespace kv4::cuda
