// Codes of 16 lanes by 16 positions (layout.h) as bytes L[n] - L[0], four positions of each lane a register.
//
// Instructions for 16 positions, beside loads; with VBMI (avx512vbmi/unpack.h) a table of 64 is one vpermb, which
// ignores what stands above an index:
//
//            AVX-512BW                                                          VBMI
//   2 bits   3 shifts, 2 ands, 4 vpshufb: 9                                     3 shifts, 4 vpermb: 7
//   3        5 shifts, 1 and, 2 vpternlogd, 4 vpshufb: 12                       5 shifts, 2 vpternlogd, 4 vpermb: 11
//   4        2 shifts, 4 ands, 4 vpshufb: 10                                    2 shifts, 4 vpermb: 6
//   trellis
//   2 bits   5 shifts, 4 ands, 1 vpternlogd, 4 vpshufb: 14                      4 shifts, 1 vpternlogd, 4 vpermb: 9
//   3        12 shifts, 1 and, 6 vpternlogd, 4 vptestmb, 8 vpshufb: 31          9 shifts, 6 vpternlogd, 4 vpermb: 19
//   4        2 shifts, 4 ands, 8 vptestmb, 16 vpshufb, 4 blends: 34             2 shifts, 2 vpternlogd, 4 vpermb: 8
//   6        2 shifts, 4 ands, 8 vptestmb, 16 vpshufb, 4 blends: 34             5 shifts, 4 vpternlogd, 4 vpermb: 13
//   8        none
//
// vpshufb looks at bits 0 to 3 and 7 of an index alone, so that nibbles below 8 need no mask.
// Codes of three contiguous bits by vpermb, vpmultishiftqb and vpermb take 12, and have no like without VBMI. Included
// in a target region.
#pragma once

#include <immintrin.h>

#include "cpu/level_table.h"
#include "cpu/steps.h"

namespace kv4::cpu::avx512 {

KV4_INLINE __m512i byte512(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
// The 16 entries of a table from `first` on, in all four quarters.
KV4_INLINE __m512i part512(const LevelTable& t, int first = 0) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t.levels + first)));
}
template <int kShift>  // right; left where it is negative
KV4_INLINE __m512i shift512(__m512i x) {
  if constexpr (kShift > 0) return _mm512_srli_epi16(x, kShift);
  else if constexpr (kShift < 0) return _mm512_slli_epi16(x, -kShift);
  else return x;
}
// x where the mask is set, else y.
KV4_INLINE __m512i choose512(__m512i mask, __m512i x, __m512i y) { return _mm512_ternarylogic_epi32(mask, x, y, 0xca); }

// The two planes of 3 bits as two registers of two nibbles, whose lower three bits are codes: 4 i % 2 of register i
// % 2. kAlone: their highest bit is 0.
template <bool kAlone>
struct Threes {
  // Lanes 8 to 15 have the odd bits of the second plane.
  __m512i odd = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(1), 1), mask = byte512(0x33), nibbles[2]{};

  KV4_INLINE Threes() {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t* second) {
    const __m512i two = _mm512_loadu_si512(first);
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    const __m512i shifted = _mm512_srlv_epi16(both, odd);
    const __m512i one = kAlone ? _mm512_and_si512(shifted, byte512(0x55)) : shifted;
    nibbles[0] = choose512(mask, two, shift512<-2>(one));
    nibbles[1] = choose512(mask, shift512<2>(two), one);
  }
  template <int i>
  KV4_INLINE __m512i index() const {
    return shift512<i / 2 * 4>(nibbles[i % 2]);
  }
};

// The two planes of 6 bits.
struct Sixes {
  __m512i four[2]{}, two{};

  KV4_INLINE Sixes() {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t* second) {
    four[0] = _mm512_loadu_si512(first);
    four[1] = _mm512_loadu_si512(first + 64);
    two = _mm512_loadu_si512(second);
  }
};

// load of each step, then bytes<i>: positions 4 i ... 4 i + 3.
template <int B>
struct Unpack;

template <>
struct Unpack<2> {
  __m512i table{}, pairs = byte512(0x33), nibbles[2]{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(part512(t)) {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    const __m512i codes = _mm512_loadu_si512(first);
    nibbles[0] = _mm512_and_si512(codes, pairs);
    nibbles[1] = _mm512_and_si512(shift512<2>(codes), pairs);
  }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_shuffle_epi8(table, shift512<i / 2 * 4>(nibbles[i % 2]));
  }
};

