#include "cuda/seal_digits.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "format/convert.h"

namespace kv4::cuda {

std::vector<std::uint16_t> digits_of(const std::vector<double>& matrix, int dim, float* unit) {
  double top = 0;
  for (double x : matrix) top = std::max(top, std::fabs(x));
  int exponent = 0;
  std::frexp(static_cast<float>(top), &exponent);
  const double units = std::ldexp(1.0, 11 - exponent);  // the largest magnitude is at most 2^11 units
  *unit = static_cast<float>(1.0 / units);
  const std::size_t n = static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim);
  std::vector<std::uint16_t> digits(4 * n);
  for (int row = 0; row < dim; ++row) {
    const int output = output_channel(row / 8, row % 8);
    for (int c = 0; c < dim; ++c) {
      // Of 16 rows by 16 channels, lane 4g + t holds rows g, g + 8, then both of the next 8 channels, two channels
      // each.
      const int fragment = (row / 16 * (dim / 16) + c / 16) * 32 + row % 8 * 4 + c % 8 / 2,
                element = c % 16 / 8 * 4 + row % 16 / 8 * 2 + c % 2;
      double x =
          matrix[static_cast<std::size_t>(output) * static_cast<std::size_t>(dim) + static_cast<std::size_t>(c)] *
          units;
      for (std::size_t digit = 0; digit < 3; ++digit) {
        const double whole = std::nearbyint(x);
        x = (x - whole) * 4096;
        digits[digit * n + static_cast<std::size_t>(block_at(row, c, dim)) / 2] =
            f32_to_f16(static_cast<float>(digit > 0 ? whole / 4096 : whole));
      }
      digits[3 * n + static_cast<std::size_t>(fragment * 8 + element)] =
          digits[2 * n + static_cast<std::size_t>(block_at(row, c, dim)) / 2];
    }
  }
  return digits;
}

}  // namespace kv4::cuda
