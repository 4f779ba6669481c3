// Integer dot products of packed codes for AVX-512 VNNI (the names are described in portable/dot.h).
//
// Per 16 lanes and 8 positions: 1 load, 1 shift, 2 ands and 2 vpshufb unpack the nibbles, then each row takes 4
// vpdpbusd, and 2 where v is a byte. Two blocks of 16 lanes share the loads of v: vpbroadcastd, half as many loads
// as products, where a broadcast operand of each product would take as many. vpdpbusd runs at 2 a cycle on Zen 5
// (measured, 512 bits, with 2 loads a cycle) and Sapphire Rapids (ports 0 and 5, which vpshufb shares) and at 1 a
// cycle on Zen 4, so it binds from R = 2 on. At 6 rows of d = 128 a token takes, on Zen 5, 24 cycles of products,
// by samples 23 with unpacking, and 12 with bytes. ns per token of one thread at 4,096 tokens, by turns: one
// block at a time 11.3, two 9.9, bytes 6.9; 7 rows of d = 64 8.1, 7.1, 5.2.
//
// v = 256 h + l with h and l in int8; levels are offset by -L[0] to be the unsigned operand. The offset leaves through
// start().
#pragma once

#include <immintrin.h>

#include "cpu/avx512/unpack.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::avx512 {

// Unpack: unpack.h's, or that of an instruction set that adds to this one. kHalves 1: v is a byte. kWeights: one
// without a sign, and the levels are the signed operand.
template <template <int> class Unpack, int kHalves, bool kWeights = false>
struct Products {
  static constexpr int kLimit = kHalves == 2 ? 32512 : kWeights ? 255 : 127;
  static constexpr int kAccumulators = 24;
  static constexpr int kOctetBytes = 8 * kHalves;

