// Codes of 8 lanes by 16 positions (layout.h) as bytes L[n] - L[0], four positions of each lane a register.
//
// Instructions for 16 positions, beside loads: 2 bits 3 shifts, 2 ands, 4 vpshufb; 3 bits 5 shifts, 4 ands, 2 ors, 4
// vpshufb; 4 bits 2, 4, 4; 6 bits 9 shifts, 4 ands, 16 vpshufb, 12 vpblendvb; 8 bits none. Of a trellis 2 bits take 4
// shifts, 5 ands, 1 or, 4 vpshufb; 3 bits 15 shifts, 12 ands, 6 ors, 8 vpshufb, 4 vpblendvb; 4 bits 10 shifts, 4 ands,
// 16 vpshufb, 12 vpblendvb. vpshufb looks at bits 0 to 3 and 7 of an index alone, so that nibbles below 8 need no mask.
// Included in a target region.
#pragma once

#include <immintrin.h>

#include "cpu/level_table.h"
#include "cpu/steps.h"

namespace kv4::cpu::avx2 {

KV4_INLINE __m256i load256(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
KV4_INLINE __m256i byte256(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
// The 16 entries of a table from `first` on, in both halves.
KV4_INLINE __m256i part256(const LevelTable& t, int first = 0) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.levels + first)));
}
template <int kShift>  // right; left where it is negative
KV4_INLINE __m256i shift256(__m256i x) {
  if constexpr (kShift > 0) return _mm256_srli_epi16(x, kShift);
  else if constexpr (kShift < 0) return _mm256_slli_epi16(x, -kShift);
  else return x;
}

// begin(half), then load of each step, then bytes<i>: positions 4 i ... 4 i + 3.
template <int B>
struct Unpack;

template <>
struct Unpack<4> {
  __m256i table, mask = byte256(15), codes{};
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable& t) : table(part256(t)) {}
  KV4_INLINE void begin(int h) { half = h; }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) { codes = load256(first + 32 * half); }
  template <int i>
  KV4_INLINE __m256i bytes() const {
    return _mm256_shuffle_epi8(table, _mm256_and_si256(shift256<4 * i>(codes), mask));
  }
};

// A table of 16 for each state, those of even places and of odd ones.
template <>
struct Unpack<kTrellis + 4> {
  __m256i table[2][4], mask = byte256(15), codes{}, before{};
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable& t) {
    KV4_UNROLL
    for (int n = 0; n < 4; ++n) {
      table[0][n] = part256(t, 16 * n);
      table[1][n] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.odd + 16 * n)));
    }
  }
  KV4_INLINE void begin(int h) {
    half = h;
    codes = __m256i{};
  }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    before = codes;
    codes = load256(first + 32 * half);
  }
  template <int i>
  KV4_INLINE __m256i bytes() const {
    const __m256i code = _mm256_and_si256(shift256<4 * i>(codes), mask);
    // The two bits of the state at the top of each byte, where a blend asks for them: bits 4 and 5 of the byte before,
    // or 2 and 3 of this one.
    const __m256i low = i == 0 ? shift256<-3>(before) : shift256<-5>(codes),
                  high = i == 0 ? shift256<-2>(before) : shift256<-4>(codes);
    const auto level = [&](int n) KV4_INLINE_LAMBDA { return _mm256_shuffle_epi8(table[i][n], code); };
    return _mm256_blendv_epi8(_mm256_blendv_epi8(level(0), level(1), low), _mm256_blendv_epi8(level(2), level(3), low),
                              high);
  }
};

// Codes below 8 as two registers of two nibbles, from bit 4 (i / 2) on of register i % 2.
struct Nibbles {
  __m256i table, nibbles[2]{};

  explicit KV4_INLINE Nibbles(const LevelTable& t) : table(part256(t)) {}
  template <int i>
  KV4_INLINE __m256i bytes() const {
    return _mm256_shuffle_epi8(table, shift256<i / 2 * 4>(nibbles[i % 2]));
  }
};

template <>
struct Unpack<2> : Nibbles {
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable& t) : Nibbles(t) {}
  KV4_INLINE void begin(int h) { half = h; }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    const __m256i codes = load256(first + 32 * half), pairs = byte256(0x33);
    nibbles[0] = _mm256_and_si256(codes, pairs);
    nibbles[1] = _mm256_and_si256(shift256<2>(codes), pairs);
  }
};

// Each code and the one before it, the earlier one's bits below.
template <>
struct Unpack<kTrellis + 2> {
  __m256i table, codes{}, before{};
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable& t) : table(part256(t)) {}
  KV4_INLINE void begin(int h) {
    half = h;
    codes = __m256i{};
  }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    before = codes;
    codes = load256(first + 32 * half);
  }
  template <int i>
  KV4_INLINE __m256i bytes() const {
    __m256i index;
    if constexpr (i == 0)
      index = _mm256_or_si256(_mm256_and_si256(shift256<6>(before), byte256(3)),
                              _mm256_and_si256(shift256<-2>(codes), byte256(12)));
    else index = _mm256_and_si256(shift256<2 * i - 2>(codes), byte256(15));
    return _mm256_shuffle_epi8(table, index);
  }
};

