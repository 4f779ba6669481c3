#include "reference/seal.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "format/convert.h"

namespace kv4::reference {
namespace {

// y = matrix x
void multiply(const std::vector<double>& matrix, const double* x, double* y, int d) {
  for (int i = 0; i < d; ++i) {
    double sum = 0;
    for (int c = 0; c < d; ++c) sum += matrix[static_cast<std::size_t>(i) * d + c] * x[c];
    y[i] = sum;
  }
}

struct Nearest {
  std::uint8_t code;
  double margin;
};

Nearest nearest(const Levels& levels, double y) {
  const int lowest = levels.negative_base == levels.half() ? 1 : 0;  // mid-tread has no use for code 0
  // Two codes meet at each boundary; a magnitude tie goes away from 0, y = 0 goes to code half().
  int code = lowest;
  double margin = std::numeric_limits<double>::infinity();
  for (int n = lowest + 1; n < levels.count(); ++n) {
    const double below = levels.table[n - 1], above = levels.table[n], boundary = (below + above) / 2;
    if (boundary >= 0 ? y >= boundary : y > boundary) code = n;
    margin = std::min(margin, std::abs(y - boundary) / (above - below));
  }
  return {static_cast<std::uint8_t>(code), margin};
}

// A page of `tokens` rows whose codes are all of 0.
Sealed zeros(const SideSpec& side, const Levels& levels, int tokens) {
  Sealed out;
  out.tokens = tokens;
  out.dim = side.dim;
  const std::size_t n = static_cast<std::size_t>(tokens) * side.dim;
  out.codes.assign(n, static_cast<std::uint8_t>(levels.half()));
  out.x.assign(n, 0.0);
  out.margin.assign(n, std::numeric_limits<double>::infinity());
  out.scales.assign(static_cast<std::size_t>(side.groups) * tokens, 0);
  out.scale_f64.assign(out.scales.size(), 0.0);
  out.step.assign(out.scales.size(), 0.0);
  return out;
}

// The path of least squared error through a chain whose place j has y(j): code(j, c) is told them.
template <class Y, class Code>
void best_path(const Levels& levels, int count, Y y, Code code) {
  constexpr int kStates = Levels::kStates;
  const double never = std::numeric_limits<double>::infinity();
  std::vector<std::array<std::pair<int, int>, kStates>> from(static_cast<std::size_t>(count));  // state, code
  std::array<double, kStates> cost;
  cost.fill(never);
  cost[0] = 0;
  for (int j = 0; j < count; ++j) {
    std::array<double, kStates> after;
    after.fill(never);
    for (int state = 0; state < kStates; ++state) {
      for (int c = 0; c < levels.count(); ++c) {
        const std::size_t next = static_cast<std::size_t>(levels.next_state(j, c));
        const double sum = cost[static_cast<std::size_t>(state)] + std::pow(y(j) - levels.level(j, state, c), 2);
        if (!(sum < after[next])) continue;
        after[next] = sum;
        from[static_cast<std::size_t>(j)][next] = {state, c};
      }
    }
    cost = after;
  }
  auto state = std::min_element(cost.begin(), cost.end()) - cost.begin();
  for (int j = count - 1; j >= 0; --j) {
    const auto [before, c] = from[static_cast<std::size_t>(j)][static_cast<std::size_t>(state)];
    code(j, static_cast<std::uint8_t>(c));
    state = before;
  }
}

// Codes of a trellis, by the steps of out->step; x in units of a step is 0 where that is 0.
void quantise_chains(const SideSpec& side, Sealed* out) {
  const auto at = [&](int j, int c) { return static_cast<std::size_t>(j) * side.dim + c; };
  const auto y = [&](int j, int c) {
    const double step = out->step[static_cast<std::size_t>(c / side.group) * out->tokens + j];
    return step > 0 ? out->x[at(j, c)] / step : 0.0;
  };
  if (side.values) {
    for (int c = 0; c < side.dim; ++c)
      for (int i = 0; i < 4; ++i)
        best_path(
            side.levels, (out->tokens - i + 3) / 4, [&](int j) { return y(4 * j + i, c); },
            [&](int j, std::uint8_t code) { out->codes[at(4 * j + i, c)] = code; });
    return;
  }
  for (int j = 0; j < out->tokens; ++j)
    for (int first = 0; first < side.dim; first += side.group)
      for (int i = 0; i < 4; ++i)
        best_path(
            side.levels, (side.group - i + 3) / 4, [&](int n) { return y(j, first + 4 * n + i); },
            [&](int n, std::uint8_t code) { out->codes[at(j, first + 4 * n + i)] = code; });
}

// Scales of all codes.
void fit(const SideSpec& side, Sealed* out) {
  const std::vector<double> level = levels_of(side, side.levels, out->codes.data(), out->tokens);
  for (std::size_t s = 0; s < out->step.size(); ++s) {
    if (!(out->step[s] > 0)) continue;
    const std::size_t g = s / static_cast<std::size_t>(out->tokens), j = s % static_cast<std::size_t>(out->tokens),
                      first = j * static_cast<std::size_t>(side.dim) + g * static_cast<std::size_t>(side.group);
    out->scale_f64[s] = least_squares_scale(out->x.data() + first, level.data() + first, side.group);
    out->scales[s] = f32_to_f16(static_cast<float>(out->scale_f64[s]));
  }
}

// Codes and scales of row j of out->x; of a trellis its steps alone.
void quantise(const SideSpec& side, const Levels& levels, int j, Sealed* out) {
  const StepRule rule = step_rule(levels, side.scale, side.group);
  for (int g = 0; g < side.groups; ++g) {
    const std::size_t first = static_cast<std::size_t>(j) * side.dim + static_cast<std::size_t>(g) * side.group;
    const double* xg = out->x.data() + first;
    double squares = 0, largest = 0;
    for (int c = 0; c < side.group; ++c) {
      squares += xg[c] * xg[c];
      largest = std::max(largest, std::abs(xg[c]));
    }
    const double step = rule.factor * (rule.by_largest ? largest : std::sqrt(squares / side.group));
    if (!(step > 0)) continue;
    const std::size_t s = static_cast<std::size_t>(g) * out->tokens + j;
    out->step[s] = step;
    if (levels.is_trellis()) continue;
    std::vector<double> level;
    for (int c = 0; c < side.group; ++c) {
      const Nearest best = nearest(levels, xg[c] / step);
      out->codes[first + c] = best.code;
      out->margin[first + c] = best.margin;
      level.push_back(levels.table[best.code]);
    }
    out->scale_f64[s] = side.scale == ScaleRule::abs_max ? step : least_squares_scale(xg, level.data(), side.group);
    out->scales[s] = f32_to_f16(static_cast<float>(out->scale_f64[s]));
  }
}

}  // namespace

std::vector<double> levels_of(const SideSpec& side, const Levels& levels, const std::uint8_t* codes, int tokens) {
  const auto at = [&](int j, int c) { return static_cast<std::size_t>(j) * side.dim + c; };
  std::vector<double> found(at(tokens, 0));
  for (int j = 0; j < tokens; ++j) {
    for (int c = 0; c < side.dim; ++c) {
      const int code = codes[at(j, c)];
      if (!levels.is_trellis()) {
        found[at(j, c)] = levels.table[static_cast<std::size_t>(code)];
        continue;
      }
      const int place = (side.values ? j : c % side.group) / 4;
      const int before = place == 0 ? 0 : codes[side.values ? at(j - 4, c) : at(j, c - 4)];
      found[at(j, c)] = levels.level(place, levels.next_state(place + 1, before), code);
    }
  }
  return found;
}

double least_squares_scale(const double* x, const double* level, int n) {
  double xl = 0, ll = 0;
  for (int c = 0; c < n; ++c) {
    xl += x[c] * level[c];
    ll += level[c] * level[c];
  }
  return ll > 0 ? xl / ll : 0;
}

Sealed seal(const SideSpec& side, const double* rows, int tokens, const std::uint8_t* skip, const double* lambda,
            const std::uint16_t* stored_mean) {
  const int d = side.dim;
  const std::vector<double> rotation = side.rotation->matrix_f64();
  const auto masked = [&](int j) { return skip != nullptr && skip[j] != 0; };
  const auto weight = [&](int c) { return lambda != nullptr ? lambda[c] : 1.0; };

  Sealed out = zeros(side, side.levels, tokens);
  // Rows are taken relative to their mean and the mean's own rotation is added back, so that a large
  // common bias costs no accuracy.
  std::vector<double> mu(d, 0.0), offset(d, 0.0), centred(d);
  if (side.mean) {
    int used = 0;
    for (int j = 0; j < tokens; ++j) used += !masked(j);
    for (int c = 0; c < d; ++c) {
      long double sum = 0;
      for (int j = 0; j < tokens; ++j)
        if (!masked(j)) sum += rows[static_cast<std::size_t>(j) * d + c];
      mu[c] = used > 0 ? static_cast<double>(sum / used) : 0.0;
      centred[c] = weight(c) * mu[c];
    }
    out.mean_f64.resize(d);
    out.mean.resize(d);
    multiply(rotation, centred.data(), out.mean_f64.data(), d);
    for (int i = 0; i < d; ++i) {
      out.mean[i] = stored_mean != nullptr ? stored_mean[i] : f32_to_f16(static_cast<float>(out.mean_f64[i]));
      offset[i] = out.mean_f64[i] - f16_to_f32(out.mean[i]);
    }
  }

  for (int j = 0; j < tokens; ++j) {
    if (masked(j)) continue;
    for (int c = 0; c < d; ++c) centred[c] = weight(c) * (rows[static_cast<std::size_t>(j) * d + c] - mu[c]);
    double* x = out.x.data() + static_cast<std::size_t>(j) * d;
    multiply(rotation, centred.data(), x, d);
    for (int i = 0; i < d; ++i) x[i] += offset[i];
    quantise(side, side.levels, j, &out);
  }
  if (side.levels.is_trellis()) {
    quantise_chains(side, &out);
    fit(side, &out);
  }
  return out;
}

std::vector<int> lightest(const double* values, int tokens, int dim, const std::uint8_t* skip, int count) {
  std::vector<int> order;
  std::vector<double> sums(tokens, 0.0);
  for (int j = 0; j < tokens; ++j) {
    if (skip != nullptr && skip[j] != 0) continue;
    for (int c = 0; c < dim; ++c) sums[j] += std::pow(values[static_cast<std::size_t>(j) * dim + c], 2);
    order.push_back(j);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sums[a] < sums[b]; });
  order.resize(std::min(order.size(), static_cast<std::size_t>(count)));
  return order;
}

