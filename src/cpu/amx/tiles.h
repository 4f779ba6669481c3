// The matrix unit of AMX-INT8: eight tile registers of 16 rows of 64 bytes. Included in a target region.
//
// Measured on Emerald Rapids, cycles: an 8-row product 10, a 16-row one 16, 52 to its result; a levels' tileloadd with
// its product 16, whatever the rows; tilestored 14 to 16, whatever the rows, and not beside loads. Unpacking a tile: 16
// stores, 20 from codes in L1, 29 from L2. What was stored just before a tileloadd delays it: unpacked and multiplied
// by turns a tile takes 77 where it is multiplied right after its own stores, 39, 26 and 21 where one, two and three
// tiles are unpacked in between, and 21 from four on: one is then done beside the other. So pieces of four tiles are
// unpacked one ahead (matrix_levels.inl).
//
// Instructions for a page of 64 tokens at d = 128, stepped through one by one: what a version took that multiplied only
// what it had unpacked, a page to a softmax from 5 rows on and two to 4, on the vector unit to 2 rows; and now
//
//   rows              1       2       4       6       8
//   before        3,509   4,554   4,017   5,408   6,430
//   now           2,378   2,641   3,113   3,560   4,306
//
// of which 1,180 unpack and multiply (16 tiles: 8 loads, 16 vpermb, 8 shifts, 16 stores, 8 prefetches, 18 more each).
//
// Whole, ns per token of one thread, by turns with that version, its time first. The core's other hardware thread was
// a stranger's: free, it left the matrix unit alone; shared, it used it too, which took a load and its product from 6
// ns to 20 or 30.
//
//   rows            1         2          3          4           6            8            64
//   free        6.2  5.0   8.2  5.9   7.2  6.7   7.9  7.6   10.5  9.6   12.9  11.1    88   88
//   shared      8.5  9.1  11.1 10.3  16.1 11.2  16.9 12.2   22.4 14.9   24.9  17.2   177  138
//
// from L2; from memory on two threads, in one mixture of both, 4 rows 10.5 and 7.0, 6 rows 13.4 and 8.6; 1 and 2 rows,
// free, 4.2 and 3.8, 4.9 and 4.1; shared, 5.7 and 5.8, 6.8 and 7.1.
//
// What binds at 6 rows, by leaving parts out: tiles without vectors take 7 ns, vectors without tiles 5. Their sum was
// what all took; beside each other they take 10. Of the 7, unpacking is 3, stores of sums 1, prefetching 1. Memory asks
// for 136 bytes a token: 6.8 ns a thread at the 20 GB/s that each of two reads here.
//
// Versions tried (6 rows): h and l in products of their own; levels of the whole page first: no faster, and at 8 rows
// 1.3 times as long where its buffers lay 4 KiB apart. Unpacking right before each load: 1.5 times. Prefetching one
// line of each two and leaving the other to the processor: 8 to 15 % slower from memory. Two and three pages to a
// softmax in place of four: 3 and 1 % slower; where tiles share a page's levels 8 and 25 %. A piece handed over by
// value: 20 % slower. As many sums in the vector kernel for two octets as for one, to hide vpdpbusd's latency: 3 %
// faster at one row, as much slower at two.
//
// The instructions are written as assembly: GCC's intrinsics do not say that they touch memory.
#pragma once

#include <immintrin.h>

#include "cpu/avx512vbmi/unpack.h"
#include "cpu/attend.h"
#include "cpu/target.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::amx {

struct Tiles {
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

  // 64 integers as 256 h + l: 64 bytes of h and 64 of l, a store each. Unsigned ones are at most 65535, signed ones
  // 32512 in magnitude, and so are their halves.
  template <bool kUnsigned>
  static KV4_INLINE void split(const I (&v)[4], std::int8_t* high, std::int8_t* low) {
    // Packing goes by quarters of a register: word 4 q + i holds bytes of quarter q of v[i].
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i byte = _mm512_set1_epi16(255);
    __m512i a, b, h;
    if constexpr (kUnsigned) {
      a = _mm512_packus_epi32((__m512i)v[0], (__m512i)v[1]);
      b = _mm512_packus_epi32((__m512i)v[2], (__m512i)v[3]);
      h = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    } else {
      const __m512i half = _mm512_set1_epi16(128);
      a = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
      b = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
      h = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                             _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
    }
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
      const __m512i levels = avx512vbmi::whole512(table);
      KV4_UNROLL
      for (int i = 0; i < 2; ++i) {
        const __m512i w = _mm512_loadu_si512(codes + 64 * i);
        _mm512_storeu_si512(to + 128 * i, _mm512_permutexvar_epi8(w, levels));
        _mm512_storeu_si512(to + 128 * i + 64, _mm512_permutexvar_epi8(_mm512_srli_epi16(w, 4), levels));
      }
    } else {
      avx512vbmi::Unpack<B> unpack(table);
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
  // sums[m][n], int32, += the sum over k < 16 and i < 4 of rows[m][4 k + i] levels[k][4 n + i], all int8 but rows that
  // are unsigned.
  template <bool kUnsigned, int kSums, int kRows, int kLevels>
  static KV4_INLINE void multiply() {
    if constexpr (kUnsigned)
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kLevels));
    else asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kLevels));
  }
};

}  // namespace kv4::cpu::amx
