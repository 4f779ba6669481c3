// The level tables.
//
// lloyd_max: the optimal quantisers of a unit Gaussian (S. Lloyd, Least squares quantization in PCM, IEEE Trans. IT 28,
// 1982; J. Max, Quantizing for minimum distortion, IRE Trans. IT 6, 1960, table I), the outermost level taken to 127,
// the largest int8, and the others rounded. That of 16 levels is +-{0.1284, 0.3881, 0.6568,
// 0.9424, 1.2562, 1.6181, 2.0690, 2.7326}, and its gain 46.48 = 127 / 2.7326; the gains of other widths are those of
// least squared error for the levels as rounded. With 256 levels some of the best would round to the same: they are
// even, to 4.5 deviations.
//
// uniform: the gain is 1 / r, r = 0.35341 the step that minimises the mean squared error of a uniform
// 15-level quantiser of a unit Gaussian (Max 1960, table II, N = 15).
//
// trellis: trellis-coded quantisation (M. W. Marcellin and T. R. Fischer, Trellis coded quantization of memoryless and
// Gauss-Markov sources, IEEE Trans. Commun. 38, 1990) with a state that is two bits of the code before, so that a
// kernel finds it in the byte beside. Found by linear labels drawn at random, the best of thousands trained as Lloyd
// and Max do, each level the mean of the Gaussian values that the best path gives it. At 4 bits one table A of 16
// levels then serves every state n, permuted and mirrored: level(n, c) = +-A[c ^ (n >> 1) ^ (n & 1) << 2], negative
// where n is odd. Squared errors of Gaussian vectors of 128, beside lloyd_max's and the least that any code of that
// rate may have: 4 bits .0060, .0086, .0039; 3 bits .0235, .0334, .0156; 2 bits .0934, .1148, .0625. With 8 and 16
// states in place of 4, whose tables are as long as those of 4 bits, 3 bits have .0229 and 2 bits .0843.
//
// Steps by the largest magnitude: a group's scale is fitted to its codes afterwards, so the step only decides which
// codes they are, and most depends on where the largest value lies among the outermost levels. The squared error of
// Gaussian groups, over that of steps by their rms: 4 bits .84, .91 and .95 at 64, 128 and 256 values, 6 bits .89, .9
// and .96, 8 bits .35 and .4 at 64 and 128, 3 bits .95 and .99; heavier tails gain more (4 bits, 128 values, Student's
// t of 5 degrees of freedom: half). By a search over hundredths; tests/cpp/test_recipe.cpp holds each against its
// neighbours. 2 bits, and 3 bits of long groups, lose by it: 0 stands for the rms.
#include "recipe/levels.h"

#include <array>

