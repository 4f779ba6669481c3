// The levels of a side as kernels look them up. Included in a target region.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/layout.h"
#include "cpu/target.h"
#include "recipe/levels.h"

namespace kv4::cpu {

// By the low six bits of an index: tables of fewer repeat, so that a shuffle of 16, 32 or 64 entries finds a code
// whatever stands above it. Codes of 8 bits need no table: they are 128 more than their levels.
struct alignas(64) LevelTable {
  std::uint8_t levels[64];
  // Of a trellis of 4 bits levels[] is for even places, by 16 state + code, and these are for odd ones; the second by 4
  // code + state, as the byte that holds a code and the one before it has them from bit 2 on. One of 3 bits has
  // levels[8 state + code], one of 2 bits levels[4 code + state].
  std::uint8_t odd[64], odd_by_byte[64];
};

inline int coding_of(const Levels& l) { return l.is_trellis() ? kTrellis + l.bits : l.bits; }

// Levels less `offset`.
KV4_INLINE LevelTable level_table(const Levels& l, std::int8_t offset) {
  LevelTable t;
  if (l.bits == 8) return t;
  if (l.is_trellis()) {
    const int pairs = Levels::kStates * l.count();
    for (int i = 0; i < 64; ++i) {
      const int pair = i % pairs, count = l.count();
      const auto level = [&](int place, int state, int code) {
        return static_cast<std::uint8_t>(l.level(place, state, code) - offset);
      };
      t.levels[i] = l.bits == 2 ? level(0, pair % 4, pair / 4) : level(0, pair / count, pair % count);
      t.odd[i] = level(1, pair / count, pair % count);
      t.odd_by_byte[i] = level(1, pair % 4, pair / 4);
    }
    return t;
  }
  const int count = l.bits == 6 ? 64 : 16, mask = l.count() - 1;
  for (int n = 0; n < count; ++n) t.levels[n] = static_cast<std::uint8_t>(l.table[n & mask] - offset);
  for (int n = count; n < 64; n += 16) std::memcpy(t.levels + n, t.levels, 16);
  return t;
}

}  // namespace kv4::cpu