// Two bits of the first plane, and above them one of the second.
template <>
struct Unpack<3> : Nibbles {
  __m128i shift{};
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable& t) : Nibbles(t) {}
  KV4_INLINE void begin(int h) {
    half = h;
    shift = _mm_cvtsi32_si128(h);
  }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t* second) {
    const __m256i two = load256(first + 32 * half), one = _mm256_srl_epi16(load256(second), shift);
    nibbles[0] = join(two, shift256<-2>(one));
    nibbles[1] = join(shift256<2>(two), one);
  }
  static KV4_INLINE __m256i join(__m256i two, __m256i one) {
    return _mm256_or_si256(_mm256_and_si256(two, byte256(0x33)), _mm256_and_si256(one, byte256(0x44)));
  }
};

// An index of a code, in the lower three bits, and of the two that the code before it leaves; the upper of them chooses
// between two tables of 16.
template <>
struct Unpack<kTrellis + 3> : Unpack<3> {
  __m256i upper_table, last{};

  explicit KV4_INLINE Unpack(const LevelTable& t) : Unpack<3>(t), upper_table(part256(t, 16)) {}
  KV4_INLINE void begin(int h) {
    Unpack<3>::begin(h);
    nibbles[1] = __m256i{};
  }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t* second) {
    last = nibbles[1];
    Unpack<3>::load(first, second);
  }
  // Position 4 i's code lies from bit 4 (i / 2) on of nibbles[i % 2].
  template <int i>
  KV4_INLINE __m256i bytes() const {
    const __m256i before = i == 0 ? last : nibbles[1 - i % 2];
    constexpr int kBefore = i == 0 ? 4 : (i - 1) / 2 * 4;  // its first bit there
    const __m256i index = _mm256_or_si256(_mm256_and_si256(shift256<i / 2 * 4>(nibbles[i % 2]), byte256(7)),
                                          _mm256_and_si256(shift256<kBefore - 3>(before), byte256(8)));
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(table, index), _mm256_shuffle_epi8(upper_table, index),
                              shift256<kBefore - 6>(before));
  }
};

// Four tables of 16, chosen from by two bits of the second plane.
template <>
struct Unpack<6> {
  __m256i table[4], four[2]{}, two{};
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable& t) {
    KV4_UNROLL
    for (int n = 0; n < 4; ++n) table[n] = part256(t, 16 * n);
  }
  KV4_INLINE void begin(int h) { half = h; }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t* second) {
    four[0] = load256(first + 32 * half);
    four[1] = load256(first + 64 + 32 * half);
    two = load256(second + 32 * half);
  }
  template <int i>
  KV4_INLINE __m256i bytes() const {
    const __m256i low = _mm256_and_si256(shift256<i % 2 * 4>(four[i / 2]), byte256(15));
    // A blend asks for the highest bit of a byte.
    const __m256i odd = shift256<2 * i - 7>(two), upper = shift256<2 * i - 6>(two);
    return _mm256_blendv_epi8(
        _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], low), _mm256_shuffle_epi8(table[1], low), odd),
        _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], low), _mm256_shuffle_epi8(table[3], low), odd), upper);
  }
};

template <>
struct Unpack<8> {
  const std::uint8_t* codes = nullptr;
  int half = 0;

  explicit KV4_INLINE Unpack(const LevelTable&) {}
  KV4_INLINE void begin(int h) { half = h; }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) { codes = first + 32 * half; }
  template <int i>
  KV4_INLINE __m256i bytes() const {
    return load256(codes + 64 * i);
  }
};

// The same as 16-bit levels: positions (0, 2), (4, 6), (1, 3), (5, 7) of each octet.
template <int B>
struct Pairs : Unpack<B> {
  __m256i words[2]{};

  explicit KV4_INLINE Pairs(const LevelTable& t) : Unpack<B>(t) {}
  template <int i>
  KV4_INLINE __m256i levels() {
    if constexpr (i % 4 < 2) {
      words[i % 2] = this->template bytes<i / 4 * 2 + i % 2>();
      return _mm256_and_si256(words[i % 2], _mm256_set1_epi16(255));
    } else {
      return _mm256_srli_epi16(words[i % 2], 8);
    }
  }
};

// Each nibble becomes an index whose upper byte is 0, where the level is 0.
template <>
struct Pairs<4> : Unpack<4> {
  __m256i nibble = _mm256_set1_epi16(15);

  explicit KV4_INLINE Pairs(const LevelTable& t) : Unpack<4>(t) {}
  template <int i>
  KV4_INLINE __m256i levels() const {
    if constexpr (i == 3) return _mm256_shuffle_epi8(table, shift256<12>(codes));
    else return _mm256_shuffle_epi8(table, _mm256_and_si256(shift256<4 * i>(codes), nibble));
  }
};

}  // namespace kv4::cpu::avx2
