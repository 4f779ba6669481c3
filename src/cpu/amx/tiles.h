// The matrix unit of AMX-INT8: eight tile registers of 16 rows of 64 bytes. Included in a target region.
//
// Measured on Emerald Rapids (2.9 GHz), cycles: an 8-row tdpbssd 10, a 16-row one 16; a levels' tileloadd with its
// tdpbssd 16, whatever the rows; tilestored 14 to 16, whatever the rows, and not beside loads; what is stored reaches a
// tileloadd after some 75, through L1 only, and what a tileloadd's address merely resembles (its low 12 bits) delays it
// too. A page of 64 tokens at d = 128, up to 8 query rows:
//
//                  keys           values         cycles
//   unpacking      64 x 2 stores  64 x 2 stores  326: a store a cycle, a shuffle each
//   load, multiply 8              8              257
//   store sums     4              8              168
//   all three                                    642
//   vectors        36 instructions a row, 206 for softmax, weights, o: about 100 cycles a row
//
// The parts hardly overlap. Whole, from L2, ns per token at 1, 2, 3, 4, 6, 8, 16, 64
// rows: 7.5, 8.3, 7.5, 8.1, 10.4, 12.1, 22, 84 (the first two before pages were taken in pairs); the vectors of
// avx512/dot.h 6.6, 8.5, 11, 13.4, 17.5, 22, 36, 122. So from 3 rows on the matrix unit is faster.
//
// Versions tried (6 rows, ns): h and l in products of their own, levels of the whole page first 11.1, at 8 rows 16.6,
// where its buffers lay 4 KiB apart; 4 KiB of levels at a time 10.9. Products of the next page before this page's
// softmax 16.6 to 17.4: their stores keep the next loads waiting. Unpacking right before each load 15.7. Two pages to a
// softmax at 6 rows 11.1, at 16 to 64 10 to 25 % slower: more than L1 holds beside the rest.
//
// The instructions are written as assembly: GCC's intrinsics do not say that they touch memory.
#pragma once

#include <immintrin.h>

#include "cpu/amx/unpack.h"
#include "cpu/attend.h"
#include "cpu/target.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::amx {

struct Tiles {
  static constexpr int kFewestRows = 3;

  // Registers 0 to 4 as `rows` <= 16 rows of 64 bytes, 5 to 7 as 16, for this thread, until release().
  static KV4_INLINE void configure(int rows) {
    struct alignas(64) Config {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
    Config config;
    for (int i = 0; i < 5; ++i) config.rows[i] = static_cast<std::uint8_t>(rows);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static KV4_INLINE void release() { asm volatile("tilerelease" : : : "memory"); }

  using I = VecTypes<16>::I;

  // 64 integers of at most 32512 as 256 h + l: 64 bytes of h and 64 of l, a store each.
  static KV4_INLINE void split(const I (&v)[4], std::int8_t* high, std::int8_t* low) {
    const __m512i a = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
    const __m512i b = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
    // Packing went by quarters of a register: word 4 q + i holds bytes of quarter q of v[i].
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    const __m512i h = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                         _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
    const __m512i l = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, h));
    _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, l));
  }

  // Levels by their codes: vpermb takes the low six bits of an index, whatever is above the code.
  using Table = LevelTable;
  static KV4_INLINE Table table(const Levels& levels) { return level_table(levels, 0); }
  // A step of 16 positions of 16 lanes (layout.h), `codes` of its first plane and `more` of its second, to 256 bytes of
  // levels, 4 positions in each 64.
  template <int B>
  static KV4_INLINE void unpack(const std::uint8_t* codes, const std::uint8_t* more, const Table& table,
                                std::uint8_t* to) {
    if constexpr (B == 4) {
      const __m512i levels = whole512(table);
      KV4_UNROLL
      for (int i = 0; i < 2; ++i) {
        const __m512i w = _mm512_loadu_si512(codes + 64 * i);
        _mm512_storeu_si512(to + 128 * i, _mm512_permutexvar_epi8(w, levels));
        _mm512_storeu_si512(to + 128 * i + 64, _mm512_permutexvar_epi8(_mm512_srli_epi16(w, 4), levels));
      }
    } else {
      Unpack<B> unpack(table);
      unpack.load(codes, more);
      // Codes of 8 bits are 128 more than their levels.
      const __m512i offset = avx512::byte512(B == 8 ? 0x80 : 0);
      _mm512_storeu_si512(to, _mm512_xor_si512(unpack.template bytes<0>(), offset));
      _mm512_storeu_si512(to + 64, _mm512_xor_si512(unpack.template bytes<1>(), offset));
      _mm512_storeu_si512(to + 128, _mm512_xor_si512(unpack.template bytes<2>(), offset));
      _mm512_storeu_si512(to + 192, _mm512_xor_si512(unpack.template bytes<3>(), offset));
    }
  }

  template <int kTile>
  static KV4_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // 1,024 bytes, row after row.
  template <int kTile>
  static KV4_INLINE void load(const void* p) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(std::int64_t{64}), "i"(kTile) : "memory");
  }
  template <int kTile>
  static KV4_INLINE void store(void* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(std::int64_t{64}), "i"(kTile) : "memory");
  }
  // sums[m][n], int32, += the sum over k < 16 and i < 4 of rows[m][4 k + i] levels[k][4 n + i], all int8.
  template <int kSums, int kRows, int kLevels>
  static KV4_INLINE void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kLevels));
  }
};

}  // namespace kv4::cpu::amx
