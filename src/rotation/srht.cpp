// Randomised Hadamard transform (Ailon, Chazelle: The fast Johnson-Lindenstrauss transform, 2009),
// extended to d = 2^k m by a real DFT of the odd size m.
#include <bit>
#include <cmath>

#include "rotation/interned.h"
#include "rotation/kinds.h"

namespace kv4 {

std::vector<double> odd_dft_matrix(int m) {
  const double unit = 1 / std::sqrt(static_cast<double>(m)), pair = std::sqrt(2.0 / m);
  std::vector<double> f(static_cast<std::size_t>(m) * m);
  for (int n = 0; n < m; ++n) {
    f[n] = unit;
    for (int j = 1; j <= (m - 1) / 2; ++j) {
      const std::complex<double> w = root_of_unity(static_cast<std::int64_t>(j) * n, m);
      f[static_cast<std::size_t>(2 * j - 1) * m + n] = pair * w.real();
      f[static_cast<std::size_t>(2 * j) * m + n] = pair * w.imag();
    }
  }
  return f;
}

Status Rotation::srht(int d, std::uint64_t seed, std::shared_ptr<const Rotation>* out) {
  KV4_RETURN_IF_ERROR(validate_dimension(d));
  *out = Interned::find({RotationKind::srht, d, 0, seed});
  if (*out != nullptr) return {};
  std::unique_ptr<Rotation> r(new Rotation(RotationKind::srht, d, 0, seed));
  r->hadamard_order_ = d & -d;
  r->signs_ = random_signs(d, seed);
  for (const float sign : r->signs_)
    r->scaled_signs_f64_.push_back(sign / std::sqrt(static_cast<double>(r->hadamard_order_)));
  r->scaled_signs_ = to_f32(r->scaled_signs_f64_);
  r->odd_dft_f64_ = odd_dft_matrix(d / r->hadamard_order_);
  r->odd_dft_ = to_f32(r->odd_dft_f64_);
  *out = Interned::add(std::move(r));
  return {};
}

std::vector<double> srht_matrix(const Rotation& r) {
  const int d = r.dim(), order = r.hadamard_order(), m = d / order;
  const std::vector<double> f = odd_dft_matrix(m);
  const double unit = 1 / std::sqrt(static_cast<double>(order));
  std::vector<double> matrix(static_cast<std::size_t>(d) * d);
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) {
      const bool odd = std::popcount(static_cast<unsigned>(i / m) & static_cast<unsigned>(j / m)) % 2 != 0;
      matrix[static_cast<std::size_t>(i) * d + j] = (odd ? -unit : unit) *
                                                    f[static_cast<std::size_t>(i % m) * m + j % m] * r.signs()[j];
    }
  return matrix;
}

}  // namespace kv4
