// Integer dot products of packed codes, in plain C++. Every other instruction set offers the same names.
#pragma once

#include "cpu/layout.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::portable {

// sum over positions i of v_i L[code_i], for the 16 lanes of a block of layout.h (16 tokens of keys
// or 16 channels of values) and several rows of v. |v_i| <= kLimit.
struct Dot {
  // With at most 512 positions and |L| <= 127, |sum| <= 512 * 32512 * 127 < 2^31. 32512 = 127 * 256
  // is the largest multiple of 256 below 2^15: its upper and lower byte both fit int8 after rounding. Of 8 bits code 0,
  // which sealing never makes, reads as -128: 512 * 32512 * 128 < 2^31 still.
  static constexpr int kLimit = 32512;
  // Float registers that the exact kernel may hold sums in.
  static constexpr int kAccumulators = 8;

  struct Table {
    std::int16_t levels[256];
  };
  static Table table(const Levels& l) {
    Table t;
    if (l.is_trellis()) std::copy_n(l.trellis.data(), 2 * Levels::kStates * l.count(), t.levels);
    else std::copy_n(l.table.data(), l.count(), t.levels);
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

  // sums[r * 16 + lane] = start[r * start_stride] + the dot product over 8 * octets positions of row r, of codes of B
  // bits, whose second plane (layout.h) begins at `more`; octets is even. `next` is prefetched along. An instruction
  // set may take up to kBlocks blocks at once (avx512/dot.h), each some bytes behind the last: the last two parameters.
  static constexpr int kBlocks = 1;
  template <int R, int B, int>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t) {
    constexpr int kFirst = first_plane(B), kSecond = later_plane(B);
    std::int32_t acc[R][16];
    for (int r = 0; r < R; ++r)
      for (int lane = 0; lane < 16; ++lane) acc[r][lane] = start[r * start_stride];
    unsigned last[4][16] = {};  // of a trellis, the codes before
    for (int o = 0; o < octets; o += 2) {
      for (int b = 0; b < step_bytes(kFirst); b += 64) __builtin_prefetch(next + b);
      std::int16_t levels[16][16];
      for (int i = 0; i < 16; ++i) {
        for (int lane = 0; lane < 16; ++lane) {
          unsigned code = read<kFirst>(codes, lane, i);
          if constexpr (kSecond > 0) code |= read<kSecond>(more, lane, i) << kFirst;
          if constexpr (is_trellis(B)) {
            const int place = i / 4;
            const int state = Levels::next_state(bits_of(B), place + 1, static_cast<int>(last[i % 4][lane]));
            last[i % 4][lane] = code;
            code += static_cast<unsigned>((place % 2 * Levels::kStates + state) << bits_of(B));
          }
          levels[i][lane] = table.levels[code];
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) {
          std::int16_t v[8];
          std::memcpy(v, operands + ((o + half) * R + r) * kOctetBytes, sizeof v);
          for (int i = 0; i < 8; ++i)
            for (int lane = 0; lane < 16; ++lane) acc[r][lane] += levels[8 * half + i][lane] * v[i];
        }
      }
      codes += step_bytes(kFirst);
      next += step_bytes(kFirst);
      more += step_bytes(kSecond);
    }
    std::memcpy(sums, acc, sizeof acc);
  }

 private:
  template <int kPlane>
  static unsigned read(const std::uint8_t* plane, int lane, int position) {
    const Nibble at = plane_place(kPlane, 0, lane, position, kStepPositions);
    return plane[at.byte] >> at.shift & ((1u << kPlane) - 1);
  }
};

}  // namespace kv4::cpu::portable
