// Subsampled randomised Fourier transform without the subsampling (Woolfe, Liberty, Rokhlin,
// Tygert: A fast randomized algorithm for the approximation of matrices, 2008): F D with the
// orthonormal real layout of kv4/rotation.h.
#include <cmath>
#include <numbers>

#include "rotation/interned.h"
#include "rotation/kinds.h"

namespace kv4 {

Status Rotation::srft(int d, std::uint64_t seed, std::shared_ptr<const Rotation>* out) {
  KV4_RETURN_IF_ERROR(validate_dimension(d));
  *out = Interned::find({RotationKind::srft, d, 0, seed});
  if (*out != nullptr) return {};
  std::unique_ptr<Rotation> r(new Rotation(RotationKind::srft, d, 0, seed));
  r->signs_ = random_signs(d, seed);
  for (const float sign : r->signs_) r->scaled_signs_f64_.push_back(sign / std::sqrt(2.0 * d));
  r->scaled_signs_ = to_f32(r->scaled_signs_f64_);
  r->fft_ = make_fft_plan(d / 2);
  *out = Interned::add(std::move(r));
  return {};
}

std::vector<double> srft_matrix(const Rotation& r) {
  const int d = r.dim(), h = d / 2;
  const double unit = 1 / std::sqrt(static_cast<double>(d)), pair = std::numbers::sqrt2 * unit;
  std::vector<double> matrix(static_cast<std::size_t>(d) * d);
  for (int n = 0; n < d; ++n) {
    const double sign = r.signs()[n];
    matrix[n] = sign * unit;
    matrix[static_cast<std::size_t>(d) + n] = n % 2 == 0 ? sign * unit : -sign * unit;
    for (int j = 1; j < h; ++j) {
      const std::complex<double> w = root_of_unity(static_cast<std::int64_t>(j) * n, d);
      matrix[static_cast<std::size_t>(2 * j) * d + n] = sign * pair * w.real();
      matrix[static_cast<std::size_t>(2 * j + 1) * d + n] = sign * pair * w.imag();
    }
  }
  return matrix;
}

}  // namespace kv4
