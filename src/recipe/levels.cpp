// The level tables.
//
// lloyd_max: the optimal 16-level quantiser of a unit Gaussian has the levels +-{0.1284, 0.3881, 0.6568,
// 0.9424, 1.2562, 1.6181, 2.0690, 2.7326} (S. Lloyd, Least squares quantization in PCM, IEEE Trans. IT 28,
// 1982; J. Max, Quantizing for minimum distortion, IRE Trans. IT 6, 1960, table I). The gain 46.48 puts
// the outermost at 127, the largest int8; the others round to the magnitudes below.
//
// uniform: the gain is 1 / r, r = 0.35341 the step that minimises the mean squared error of a uniform
// 15-level quantiser of a unit Gaussian (Max 1960, table II, N = 15).
#include "recipe/levels.h"

namespace kv4 {
namespace {

constexpr Levels make_levels(const std::array<std::uint8_t, 8>& magnitude, int negative_base, int spread, float gain) {
  Levels l{};
  l.magnitude = magnitude;
  l.negative_base = negative_base;
  l.spread = spread;
  l.gain = gain;
  for (int i = 0; i < 7; ++i) l.twice_threshold[i] = static_cast<std::uint8_t>(magnitude[i] + magnitude[i + 1]);
  for (int i = 0; i < 8; ++i) {
    l.table[8 + i] = static_cast<std::int8_t>(magnitude[i]);
    const int code = negative_base - i;
    // Mid-tread: i = 0 is the code 8 again and keeps its level 0.
    if (code < 8) l.table[code] = static_cast<std::int8_t>(-magnitude[i]);
  }
  // Mid-tread leaves code 0 unused by sealing; it reads as the lowest level.
  if (negative_base == 8) l.table[0] = l.table[1];
  return l;
}

// No two thresholds, times 2^spread, may share a sixteenth of 0 ... 255: sealing looks them up by it.
constexpr bool spread_fits(const Levels& l) {
  for (int i = 0; i < 7; ++i) {
    if ((l.twice_threshold[i] << l.spread) > 255) return false;
    if (i > 0 && (l.twice_threshold[i] << l.spread) / 16 == (l.twice_threshold[i - 1] << l.spread) / 16) return false;
  }
  return true;
}

constexpr Levels kLloydMax = make_levels({6, 18, 31, 44, 58, 75, 96, 127}, 7, 0, 46.48f);
constexpr Levels kUniform = make_levels({0, 1, 2, 3, 4, 5, 6, 7}, 8, 4, 2.829564f);
static_assert(spread_fits(kLloydMax) && spread_fits(kUniform));

}  // namespace

const Levels& levels(LevelKind kind) { return kind == LevelKind::uniform ? kUniform : kLloydMax; }

}  // namespace kv4
