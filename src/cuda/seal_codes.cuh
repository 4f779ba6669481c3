// Rows to codes: thresholds by byte look-ups, 8 values at a time, and the sums that fit a row's scale to its codes.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/seal.h"

namespace kv4::cuda {

// Four bytes of a table of 16 below 128, chosen by the nibbles of `selector` (`flipped`: their fourth bits inverted).
__device__ __forceinline__ uint32_t look_up_16(const uint32_t (&table)[4], uint32_t selector, uint32_t flipped) {
  return look_up(table[0], table[1], selector) | look_up(table[2], table[3], flipped);
}

// What fits a scale to a row's codes: twice the sum of magnitudes times levels, in units, and the sum of the levels'
// squares.
struct Fit {
  unsigned products = 0, squares = 0;
};

// Magnitudes to codes. A magnitude times `scale` and cut to an integer below 256 lies in one of 16 cells, of which none
// holds more than one threshold, itself an integer (Levels in recipe/levels.h). The cell's entry is 16 times the number
// of thresholds below it plus 16 less what its own lies above its start: adding what the magnitude lies above it
// carries into the upper nibble where it has reached the threshold. Five bits more are kept for the fit, which no
// magnitude of a row of 256 takes beyond 16 bits: it is at most 16 times the row's rms, or the largest level. Narrow
// codes' gains are larger, up to 85: four bits.
template <bool kNarrow>
struct Quantiser {
  static constexpr int kFitBits = kNarrow ? 4 : 5;
  static constexpr uint32_t kMost = ((256u << kFitBits) - 1) * 0x10001u;  // of pairs of magnitudes
  uint32_t cells[4], sizes[2];
  float units;    // to a level
  float to_step;  // from a row's statistic
  bool midtread;  // no level below 0 has magnitude 0

  Quantiser() = default;

  __device__ explicit Quantiser(const SideParams& side)
      : cells{}, sizes{}, to_step(side.step.factor), midtread(side.negative_base == 8) {
    const int count = kNarrow ? (1 << (side.bits - 1)) - 1 : 7;  // of thresholds
    float scale = 2;
    while (side.thresholds[count - 1] * scale * 2 < 256) scale *= 2;
    units = scale * (1 << kFitBits);
    for (int c = 0; c < 16; ++c) {
      uint32_t entry = 0;
      for (int i = 0; i < count; ++i) {
        const int threshold = static_cast<int>(side.thresholds[i] * scale);
        if (threshold / 16 < c) entry += 16;
        else if (threshold / 16 == c) entry += 16 - threshold % 16;
      }
      cells[c / 4] |= entry << c % 4 * 8;
    }
    for (int i = 0; i < 8; ++i) sizes[i / 4] |= static_cast<uint32_t>(side.levels[8 + i]) << i % 4 * 8;
  }

  // Stored nibbles of 8 values in order; `inverse`: units over the row's step. The first kCount values count for the
  // fit.
  template <int kCount>
  __device__ __forceinline__ uint32_t operator()(const float (&x)[8], float inverse, Fit& fit) const {
    uint32_t z[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = __float_as_uint(__fmaf_rz(fabsf(x[i]), inverse, 8388608.0f));
    uint32_t pairs[2][2], whole[2], below[2];  // of even and odd values
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < 2; ++i) pairs[e][i] = __byte_perm(z[e + 4 * i], z[e + 4 * i + 2], 0x5410);
      whole[e] =
          __byte_perm(__vminu2(pairs[e][0], kMost) >> kFitBits, __vminu2(pairs[e][1], kMost) >> kFitBits, 0x6420);
      below[e] = __byte_perm(look_up(__float_as_uint(x[e]), __float_as_uint(x[e + 2]), 0x00fb),
                             look_up(__float_as_uint(x[e + 4]), __float_as_uint(x[e + 6]), 0x00fb), 0x5410);
    }
    const uint32_t at = (whole[0] >> 4 & 0x0f0f0f0f) | (whole[1] & 0xf0f0f0f0), flipped = at ^ 0x88888888u;
    const uint32_t low = look_up_16(cells, at, flipped), high = look_up_16(cells, at >> 16, flipped >> 16);
    uint32_t sum[2];  // the index above 4 bits
#pragma unroll
    for (int e = 0; e < 2; ++e) sum[e] = __byte_perm(low, high, e == 0 ? 0x6420 : 0x7531) + (whole[e] & 0x0f0f0f0f);
    const uint32_t index = (sum[0] >> 4 & 0x0f0f0f0f) | (sum[1] & 0xf0f0f0f0);
    const uint32_t first = look_up(sizes[0], sizes[1], index),
                   second = kCount > 4 ? look_up(sizes[0], sizes[1], index >> 16) : 0;
    unsigned products = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t size = __byte_perm(first, second, e == 0 ? 0x6420 : 0x7531);
      products = __dp2a_lo(pairs[e][0], size, products);
      if (kCount > 4) products = __dp2a_hi(pairs[e][1], size, products);
      fit.squares = __dp4a(size, size, fit.squares);
      fit.products = __dp4a(size, 0x01010101u, fit.products);  // a half each: a unit was cut
    }
    fit.products += 2 * products;
    const uint32_t signs = (below[0] & 0x08080808) | (below[1] & 0x80808080);
    if (!midtread) return index | signs;
    return index + (signs >> 3 & (index + 0x77777777) >> 3) * 7;  // codes below 0 count from the level below 0
  }
};

// Words of the codes of row r of a lane's two, whose kColumns channels lie in `y` as mma_halves leaves them; zeros
// unless there are `any`.
template <int kColumns, bool kNarrow, int kTiles>
__device__ __forceinline__ Fit codes_of_row(const Quantiser<kNarrow>& quantise, const float (&y)[kTiles][4], int r,
                                            bool any, float inverse, uint32_t (&words)[kTiles / 4]) {
  const uint32_t all = any ? ~0u : 0u;
  Fit fit;
#pragma unroll
  for (int b = 0; b < kTiles / 4; ++b) {
    float values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = y[4 * b + k / 2][2 * r + k % 2];
    words[b] = all & (32 * b + 16 < kColumns ? quantise.template operator()<8>(values, inverse, fit)
                                             : quantise.template operator()<4>(values, inverse, fit));
  }
  return fit;
}

}  // namespace kv4::cuda