Sealed second_rows(const SideSpec& side, const Levels& levels, const Sealed& sealed, const std::uint8_t* codes,
                   const std::uint16_t* scales, const std::vector<int>& places) {
  Sealed out = zeros(side, levels, static_cast<int>(places.size()));
  const std::vector<double> first = levels_of(side, side.levels, codes, sealed.tokens);
  for (int row = 0; row < out.tokens; ++row) {
    const std::size_t j = static_cast<std::size_t>(places[row]);
    for (int i = 0; i < side.dim; ++i) {
      const double scale = f16_to_f32(scales[static_cast<std::size_t>(i / side.group) * sealed.tokens + j]);
      const std::size_t at = j * static_cast<std::size_t>(side.dim) + i;
      out.x[static_cast<std::size_t>(row) * side.dim + i] = sealed.x[at] - scale * first[at];
    }
    quantise(side, levels, row, &out);
  }
  return out;
}

SecondRows read_second_rows(const PageSpec& spec, const std::uint8_t* slice) {
  const kv4_second_layout& at = spec.second;
  const int rows = static_cast<int>(at.rows);
  SecondRows out;
  out.levels = spec.second_levels;
  for (int row = 0; row < rows; ++row) {
    out.places.push_back(slice[at.places + row]);
    const std::vector<std::uint8_t> codes = from_canonical(slice + at.codes + row * at.row_bytes, 1, spec.key.dim);
    out.codes.insert(out.codes.end(), codes.begin(), codes.end());
  }
  out.scales.resize(static_cast<std::size_t>(rows) * spec.key.groups);
  if (rows > 0) std::memcpy(out.scales.data(), slice + at.scales, out.scales.size() * 2);  // else of no address
  return out;
}

