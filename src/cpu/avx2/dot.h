// Integer dot products of packed codes for AVX2 (the names are described in portable/dot.h).
//
// Per 8 lanes and 8 positions: 1 load, 3 shifts, 3 ands and 4 vpshufb unpack the nibbles, then each row
// takes 4 vpmaddwd from memory and 4 vpaddd: 11 + 8 R instructions. Zen 3 starts 4 vector instructions a cycle,
// 2 of them vpmaddwd, and 2 loads: its vector pipes bind, (10 + 8 R) / 4 cycles. Measured: within 12 % of it from
// R = 4 on, 22 to 50 % above it below, where loads of operands wait for the loop's start.
//
// A 16-bit lane holds two code bytes; each nibble becomes an index whose upper byte is 0. Levels are
// offset by -L[0], so that index 0 reads 0: one shuffle yields 8 dwords of two 16-bit levels and no
// sign extension is needed. The offset leaves through start().
#pragma once

#include <immintrin.h>

#include "cpu/avx2/unpack.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::avx2 {

struct Dot {
  static constexpr int kLimit = 32512;
  static constexpr int kBlocks = 1;
  static constexpr int kAccumulators = 12;

  using Table = LevelTable;  // L[n] - L[0], 0 ... 254
  static KV4_INLINE Table table(const Levels& l) { return level_table(l, l.table[0]); }
  // Modulo 2^32, as all sums: scales of a damaged page, negative or NaN, make integers beyond kLimit.
  static KV4_INLINE std::int32_t start(const Levels& l, std::int32_t sum) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(l.table[0]) * static_cast<std::uint32_t>(sum));
  }

  // Pairs of int16, each repeated over a register: positions (0, 2), (4, 6), (1, 3), (5, 7) of each 8, the
  // order in which block() unpacks. A memory operand of vpmaddwd then needs no broadcast of its own.
  static constexpr int kOctetBytes = 128;
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    for (int o = 0; o < 2; ++o, operand += octet_stride) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 8 * o));
      const __m256i pairs = _mm256_blend_epi16(x, _mm256_slli_epi32(_mm256_bsrli_epi128(x, 8), 16), 0xaa);
      const __m256i low = _mm256_permute2x128_si256(pairs, pairs, 0x00);
      const __m256i high = _mm256_permute2x128_si256(pairs, pairs, 0x11);
      __m256i* to = reinterpret_cast<__m256i*>(operand);
      _mm256_store_si256(to, _mm256_shuffle_epi32(low, 0x00));
      _mm256_store_si256(to + 1, _mm256_shuffle_epi32(high, 0x00));
      _mm256_store_si256(to + 2, _mm256_shuffle_epi32(low, 0x55));
      _mm256_store_si256(to + 3, _mm256_shuffle_epi32(high, 0x55));
    }
  }

  // Sums wrap modulo 2^32 on the way; the result does not overflow (portable/dot.h).
  template <int R, int B, int>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t) {
    using Steps = kv4::cpu::Steps<B, true>;
    // With few rows the latency of the additions binds: each row then has several sums.
    constexpr int kChains = R == 1 ? 4 : R <= 3 ? 2 : 1;
    Pairs<B> pairs(table);
    for (int half = 0; half < 2; ++half) {
      __m256i acc[kChains][R];
      KV4_UNROLL
      for (int c = 0; c < kChains; ++c) {
        KV4_UNROLL
        for (int r = 0; r < R; ++r) acc[c][r] = c == 0 ? _mm256_set1_epi32(start[r * start_stride]) : __m256i{};
      }
      const std::uint8_t* operand = operands;
      pairs.begin(half);
      for (int o = 0; o < octets; o += Steps::kOctets) {
        if (half == 0) Steps::prefetch(next, more - codes, o);
        pairs.load(Steps::first(codes, o), Steps::second(more, o));
        octet<0>(acc, pairs, operand);
        if constexpr (Steps::kOctets == 2) octet<1>(acc, pairs, operand + R * kOctetBytes);
        operand += Steps::kOctets * R * kOctetBytes;
      }
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        __m256i sum = acc[0][r];
        KV4_UNROLL
        for (int c = 1; c < kChains; ++c) sum = _mm256_add_epi32(sum, acc[c][r]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16 + half * 8), sum);
      }
    }
  }

 private:
  template <int kOctet, int kChains, int R, class Pairs>
  static KV4_INLINE void octet(__m256i (&acc)[kChains][R], Pairs& pairs, const std::uint8_t* operand) {
    step(acc[0], pairs.template levels<4 * kOctet>(), operand);
    step(acc[1 % kChains], pairs.template levels<4 * kOctet + 1>(), operand + 32);
    step(acc[2 % kChains], pairs.template levels<4 * kOctet + 2>(), operand + 64);
    step(acc[3 % kChains], pairs.template levels<4 * kOctet + 3>(), operand + 96);
  }
  template <int R>
  static KV4_INLINE void step(__m256i (&acc)[R], __m256i levels, const std::uint8_t* operand) {
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(operand + r * kOctetBytes));
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(levels, pairs));
      // GCC would join the four sums of a row into a tree, whose many parts no longer fit the registers.
      asm("" : "+x"(acc[r]));
    }
  }
};

}  // namespace kv4::cpu::avx2
