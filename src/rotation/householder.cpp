// Products of Householder reflections. Their directions are sums of four uniform 16-bit integers
// per channel: near Gaussian, and exact, so that a vector and its norm need only a correctly
// rounded square root and division.
#include <cmath>
#include <string>

#include "rotation/interned.h"
#include "rotation/kinds.h"
#include "rotation/random.h"

namespace kv4 {

Status Rotation::householder(int d, int reflectors, std::uint64_t seed, std::shared_ptr<const Rotation>* out) {
  KV4_RETURN_IF_ERROR(validate_dimension(d));
  if (reflectors < 1 || reflectors > d)
    return invalid_argument("reflectors", "1 to " + std::to_string(d), std::to_string(reflectors));
  *out = Interned::find({RotationKind::householder, d, reflectors, seed});
  if (*out != nullptr) return {};
  std::unique_ptr<Rotation> r(new Rotation(RotationKind::householder, d, reflectors, seed));
  r->vectors_f64_.reserve(static_cast<std::size_t>(reflectors) * d);
  SplitMix64 random(seed);
  std::vector<std::int64_t> g(d);
  for (int i = 0; i < reflectors; ++i) {
    std::int64_t squares = 0;  // below 512 * 2^34: exact in int64 and in binary64
    for (std::int64_t& x : g) {
      const std::uint64_t w = random.next();
      x = static_cast<std::int64_t>((w & 0xffff) + (w >> 16 & 0xffff) + (w >> 32 & 0xffff) + (w >> 48)) - 131070;
      squares += x * x;
    }
    if (squares == 0) g[0] = squares = 1;
    const double norm = std::sqrt(static_cast<double>(squares));
    for (const std::int64_t x : g) r->vectors_f64_.push_back(static_cast<double>(x) / norm);
  }
  r->vectors_ = to_f32(r->vectors_f64_);
  *out = Interned::add(std::move(r));
  return {};
}

std::vector<double> householder_matrix(const Rotation& r) {
  const std::size_t d = static_cast<std::size_t>(r.dim());
  std::vector<double> matrix(d * d), dot(d);
  for (std::size_t c = 0; c < d; ++c) matrix[c * d + c] = 1;
  for (int i = 0; i < r.reflectors(); ++i) {
    const double* u = r.reflector_vectors_f64().data() + static_cast<std::size_t>(i) * d;
    dot.assign(d, 0);
    for (std::size_t row = 0; row < d; ++row)
      for (std::size_t c = 0; c < d; ++c) dot[c] += u[row] * matrix[row * d + c];
    for (std::size_t row = 0; row < d; ++row)
      for (std::size_t c = 0; c < d; ++c) matrix[row * d + c] -= 2 * u[row] * dot[c];
  }
  return matrix;
}

}  // namespace kv4
