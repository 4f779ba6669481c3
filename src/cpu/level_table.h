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
};

// Levels less `offset`.
KV4_INLINE LevelTable level_table(const Levels& l, std::int8_t offset) {
  LevelTable t;
  if (l.bits == 8) return t;
  const int count = l.bits == 6 ? 64 : 16, mask = l.count() - 1;
  for (int n = 0; n < count; ++n) t.levels[n] = static_cast<std::uint8_t>(l.table[n & mask] - offset);
  for (int n = count; n < 64; n += 16) std::memcpy(t.levels + n, t.levels, 16);
  return t;
}

}  // namespace kv4::cpu
