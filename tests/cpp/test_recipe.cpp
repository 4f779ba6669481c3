// Recipes: validation and its messages; level tables and their gains.
#include "recipe/levels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "cases.h"
#include "reference/seal.h"

namespace kv4 {
namespace {

struct Refusal {
  const char* field;
  std::function<void(Recipe&)> change;
};

TEST(Recipe, PresetsAreValid) {
  for (const Recipe& r : {Recipe::kv4(), Recipe::paper(), Recipe::exact()}) {
    EXPECT_TRUE(validate(r).ok()) << validate(r).message();
    for (int d : {32, 34, 80, 128, 512}) EXPECT_TRUE(validate(r, d, 64).ok()) << validate(r, d, 64).message();
  }
  const Recipe paper = Recipe::paper();
  for (const SideRecipe* side : {&paper.key, &paper.value}) {
    EXPECT_EQ(side->rotation, RotationKind::srft);
    EXPECT_EQ(side->levels, LevelKind::uniform);
    EXPECT_EQ(side->scale, ScaleRule::abs_max);
    EXPECT_EQ(side->group, 0);
    EXPECT_EQ(side->lambda, LambdaMode::none);
    EXPECT_FALSE(side->mean);
  }
  EXPECT_EQ(paper.seal, SealMode::arrival);
  EXPECT_EQ(paper.sinks, 0);
  EXPECT_EQ(paper.window, 0);
  EXPECT_EQ(Recipe::exact().seal, SealMode::never);
}

TEST(Recipe, RefusalsNameTheField) {
  const Refusal refusals[] = {
      {"recipe.key.rotation", [](Recipe& r) { r.key.rotation = static_cast<RotationKind>(5); }},
      {"recipe.value.reflectors", [](Recipe& r) { r.value.reflectors = -1; }},
      {"recipe.value.reflectors", [](Recipe& r) { r.value.reflectors = 4; }},
      {"recipe.key.group", [](Recipe& r) { r.key.group = 48; }},
      {"recipe.value.group", [](Recipe& r) { r.value.group = -32; }},
      {"recipe.key.levels", [](Recipe& r) { r.key.levels = static_cast<LevelKind>(3); }},
      {"recipe.key.bits", [](Recipe& r) { r.key.bits = 5; }},
      {"recipe.refined", [](Recipe& r) { r.refined = 3; }},
      {"recipe.refined", [](Recipe& r) { r.refined = -1; }},
      {"recipe.refined", [](Recipe& r) { r = Recipe::paper(), r.refined = 1; }},
      {"recipe.value.bits", [](Recipe& r) { r.value.bits = 0; }},
      {"recipe.value.bits", [](Recipe& r) { r.value.bits = -4; }},
      {"recipe.value.levels", [](Recipe& r) { r.value.bits = 3, r.value.levels = LevelKind::uniform; }},
      {"recipe.key.levels", [](Recipe& r) { r.key.bits = 6, r.key.levels = LevelKind::trellis; }},
      {"recipe.key.levels", [](Recipe& r) { r = Recipe::paper(), r.key = {.levels = LevelKind::trellis}; }},
      {"recipe.value.levels", [](Recipe& r) { r = Recipe::paper(), r.value = {.levels = LevelKind::trellis}; }},
      {"recipe.value.scale",
       [](Recipe& r) { r.value.levels = LevelKind::trellis, r.value.scale = ScaleRule::abs_max; }},
      {"recipe.value.scale", [](Recipe& r) { r.value.scale = static_cast<ScaleRule>(2); }},
      {"recipe.key.lambda", [](Recipe& r) { r.key.lambda = static_cast<LambdaMode>(3); }},
      {"recipe.value.lambda", [](Recipe& r) { r.value.lambda = LambdaMode::automatic; }},
      {"recipe.value.mean", [](Recipe& r) { r.value.mean = true; }},
      {"recipe.seal", [](Recipe& r) { r.seal = static_cast<SealMode>(3); }},
      {"recipe.sinks", [](Recipe& r) { r.sinks = -1; }},
      {"recipe.window", [](Recipe& r) { r.window = -1; }},
      {"recipe.key.mean", [](Recipe& r) { r = Recipe::paper(), r.key.mean = true; }},
      {"recipe.key.lambda", [](Recipe& r) { r = Recipe::paper(), r.key.lambda = LambdaMode::automatic; }},
      {"recipe.sinks", [](Recipe& r) { r = Recipe::paper(), r.sinks = 4; }},
      {"recipe.window", [](Recipe& r) { r = Recipe::paper(), r.window = 64; }},
  };
  for (const Refusal& refusal : refusals) {
    Recipe r;
    refusal.change(r);
    const Status s = validate(r);
    EXPECT_EQ(s.code(), StatusCode::invalid_argument) << refusal.field;
    EXPECT_TRUE(s.message().starts_with(std::string(refusal.field) + ": expected ")) << s.message();
    EXPECT_NE(s.message().find("; got "), std::string::npos) << s.message();
  }
}

TEST(Recipe, HeadDims) {
  Recipe r;
  r.key.group = 64;
  EXPECT_TRUE(validate(r, 128, 80).ok());
  EXPECT_TRUE(validate(r, 80, 80).message().starts_with("recipe.key.group: ")) << validate(r, 80, 80).message();
  r = Recipe{};
  for (int d : {16, 63, 514, 30}) {
    EXPECT_EQ(validate(r, d, 64).code(), StatusCode::unsupported) << d;
    EXPECT_TRUE(validate(r, d, 64).message().starts_with("head_dim_k: "));
    EXPECT_TRUE(validate(r, 64, d).message().starts_with("head_dim_v: "));
    EXPECT_TRUE(validate(Recipe::exact(), d, d).ok()) << d;
  }
  EXPECT_EQ(validate(Recipe::exact(), 0, 64).code(), StatusCode::invalid_argument);
  r.value.rotation = RotationKind::householder;
  r.value.reflectors = 65;
  EXPECT_TRUE(validate(r, 128, 96).ok());
  EXPECT_TRUE(validate(r, 128, 64).message().starts_with("recipe.value.reflectors: "));
}

struct Table {
  LevelKind kind;
  int bits;
};
constexpr Table kTables[] = {{LevelKind::lloyd_max, 2}, {LevelKind::lloyd_max, 3}, {LevelKind::lloyd_max, 4},
                             {LevelKind::lloyd_max, 6}, {LevelKind::lloyd_max, 8}, {LevelKind::uniform, 4}};

TEST(Levels, TablesAgree) {
  for (const Table& table : kTables) {
    const Levels& l = levels(table.kind, table.bits);
    ASSERT_EQ(l.bits, table.bits);
    const int unused = l.negative_base == l.half() ? 1 : 0;
    for (int n = unused; n + 1 < l.count(); ++n) EXPECT_LT(l.table[n], l.table[n + 1]);
    EXPECT_LE(l.table[0], l.table[1]);
    for (int i = 0; i + 1 < l.half(); ++i) EXPECT_EQ(l.twice_threshold[i], l.magnitude[i] + l.magnitude[i + 1]);
    // The index rule finds the nearest level for every quarter step.
    for (double y = -140; y <= 140; y += 0.25) {
      int i = 0;
      for (int t = 0; t + 1 < l.half(); ++t) i += l.twice_threshold[t] <= std::abs(2 * y);
      const int code = y >= 0 ? l.half() + i : l.negative_base - i;
      double best = 1e9;
      for (int n = unused; n < l.count(); ++n) best = std::min(best, std::abs(y - l.table[n]));
      EXPECT_EQ(std::abs(y - l.table[code]), best) << table.bits << " bits, " << y;
    }
    EXPECT_EQ(l.table[l.count() - 1], table.kind == LevelKind::uniform ? 7 : 127);
    EXPECT_EQ(l.top(), l.table[l.count() - 1]);
  }
  EXPECT_EQ(levels(LevelKind::uniform).table[1], -7);
  EXPECT_EQ(levels(LevelKind::uniform).table[8], 0);
  // As the kernels read 8 bits.
  for (int code = 0; code < 256; ++code) EXPECT_EQ(levels(LevelKind::lloyd_max, 8).table[code], code - 128);
}

double density(double x) { return std::isinf(x) ? 0 : std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }
double below(double x) { return std::isinf(x) ? (x > 0 ? 1 : 0) : 0.5 * std::erfc(-x / std::sqrt(2.0)); }

// E (x - level(x))^2 of a unit Gaussian, levels at table / gain; per cell also its centroid.
double distortion(const Levels& l, double gain, std::vector<double>* centroids = nullptr) {
  double sum = 0;
  const int lowest = l.negative_base == l.half() ? 1 : 0, last = l.count() - 1;
  for (int n = lowest; n <= last; ++n) {
    const double a = n == lowest ? -INFINITY : (l.table[n - 1] + l.table[n]) / 2.0 / gain;
    const double b = n == last ? INFINITY : (l.table[n] + l.table[n + 1]) / 2.0 / gain;
    const double p = below(b) - below(a), first = density(a) - density(b), q = l.table[n] / gain;
    const double second = p + (std::isinf(a) ? 0 : a * density(a)) - (std::isinf(b) ? 0 : b * density(b));
    sum += second - 2 * q * first + q * q * p;
    if (centroids != nullptr) centroids->push_back(first / p);
  }
  return sum;
}

// Max 1960, table I: the minima of 4, 8 and 16 levels; rounding levels to integers costs less than 1 %. No table of 64
// levels is in it: Panter and Dite (1951) give sqrt(3) pi / 2 / 64^2 for many levels, which rounding raises by 7 %.
TEST(Levels, LloydMaxLevelsAreCentroids) {
  for (const auto& [bits, least, more] :
       {std::tuple{2, 0.1175, 0.01}, {3, 0.03454, 0.01}, {4, 0.009497, 0.01}, {6, 0.000664, 0.08}}) {
    const Levels& l = levels(LevelKind::lloyd_max, bits);
    std::vector<double> centroids;
    EXPECT_NEAR(distortion(l, l.gain, &centroids), least, least * more) << bits;
    // Half a unit of rounding in the level itself and in the two boundaries of its cell; of the outermost, whose cell
    // has no end, what the gain makes good.
    for (int n = 1; n + 1 < l.count(); ++n) EXPECT_NEAR(centroids[n] * l.gain, l.table[n], 1.0) << bits << " " << n;
    EXPECT_NEAR(centroids[0] * l.gain, l.table[0], 2.0) << bits;
    if (bits == 4) continue;  // its gain is that of the unrounded levels
    for (double factor : {0.99, 1.01}) EXPECT_LT(distortion(l, l.gain), distortion(l, l.gain * factor)) << bits;
  }
}

// The least squared error over groups of Gaussian values, of their own squares, with steps by a rule.
double error_of(const Levels& l, const StepRule& rule, int group) {
  cases::Random random(7);
  double left = 0, all = 0;
  std::vector<double> x(static_cast<std::size_t>(group));
  std::vector<std::uint8_t> codes(x.size());
  for (int rows = 0; rows < 60000 / group; ++rows) {
    double squares = 0, largest = 0;
    for (double& v : x) {
      v = random.normal();
      squares += v * v;
      largest = std::max(largest, std::abs(v));
    }
    const double step = rule.factor * (rule.by_largest ? largest : std::sqrt(squares / group));
    for (std::size_t c = 0; c < x.size(); ++c) {
      int i = 0;
      for (int t = 0; t + 1 < l.half(); ++t) i += l.twice_threshold[t] <= std::abs(2 * x[c] / step);
      codes[c] = static_cast<std::uint8_t>(x[c] >= 0 ? l.half() + i : l.negative_base - i);
    }
    std::vector<double> level;
    for (std::uint8_t code : codes) level.push_back(l.table[code]);
    const double scale = reference::least_squares_scale(x.data(), level.data(), group);
    for (std::size_t c = 0; c < x.size(); ++c) left += std::pow(x[c] - scale * l.table[codes[c]], 2);
    all += squares;
  }
  return left / all;
}

// Of every state and place the levels are one table's, permuted and mirrored; each code is stored so that a state lies
// beside it in a byte; and in a chain every pair of places can have any two codes.
TEST(Levels, TrellisIsOneTable) {
  const Levels& l = levels(LevelKind::trellis);
  ASSERT_TRUE(l.is_trellis());
  EXPECT_FALSE(levels(LevelKind::lloyd_max).is_trellis());
  for (int state = 0; state < Levels::kStates; ++state) {
    std::set<int> seen;
    for (int code = 0; code < 16; ++code) {
      const int level = l.level(1, state, code), swapped = code >> 2 | (code & 3) << 2;
      EXPECT_EQ(level, (state & 1 ? -1 : 1) * l.level(1, 0, code ^ state >> 1 ^ (state & 1) << 2));
      EXPECT_EQ(l.level(0, state, swapped), level);
      EXPECT_EQ(l.next_state(0, swapped), l.next_state(1, code));
      EXPECT_GE(level, l.table[0]) << "of which kernels make bytes without a sign";
      seen.insert(level);
    }
    EXPECT_EQ(seen.size(), 16u);
  }
}

// Squared errors of Gaussian vectors, which docs/notes/bits.md states.
TEST(Levels, TrellisOnGaussianVectors) {
  struct Case {
    int group;
    double keys, values;  // chains of values have 16 places alone, and the first has no state to choose
  };
  for (const auto& [group, keys, of_values] : {Case{64, .0061, .0063}, {128, .0061, .0065}, {256, .0062, .0068}}) {
    SideSpec side;
    side.dim = side.group = group;
    side.groups = 1;
    ASSERT_TRUE(Rotation::identity(group, &side.rotation).ok());
    side.levels = levels(LevelKind::trellis);
    for (bool values : {false, true}) {
      side.values = values;
      cases::Random random(11);
      double left = 0, all = 0;
      for (int page = 0; page < 3; ++page) {
        std::vector<double> rows(static_cast<std::size_t>(kPageTokens * group));
        for (double& x : rows) x = random.normal();
        const reference::Sealed r = reference::seal(side, rows.data(), kPageTokens);
        const std::vector<double> read =
            reference::dequantise(side, r.codes.data(), r.scales.data(), nullptr, kPageTokens);
        for (std::size_t i = 0; i < rows.size(); ++i) {
          left += std::pow(rows[i] - read[i], 2);
          all += rows[i] * rows[i];
        }
      }
      EXPECT_LT(left / all, values ? of_values : keys) << group << (values ? " values" : " keys");
      EXPECT_GT(left / all, 1.0 / 256) << "less than any code of 4 bits leaves";
    }
  }
}

TEST(Levels, StepsOfLeastSquaresAreTheBestOfTheirKind) {
  struct Case {
    LevelKind kind;
    int bits, group;
    bool by_largest;
    double less;  // at most this of the error of steps by the rms
  };
  for (const Case& c : {Case{LevelKind::lloyd_max, 2, 128, false, 1},
                        {LevelKind::lloyd_max, 3, 64, true, .97},
                        {LevelKind::lloyd_max, 3, 128, true, .995},
                        {LevelKind::lloyd_max, 3, 256, false, 1},
                        {LevelKind::lloyd_max, 4, 32, true, .8},
                        {LevelKind::lloyd_max, 4, 64, true, .87},
                        {LevelKind::lloyd_max, 4, 128, true, .93},
                        {LevelKind::lloyd_max, 4, 256, true, .98},
                        {LevelKind::lloyd_max, 6, 128, true, .94},
                        {LevelKind::lloyd_max, 8, 128, true, .5},
                        {LevelKind::uniform, 4, 128, true, .97}}) {
    const Levels& l = levels(c.kind, c.bits);
    const StepRule rule = step_rule(l, ScaleRule::least_squares, c.group);
    EXPECT_EQ(rule.by_largest, c.by_largest) << c.bits << " bits, groups of " << c.group;
    const double found = error_of(l, rule, c.group);
    EXPECT_LE(found, c.less * error_of(l, {.by_largest = false, .factor = 1 / l.gain}, c.group))
        << c.bits << " bits, groups of " << c.group;
    for (float other : {0.9f, 1.1f})
      EXPECT_LT(found, error_of(l, {.by_largest = rule.by_largest, .factor = rule.factor * other}, c.group))
          << c.bits << " bits, groups of " << c.group << ", " << other;
  }
  // By the nearest length in the table; abs_max puts the largest value at the largest level.
  const Levels& l = levels(LevelKind::lloyd_max);
  const auto factor = [&](int group) { return step_rule(l, ScaleRule::least_squares, group).factor; };
  EXPECT_EQ(factor(80), factor(64));
  EXPECT_EQ(factor(96), factor(128));
  EXPECT_EQ(factor(1), factor(16));
  EXPECT_EQ(factor(1024), factor(512));
  EXPECT_NE(factor(128), factor(256));
  EXPECT_TRUE(step_rule(l, ScaleRule::abs_max, 64).by_largest);
  EXPECT_EQ(step_rule(l, ScaleRule::abs_max, 64).factor, 1.0f / 127);
}

TEST(Levels, UniformGainIsOptimal) {
  const Levels& l = levels(LevelKind::uniform);
  const double best = distortion(l, l.gain);
  for (double factor : {0.999, 1.001}) EXPECT_LT(best, distortion(l, l.gain * factor));
}

}  // namespace
}  // namespace kv4
