#include "cuda/seal_digits.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "format/convert.h"

namespace kv4::cuda {

namespace {

// Three digits of each entry, in units of *unit.
struct Digits {
  double units;
  explicit Digits(const std::vector<double>& matrix, float* unit) {
    double top = 0;
    for (double x : matrix) top = std::max(top, std::fabs(x));
    int exponent = 0;
    std::frexp(static_cast<float>(top), &exponent);
    units = std::ldexp(1.0, 11 - exponent);  // the largest magnitude is at most 2^11 units
    *unit = static_cast<float>(1.0 / units);
  }
  std::array<std::uint16_t, 3> operator()(double x) const {
    std::array<std::uint16_t, 3> digits;
    x *= units;
    for (std::size_t digit = 0; digit < 3; ++digit) {
      const double whole = std::nearbyint(x);
      x = (x - whole) * 4096;
      digits[digit] = f32_to_f16(static_cast<float>(digit > 0 ? whole / 4096 : whole));
    }
    return digits;
  }
};

double entry(const std::vector<double>& matrix, int dim, int row, int column) {
  return matrix[static_cast<std::size_t>(row) * static_cast<std::size_t>(dim) + static_cast<std::size_t>(column)];
}

}  // namespace

std::vector<std::uint16_t> digits_of(const std::vector<double>& matrix, int dim, float* unit) {
  const Digits digits_of_entry(matrix, unit);
  const std::size_t n = static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim);
  std::vector<std::uint16_t> digits(4 * n);
  for (int row = 0; row < dim; ++row) {
    const int output = output_channel(row / 8, row % 8);
    for (int c = 0; c < dim; ++c) {
      // Of 16 rows by 16 channels, lane 4g + t holds rows g, g + 8, then both of the next 8 channels, two channels
      // each.
      const int fragment = (row / 16 * (dim / 16) + c / 16) * 32 + row % 8 * 4 + c % 8 / 2,
                element = c % 16 / 8 * 4 + row % 16 / 8 * 2 + c % 2;
      const std::array<std::uint16_t, 3> its = digits_of_entry(entry(matrix, dim, output, c));
      for (std::size_t digit = 0; digit < 3; ++digit)
        digits[digit * n + static_cast<std::size_t>(block_at(row, c, dim)) / 2] = its[digit];
      digits[3 * n + static_cast<std::size_t>(fragment * 8 + element)] = its[2];
    }
  }
  return digits;
}

std::vector<std::uint16_t> digit_fragments_of(const std::vector<double>& matrix, int dim, float* unit) {
  const Digits digits_of_entry(matrix, unit);
  std::vector<std::uint16_t> fragments(2 * static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim));
  for (int i = 0; i < dim; ++i) {
    for (int c = 0; c < dim; ++c) {
      const std::array<std::uint16_t, 3> its = digits_of_entry(entry(matrix, dim, i, c));
      const int second = i % 4 / 2, g = i % 16 / 4 * 2 + i % 2, t = c % 8 / 2,
                element = second * 4 + c % 16 / 8 * 2 + c % 2;
      for (int digit = 0; digit < 2; ++digit) {
        const int word = ((i / 16 * (dim / 16) + c / 16) * 2 + digit) * 32 + 4 * g + t;
        fragments[static_cast<std::size_t>(word * 8 + element)] = its[static_cast<std::size_t>(digit)];
      }
    }
  }
  return fragments;
}

}  // namespace kv4::cuda
