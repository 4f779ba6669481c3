// Integer dot products of packed codes for AVX-VNNI (the names are described in portable/dot.h).
//
// Per 8 lanes and 8 positions: 1 load, 1 shift, 2 ands and 2 vpshufb unpack the nibbles, then each row takes 4
// vpdpbusd from memory: 6 + 4 R instructions, where AVX2 alone takes 11 + 8 R. vpdpbusd runs at 2 a cycle on
// Alder Lake's large cores and on Zen 5, and binds from R = 2 on. Counted, not measured.
//
// v = 256 h + l with h and l in int8; levels are offset by -L[0] to be the unsigned operand. The offset
// leaves through start().
#pragma once

#include "cpu/avx2/dot.h"

namespace kv4::cpu::avxvnni {

// AVX2's table, limits and bytes of an operand.
struct Dot : avx2::Dot {
  // Each 8 positions: four registers, each one word of four bytes repeated: h of positions 0 to 3 and 4 to 7, l alike.
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    const __m256i bytes = _mm256_broadcastsi128_si256(order);
    for (int o = 0; o < 2; ++o, operand += octet_stride) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 8 * o));
      const __m256i h = _mm256_srai_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(128)), 8);
      __m256i* to = reinterpret_cast<__m256i*>(operand);
      // The lowest byte of each word, four words of a half to every word of that half; then each half to both.
      const __m256i high = _mm256_shuffle_epi8(h, bytes), low = _mm256_shuffle_epi8(x, bytes);
      _mm256_store_si256(to, _mm256_permute2x128_si256(high, high, 0x00));
      _mm256_store_si256(to + 1, _mm256_permute2x128_si256(high, high, 0x11));
      _mm256_store_si256(to + 2, _mm256_permute2x128_si256(low, low, 0x00));
      _mm256_store_si256(to + 3, _mm256_permute2x128_si256(low, low, 0x11));
    }
  }

  // (high << 8) + low + start wraps modulo 2^32; the result does not overflow (portable/dot.h).
  // high and low themselves stay below 512 * 255 * 128 < 2^25.
  template <int R, int B, int>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t) {
    // Two sums a row: from six rows on they no longer fit the registers together with what unpacking takes.
    if constexpr (R > 5) {
      constexpr int kFirst = R / 2;
      part<R, B, 0, kFirst>(codes, more, octets, operands, start, start_stride, table, next, sums);
      part<R, B, kFirst, R>(codes, more, octets, operands, start, start_stride, table, codes, sums);
    } else {
      part<R, B, 0, R>(codes, more, octets, operands, start, start_stride, table, next, sums);
    }
  }

 private:
  // Rows [kBegin, kEnd) of R.
  template <int R, int B, int kBegin, int kEnd>
  static KV4_INLINE void part(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                              const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                              const Table& table, const std::uint8_t* next, std::int32_t* sums) {
    using Steps = kv4::cpu::Steps<B, true>;
    constexpr int kRows = kEnd - kBegin;
    avx2::Unpack<B> unpack(table);
    for (int half = 0; half < 2; ++half) {
      __m256i high[kRows], low[kRows];
      KV4_UNROLL
      for (int r = 0; r < kRows; ++r) high[r] = low[r] = _mm256_setzero_si256();
      const std::uint8_t* operand = operands + kBegin * kOctetBytes;
      unpack.begin(half);
      for (int o = 0; o < octets; o += Steps::kOctets) {
        if (half == 0) Steps::prefetch(next, more - codes, o);
        unpack.load(Steps::first(codes, o), Steps::second(more, o));
        octet(high, low, unpack.template bytes<0>(), unpack.template bytes<1>(), operand);
        if constexpr (Steps::kOctets == 2)
          octet(high, low, unpack.template bytes<2>(), unpack.template bytes<3>(), operand + R * kOctetBytes);
        operand += Steps::kOctets * R * kOctetBytes;
      }
      KV4_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[r], 8), low[r]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + (kBegin + r) * 16 + half * 8),
                            _mm256_add_epi32(sum, _mm256_set1_epi32(start[(kBegin + r) * start_stride])));
      }
    }
  }
  template <int kRows>
  static KV4_INLINE void octet(__m256i (&high)[kRows], __m256i (&low)[kRows], __m256i first, __m256i second,
                               const std::uint8_t* operand) {
    KV4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256i* v = reinterpret_cast<const __m256i*>(operand + r * kOctetBytes);
      high[r] = _mm256_dpbusd_avx_epi32(high[r], first, _mm256_load_si256(v));
      high[r] = _mm256_dpbusd_avx_epi32(high[r], second, _mm256_load_si256(v + 1));
      low[r] = _mm256_dpbusd_avx_epi32(low[r], first, _mm256_load_si256(v + 2));
      low[r] = _mm256_dpbusd_avx_epi32(low[r], second, _mm256_load_si256(v + 3));
    }
  }
};

}  // namespace kv4::cpu::avxvnni
