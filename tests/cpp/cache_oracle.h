// Reference model of one sequence, written only from the definition of what a query sees:
// dense rows, float64, reference sealing. Slow and short.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include <gtest/gtest.h>

#include "kv4/cache.h"
#include "reference/seal.h"

namespace kv4::oracle {

struct Shape {
  int q_heads, kv_heads, dim;
};

// Keys and values of one token, [kv_heads, dim] each.
struct Token {
  std::vector<double> k, v;
  bool masked = false;  // padding
};

class Sequence {
 public:
  Sequence(const Recipe& recipe, Shape shape, int start) : recipe_(recipe), shape_(shape), start_(start) {
    key_ = side(recipe.key);
    value_ = side(recipe.value);
  }

  std::int64_t body() const { return start_ + recipe_.sinks; }  // position of page 0
  std::int64_t length() const { return static_cast<std::int64_t>(tokens_.size()); }

  // Appends one call's tokens, before its queries. Pages due at the old length lose their exact rows.
  void append(const std::vector<Token>& tokens) {
    released_ = std::max(released_, due(length()));
    for (std::int64_t p = 0; p < released_; ++p) seal(p);
    fixed_for_good_ |= released_ > 0;
    stepwise_ = static_cast<std::int64_t>(tokens.size()) <= kPageTokens;
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  }

  // q [q_heads, dim] of the query at `position`.
  void record(std::int64_t position, const std::vector<double>& q) {
    if (recipe_.key.lambda != LambdaMode::automatic || position < start_ ||
        position >= body() + recipe_.window + kPageTokens)
      return;
    if ((position - start_) % 8 != 7) return;
    energy_[position] = q;
  }

  // Output [q_heads, dim] of the query at `position`; a window of 0 sees everything. `unit_error` [q_heads]: standard
  // deviation of the outputs of a head where the weights of each page are rounded to whole numbers of which the largest
  // is 1, an error that falls with that number. A weight there is p times the value's scale, some 1/47 of the value's
  // rms.
  std::vector<double> attend(std::int64_t position, const std::vector<double>& q, double scale, std::int64_t window = 0,
                             std::vector<double>* unit_error = nullptr) {
    if (unit_error != nullptr) unit_error->assign(static_cast<std::size_t>(shape_.q_heads), 0.0);
    const std::int64_t pages = visible_pages(position);
    std::vector<double> out(static_cast<std::size_t>(shape_.q_heads) * shape_.dim, 0.0);
    const int group = shape_.q_heads / shape_.kv_heads;
    for (int h = 0; h < shape_.q_heads; ++h) {
      std::vector<double> score;
      std::vector<std::int64_t> seen;
      for (std::int64_t j = start_; j <= position; ++j) {
        if (window > 0 && j <= position - window) continue;
        const double* k = held(j, pages, true, h / group);
        double s = 0;
        for (int c = 0; c < shape_.dim; ++c) s += q[static_cast<std::size_t>(h) * shape_.dim + c] * k[c];
        score.push_back(s * scale);
        seen.push_back(j);
      }
      if (seen.empty()) continue;
      const double top = *std::max_element(score.begin(), score.end());
      double sum = 0;
      for (double& s : score) sum += s = std::exp(s - top);
      std::map<std::int64_t, double> largest;  // of each page, the value's rms in it
      for (std::size_t i = 0; i < seen.size(); ++i) {
        const double* v = held(seen[i], pages, false, h / group);
        double energy = 0;
        for (int c = 0; c < shape_.dim; ++c) {
          out[static_cast<std::size_t>(h) * shape_.dim + c] += score[i] / sum * v[c];
          energy += v[c] * v[c] / shape_.dim;
        }
        if (const std::int64_t page = page_of(seen[i]); page >= 0 && page < pages)
          largest[page] = std::max(largest[page], score[i] / sum * std::sqrt(energy));
      }
      if (unit_error == nullptr) continue;
      for (const auto& [page, weight] : largest) (*unit_error)[static_cast<std::size_t>(h)] += weight * weight;
      // Rounding errors of 64 tokens, each times the rms of values of equal scale.
      (*unit_error)[static_cast<std::size_t>(h)] =
          std::sqrt((*unit_error)[static_cast<std::size_t>(h)] * kPageTokens / 12);
    }
    return out;
  }

