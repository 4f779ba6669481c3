#include "rotation/rotation.h"

#include <cmath>
#include <numbers>
#include <string>
#include <utility>

#include "rotation/interned.h"
#include "rotation/kinds.h"
#include "rotation/random.h"

namespace kv4 {

Status validate_dimension(int d) {
  if (d < kMinHeadDim || d > kMaxHeadDim || d % 2 != 0)
    return invalid_argument("d",
                            "an even number from " + std::to_string(kMinHeadDim) + " to " + std::to_string(kMaxHeadDim),
                            std::to_string(d));
  return {};
}

std::vector<float> random_signs(int d, std::uint64_t seed) {
  SplitMix64 random(seed);
  std::vector<float> signs(d);
  std::uint64_t word = 0;
  for (int c = 0; c < d; ++c) {
    if (c % 64 == 0) word = random.next();
    signs[c] = (word >> (c % 64) & 1) != 0 ? -1.0f : 1.0f;
  }
  return signs;
}

std::vector<float> to_f32(const std::vector<double>& x) {
  std::vector<float> y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = static_cast<float>(x[i]);
  return y;
}

std::complex<double> root_of_unity(std::int64_t j, std::int64_t n) {
  j = (j % n + n) % n;
  const std::int64_t quarter = 4 * j / n, rest = 4 * j - quarter * n;  // angle = pi/2 (quarter + rest/n)
  const bool upper = 2 * rest > n;
  const double angle = std::numbers::pi / 2 * static_cast<double>(upper ? n - rest : rest) / static_cast<double>(n);
  double c = std::cos(angle), s = std::sin(angle);
  if (2 * rest == n) c = s = std::numbers::sqrt2 / 2;
  if (upper) std::swap(c, s);
  switch (quarter) {  // conjugated: the exponent is negative
    case 0: return {c, -s};
    case 1: return {-s, -c};
    case 2: return {-c, s};
    default: return {s, c};
  }
}

Status Rotation::identity(int d, std::shared_ptr<const Rotation>* out) {
  KV4_RETURN_IF_ERROR(validate_dimension(d));
  *out = Interned::find({RotationKind::identity, d});
  if (*out != nullptr) return {};
  std::unique_ptr<Rotation> r(new Rotation(RotationKind::identity, d));
  *out = Interned::add(std::move(r));
  return {};
}

std::size_t Rotation::bytes() const {
  std::size_t sum = sizeof(Rotation);
  const auto add = [&sum](const auto&... tables) { ((sum += tables.capacity() * sizeof(tables[0])), ...); };
  add(signs_, scaled_signs_, odd_dft_, vectors_, matrix_, inverse_, inverse_transpose_);
  add(scaled_signs_f64_, odd_dft_f64_, vectors_f64_, matrix_f64_, inverse_f64_);
  add(fft_.radix, fft_.slot, fft_.source, fft_.twiddle, fft_.split, fft_.circle, fft_.root, fft_.twiddle_f64,
      fft_.split_f64, fft_.root_f64);
  return sum;
}

std::vector<double> Rotation::matrix_f64() const {
  switch (kind_) {
    case RotationKind::identity: break;
    case RotationKind::srft: return srft_matrix(*this);
    case RotationKind::srht: return srht_matrix(*this);
    case RotationKind::householder: return householder_matrix(*this);
    case RotationKind::dense: return matrix_f64_;
  }
  std::vector<double> matrix(static_cast<std::size_t>(dim_) * dim_);
  for (int c = 0; c < dim_; ++c) matrix[static_cast<std::size_t>(c) * dim_ + c] = 1;
  return matrix;
}

std::vector<double> Rotation::inverse_f64() const {
  if (kind_ == RotationKind::dense) return inverse_f64_;
  const std::vector<double> matrix = matrix_f64();
  std::vector<double> inverse(matrix.size());
  for (int i = 0; i < dim_; ++i)
    for (int j = 0; j < dim_; ++j)
      inverse[static_cast<std::size_t>(j) * dim_ + i] = matrix[static_cast<std::size_t>(i) * dim_ + j];
  return inverse;
}

}  // namespace kv4
