// Recipes: what validate refuses and how it says so; the level tables and their gains.
#include "recipe/levels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
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

TEST(Levels, TablesAgree) {
  for (LevelKind kind : {LevelKind::lloyd_max, LevelKind::uniform}) {
    const Levels& l = levels(kind);
    const int unused = l.negative_base == 8 ? 1 : 0;
    for (int n = unused; n < 15; ++n) EXPECT_LT(l.table[n], l.table[n + 1]);
    EXPECT_LE(l.table[0], l.table[1]);
    for (int i = 0; i < 7; ++i) EXPECT_EQ(l.twice_threshold[i], l.magnitude[i] + l.magnitude[i + 1]);
    // The index rule finds the nearest level for every quarter step.
    for (double y = -140; y <= 140; y += 0.25) {
      int i = 0;
      for (int t = 0; t < 7; ++t) i += l.twice_threshold[t] <= std::abs(2 * y);
      const int code = y >= 0 ? 8 + i : l.negative_base - i;
      double best = 1e9;
      for (int n = unused; n < 16; ++n) best = std::min(best, std::abs(y - l.table[n]));
      EXPECT_EQ(std::abs(y - l.table[code]), best) << y;
    }
  }
  EXPECT_EQ(levels(LevelKind::lloyd_max).table[15], 127);
  EXPECT_EQ(levels(LevelKind::uniform).table[1], -7);
  EXPECT_EQ(levels(LevelKind::uniform).table[8], 0);
}

double density(double x) { return std::isinf(x) ? 0 : std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }
double below(double x) { return std::isinf(x) ? (x > 0 ? 1 : 0) : 0.5 * std::erfc(-x / std::sqrt(2.0)); }

// E (x - level(x))^2 of a unit Gaussian, levels at table / gain; per cell also its centroid.
double distortion(const Levels& l, double gain, std::vector<double>* centroids = nullptr) {
  double sum = 0;
  for (int n = l.negative_base == 8 ? 1 : 0; n < 16; ++n) {
    const bool lowest = n == 0 || l.table[n - 1] == l.table[n];
    const double a = lowest ? -INFINITY : (l.table[n - 1] + l.table[n]) / 2.0 / gain;
    const double b = n == 15 ? INFINITY : (l.table[n] + l.table[n + 1]) / 2.0 / gain;
    const double p = below(b) - below(a), first = density(a) - density(b), q = l.table[n] / gain;
    const double second = p + (std::isinf(a) ? 0 : a * density(a)) - (std::isinf(b) ? 0 : b * density(b));
    sum += second - 2 * q * first + q * q * p;
    if (centroids != nullptr) centroids->push_back(first / p);
  }
  return sum;
}

TEST(Levels, LloydMaxLevelsAreCentroids) {
  const Levels& l = levels(LevelKind::lloyd_max);
  std::vector<double> centroids;
  // Max 1960, table I: the 16-level minimum is 0.009497; rounding levels to integers costs less than 1 %.
  EXPECT_NEAR(distortion(l, l.gain, &centroids), 0.009497, 0.009497 * 0.01);
  // Half a unit of rounding in the level itself and in the two boundaries of its cell.
  for (int n = 0; n < 16; ++n) EXPECT_NEAR(centroids[n] * l.gain, l.table[n], 1.0) << n;
}

TEST(Levels, UniformGainIsOptimal) {
  const Levels& l = levels(LevelKind::uniform);
  const double best = distortion(l, l.gain);
  for (double factor : {0.999, 1.001}) EXPECT_LT(best, distortion(l, l.gain * factor));
}

}  // namespace
}  // namespace kv4