namespace kv4 {
namespace {

// The numbers of a table of 2 kHalf levels.
template <std::size_t kHalf>
struct Numbers {
  std::array<std::int8_t, (2 * kHalf > 64 ? 2 * kHalf : 64)> table{};
  std::array<std::uint8_t, kHalf> magnitude{};
  std::array<std::uint8_t, kHalf> twice_threshold{};
};

template <std::size_t kHalf>
constexpr Numbers<kHalf> numbers_of(const std::array<std::uint8_t, kHalf>& magnitude, bool mid_tread) {
  constexpr int half = static_cast<int>(kHalf);
  Numbers<kHalf> n;
  n.magnitude = magnitude;
  for (std::size_t i = 0; i + 1 < kHalf; ++i)
    n.twice_threshold[i] = static_cast<std::uint8_t>(magnitude[i] + magnitude[i + 1]);
  for (int i = 0; i < half; ++i) {
    const auto size = static_cast<std::int8_t>(magnitude[static_cast<std::size_t>(i)]);
    n.table[kHalf + static_cast<std::size_t>(i)] = size;
    // Mid-tread: i = 0 is the code `half` again and keeps its level 0.
    const int code = half - 1 + (mid_tread ? 1 : 0) - i;
    if (code < half) n.table[static_cast<std::size_t>(code)] = static_cast<std::int8_t>(-size);
  }
  // Mid-tread leaves code 0 unused by sealing; it reads as the lowest level.
  if (mid_tread) n.table[0] = n.table[1];
  return n;
}

constexpr Numbers<128> even_numbers() {
  std::array<std::uint8_t, 128> magnitude{};
  for (std::size_t i = 0; i < 128; ++i) magnitude[i] = static_cast<std::uint8_t>(i);
  Numbers<128> n = numbers_of<128>(magnitude, true);
  n.table[0] = -128;  // so that every level is code - 128
  return n;
}

// Of groups of 16, 32, 64, 128, 256 and 512.
using Reach = std::array<float, 6>;

template <std::size_t kHalf>
constexpr Levels levels_of(int bits, const Numbers<kHalf>& n, int spread, float gain, const Reach& reach) {
  const int half = static_cast<int>(kHalf);
  return {.bits = bits,
          .table = TableView(n.table.data()),
          .magnitude = TableView(n.magnitude.data()),
          .twice_threshold = TableView(n.twice_threshold.data()),
          .spread = spread,
          .negative_base = n.magnitude[0] == 0 ? half : half - 1,
          .gain = gain,
          .trellis = {},
          .reach = TableView(reach.data())};
}

// No two thresholds, times 2^spread, may share a cell of so many of 0 ... 255: sealing looks them up by it.
constexpr bool spread_fits(const Levels& l, int cell) {
  for (std::size_t i = 0; i + 1 < static_cast<std::size_t>(l.half()); ++i) {
    if ((l.twice_threshold[i] << l.spread) > 255) return false;
    if (i > 0 && (l.twice_threshold[i] << l.spread) / cell == (l.twice_threshold[i - 1] << l.spread) / cell)
      return false;
  }
  return true;
}

constexpr Numbers<2> kTwoNumbers = numbers_of<2>({38, 127}, false);
constexpr Numbers<4> kThreeNumbers = numbers_of<4>({14, 45, 79, 127}, false);
constexpr Numbers<8> kFourNumbers = numbers_of<8>({6, 18, 31, 44, 58, 75, 96, 127}, false);
constexpr Numbers<32> kSixNumbers = numbers_of<32>({1,  3,  6,  8,  10, 13, 15, 17, 20, 22, 24, 27, 30, 32, 35,  38,
                                                    40, 43, 46, 49, 53, 56, 60, 64, 68, 73, 78, 84, 91, 99, 110, 127},
                                                   false);
constexpr Numbers<128> kEightNumbers = even_numbers();
constexpr Numbers<8> kUniformNumbers = numbers_of<8>({0, 1, 2, 3, 4, 5, 6, 7}, true);

constexpr Reach kTwoReach = {};
constexpr Reach kThreeReach = {.43f, .41f, .38f, .36f, 0, 0};
constexpr Reach kFourReach = {.36f, .36f, .35f, .34f, .33f, .32f};
constexpr Reach kSixReach = {.38f, .38f, .34f, .32f, .32f, .3f};
constexpr float kUncut = 1 / 4.5f;  // the largest value is at the largest level
constexpr Reach kEightReach = {kUncut, kUncut, kUncut, kUncut, kUncut, kUncut};
// [place % 2][state][code], the same at even and odd places.
template <std::size_t kCount>
struct TrellisTable {
  std::array<std::int8_t, 2 * Levels::kStates * kCount> by_place{};
  std::array<std::int8_t, 64> table{};

  constexpr explicit TrellisTable(const std::array<std::int8_t, Levels::kStates * kCount>& levels) {
    for (std::size_t i = 0; i < by_place.size(); ++i) by_place[i] = levels[i % levels.size()];
    // The first is the least of all.
    for (std::size_t c = 0; c < kCount; ++c) table[c] = levels[c];
    for (std::int8_t level : levels) table[0] = level < table[0] ? level : table[0];
  }
};
constexpr TrellisTable<4> kTrellisOfTwo{{-93, 16, -30, 72, -15, 90, -70, 30, 64, -39, 14, -124, 39, -62, 127, -13}};
constexpr TrellisTable<8> kTrellisOfThree{{-99, 25,  -61, 6,   -35, 83,  -13, 49, 13,   -48, 35,
                                           -79, 61,  -6,  125, -25, 100, -25, 61, -6,   35,  -79,
                                           12,  -48, -12, 47,  -34, 77,  -61, 7,  -127, 25}};

// At even places codes are stored with their two pairs of bits swapped (Levels::next_state).
struct TrellisNumbers {
  static constexpr std::array<std::int8_t, 16> kBase = {-127, -86, 3,  12, -65, -49, 22, 32,
                                                        -37,  -26, 43, 57, -16, -6,  74, 102};
  std::array<std::int8_t, 2 * Levels::kStates * 16> by_place{};
  std::array<std::int8_t, 64> table{};  // the first is the least of all

