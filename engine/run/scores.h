// What logits say of a text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

namespace kv4::run {

// ln sum exp of a row, in double.
inline double log_sum_exp(std::span<const float> row) {
  const double most = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float x : row) sum += std::exp(x - most);
  return most + std::log(sum);
}

// -ln p of `token`, in nats.
inline double surprise(std::span<const float> row, std::int32_t token) { return log_sum_exp(row) - row[static_cast<std::size_t>(token)]; }

// sum p ln (p / q) of two rows of logits, in nats.
inline double divergence(std::span<const float> p, std::span<const float> q) {
  const double lp = log_sum_exp(p), lq = log_sum_exp(q);
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i] - lp) * ((p[i] - lp) - (q[i] - lq));
  return sum;
}

}  // namespace kv4::run
