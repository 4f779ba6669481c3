// Lambda: the per-channel scale that minimises the expected error of q.k, not of k:
// lambda_c = (E q_c^2 / E (k_c - mu_c)^2)^(1/4), geometric mean 1, taken to the power 0.9.
//
// With quantisation noise spread evenly by the rotation, the error of q.k is proportional to
// (sum_c q_c^2 / lambda_c^2) (sum_c lambda_c^2 (k_c - mu_c)^2); Cauchy-Schwarz gives the minimum.
//
// The energies are estimates from a sequence's first tokens. Rotary position embedding rotates channels
// c and c + channels/2 into each other as positions grow, in the slow pairs over hundreds of tokens, so
// each energy is first drawn a fifth of the way to its pair's mean, and lambda is taken to the power 0.9, a tenth of
// the way to none at all. docs/quality.md has the measurements.
#pragma once

#include <cstdint>
#include <span>

#include "kv4/types.h"

namespace kv4 {

constexpr double kLambdaFloor = 1e-6;  // of the mean over the channels
constexpr double kLambdaPairShrinkage = 0.2;
constexpr double kLambdaExponent = 0.9 / 4;  // of the ratio of energies

// query_energy [channels]: E q_c^2 in any unit (lambda is normalised), key_energy alike:
// E (k_c - mu_c)^2. Both are drawn to their pairs and clamped from below at 1e-6 of their mean over the channels, so a
// channel that never moves gets a finite lambda. All-zero energies give 1. lambda [channels] out.
void lambda_from_energies(std::span<const double> query_energy, std::span<const double> key_energy,
                          std::span<float> lambda);

// energy[c] = mean over the unmasked rows of (k_c - mean k_c)^2, rows [count, channels] of
// `dtype` with channel stride 1; skip [count] or null. Returns the number of unmasked rows.
int centred_energy(const void* rows, DType dtype, std::int64_t stride, const std::uint8_t* skip, int count,
                   std::span<double> energy);

// energy[c] += x_c^2 of one row.
void add_energy(const void* row, DType dtype, std::span<float> energy);

}  // namespace kv4
