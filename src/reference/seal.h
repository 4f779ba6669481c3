// The numeric definition of sealing and of dequantising, in float64 loops over one head slice.
// Kernels are tested against it; production code never links it.
//
// Rows are [tokens, dim] doubles, row-major. With R the side's rotation (Rotation::matrix_f64),
// lambda_c = 1 where null, mu the mean over unmasked rows and m' = fp16(R (lambda * mu)):
//
//   x_j = R (lambda * row_j) - m'          m' only with a mean
//   code = the level nearest to y = x_jc / step, per group of `group` channels, where
//     least_squares  step = r max|x| or r rms(x) over the group, as step_rule() says;  scale = fp16(sum x L / sum L^2)
//     abs_max        step = max|x| / Lmax;  scale = fp16(step)
//   row_j ~ R^-1 (scale_j L[code] + m') / lambda
//
// Of a trellis codes are those of the path through a chain (recipe/levels.h) with the least sum of (y - L)^2, masked
// rows counting as zeros.
//
// A value midway between two levels takes the one of larger magnitude; 0 takes code 2^(bits-1),
// which masked rows and groups of zeros get throughout, with scale 0.
//
// Refined keys, those of the unmasked tokens with the least |v|^2, have a second row of 4-bit codes for what the first
// leaves as it is stored, e_j = x_j - scale_j L[code], by the same rules; it is added: row_j ~ R^-1 (scale_j L[code] +
// scale2_j L4[code2] + m') / lambda.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace kv4::reference {

struct Sealed {
  int tokens = 0;
  int dim = 0;
  std::vector<std::uint8_t> codes;    // [tokens, dim], one code per byte
  std::vector<std::uint16_t> scales;  // fp16 [groups, tokens]
  std::vector<std::uint16_t> mean;    // fp16 m' [dim]; empty without a mean

  std::vector<double> x;          // [tokens, dim]: what was quantised; 0 in masked rows
  std::vector<double> step;       // [groups, tokens]: codes are nearest to x / step; 0 where all codes are that of 0
  std::vector<double> scale_f64;  // [groups, tokens]: before rounding to fp16
  std::vector<double> mean_f64;   // [dim]: before rounding to fp16; empty without a mean
  // [tokens, dim]: distance of y to the nearest decision boundary, in steps (gaps between the two
  // levels that meet there); infinity where the code is that of 0 by rule.
  std::vector<double> margin;
};

// skip [tokens]: nonzero rows are masked and never read; null for none. lambda [dim] or null.
// stored_mean: fp16 [dim] to use as m' in place of the computed rounding, or null. Codes are relative
// to the mean that a page stores, whichever way its last bit was rounded.
Sealed seal(const SideSpec& side, const double* rows, int tokens, const std::uint8_t* skip = nullptr,
            const double* lambda = nullptr, const std::uint16_t* stored_mean = nullptr);

// Second rows of a page's keys, [rows] of them. A row without a token has place 0, scale 0 and codes of 0.
struct SecondRows {
  Levels levels{};
  std::vector<int> places;            // [rows] tokens
  std::vector<std::uint8_t> codes;    // [rows, dim], one code per byte
  std::vector<std::uint16_t> scales;  // fp16 [rows, groups]
};

// The `count` unmasked tokens of the least sum of squares of their values [tokens, dim], the least first, the earlier
// of two that are equal; fewer where fewer are unmasked.
std::vector<int> lightest(const double* values, int tokens, int dim, const std::uint8_t* skip, int count);

// Second rows of the tokens `places` of what `sealed.x` holds, whose first rows are `codes` and `scales` as a page
// stores them: as Sealed of places.size() tokens. Its steps and margins are those of the second rows.
Sealed second_rows(const SideSpec& side, const Levels& levels, const Sealed& sealed, const std::uint8_t* codes,
                   const std::uint16_t* scales, const std::vector<int>& places);

// As they lie in a head slice of a page.
SecondRows read_second_rows(const PageSpec& spec, const std::uint8_t* slice);

// The levels of codes [tokens, dim] of a whole page, in a trellis by those before them.
std::vector<double> levels_of(const SideSpec& side, const Levels& levels, const std::uint8_t* codes, int tokens);

// sum x L / sum L^2 over n channels: the least-squares scale of given levels.
double least_squares_scale(const double* x, const double* level, int n);

// [tokens, dim]: R^-1 (scale L + m') / lambda. codes, scales and mean as in Sealed; mean may be null. second: null for
// none; rows whose token is not below `tokens` are left out.
std::vector<double> dequantise(const SideSpec& side, const std::uint8_t* codes, const std::uint16_t* scales,
                               const std::uint16_t* mean, int tokens, const double* lambda = nullptr,
                               const SecondRows* second = nullptr);

// One code per byte [tokens, dim] <-> `bits` each in the canonical order of format/page.h.
std::vector<std::uint8_t> to_canonical(const std::vector<std::uint8_t>& codes, int bits = 4);
std::vector<std::uint8_t> from_canonical(const std::uint8_t* packed, int tokens, int dim, int bits = 4);

}  // namespace kv4::reference
