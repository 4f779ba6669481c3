// Integer dot products of packed codes for AVX2 (the names are described in portable/dot.h).
//
// Per 8 lanes and 8 positions: 1 load, 3 shifts, 3 ands and 4 vpshufb unpack the nibbles, then each row
// takes 4 vpbroadcastd, 4 vpmaddwd and 4 vpaddd: 11 + 12 R instructions. Zen 3 starts 6 of them a
// cycle, 2 vpmaddwd among them: issue binds, with vpmaddwd close behind it from R = 4 on.
//
// A 16-bit lane holds two code bytes; each nibble becomes an index whose upper byte is 0. Levels are
// offset by -L[0], so that index 0 reads 0: one shuffle yields 8 dwords of two 16-bit levels and no
// sign extension is needed. The offset leaves through start().
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"
#include "kv4/recipe.h"

namespace kv4::cpu::avx2 {

struct Dot {
  static constexpr int kLimit = 32512;
  static constexpr int kAccumulators = 8;

  struct Table {
    __m256i levels;  // L[n] - L[0], 0 ... 254, in both halves
  };
  static KV4_INLINE Table table(const Levels& l) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(l.table.data()));
    return {_mm256_broadcastsi128_si256(_mm_sub_epi8(t, _mm_set1_epi8(l.table[0])))};
  }
  static KV4_INLINE std::int32_t start(const Levels& l, std::int32_t sum) { return l.table[0] * sum; }

  // Positions (0, 2), (4, 6), (1, 3), (5, 7) of each 8 as pairs of int16: the order in which block() unpacks.
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int o = 0; o < 2; ++o) {
      const __m256i x =
          _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 8 * o)), order);
      const __m128i upper = _mm_slli_epi32(_mm256_extracti128_si256(x, 1), 16);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(operand + 16 * o),
                       _mm_blend_epi16(_mm256_castsi256_si128(x), upper, 0xaa));
    }
  }

  // Sums wrap modulo 2^32 on the way; the result does not overflow (portable/dot.h).
  template <int R>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, int octets, const std::uint8_t* operands,
                                      std::size_t operand_stride, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums) {
    const __m256i nibble = _mm256_set1_epi16(15);
    for (int half = 0; half < 2; ++half, codes += 32) {
      __m256i acc[R];
      KV4_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = _mm256_set1_epi32(start[r * start_stride]);
      const std::uint8_t* operand = operands;
      for (int o = 0; o < octets; ++o, operand += 16) {
        if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(next + o * 64), _MM_HINT_T0);
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + o * 64));
        step<R>(acc, _mm256_and_si256(w, nibble), table, operand, operand_stride);
        step<R>(acc, _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), table, operand + 4, operand_stride);
        step<R>(acc, _mm256_and_si256(_mm256_srli_epi16(w, 8), nibble), table, operand + 8, operand_stride);
        step<R>(acc, _mm256_srli_epi16(w, 12), table, operand + 12, operand_stride);
      }
      KV4_UNROLL
      for (int r = 0; r < R; ++r) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16 + half * 8), acc[r]);
    }
  }

 private:
  template <int R>
  static KV4_INLINE void step(__m256i (&acc)[R], __m256i index, const Table& table, const std::uint8_t* operand,
                              std::size_t stride) {
    const __m256i levels = _mm256_shuffle_epi8(table.levels, index);
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, operand + r * stride, 4);
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(levels, _mm256_set1_epi32(pair)));
      // GCC would join the four sums of a row into a tree, whose many parts no longer fit the registers.
      asm("" : "+x"(acc[r]));
    }
  }
};

}  // namespace kv4::cpu::avx2
