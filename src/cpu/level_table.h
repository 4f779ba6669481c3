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
  // Of a trellis levels[] is for even places, by 16 state + code, and this for odd ones; the second of them by 4 code +
  // state, as the byte that holds a code and the one before it has them from bit 2 on.
  std::uint8_t odd[64], odd_by_byte[64];
};

inline int coding_of(const Levels& l) { return l.is_trellis() ? kTrellis : l.bits; }

// Levels less `offset`.
KV4_INLINE LevelTable level_table(const Levels& l, std::int8_t offset) {
  LevelTable t;
  if (l.bits == 8) return t;
  if (l.is_trellis()) {
    for (int state = 0; state < Levels::kStates; ++state)
      for (int code = 0; code < 16; ++code) {
        const auto level = [&](int place) { return static_cast<std::uint8_t>(l.level(place, state, code) - offset); };
        t.levels[16 * state + code] = level(0);
        t.odd[16 * state + code] = t.odd_by_byte[4 * code + state] = level(1);
      }
    return t;
  }
  const int count = l.bits == 6 ? 64 : 16, mask = l.count() - 1;
  for (int n = 0; n < count; ++n) t.levels[n] = static_cast<std::uint8_t>(l.table[n & mask] - offset);
  for (int n = count; n < 64; n += 16) std::memcpy(t.levels + n, t.levels, 16);
  return t;
}

}  // namespace kv4::cpu