  using Table = LevelTable;  // L[n] - L[0], 0 ... 254; of weights L[n]
  static KV4_INLINE Table table(const Levels& l) { return level_table(l, kWeights ? std::int8_t{0} : l.table[0]); }
  // Modulo 2^32, as all sums: scales of a damaged page, negative or NaN, make integers beyond kLimit.
  static KV4_INLINE std::int32_t start(const Levels& l, std::int32_t sum) {
    if (kWeights) return 0;
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(l.table[0]) * static_cast<std::uint32_t>(sum));
  }

  // Each 8 positions: 8 bytes of h, then 8 bytes of l.
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    if constexpr (kHalves == 1) {
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_loadu_si512(v));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(operand), bytes);
      _mm_storeh_pd(reinterpret_cast<double*>(operand + octet_stride), _mm_castsi128_pd(bytes));
      return;
    }
    const __m256i x = _mm512_cvtepi32_epi16(_mm512_loadu_si512(v)), upper = _mm256_set1_epi16(-256);
    // h in the upper byte of each word, l in the lower.
    const __m256i bytes = _mm256_ternarylogic_epi32(upper, _mm256_add_epi16(x, _mm256_set1_epi16(128)), x, 0xca);
    const __m128i order = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i octets = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(operand), _mm256_castsi256_si128(octets));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(operand + octet_stride), _mm256_extracti128_si256(octets, 1));
  }

  // N <= kBlocks blocks of 16 lanes, each `stride` bytes of the first plane behind the last; sums[(r * N + n) * 16 +
  // lane]. (high << 8) + low + start wraps modulo 2^32; the result does not overflow (portable/dot.h). high and low
  // themselves stay below 512 * 255 * 128 < 2^25.
  static constexpr int kBlocks = 2;
  template <int R, int B, int N>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums,
                                      std::size_t stride) {
    // Sums for each row, block and half: those of more rows than kMost do not fit the registers.
    constexpr int kMost = 24 / (N * kHalves);
    if constexpr (R > kMost) {
      part<R, B, N, 0, R / 2>(codes, more, octets, operands, start, start_stride, table, next, sums, stride);
      part<R, B, N, R / 2, R>(codes, more, octets, operands, start, start_stride, table, codes, sums, stride);
    } else {
      part<R, B, N, 0, R>(codes, more, octets, operands, start, start_stride, table, next, sums, stride);
    }
  }

 private:
  typedef std::int32_t Word __attribute__((may_alias));

  // Rows [kBegin, kEnd) of R.
  template <int R, int B, int N, int kBegin, int kEnd>
  static KV4_INLINE void part(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                              const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                              const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t stride) {
    using Steps = kv4::cpu::Steps<B, true>;
    constexpr int kRows = kEnd - kBegin;
    // With few rows the latency of vpdpbusd binds: the two halves of an octet then have sums of their own.
    constexpr int kChains = kRows * N * kHalves <= 8 ? 2 : 1;
    __m512i sum[kHalves][kChains][kRows][N];
    KV4_UNROLL
    for (int c = 0; c < kChains; ++c) {
      KV4_UNROLL
      for (int r = 0; r < kRows; ++r) {
        KV4_UNROLL
        for (int n = 0; n < N; ++n) {
          KV4_UNROLL
          for (int h = 0; h < kHalves; ++h) sum[h][c][r][n] = _mm512_setzero_si512();
          if (c == 0) sum[kHalves - 1][c][r][n] = _mm512_set1_epi32(start[(kBegin + r) * start_stride]);
        }
      }
    }
    const std::uint8_t* operand = operands + kBegin * kOctetBytes;
    Unpack<B> unpack[N];
    KV4_UNROLL
    for (int n = 0; n < N; ++n) unpack[n] = Unpack<B>(table);
    // Blocks that lie behind each other are prefetched as one run: by turns in two, each 1 KiB from the other, memory
    // delivers a third less (Zen 5, 2 rows of d = 128 from memory: 8.4 and 4.8 ns a token).
    const bool one_run = stride == static_cast<std::size_t>(octets / Steps::kOctets * Steps::kFirst);
    for (int o = 0; o < octets; o += Steps::kOctets) {
      KV4_UNROLL
      for (int n = 0; n < N; ++n) {
        if constexpr (kBegin == 0) {
          if (one_run) Steps::prefetch(next, more - codes, o * N + n * Steps::kOctets);
          else Steps::prefetch(next + n * stride, more - codes - static_cast<std::ptrdiff_t>(n * stride / 2), o);
        }
        unpack[n].load(Steps::first(codes + n * stride, o), Steps::second(more + n * stride / 2, o));
      }
      half<0, 0>(sum, unpack, operand);
      half<1, kChains - 1>(sum, unpack, operand + 4);
      if constexpr (Steps::kOctets == 2) {
        half<2, 0>(sum, unpack, operand + R * kOctetBytes);
        half<3, kChains - 1>(sum, unpack, operand + R * kOctetBytes + 4);
      }
      operand += Steps::kOctets * R * kOctetBytes;
    }
    KV4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      KV4_UNROLL
      for (int n = 0; n < N; ++n) {
        const auto joined = [&](int h) KV4_INLINE_LAMBDA {
          return kChains == 1 ? sum[h][0][r][n] : _mm512_add_epi32(sum[h][0][r][n], sum[h][kChains - 1][r][n]);
        };
        __m512i all = joined(kHalves - 1);
        if constexpr (kHalves == 2) all = _mm512_add_epi32(_mm512_slli_epi32(joined(0), 8), all);
        _mm512_storeu_si512(sums + ((kBegin + r) * N + n) * 16, all);
      }
    }
  }

  // Half i of the octets at hand: four positions.
  template <int i, int kChain, int kChains, int kRows, int N, int B>
  static KV4_INLINE void half(__m512i (&sum)[kHalves][kChains][kRows][N], const Unpack<B> (&unpack)[N],
                              const std::uint8_t* operand) {
    __m512i levels[N];
    KV4_UNROLL
    for (int n = 0; n < N; ++n) levels[n] = unpack[n].template bytes<i>();
    KV4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      KV4_UNROLL
      for (int h = 0; h < kHalves; ++h) add_products(sum[h][kChain][r], levels, operand + r * kOctetBytes + h * 8);
    }
  }

  // sum_i levels_4l+i v_i into each lane l: _mm512_dpbusd_epi32 with the four bytes at v in every lane. The intrinsic
  // costs GCC 12 a broadcast and two moves of registers per product. Several blocks share a load of v.
  template <int N>
  static KV4_INLINE void add_products(__m512i (&sum)[N], const __m512i (&levels)[N], const std::uint8_t* v) {
    const Word& word = *reinterpret_cast<const Word*>(v);
    if constexpr (N == 1 && !kWeights) {
      asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[0]) : "v"(levels[0]), "m"(word));
    } else {
      __m512i repeated;
      asm("vpbroadcastd %1, %0" : "=v"(repeated) : "m"(word));
      KV4_UNROLL
      for (int n = 0; n < N; ++n) {
        if constexpr (kWeights) asm("vpdpbusd %2, %1, %0" : "+v"(sum[n]) : "v"(repeated), "v"(levels[n]));
        else asm("vpdpbusd %2, %1, %0" : "+v"(sum[n]) : "v"(levels[n]), "v"(repeated));
      }
    }
  }
};

template <template <int> class Unpack>
struct DotOf : Products<Unpack, 2> {
  // Where bytes are enough (attend_pages.inl).
  using ByteKeys = Products<Unpack, 1>;
  using ByteWeights = Products<Unpack, 1, true>;
};
using Dot = DotOf<Unpack>;

}  // namespace kv4::cpu::avx512
