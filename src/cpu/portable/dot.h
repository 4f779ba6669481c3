// Integer dot products of packed codes, in plain C++. Every other instruction set offers the same names.
#pragma once

#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::portable {

// sum over positions i of v_i L[code_i], for the 16 lanes of a block of layout.h (16 tokens of keys
// or 16 channels of values) and several rows of v. |v_i| <= kLimit.
struct Dot {
  // With at most 512 positions and |L| <= 127, |sum| <= 512 * 32512 * 127 < 2^31. 32512 = 127 * 256
  // is the largest multiple of 256 below 2^15: its upper and lower byte both fit int8 after rounding.
  static constexpr int kLimit = 32512;
  // Float registers that the exact kernel may hold sums in.
  static constexpr int kAccumulators = 8;

  struct Table {
    std::int16_t levels[16];
  };
  static Table table(const Levels& l) {
    Table t;
    for (int n = 0; n < 16; ++n) t.levels[n] = l.table[n];
    return t;
  }
  // What sums must start from when the table is offset; `sum` is the sum of v.
  static std::int32_t start(const Levels&, std::int32_t) { return 0; }

  // Operands of the R rows that block<R> takes lie octet by octet, 8 positions of each row in turn:
  // those of octet o and row r at (o * R + r) * kOctetBytes.
  static constexpr int kOctetBytes = 16;
  // 16 positions of v, two octets; octet_stride = R * kOctetBytes.
  static void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    for (int o = 0; o < 2; ++o) {
      std::int16_t h[8];
      for (int i = 0; i < 8; ++i) h[i] = static_cast<std::int16_t>(v[8 * o + i]);
      std::memcpy(operand + o * octet_stride, h, sizeof h);
    }
  }

  // sums[r * 16 + lane] = start[r * start_stride] + the dot product over 8 * octets positions of row r.
  // `next` is prefetched along.
  template <int R>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, int octets, const std::uint8_t* operands,
                                      const std::int32_t* start, std::size_t start_stride, const Table& table,
                                      const std::uint8_t* next, std::int32_t* sums) {
    std::int32_t acc[R][16];
    for (int r = 0; r < R; ++r)
      for (int lane = 0; lane < 16; ++lane) acc[r][lane] = start[r * start_stride];
    for (int o = 0; o < octets; ++o, codes += 64) {
      __builtin_prefetch(next + o * 64);
      std::int16_t levels[8][16];
      for (int lane = 0; lane < 16; ++lane) {
        for (int i = 0; i < 4; ++i) {
          levels[i][lane] = table.levels[codes[lane * 4 + i] & 15];
          levels[4 + i][lane] = table.levels[codes[lane * 4 + i] >> 4];
        }
      }
      for (int r = 0; r < R; ++r) {
        std::int16_t v[8];
        std::memcpy(v, operands + (o * R + r) * kOctetBytes, sizeof v);
        for (int i = 0; i < 8; ++i)
          for (int lane = 0; lane < 16; ++lane) acc[r][lane] += levels[i][lane] * v[i];
      }
    }
    std::memcpy(sums, acc, sizeof acc);
  }
};

}  // namespace kv4::cpu::portable
