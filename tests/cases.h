// Shapes and data shared by tests and benchmarks.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kv4/types.h"

namespace kv4::cases {

inline constexpr DType kEveryDType[] = {DType::f32, DType::f16, DType::bf16};
inline constexpr int kHeadDims[] = {64, 80, 96, 128, 256};
inline constexpr int kRotationDims[] = {32, 34, 46, 64, 80, 96, 112, 128, 160, 192, 256, 320, 512};
inline constexpr int kQueryHeadsPerKvHead[] = {1, 2, 3, 4, 6, 7, 8};
inline constexpr int kTokens[] = {1, 2, 63, 64, 65, 97, 127, 128, 131, 132, 133, 200, 1000, 5000};

// Calls whose rows (queries * group) fill one tile or several, completely or partly.
struct Rows {
  int queries, group;
};
inline constexpr Rows kQueryRows[] = {{3, 3}, {15, 1}, {16, 1}, {17, 1}, {5, 5}, {16, 2}, {33, 1}, {32, 2}, {13, 6}};

// Geometries of real models: query heads, KV heads, head dim.
struct Geometry {
  const char* name;
  int q_heads, kv_heads, head_dim;
};
inline constexpr Geometry kGeometries[] = {
    {"qwen2.5-1.5b", 12, 2, 128}, {"llama-3-8b", 32, 8, 128},  {"qwen2.5-0.5b", 14, 2, 64}, {"gemma-3-270m", 4, 1, 256},
    {"phi-2", 32, 32, 80},        {"smollm2-360m", 15, 5, 64}, {"qwen3-0.6b", 16, 8, 128},  {"llama-2-7b", 32, 32, 128},
};

// SplitMix64: the same stream on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {                                                         // unit variance
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }

 private:
  std::uint64_t state_;
};

// Rows that look like keys of a real model: a per-channel bias (a few channels large, as in
// Qwen2.5, whose key bias reaches 350), per-channel spread over two decades, Gaussian residue.
inline std::vector<float> key_rows(int rows, int dim, std::uint64_t seed, double bias = 20.0) {
  Random shape(seed);
  std::vector<double> mean(dim), spread(dim);
  for (int c = 0; c < dim; ++c) {
    mean[c] = shape.normal() * (shape.below(16) == 0 ? bias : 1.0);
    spread[c] = std::pow(10.0, shape.uniform() * 2 - 1);
  }
  std::vector<float> x(static_cast<std::size_t>(rows) * dim);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < dim; ++c)
      x[static_cast<std::size_t>(r) * dim + c] = static_cast<float>(mean[c] + spread[c] * shape.normal());
  return x;
}

inline std::vector<float> normal_rows(std::int64_t rows, int dim, std::uint64_t seed, double sigma = 1.0) {
  Random random(seed);
  std::vector<float> x(static_cast<std::size_t>(rows) * dim);
  for (float& v : x) v = static_cast<float>(sigma * random.normal());
  return x;
}

}  // namespace kv4::cases
