// The levels of a recipe's sides as kernels use them.
#pragma once

#include <array>
#include <cstdint>

#include "kv4/recipe.h"

namespace kv4 {

// A table of 16 int8 levels in ascending order, in the form the kernels use it:
// magnitude[i] >= 0 ascending; with z = |2 y| the magnitude index is the number of
// twice_threshold[] <= z. code = 8 + i for y >= 0, negative_base - i for y < 0.
struct Levels {
  std::array<std::int8_t, 16> table;
  std::array<std::uint8_t, 8> magnitude;
  std::array<std::uint8_t, 7> twice_threshold;  // 2 * midpoint of neighbouring magnitudes: exact integers
  int spread;         // twice_threshold[] * 2^spread stay below 256, no two in the same sixteenth of it
  int negative_base;  // 7: mid-rise (no zero level); 8: mid-tread (code 0 is never made; it reads as code 1)
  float gain;         // least_squares: codes are the nearest levels to gain * x / rms(x)
};
const Levels& levels(LevelKind kind);

}  // namespace kv4