  constexpr TrellisNumbers() {
    for (int place = 0; place < 2; ++place)
      for (int n = 0; n < Levels::kStates; ++n)
        for (int stored = 0; stored < 16; ++stored) {
          const int code = place == 0 ? stored >> 2 | (stored & 3) << 2 : stored;
          const int level = kBase[static_cast<std::size_t>(code ^ n >> 1 ^ (n & 1) << 2)];
          by_place[static_cast<std::size_t>((place * Levels::kStates + n) * 16 + stored)] =
              static_cast<std::int8_t>(n % 2 == 0 ? level : -level);
        }
    for (std::size_t c = 0; c < 16; ++c) table[c] = kBase[c];
  }
};
constexpr TrellisNumbers kTrellisNumbers;

constexpr Reach kTrellisTwoReach = {};
constexpr Reach kTrellisThreeReach = {.40f, .38f, .36f, .34f, .34f, .32f};
constexpr Reach kTrellisReach = {.34f, .33f, .33f, .32f, .31f, .30f};
constexpr Reach kUniformReach = {.4f, .39f, .37f, .36f, .34f, 0};

constexpr Levels kTwoBits = levels_of(2, kTwoNumbers, 0, 84.0736f, kTwoReach);
constexpr Levels kThreeBits = levels_of(3, kThreeNumbers, 0, 59.0101f, kThreeReach);
constexpr Levels kLloydMax = levels_of(4, kFourNumbers, 0, 46.48f, kFourReach);
constexpr Levels kSixBits = levels_of(6, kSixNumbers, 0, 34.3733f, kSixReach);
constexpr Levels kEightBits = levels_of(8, kEightNumbers, 0, 127 / 4.5f, kEightReach);
// A trellis's codes do not follow from magnitudes: those of lloyd_max stand there for who looks at them before it asks.
constexpr Levels trellis_of(const Levels& lloyd_max, const std::int8_t* table, const std::int8_t* by_place, float gain,
                            const Reach& reach) {
  Levels l = lloyd_max;
  l.table = TableView(table);
  l.gain = gain;
  l.trellis = TableView(by_place);
  l.reach = TableView(reach.data());
  return l;
}
constexpr Levels kTwoTrellis =
    trellis_of(kTwoBits, kTrellisOfTwo.table.data(), kTrellisOfTwo.by_place.data(), 59.8507f, kTrellisTwoReach);
constexpr Levels kThreeTrellis =
    trellis_of(kThreeBits, kTrellisOfThree.table.data(), kTrellisOfThree.by_place.data(), 46.9101f, kTrellisThreeReach);
constexpr Levels kFourTrellis =
    trellis_of(kLloydMax, kTrellisNumbers.table.data(), kTrellisNumbers.by_place.data(), 41.9773f, kTrellisReach);
constexpr Levels kUniform = levels_of(4, kUniformNumbers, 4, 2.829564f, kUniformReach);
static_assert(spread_fits(kTwoBits, 16) && spread_fits(kThreeBits, 16) && spread_fits(kLloydMax, 16) &&
              spread_fits(kUniform, 16) && spread_fits(kSixBits, 4));

}  // namespace

const Levels& levels(LevelKind kind, int bits) {
  if (kind == LevelKind::uniform) return kUniform;
  if (kind == LevelKind::trellis) return bits == 2 ? kTwoTrellis : bits == 3 ? kThreeTrellis : kFourTrellis;
  switch (bits) {
    case 2: return kTwoBits;
    case 3: return kThreeBits;
    case 6: return kSixBits;
    case 8: return kEightBits;
    default: return kLloydMax;
  }
}

StepRule step_rule(const Levels& levels, ScaleRule scale, int group) {
  if (scale == ScaleRule::abs_max) return {.by_largest = true, .factor = 1.0f / static_cast<float>(levels.top())};
  std::size_t nearest = 0;  // of the lengths that the table has, by their ratio
  for (int length = 16; nearest < 5 && group * group > 2 * length * length; length *= 2) ++nearest;
  const float reach = levels.reach[nearest];
  return {.by_largest = reach > 0, .factor = (reach > 0 ? reach : 1.0f) / levels.gain};
}

}  // namespace kv4
