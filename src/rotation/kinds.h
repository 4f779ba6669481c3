// Shared by the rotation kinds. Each kind is one file: its tables and its float64 definition,
// which reads only signs, reflectors or the given matrix, never the plan that kernels execute.
#pragma once

#include <complex>
#include <vector>

#include "rotation/rotation.h"

namespace kv4 {

Status validate_dimension(int d);

// [d], +-1: channel c is negated where bit c % 64 of word c / 64 of SplitMix64(seed) is set.
std::vector<float> random_signs(int d, std::uint64_t seed);

std::vector<float> to_f32(const std::vector<double>& x);

// exp(-2 pi i j / n), its argument reduced to the first octant in integers, so that symmetric
// entries of a table agree to the last bit.
std::complex<double> root_of_unity(std::int64_t j, std::int64_t n);

FftPlan make_fft_plan(int length);

// Row-major [m, m], m odd: the orthonormal real DFT F of kv4/rotation.h.
std::vector<double> odd_dft_matrix(int m);

// Row-major [d, d].
std::vector<double> srft_matrix(const Rotation& r);
std::vector<double> srht_matrix(const Rotation& r);
std::vector<double> householder_matrix(const Rotation& r);

// The inverse by Gaussian elimination with partial pivoting; false where a pivot vanishes.
bool invert(int d, const std::vector<double>& matrix, std::vector<double>* inverse);

}  // namespace kv4
