// Recipes: validation and its messages; level tables and their gains.
#include "recipe/levels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

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
      {"recipe.key.levels", [](Recipe& r) { r.key.levels = static_cast<LevelKind>(2); }},
      {"recipe.key.bits", [](Recipe& r) { r.key.bits = 5; }},
      {"recipe.refined", [](Recipe& r) { r.refined = 3; }},
      {"recipe.refined", [](Recipe& r) { r.refined = -1; }},
      {"recipe.refined", [](Recipe& r) { r = Recipe::paper(), r.refined = 1; }},
      {"recipe.value.bits", [](Recipe& r) { r.value.bits = 0; }},
      {"recipe.value.bits", [](Recipe& r) { r.value.bits = -4; }},
      {"recipe.value.levels", [](Recipe& r) { r.value.bits = 3, r.value.levels = LevelKind::uniform; }},
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

TEST(Levels, UniformGainIsOptimal) {
  const Levels& l = levels(LevelKind::uniform);
  const double best = distortion(l, l.gain);
  for (double factor : {0.999, 1.001}) EXPECT_LT(best, distortion(l, l.gain * factor));
}

}  // namespace
}  // namespace kv4
