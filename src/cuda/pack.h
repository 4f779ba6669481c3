// A rotation's matrix in the order in which attend_rotate.cuh multiplies by it. Host code.
#pragma once

#include <cstdint>
#include <vector>

namespace kv4::cuda {

// matrix [dim, dim] by rows, dim a multiple of 16. Returns 4 words for each of dim * dim / 4 lanes' shares; *scale is
// the largest magnitude, by which entries are divided.
std::vector<std::uint32_t> pack_matrix(const std::vector<double>& matrix, int dim, float* scale);

}  // namespace kv4::cuda
