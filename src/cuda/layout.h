// Order of the codes in the pages of CUDA devices, for host and device code: of 4 bits, then of fewer.
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
//
// Codes of 2 and 3 bits, sign and magnitude too, lie in two planes, of a lane's four words of codes, a *group*,
// together:
//
//   pairs: codes of 2 bits, or the magnitudes of 3; word e holds those of words 2e and 2e + 1, nibble n of the first in
//          its bits 4n and 4n + 1, of the second in 4n + 2 and 4n + 3
//   signs: of 3 bits; word i's in bits 4n + i
//
// [group]: [lane][2] words of pairs, then [lane] words of signs. Words are grouped as above, four after each other, but
// where the channels are an even number of blocks of 32 a group of keys has two blocks of two octets of tokens
// (narrow_key): what a warp multiplies together, and what one lane seals.
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

// Bits of a code that planes hold.
KV4_HOST_DEVICE constexpr bool is_narrow(int bits) { return bits < 4; }

// Nibble n of a lane's word of a fragment.
struct Place {
  int fragment, lane, n;
};

KV4_HOST_DEVICE constexpr uint32_t word_index(int fragment, int lane) {
  return static_cast<uint32_t>(fragment / 4 * 128 + lane * 4 + fragment % 4);
}

KV4_HOST_DEVICE constexpr Place key_place(int token, int channel, int padded) {
  const int row = channel % 32;
  return {token / 8 * (padded / 32) + channel / 32, token % 8 * 4 + row % 16 / 4, row % 4 + row / 16 * 4};
}

KV4_HOST_DEVICE constexpr Place value_place(int token, int channel) {
  return {channel / 8 * 2 + token / 8 % 2, channel % 8 * 4 + token % 8 / 2, token / 16 * 2 + token % 2};
}

// Where fragment f of keys stands among those that narrow codes are grouped from, and which stands there.
KV4_HOST_DEVICE constexpr int narrow_key(int f, int padded) {
  const int blocks = padded / 32, octet = f / blocks, block = f % blocks;
  return blocks % 2 == 0 ? (octet / 2 * (blocks / 2) + block / 2) * 4 + octet % 2 * 2 + block % 2 : f;
}
KV4_HOST_DEVICE constexpr int narrow_key_at(int place, int padded) {
  const int blocks = padded / 32, group = place / 4, pairs = blocks / 2;
  return blocks % 2 == 0 ? (group / pairs * 2 + place % 4 / 2) * blocks + group % pairs * 2 + place % 2 : place;
}
static_assert(narrow_key(narrow_key_at(21, 128), 128) == 21 && narrow_key(11, 64) == 11 && narrow_key(7, 96) == 7);
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

// Codes from half = 2^(bits - 1) up are the levels from 0 up, those below, downwards, the levels from the one below 0
// down (Levels in recipe/levels.h). Stored, the highest bit is the sign.
KV4_HOST_DEVICE constexpr uint32_t to_stored(uint32_t code, uint32_t half = 8) {
  return code < half ? 2 * half - 1 - code : code - half;
}
KV4_HOST_DEVICE constexpr uint32_t from_stored(uint32_t stored, uint32_t half = 8) {
  return stored < half ? stored + half : 2 * half - 1 - stored;
}

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
// Narrow codes' levels, in the order of what is stored, for one look-up: in `positive` alone.
KV4_HOST_DEVICE inline Tables make_narrow_tables(const int8_t* levels, int bits) {
  Tables t = {};
  for (uint32_t i = 0; i < 1u << bits; ++i)
    t.positive[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(levels[from_stored(i, 1u << (bits - 1))]))
                         << i % 4 * 8;
  return t;
}
// Whether levels of both signs have the same magnitudes.
KV4_HOST_DEVICE inline bool even_levels(const Tables& t) {
  return t.positive[0] == t.negative[0] && t.positive[1] == t.negative[1];
}

}  // namespace kv4::cuda
