// A given matrix, for rotations learned offline. Not necessarily orthonormal: queries take the
// inverse transpose and outputs the inverse, both computed here in float64.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "rotation/interned.h"
#include "rotation/kinds.h"

namespace kv4 {
namespace {

double norm_1(int d, const std::vector<double>& a) {
  double norm = 0;
  for (int c = 0; c < d; ++c) {
    double sum = 0;
    for (int r = 0; r < d; ++r) sum += std::abs(a[static_cast<std::size_t>(r) * d + c]);
    norm = std::max(norm, sum);
  }
  return norm;
}

}  // namespace

bool invert(int d, const std::vector<double>& matrix, std::vector<double>* inverse) {
  std::vector<double> a = matrix;
  inverse->assign(a.size(), 0);
  double* b = inverse->data();
  for (int i = 0; i < d; ++i) b[static_cast<std::size_t>(i) * d + i] = 1;
  const auto row = [d](double* m, int i) { return m + static_cast<std::size_t>(i) * d; };
  for (int k = 0; k < d; ++k) {
    int pivot = k;
    for (int i = k + 1; i < d; ++i)
      if (std::abs(row(a.data(), i)[k]) > std::abs(row(a.data(), pivot)[k])) pivot = i;
    if (row(a.data(), pivot)[k] == 0) return false;
    if (pivot != k) {
      std::swap_ranges(row(a.data(), k), row(a.data(), k) + d, row(a.data(), pivot));
      std::swap_ranges(row(b, k), row(b, k) + d, row(b, pivot));
    }
    const double* ak = row(a.data(), k);
    const double* bk = row(b, k);
    for (int i = k + 1; i < d; ++i) {
      double* ai = row(a.data(), i);
      double* bi = row(b, i);
      const double factor = ai[k] / ak[k];
      if (factor == 0) continue;
      for (int c = k; c < d; ++c) ai[c] -= factor * ak[c];
      for (int c = 0; c < d; ++c) bi[c] -= factor * bk[c];
    }
  }
  for (int k = d; k-- > 0;) {
    double* bk = row(b, k);
    for (int i = k + 1; i < d; ++i) {
      const double factor = row(a.data(), k)[i];
      const double* bi = row(b, i);
      for (int c = 0; c < d; ++c) bk[c] -= factor * bi[c];
    }
    const double diagonal = row(a.data(), k)[k];
    for (int c = 0; c < d; ++c) bk[c] /= diagonal;
  }
  return true;
}

Status Rotation::dense(int d, std::span<const float> matrix, std::shared_ptr<const Rotation>* out) {
  KV4_RETURN_IF_ERROR(validate_dimension(d));
  const std::size_t size = static_cast<std::size_t>(d) * d;
  if (matrix.size() != size)
    return invalid_argument("matrix", std::to_string(size) + " entries (d * d)", std::to_string(matrix.size()));
  for (std::size_t i = 0; i < size; ++i)
    if (!std::isfinite(matrix[i]))
      return invalid_argument("matrix", "finite entries", "a non-finite entry in row " + std::to_string(i / d));
  if (auto held = Interned::find({RotationKind::dense, d, 0, 0, matrix}); held != nullptr) {
    *out = std::move(held);
    return {};
  }
  std::unique_ptr<Rotation> r(new Rotation(RotationKind::dense, d));
  r->matrix_.assign(matrix.begin(), matrix.end());
  r->matrix_f64_.assign(matrix.begin(), matrix.end());
  if (!invert(d, r->matrix_f64_, &r->inverse_f64_))
    return invalid_argument("matrix", "an invertible matrix", "a singular one");
  const double condition = norm_1(d, r->matrix_f64_) * norm_1(d, r->inverse_f64_);
  if (!(condition <= 0x1p23)) {
    char text[48];
    std::snprintf(text, sizeof text, "condition number %.3g", condition);
    return invalid_argument("matrix", "a condition number (1-norm) of at most 2^23", text);
  }
  r->inverse_ = to_f32(r->inverse_f64_);
  r->inverse_transpose_.resize(size);
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) {
      const float x = r->inverse_[static_cast<std::size_t>(i) * d + j];
      if (!std::isfinite(x)) return invalid_argument("matrix", "an inverse within float32 range", "an overflow");
      r->inverse_transpose_[static_cast<std::size_t>(j) * d + i] = x;
    }
  *out = Interned::add(std::move(r));
  return {};
}

}  // namespace kv4