  // Takes over the codes [64, dim] and the scales [64] that the cache holds for a page; returns how many codes
  // differ, or all of them where the scale of equal codes is more than one unit in its last place off. A code next to a
  // decision boundary may be one level off and a scale one unit (docs/format.md), which test_seal holds.
  int adopt(std::int64_t page, bool key, int head, const std::vector<std::uint8_t>& codes,
            const std::vector<std::uint16_t>& scales) {
    for (std::int64_t p = 0; p <= page; ++p) seal(p);
    Half& half = key ? pages_.at(page).k : pages_.at(page).v;
    reference::Sealed& mine = half.sealed[static_cast<std::size_t>(head)];
    int different = 0;
    for (std::size_t i = 0; i < codes.size(); ++i) different += mine.codes[i] != codes[i];
    const std::size_t dim = codes.size() / scales.size();
    for (std::size_t i = 0; i < scales.size(); ++i) {  // positive halves are ordered as their bits are
      // A scale is that of its row's codes: where one of them is another, so is the scale.
      const auto row = static_cast<std::ptrdiff_t>(i * dim), end = row + static_cast<std::ptrdiff_t>(dim);
      const bool same = std::equal(codes.begin() + row, codes.begin() + end, mine.codes.begin() + row);
      if (same && std::abs(mine.scales[i] - scales[i]) > 1) return static_cast<int>(codes.size());
    }
    if (different > 0 || mine.scales != scales) {
      mine.codes = codes;
      mine.scales = scales;
      dequantise(half, key);
    }
    return different;
  }

  // End of the pages without exact rows.
  std::int64_t first_exact() const { return body() + released_ * kPageTokens; }
  // Adopts an exact row [dim] of one head if each channel, before the division by lambda, is within one `epsilon` of
  // the expected one and `of_row` of the row's norm; else returns false.
  bool adopt_row(std::int64_t position, int head, const float* k, const float* v, double epsilon, double of_row) {
    Token& token = tokens_[static_cast<std::size_t>(position)];
    const std::size_t first = static_cast<std::size_t>(head) * static_cast<std::size_t>(shape_.dim);
    const auto weight = [&](int c) { return lambda_.empty() ? 1.0 : lambda_[first + static_cast<std::size_t>(c)]; };
    double of_key = 0, of_value = 0;
    for (int c = 0; c < shape_.dim; ++c) {
      const std::size_t at = first + static_cast<std::size_t>(c);
      of_key += std::pow(token.k[at] * weight(c), 2);
      of_value += std::pow(token.v[at], 2);
    }
    of_key = of_row * std::sqrt(of_key);
    of_value = of_row * std::sqrt(of_value);
    for (int c = 0; c < shape_.dim; ++c) {
      const std::size_t at = first + static_cast<std::size_t>(c);
      if (position >= start_ &&
          (std::abs(token.k[at] - k[c]) > epsilon * (std::abs(token.k[at]) + 1e-3) + of_key / weight(c) ||
           std::abs(token.v[at] - v[c]) > epsilon * (std::abs(token.v[at]) + 1e-3) + of_value))
        return false;
      token.k[at] = k[c];
      token.v[at] = v[c];
    }
    return true;
  }

  void crop(std::int64_t n) {
    for (auto it = energy_.begin(); it != energy_.end();) it = it->first >= n ? energy_.erase(it) : std::next(it);
    if (n < body()) {
      released_ = 0;
    } else if (n < body() + released_ * kPageTokens) {
      const std::int64_t page = (n - body()) / kPageTokens;
      seal(page);
      for (std::int64_t j = body() + page * kPageTokens; j < n; ++j) {
        for (int h = 0; h < shape_.kv_heads; ++h) {
          for (int c = 0; c < shape_.dim; ++c) {  // held in float32 again
            tokens_[j].k[h * shape_.dim + c] = static_cast<float>(held(j, page + 1, true, h)[c]);
            tokens_[j].v[h * shape_.dim + c] = static_cast<float>(held(j, page + 1, false, h)[c]);
          }
        }
      }
      released_ = page;
    }
    // Pages not released yet are sealed anew when they are due.
    pages_.erase(pages_.lower_bound(released_), pages_.end());
    if (pages_.empty() && released_ == 0 && !fixed_for_good_) lambda_.clear();
    tokens_.resize(static_cast<std::size_t>(n));
  }

 private:
  struct Half {
    std::vector<reference::Sealed> sealed;  // [kv_heads]
    std::vector<double> rows;               // [kv_heads, 64, dim] dequantised
  };
  struct Page {
    Half k, v;
  };

  SideSpec side(const SideRecipe& r) const {
    SideSpec s;
    s.dim = shape_.dim;
    s.group = r.group > 0 ? r.group : shape_.dim;
    s.groups = s.dim / s.group;
    s.levels = levels(r.levels);
    s.scale = r.scale;
    s.mean = r.mean;
    EXPECT_TRUE(Rotation::srft(s.dim, r.seed, &s.rotation).ok());
    return s;
  }
  std::int64_t due(std::int64_t n) const {
    if (recipe_.seal == SealMode::never) return 0;
    return std::max<std::int64_t>(0, n - body() - recipe_.window) / kPageTokens;
  }
  std::int64_t visible_pages(std::int64_t position) const { return std::max(released_, stepwise_ ? due(position) : 0); }

  std::int64_t page_of(std::int64_t j) const { return j < body() ? -1 : (j - body()) / kPageTokens; }