template <>
struct Unpack<4> {
  __m512i table{}, mask = byte512(15), codes{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(part512(t)) {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) { codes = _mm512_loadu_si512(first); }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(shift512<4 * i>(codes), mask));
  }
};

template <>
struct Unpack<3> : Threes<true> {
  __m512i table{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(part512(t)) {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_shuffle_epi8(table, index<i>());
  }
};

// Each code and the one before it, the earlier one's bits below, from bit 0 on.
struct TwosInChains {
  __m512i pair = byte512(3), codes{}, before{};

  KV4_INLINE TwosInChains() {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    before = codes;
    codes = _mm512_loadu_si512(first);
  }
  template <int i>
  KV4_INLINE __m512i index() const {
    if constexpr (i == 0) return choose512(pair, shift512<6>(before), shift512<-2>(codes));
    else return shift512<2 * i - 2>(codes);
  }
};
template <>
struct Unpack<kTrellis + 2> : TwosInChains {
  __m512i table{}, mask = byte512(15);

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(part512(t)) {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(index<i>(), mask));
  }
};

// Codes of 3 bits from bit 0 on, and above each the two bits that the one before it leaves.
template <bool kAlone>
struct ThreesInChains : Threes<kAlone> {
  __m512i code = byte512(7), last{};

  KV4_INLINE ThreesInChains() {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t* second) {
    last = this->nibbles[1];
    Threes<kAlone>::load(first, second);
  }
  // The register of the code before that at 4 i, and the first of its bits there.
  template <int i>
  KV4_INLINE __m512i before() const {
    return i == 0 ? last : this->nibbles[1 - i % 2];
  }
  template <int i>
  static constexpr int kBefore = i == 0 ? 4 : (i - 1) / 2 * 4;
  template <int i>
  KV4_INLINE __m512i pair() const {
    return choose512(code, this->template index<i>(), shift512<kBefore<i> - 3>(before<i>()));
  }
};
template <>
struct Unpack<kTrellis + 3> : ThreesInChains<true> {
  __m512i table[2]{}, mask = byte512(15);

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table{part512(t), part512(t, 16)} {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    const __m512i low = _mm512_and_si512(pair<i>(), mask);
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[0], low),
                                    _mm512_test_epi8_mask(before<i>(), byte512(2 << kBefore<i>)), table[1], low);
  }
};

// Among four tables of 16 by the low nibbles of `low` and two masks.
KV4_INLINE __m512i look_up_64(const __m512i (&table)[4], __m512i low, __mmask64 odd, __mmask64 upper) {
  const __m512i a = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[0], low), odd, table[1], low);
  const __m512i b = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[2], low), odd, table[3], low);
  return _mm512_mask_mov_epi8(a, upper, b);
}

// A table of 16 for each state, those of even places and of odd ones.
template <>
struct Unpack<kTrellis + 4> {
  __m512i table[2][4]{}, codes{}, before{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) {
    KV4_UNROLL
    for (int n = 0; n < 4; ++n) {
      table[0][n] = part512(t, 16 * n);
      table[1][n] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t.odd + 16 * n)));
    }
  }
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    before = codes;
    codes = _mm512_loadu_si512(first);
  }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    const __m512i state = i == 0 ? before : codes;
    constexpr int kState = i == 0 ? 4 : 2;  // its first bit
    return look_up_64(table[i], _mm512_and_si512(shift512<4 * i>(codes), byte512(15)),
                      _mm512_test_epi8_mask(state, byte512(1 << kState)),
                      _mm512_test_epi8_mask(state, byte512(2 << kState)));
  }
};

// Four tables of 16, chosen from by two bits of the second plane.
template <>
struct Unpack<6> : Sixes {
  __m512i table[4]{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) {
    KV4_UNROLL
    for (int n = 0; n < 4; ++n) table[n] = part512(t, 16 * n);
  }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    const __m512i low = _mm512_and_si512(shift512<i % 2 * 4>(four[i / 2]), byte512(15));
    return look_up_64(table, low, _mm512_test_epi8_mask(two, byte512(1 << 2 * i)),
                      _mm512_test_epi8_mask(two, byte512(2 << 2 * i)));
  }
};

template <>
struct Unpack<8> {
  const std::uint8_t* codes = nullptr;

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable&) {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) { codes = first; }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_loadu_si512(codes + 64 * i);
  }
};

}  // namespace kv4::cpu::avx512