std::vector<double> dequantise(const SideSpec& side, const std::uint8_t* codes, const std::uint16_t* scales,
                               const std::uint16_t* mean, int tokens, const double* lambda, const SecondRows* second) {
  const int d = side.dim;
  const std::vector<double> inverse = side.rotation->inverse_f64();
  const std::vector<double> level = levels_of(side, side.levels, codes, tokens);
  std::vector<double> out(static_cast<std::size_t>(tokens) * d), x(d);
  for (int j = 0; j < tokens; ++j) {
    for (int i = 0; i < d; ++i) {
      const double scale = f16_to_f32(scales[static_cast<std::size_t>(i / side.group) * tokens + j]);
      x[i] = scale * level[static_cast<std::size_t>(j) * d + i];
      if (mean != nullptr) x[i] += f16_to_f32(mean[i]);
    }
    for (std::size_t r = 0; second != nullptr && r < second->places.size(); ++r) {
      if (second->places[r] != j) continue;
      for (int i = 0; i < d; ++i)
        x[i] += f16_to_f32(second->scales[r * static_cast<std::size_t>(side.groups) + i / side.group]) *
                second->levels.table[second->codes[r * static_cast<std::size_t>(d) + i]];
    }
    double* row = out.data() + static_cast<std::size_t>(j) * d;
    multiply(inverse, x.data(), row, d);
    if (lambda != nullptr)
      for (int c = 0; c < d; ++c) row[c] /= lambda[c];
  }
  return out;
}

std::vector<std::uint8_t> to_canonical(const std::vector<std::uint8_t>& codes, int bits) {
  std::vector<std::uint8_t> packed((codes.size() * static_cast<std::size_t>(bits) + 7) / 8);
  for (std::size_t i = 0; i < codes.size() * static_cast<std::size_t>(bits); ++i) {
    const int bit = codes[i / bits] >> (i % bits) & 1;
    packed[i / 8] = static_cast<std::uint8_t>(packed[i / 8] | bit << (i % 8));
  }
  return packed;
}

std::vector<std::uint8_t> from_canonical(const std::uint8_t* packed, int tokens, int dim, int bits) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(tokens) * dim);
  for (std::size_t i = 0; i < codes.size() * static_cast<std::size_t>(bits); ++i) {
    const int bit = packed[i / 8] >> (i % 8) & 1;
    codes[i / bits] = static_cast<std::uint8_t>(codes[i / bits] | bit << (i % bits));
  }
  return codes;
}

}  // namespace kv4::reference
