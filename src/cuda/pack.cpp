#include "cuda/pack.h"

#include <algorithm>
#include <cmath>

#include "cuda/layout.h"
#include "format/convert.h"

namespace kv4::cuda {

std::vector<std::uint32_t> pack_matrix(const std::vector<double>& matrix, int dim, float* scale) {
  double top = 0;
  for (double x : matrix) top = std::max(top, std::abs(x));
  *scale = top > 0 ? static_cast<float>(top) : 1.0f;
  const auto entry = [&](int row, int column) { return matrix[static_cast<std::size_t>(row) * dim + column] / *scale; };
  std::vector<std::uint32_t> words;
  words.reserve(static_cast<std::size_t>(dim) * dim);
  for (int n = 0; n < dim / 8; ++n)
    for (int k = 0; k < dim / 16; ++k)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int half = 0; half < 2; ++half)
          for (int pair = 0; pair < 2; ++pair) {
            std::uint32_t word = 0;
            for (int e = 0; e < 2; ++e) {
              const double x = entry(k * 16 + pair * 8 + lane % 4 * 2 + e, n * 8 + lane / 4);
              const std::uint16_t high = f32_to_f16(static_cast<float>(x));
              const std::uint16_t bits = half == 0 ? high : f32_to_f16(static_cast<float>(x - f16_to_f32(high)));
              word |= static_cast<std::uint32_t>(bits) << 16 * e;
            }
            words.push_back(word);
          }
  return words;
}

}  // namespace kv4::cuda
