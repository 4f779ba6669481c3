#include "moments/lambda.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "format/convert.h"

namespace kv4 {
namespace {

double clamp_floor(std::span<const double> energy) {
  double sum = 0;
  for (double e : energy) sum += e;
  return kLambdaFloor * sum / static_cast<double>(energy.size());
}

template <class F>
void for_each_channel(const void* row, DType dtype, int channels, F&& f) {
  if (dtype == DType::f32) {
    for (int c = 0; c < channels; ++c) f(c, static_cast<const float*>(row)[c]);
  } else if (dtype == DType::f16) {
    for (int c = 0; c < channels; ++c) f(c, f16_to_f32(static_cast<const std::uint16_t*>(row)[c]));
  } else {
    for (int c = 0; c < channels; ++c) f(c, bf16_to_f32(static_cast<const std::uint16_t*>(row)[c]));
  }
}

// `energy`, shrunk towards its rotary pair and clamped from below; empty if there is none.
std::vector<double> shrunk(std::span<const double> energy) {
  const double floor = clamp_floor(energy);
  std::vector<double> out;
  if (!(floor > 0)) return out;
  const std::size_t half = energy.size() / 2;
  out.assign(energy.begin(), energy.end());
  for (std::size_t c = 0; c < half; ++c) {
    const double pair = (energy[c] + energy[c + half]) / 2;
    out[c] += kLambdaPairShrinkage * (pair - out[c]);
    out[c + half] += kLambdaPairShrinkage * (pair - out[c + half]);
  }
  for (double& e : out) e = std::max(e, floor);
  return out;
}

}  // namespace

void lambda_from_energies(std::span<const double> query_energy, std::span<const double> key_energy,
                          std::span<float> lambda) {
  const std::vector<double> query = shrunk(query_energy), key = shrunk(key_energy);
  if (query.empty() || key.empty()) {
    std::fill(lambda.begin(), lambda.end(), 1.0f);
    return;
  }
  const auto log_lambda = [&](std::size_t c) { return kLambdaExponent * std::log(query[c] / key[c]); };
  double mean_log = 0;
  for (std::size_t c = 0; c < lambda.size(); ++c) mean_log += log_lambda(c);
  mean_log /= static_cast<double>(lambda.size());
  for (std::size_t c = 0; c < lambda.size(); ++c) lambda[c] = static_cast<float>(std::exp(log_lambda(c) - mean_log));
}

int centred_energy(const void* rows, DType dtype, std::int64_t stride, const std::uint8_t* skip, int count,
                   std::span<double> energy) {
  const int channels = static_cast<int>(energy.size());
  const auto row = [&](int j) {
    return static_cast<const std::byte*>(rows) + j * stride * static_cast<std::int64_t>(size_of(dtype));
  };
  std::vector<double> mean(energy.size(), 0.0);
  int used = 0;
  for (int j = 0; j < count; ++j) {
    if (skip != nullptr && skip[j] != 0) continue;
    ++used;
    for_each_channel(row(j), dtype, channels, [&](int c, float x) { mean[c] += x; });
  }
  std::fill(energy.begin(), energy.end(), 0.0);
  if (used == 0) return 0;
  for (double& m : mean) m /= used;
  for (int j = 0; j < count; ++j) {
    if (skip != nullptr && skip[j] != 0) continue;
    for_each_channel(row(j), dtype, channels, [&](int c, float x) { energy[c] += (x - mean[c]) * (x - mean[c]); });
  }
  for (double& e : energy) e /= used;
  return used;
}

void add_energy(const void* row, DType dtype, std::span<float> energy) {
  for_each_channel(row, dtype, static_cast<int>(energy.size()), [&](int c, float x) { energy[c] += x * x; });
}

}  // namespace kv4
