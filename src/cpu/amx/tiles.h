// The matrix unit of AMX-INT8: eight tile registers of 16 rows of 64 bytes. Included in a target region.
//
// Cycles of a Sapphire Rapids core per page (64 tokens) and 16 query rows at d = 128, counted, not measured:
//
//                keys                             values                           unit
//   tdpbssd      4 blocks x 2 halves x 2 = 16     8 blocks x 2 halves x 1 = 16     TMUL, 16 cycles each: 512
//   tileloadd    2 pairs x 2 x 4 = 16             4 pairs x 4 = 16                 2 loads a cycle, 8 each: 256
//   tilestored   2 pairs x 4 = 8                  4 pairs x 4 = 16                 1 store a cycle, 16 each: 384
//   vectors      16 x 36 instructions             16 x 206: softmax, weights, o    about 2 a cycle: 1,900
//
// The three units work side by side, so what surrounds the products binds: about 1.9 cycles per token and row. Vectors
// (avx512/dot.h) take 4 for the products and 4 / 8 for unpacking besides, 6.4 together. Unpacking a page to its 16 KiB
// of levels takes some 400 cycles once per task, 0.1 per token and row at 64 rows. TMUL takes 16 cycles whichever part
// of a tile is filled: 9 rows cost it what 16 do, 0.9 cycles per token and row, still less than 4.5. Up to 8 rows one
// unpacking serves the vectors too, and decoding waits for memory either way (8.5 KiB a page at 12 GB/s a core: 2,100
// cycles).
//
// The instructions are written as assembly: GCC's intrinsics do not say that they touch memory.
#pragma once

#include "cpu/attend.h"
#include "cpu/target.h"

namespace kv4::cpu::amx {

struct Tiles {
  static constexpr int kFewestRows = kTileRows + 1;

  // All eight registers as 16 rows of 64 bytes, for this thread, until release().
  static KV4_INLINE void configure() {
    struct alignas(64) Config {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
    const Config config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static KV4_INLINE void release() { asm volatile("tilerelease" : : : "memory"); }

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
