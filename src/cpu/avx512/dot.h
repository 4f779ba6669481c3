// Integer dot products of packed codes for AVX-512 VNNI (the names are described in portable/dot.h).
//
// Per 16 lanes and 8 positions: 1 load, 1 shift, 2 ands and 2 vpshufb unpack the nibbles, then each row
// takes 4 vpdpbusd with a broadcast memory operand. vpdpbusd runs at 2 a cycle on Sapphire Rapids
// (ports 0 and 5, which vpshufb shares) and at 1 a cycle on Zen 4, so it binds from R = 2 on.
//
// v = 256 h + l with h and l in int8; levels are offset by -L[0] to be the unsigned operand. The offset
// leaves through start().
#pragma once

#include <immintrin.h>

#include "cpu/avx512/unpack.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::avx512 {

struct Dot {
  static constexpr int kLimit = 32512;
  static constexpr int kAccumulators = 24;
  static constexpr int kOctetBytes = 16;

  using Table = LevelTable;  // L[n] - L[0], 0 ... 254
  static KV4_INLINE Table table(const Levels& l) { return level_table(l, l.table[0]); }
  // Modulo 2^32, as all sums: scales of a damaged page, negative or NaN, make integers beyond kLimit.
  static KV4_INLINE std::int32_t start(const Levels& l, std::int32_t sum) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(l.table[0]) * static_cast<std::uint32_t>(sum));
  }

  // Each 8 positions: 8 bytes of h, then 8 bytes of l.
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    const __m512i x = _mm512_loadu_si512(v);
    const __m128i h = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8));
    const __m128i l = _mm512_cvtepi32_epi8(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(operand), _mm_unpacklo_epi64(h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(operand + octet_stride), _mm_unpackhi_epi64(h, l));
  }

  // (high << 8) + low + start wraps modulo 2^32; the result does not overflow (portable/dot.h).
  // high and low themselves stay below 512 * 255 * 128 < 2^25.
  template <int R, int B>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums) {
    using Steps = kv4::cpu::Steps<B, B == 4>;
    // With few rows the latency of vpdpbusd binds: the two halves of an octet then have sums of their own.
    constexpr int kChains = R <= 4 ? 2 : 1;
    __m512i high[kChains][R], low[kChains][R];
    KV4_UNROLL
    for (int c = 0; c < kChains; ++c) {
      KV4_UNROLL
      for (int r = 0; r < R; ++r) high[c][r] = low[c][r] = _mm512_setzero_si512();
    }
    const std::uint8_t* operand = operands;
    Unpack<B> unpack(table);
    for (int o = 0; o < octets; o += Steps::kOctets) {
      Steps::prefetch(next, more - codes, o);
      unpack.load(Steps::first(codes, o), Steps::second(more, o));
      octet(high, low, unpack.template bytes<0>(), unpack.template bytes<1>(), operand);
      if constexpr (Steps::kOctets == 2)
        octet(high, low, unpack.template bytes<2>(), unpack.template bytes<3>(), operand + R * kOctetBytes);
      operand += Steps::kOctets * R * kOctetBytes;
    }
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      __m512i h = high[0][r], l = low[0][r];
      if constexpr (kChains == 2) {
        h = _mm512_add_epi32(h, high[1][r]);
        l = _mm512_add_epi32(l, low[1][r]);
      }
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(h, 8), l);
      _mm512_storeu_si512(sums + r * 16, _mm512_add_epi32(sum, _mm512_set1_epi32(start[r * start_stride])));
    }
  }

 private:
  template <int kChains, int R>
  static KV4_INLINE void octet(__m512i (&high)[kChains][R], __m512i (&low)[kChains][R], __m512i first, __m512i second,
                               const std::uint8_t* operand) {
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const std::uint8_t* v = operand + r * kOctetBytes;
      add_products(high[0][r], first, v);
      add_products(low[0][r], first, v + 8);
      add_products(high[kChains - 1][r], second, v + 4);
      add_products(low[kChains - 1][r], second, v + 12);
    }
  }
  typedef std::int32_t Word __attribute__((may_alias));

  // sum_i levels_4l+i v_i into each lane l: _mm512_dpbusd_epi32 with the four bytes at v in every lane. The
  // intrinsic costs GCC 12 a broadcast and two moves of registers per product.
  static KV4_INLINE void add_products(__m512i& sum, __m512i levels, const std::uint8_t* v) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(levels), "m"(*reinterpret_cast<const Word*>(v)));
  }
};

}  // namespace kv4::cpu::avx512
