// A rotation's matrix for 16-bit float products: each entry in fixed point, three digits of 12 bits, the second and
// third times 2^-12. A digit's matrix is one operand (wgmma.cuh): blocks of 8 output by 8 input channels. After the
// three the third again, as the A fragments of mma_halves, 16 bytes a lane.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <vector>

#include "cuda/layout.h"

namespace kv4::cuda {

constexpr int kBlockBytes = 128;  // of 8 rows of 8 16-bit elements

// Where element (row, channel) lies, in bytes; `channels` of a row.
KV4_HOST_DEVICE constexpr int block_at(int row, int channel, int channels) {
  return (row / 8 * (channels / 8) + channel / 8) * kBlockBytes + row % 8 * 16 + channel % 8 * 2;
}

// The output channel of tile n of 8, column q: a lane's columns of four tiles are those of a word of 8 key codes.
KV4_HOST_DEVICE constexpr int output_channel(int n, int q) {
  return n / 4 * 32 + n % 4 / 2 * 16 + q / 2 * 4 + n % 2 * 2 + q % 2;
}

// `matrix` [dim, dim] by output channels. `unit`: what the first digit is in units of.
std::vector<std::uint16_t> digits_of(const std::vector<double>& matrix, int dim, float* unit);

// The first two digits as B fragments of mma_halves, whose columns are output channels: word
//   ((tile * (dim / 16) + step) * 2 + digit) * 32 + lane
// has the channels of tile and step, 16 each, two columns of 8: lane 4g + t has in x, y column g of the first, in z, w
// of the second. Of both the columns 2t and 2t + 1 are output channels 4t ... 4t + 3 of the tile.
struct DigitFragments {
  const uint4* words = nullptr;  // null for the identity
  float unit = 1;                // of the first digit
};
std::vector<std::uint16_t> digit_fragments_of(const std::vector<double>& matrix, int dim, float* unit);

}  // namespace kv4::cuda
