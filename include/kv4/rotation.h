// Rotations. One of dimension d is a linear map R on d channels; kv4 stores
// x = R k and never undoes it per key: scores use the dual map on queries.
//
//   keys, values   x  = R k
//   queries        q' = R^-T q      (so that q'.x = q.k; equals R q for orthonormal R)
//   outputs        o  = R^-1 y      (equals R^T y for orthonormal R)
//
// All kinds but `dense` are orthonormal. Everything random comes from `seed` through integer
// arithmetic and correctly rounded operations only (SplitMix64, Steele et al. 2014), so signs and
// reflectors are identical on every machine. The definition of each kind, with w_c = word c of
// SplitMix64 started at `seed`:
//
//   D (srft, srht)  diag of signs: channel c is negated where bit c % 64 of w_(c / 64) is set.
//   srft            with X_j = sum_n (D k)_n exp(-2 pi i j n / d), h = d / 2,
//                   x = [X_0, X_h, sqrt2 Re X_1, sqrt2 Im X_1, ..., sqrt2 Re X_(h-1), sqrt2 Im X_(h-1)] / sqrt(d)
//   srht            channel c = a m + b with a < 2^k, b < m; x_(a m + b) = sum over a', b' of
//                   (-1)^popcount(a & a') / sqrt(2^k) F[b][b'] (D k)_(a' m + b'); rows of F:
//                   1/sqrt(m), then sqrt(2/m) cos(2 pi j n / m), -sqrt(2/m) sin(2 pi j n / m) for j = 1 ... (m-1)/2
//   householder     u_i = g / |g|, g_c = (sum of the four 16-bit fields of w_(i d + c)) - 131070;
//                   R = (I - 2 u_last u_last^T) ... (I - 2 u_0 u_0^T)
#pragma once

#include <cstdint>

namespace kv4 {

enum class RotationKind : std::uint8_t {
  identity = 0,
  srft = 1,  // F D: orthonormal real FFT of the sign-flipped vector; any even d in 32..512
  srht = 2,  // (H_(2^k) (x) F_m) D with d = 2^k m, m odd: Walsh-Hadamard, times a real DFT of size m where d is no
             // power of two
  householder = 3,  // product of `reflectors` reflections I - 2 u u^T
  dense = 4         // a given (learned) invertible matrix, row-major [d, d]
};

constexpr int kMinHeadDim = 32;
constexpr int kMaxHeadDim = 512;

}  // namespace kv4
