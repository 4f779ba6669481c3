// Codes of 16 lanes by 16 positions (layout.h) as bytes of a table, with VBMI (counts: avx512/unpack.h). Included in a
// target region.
#pragma once

#include "cpu/avx512/unpack.h"

namespace kv4::cpu::avx512vbmi {

using avx512::shift512;

KV4_INLINE __m512i whole512(const LevelTable& t) { return _mm512_load_si512(t.levels); }

template <int B>
struct Unpack : avx512::Unpack<B> {
  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : avx512::Unpack<B>(t) {}
};

template <>
struct Unpack<2> {
  __m512i table{}, codes{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(whole512(t)) {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) { codes = _mm512_loadu_si512(first); }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_permutexvar_epi8(shift512<2 * i>(codes), table);
  }
};

// A table of 16 that repeats finds a nibble whatever stands above it.
template <>
struct Unpack<4> {
  __m512i table{}, codes{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(whole512(t)) {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) { codes = _mm512_loadu_si512(first); }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_permutexvar_epi8(shift512<4 * i>(codes), table);
  }
};

// A table of 64 by the code and its state: of an even place the low nibble and bits 4 and 5 of the byte before, of an
// odd one bits 2 to 7 of the byte.
template <>
struct Unpack<kTrellis + 4> {
  __m512i even{}, odd{}, nibble = avx512::byte512(15), codes{}, before{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : even(whole512(t)), odd(_mm512_load_si512(t.odd_by_byte)) {}
  KV4_INLINE void load(const std::uint8_t* first, const std::uint8_t*) {
    before = codes;
    codes = _mm512_loadu_si512(first);
  }
  template <int i>
  KV4_INLINE __m512i bytes() const {
    if constexpr (i == 0) return _mm512_permutexvar_epi8(avx512::choose512(nibble, codes, before), even);
    else return _mm512_permutexvar_epi8(shift512<2>(codes), odd);
  }
};

template <>
struct Unpack<3> : avx512::Threes<false> {
  __m512i table{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(whole512(t)) {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_permutexvar_epi8(index<i>(), table);
  }
};

template <>
struct Unpack<kTrellis + 2> : avx512::TwosInChains {
  __m512i table{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(whole512(t)) {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_permutexvar_epi8(index<i>(), table);
  }
};

template <>
struct Unpack<kTrellis + 3> : avx512::ThreesInChains<false> {
  __m512i table{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(whole512(t)) {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_permutexvar_epi8(pair<i>(), table);
  }
};

template <>
struct Unpack<6> : avx512::Sixes {
  __m512i table{};

  KV4_INLINE Unpack() {}
  explicit KV4_INLINE Unpack(const LevelTable& t) : table(whole512(t)) {}
  template <int i>
  KV4_INLINE __m512i bytes() const {
    return _mm512_permutexvar_epi8(
        avx512::choose512(avx512::byte512(15), shift512<i % 2 * 4>(four[i / 2]), shift512<2 * i - 4>(two)), table);
  }
};

}  // namespace kv4::cpu::avx512vbmi
