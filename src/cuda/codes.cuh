// Codes of a page as the nibbles that look-ups take: narrow ones, of 2 and 3 bits, from planes, and back (layout.h).
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace kv4::cuda {

// A lane's words of one group: pairs, signs.
struct NarrowGroup {
  uint2 pairs;
  uint32_t signs;

  template <int kBits>
  __device__ __forceinline__ void load(const unsigned char* codes, int group, int lane) {
    const unsigned char* const from = codes + group * (kLanes * 4 * kBits);
    pairs = reinterpret_cast<const uint2*>(from)[lane];
    if constexpr (kBits == 3) signs = reinterpret_cast<const uint32_t*>(from)[2 * kLanes + lane];
  }
  // The stored codes of word i, constant, as nibbles. 2 bits: 2 instructions or 1, 3 bits: 4 or 3.
  template <int kBits>
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint32_t pair = i < 2 ? pairs.x : pairs.y, two = (i % 2 == 0 ? pair : pair >> 2) & 0x33333333;
    if constexpr (kBits == 2) return two;
    else return two | ((i < 2 ? signs << (2 - i) : signs >> (i - 2)) & 0x44444444);
  }
};

// A lane's four words of a group, as nibbles.
template <int kBits>
__device__ __forceinline__ uint4 group_words(const unsigned char* codes, int group, int lane) {
  if constexpr (is_narrow(kBits)) {
    NarrowGroup its = {};
    its.template load<kBits>(codes, group, lane);
    return {its.template word<kBits>(0), its.template word<kBits>(1), its.template word<kBits>(2),
            its.template word<kBits>(3)};
  } else {
    return reinterpret_cast<const uint4*>(codes)[group * kLanes + lane];
  }
}

// One of them.
template <int kBits>
__device__ __forceinline__ uint32_t group_word(const unsigned char* codes, int place, int lane) {
  if constexpr (!is_narrow(kBits)) return reinterpret_cast<const uint32_t*>(codes)[word_index(place, lane)];
  const auto* from = reinterpret_cast<const uint32_t*>(codes + place / 4 * (kLanes * 4 * kBits));
  const int i = place % 4;
  const uint32_t two = from[lane * 2 + i / 2] >> i % 2 * 2 & 0x33333333;
  if constexpr (kBits == 2) return two;
  else return two | (from[2 * kLanes + lane] >> i & 0x11111111) << 2;
}

// 8 codes as nibbles to the operand of Sums::add: 4 bits in two parts, fewer in one.
__device__ __forceinline__ uint2 narrow_levels(uint32_t word, const Tables& t) {
  return {look_up(t.positive[0], t.positive[1], word), look_up(t.positive[0], t.positive[1], word >> 16)};
}
template <int kBits>
__device__ __forceinline__ auto operand_of(uint32_t word, const Tables& t) {
  if constexpr (is_narrow(kBits)) return narrow_levels(word, t);
  else return levels_of(word, t);
}

// Of narrow codes as nibbles the sign in the fourth bit, as levels_of and Halves8 take it.
template <int kBits>
__device__ __forceinline__ uint32_t as_four_bits(uint32_t word) {
  if constexpr (kBits == 2) return (word & 0x11111111) | (word << 2 & 0x88888888);
  else return (word & 0x33333333) | (word << 1 & 0x88888888);
}

// Nibbles with the sign in the fourth bit to what the two planes hold.
__device__ __forceinline__ uint32_t to_pairs(int bits, uint32_t first, uint32_t second) {
  const auto two = [bits](uint32_t word) {
    return bits == 3 ? word & 0x33333333 : (word & 0x11111111) | (word >> 2 & 0x22222222);
  };
  return two(first) | two(second) << 2;
}
__device__ __forceinline__ uint32_t to_signs(const uint4& words) {
  const auto sign = [](uint32_t word, int i) { return (word >> 3 & 0x11111111) << i; };
  return sign(words.x, 0) | sign(words.y, 1) | sign(words.z, 2) | sign(words.w, 3);
}

// Stores a lane's words of a group, nibbles with the sign in the fourth bit. Where nibbles of `keep` are 15 the codes
// stay as they are, elsewhere it is 0.
__device__ __forceinline__ void put_narrow(unsigned char* codes, int bits, int group, int lane, const uint4& words,
                                           const uint4& keep) {
  unsigned char* const to = codes + group * (kLanes * 4 * bits);
  uint2 pairs = {to_pairs(bits, words.x, words.y), to_pairs(bits, words.z, words.w)};
  auto& at = reinterpret_cast<uint2*>(to)[lane];
  auto& signs_at = reinterpret_cast<uint32_t*>(to)[2 * kLanes + lane];
  uint32_t signs = to_signs(words);
  if ((keep.x | keep.y | keep.z | keep.w) != 0) {
    const uint2 old = at, kept = {to_pairs(bits, keep.x, keep.y), to_pairs(bits, keep.z, keep.w)};
    pairs = {(pairs.x & ~kept.x) | (old.x & kept.x), (pairs.y & ~kept.y) | (old.y & kept.y)};
    const uint32_t kept_signs = to_signs(keep);
    if (bits == 3) signs = (signs & ~kept_signs) | (signs_at & kept_signs);
  }
  at = pairs;
  if (bits == 3) signs_at = signs;
}

}  // namespace kv4::cuda