  const double* held(std::int64_t j, std::int64_t pages, bool key, int head) {
    const std::int64_t page = page_of(j);
    if (page < 0 || page >= pages)
      return (key ? tokens_[j].k : tokens_[j].v).data() + static_cast<std::size_t>(head) * shape_.dim;
    for (std::int64_t p = 0; p <= page; ++p) seal(p);
    const std::int64_t row = (j - body()) % kPageTokens;
    const Page& held_page = pages_.at(page);
    return (key ? held_page.k : held_page.v).rows.data() +
           (static_cast<std::size_t>(head) * kPageTokens + row) * shape_.dim;
  }

  const double* lambda(bool key, int head) const {
    return key && !lambda_.empty() ? lambda_.data() + static_cast<std::size_t>(head) * shape_.dim : nullptr;
  }

  void dequantise(Half& half, bool key) const {
    half.rows.clear();
    for (int h = 0; h < shape_.kv_heads; ++h) {
      const reference::Sealed& s = half.sealed[static_cast<std::size_t>(h)];
      const std::vector<double> rows = reference::dequantise(key ? key_ : value_, s.codes.data(), s.scales.data(),
                                                             s.mean.empty() ? nullptr : s.mean.data(), kPageTokens,
                                                             lambda(key, h));
      half.rows.insert(half.rows.end(), rows.begin(), rows.end());
    }
  }

  void seal(std::int64_t page) {
    if (pages_.count(page) > 0) return;
    if (page == 0 && recipe_.key.lambda == LambdaMode::automatic && lambda_.empty()) fix_lambda();
    Page fresh;
    for (const bool key : {true, false}) {
      Half& half = key ? fresh.k : fresh.v;
      for (int h = 0; h < shape_.kv_heads; ++h) {
        std::vector<double> rows;
        for (int t = 0; t < kPageTokens; ++t) {
          const Token& token = tokens_[static_cast<std::size_t>(body() + page * kPageTokens + t)];
          const std::vector<double>& x = key ? token.k : token.v;
          rows.insert(rows.end(), x.begin() + h * shape_.dim, x.begin() + (h + 1) * shape_.dim);
        }
        half.sealed.push_back(reference::seal(key ? key_ : value_, rows.data(), kPageTokens, nullptr, lambda(key, h)));
      }
      dequantise(half, key);
    }
    pages_[page] = std::move(fresh);
  }

  // (E q^2 / E (k - mean)^2)^(0.9/4), geometric mean 1. Moments: of every eighth query before the first page is
  // due; of the keys of that page and of whole 64s of the window, each about its own mean. Both drawn by
  // a fifth to the mean of channels c and c + dim/2, and clamped at 1e-6 of their channel mean.
  void fix_lambda() {
    const int group = shape_.q_heads / shape_.kv_heads, dim = shape_.dim;
    lambda_.assign(static_cast<std::size_t>(shape_.kv_heads) * dim, 1.0);
    if (energy_.empty()) return;
    for (int h = 0; h < shape_.kv_heads; ++h) {
      std::vector<double> q2(dim, 0.0), k2(dim, 0.0);
      for (const auto& [position, q] : energy_)
        for (int g = 0; g < group; ++g)
          for (int c = 0; c < dim; ++c) q2[c] += std::pow(q[(static_cast<std::size_t>(h) * group + g) * dim + c], 2);
      for (int block = 0; block <= recipe_.window / kPageTokens; ++block) {
        const auto k = [&](int t, int c) {
          return tokens_[static_cast<std::size_t>(body() + block * kPageTokens + t)]
              .k[static_cast<std::size_t>(h) * dim + c];
        };
        for (int c = 0; c < dim; ++c) {
          double mean = 0;
          for (int t = 0; t < kPageTokens; ++t) mean += k(t, c) / kPageTokens;
          for (int t = 0; t < kPageTokens; ++t) k2[c] += std::pow(k(t, c) - mean, 2);
        }
      }
      const auto prepared = [&](const std::vector<double>& e) {
        double mean = 0;
        for (double x : e) mean += x / dim;
        std::vector<double> out(dim);
        for (int c = 0; c < dim; ++c)
          out[c] = std::max(1e-6 * mean, 0.8 * e[c] + 0.1 * (e[c] + e[(c + dim / 2) % dim]));
        return out;
      };
      const std::vector<double> q = prepared(q2), k = prepared(k2);
      double log_mean = 0;
      for (int c = 0; c < dim; ++c) log_mean += 0.225 * std::log(q[c] / k[c]) / dim;
      for (int c = 0; c < dim; ++c)
        lambda_[static_cast<std::size_t>(h) * dim + c] =
            static_cast<float>(std::exp(0.225 * std::log(q[c] / k[c]) - log_mean));
    }
  }

  Recipe recipe_;
  Shape shape_;
  int start_;
  SideSpec key_, value_;
  std::vector<Token> tokens_;
  std::map<std::int64_t, std::vector<double>> energy_;
  std::vector<double> lambda_;
  std::map<std::int64_t, Page> pages_;
  std::int64_t released_ = 0;  // pages without exact rows
  bool stepwise_ = true;
  bool fixed_for_good_ = false;  // a released page was sealed with this lambda
};

}  // namespace kv4::oracle
