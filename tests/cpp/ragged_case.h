// One cache of many sequences beside caches of one sequence each, which get the same calls.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "save_case.h"

namespace kv4::saved {

inline constexpr int kGroup = 2;  // query heads per KV head

// Tensors are [1, heads, tokens, dim]; parts of several sequences follow each other on the axis of tokens.
struct Rows {
  std::vector<std::vector<float>> parts;  // [heads, tokens, dim] of each
  int heads, dim;
  std::vector<std::int64_t> tokens;
  std::vector<float> joined;

  std::int64_t total() const {
    std::int64_t sum = 0;
    for (const std::int64_t n : tokens) sum += n;
    return sum;
  }
  void add(std::int64_t n, std::uint64_t seed) {
    tokens.push_back(n);
    parts.push_back(cases::normal_rows(heads * n, dim, seed, 0.5));
  }
  TensorView view(std::size_t i) const { return view_of(parts[i].data(), tokens[i]); }
  TensorView view() {
    joined.clear();
    for (int h = 0; h < heads; ++h)
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const auto row = static_cast<std::size_t>(tokens[i] * dim);
        joined.insert(joined.end(), parts[i].begin() + static_cast<std::ptrdiff_t>(h * row),
                      parts[i].begin() + static_cast<std::ptrdiff_t>((h + 1) * row));
      }
    return view_of(joined.data(), total());
  }
  TensorView view_of(const float* data, std::int64_t n) const {
    return {data, DType::f32, {1, heads, n, dim}, {heads * n * dim, n * dim, dim, 1}};
  }
};

inline MutableTensorView into(std::vector<float>& out, std::int64_t heads, std::int64_t n, std::int64_t dim) {
  out.assign(static_cast<std::size_t>(heads * n * dim), -7.0f);
  return {out.data(), DType::f32, {1, heads, n, dim}, {heads * n * dim, n * dim, dim, 1}};
}

// A partial state of one batch, its rows one after another.
struct State {
  State(std::int64_t heads, std::int64_t n, std::int64_t dim)
      : o(static_cast<std::size_t>(heads * n * dim), -7.0f), m(static_cast<std::size_t>(heads * n)), l(m) {}
  PartialState view() { return {o.data(), m.data(), l.data()}; }
  std::vector<float> o, m, l;
};

// One cache of many sequences, and for each a cache that holds it alone.
class Ragged {
 public:
  Ragged(const CacheConfig& config, std::uint64_t seed) : config_(config), random_(seed), cache_(create(config)) {}

  cases::Random& random() { return random_; }
  Cache& cache() { return *cache_; }
  std::int64_t batch() const { return static_cast<std::int64_t>(alone_.size()); }
  std::int64_t length(std::int64_t row) const { return alone_[static_cast<std::size_t>(row)]->length(); }

  void add(int count) {
    ASSERT_TRUE(cache_->add(count).ok());
    for (int i = 0; i < count; ++i) {
      alone_.push_back(create(config_));
      starts_.push_back(random_.below(3) == 0 ? random_.below(20) : 0);
    }
  }
  void remove(const std::vector<std::int64_t>& rows) {
    ASSERT_TRUE(cache_->remove(rows).ok());
    std::vector<std::int64_t> sorted = rows;
    std::sort(sorted.rbegin(), sorted.rend());
    for (const std::int64_t row : sorted) {
      alone_.erase(alone_.begin() + row);
      starts_.erase(starts_.begin() + row);
    }
  }
  // Some rows in any order, each with the tokens that count() says.
  template <class Count>
  std::vector<RowCount> some(Count count) {
    std::vector<RowCount> rows;
    for (std::int64_t b = 0; b < batch(); ++b)
      if (random_.below(4) > 0) rows.push_back({b, count(b)});
    for (std::size_t i = rows.size(); i > 1; --i)
      std::swap(rows[i - 1], rows[static_cast<std::size_t>(random_.below(static_cast<int>(i)))]);
    return rows;
  }
  void append(const std::vector<RowCount>& rows) {
    Rows k{{}, config_.kv_heads, config_.head_dim_k, {}, {}}, v{{}, config_.kv_heads, config_.head_dim_v, {}, {}};
    for (const RowCount& each : rows) {
      k.add(each.tokens, random_.bits());
      v.add(each.tokens, random_.bits());
    }
    const Status status = cache_->append(rows, k.view(), v.view());
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::size_t i = 0; i < rows.size(); ++i) ASSERT_TRUE(alone(rows[i]).append(k.view(i), v.view(i)).ok());
    expect_equal();
  }
  // general: also a mask of random holes, the query's own token left.
  void attend(const std::vector<RowCount>& rows, bool general = false) {
    if (rows.empty()) return;
    const int heads = config_.kv_heads * kGroup;
    Rows q{{}, heads, config_.head_dim_k, {}, {}};
    std::vector<std::int32_t> starts;
    std::int64_t columns = 0;
    for (const RowCount& each : rows) {
      q.add(each.tokens, random_.bits());
      starts.push_back(static_cast<std::int32_t>(
          std::min<std::int64_t>(starts_[static_cast<std::size_t>(each.row)], length(each.row) - each.tokens)));
      columns = std::max(columns, length(each.row));
    }
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(q.total() * columns));
    for (std::uint8_t& x : mask) x = random_.below(9) > 0;
    std::vector<float> out, want;
    AttendArgs args;
    args.q = q.view();
    args.mask.start = starts.data();
    if (general) {
      args.mask.kind = Mask::General::boolean;
      args.mask.general = mask.data();
      args.mask.general_stride = {0, 0, columns, 1};
      args.mask.columns = columns;
    }
    const Status status = cache_->attend(rows, args, into(out, heads, q.total(), config_.head_dim_v));
    ASSERT_TRUE(status.ok()) << status.message();
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      AttendArgs own = args;
      own.q = q.view(i);
      own.mask.start = &starts[i];
      own.mask.general = mask.data() + begin * columns;
      ASSERT_TRUE(alone(rows[i]).attend(own, into(want, heads, rows[i].tokens, config_.head_dim_v)).ok());
      const std::int64_t dim = config_.head_dim_v;
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t j = 0; j < rows[i].tokens * dim; ++j)
          ASSERT_EQ(out[static_cast<std::size_t>((h * q.total() + begin) * dim + j)],
                    want[static_cast<std::size_t>(h * rows[i].tokens * dim + j)])
              << "row " << rows[i].row << ", head " << h << ", query " << j / dim << " of " << rows[i].tokens
              << ", length " << length(rows[i].row);
      begin += rows[i].tokens;
    }
    attend_partial(rows, args, q, starts, mask, columns);
  }
  // The state over a part of what each holds: below any position that does not cut into sealed tokens.
  void attend_partial(const std::vector<RowCount>& rows, const AttendArgs& args, Rows& q,
                      const std::vector<std::int32_t>& starts, const std::vector<std::uint8_t>& mask,
                      std::int64_t columns) {
    const int heads = config_.kv_heads * kGroup;
    const std::int64_t dim = config_.head_dim_v, total = q.total();
    std::vector<std::int64_t> upto;
    std::vector<State> want;
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < rows.size(); begin += rows[i++].tokens) {
      AttendArgs own = args;
      own.q = q.view(i);
      own.mask.start = &starts[i];
      own.mask.general = mask.data() + begin * columns;
      State& state = want.emplace_back(heads, rows[i].tokens, dim);
      upto.push_back(random_.below(static_cast<int>(length(rows[i].row)) + 1));
      if (alone(rows[i]).attend_partial(own, upto[i], state.view()).ok()) continue;
      upto[i] = length(rows[i].row);
      ASSERT_TRUE(alone(rows[i]).attend_partial(own, upto[i], state.view()).ok());
    }
    State got(heads, total, dim);
    const Status status = cache_->attend_partial(rows, args, upto, got.view());
    ASSERT_TRUE(status.ok()) << status.message();
    begin = 0;
    for (std::size_t i = 0; i < rows.size(); begin += rows[i++].tokens)
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t n = rows[i].tokens, at = h * total + begin, own = h * n;
        SCOPED_TRACE("row " + std::to_string(rows[i].row) + ", head " + std::to_string(h) + ", upto " +
                     std::to_string(upto[i]));
        ASSERT_TRUE(std::equal(got.m.begin() + at, got.m.begin() + at + n, want[i].m.begin() + own));
        ASSERT_TRUE(std::equal(got.l.begin() + at, got.l.begin() + at + n, want[i].l.begin() + own));
        ASSERT_TRUE(
            std::equal(got.o.begin() + at * dim, got.o.begin() + (at + n) * dim, want[i].o.begin() + own * dim));
      }
  }
  void crop(std::int64_t row, std::int64_t n) {
    const Status own = alone_[static_cast<std::size_t>(row)]->crop(n), status = cache_->crop(static_cast<int>(row), n);
    ASSERT_EQ(status.message(), own.message());
    expect_equal();
  }
  void erase(std::int64_t row, std::int64_t first, std::int64_t count) {
    const Status own = alone_[static_cast<std::size_t>(row)]->erase(0, first, count),
                 status = cache_->erase(static_cast<int>(row), first, count);
    ASSERT_EQ(status.message(), own.message());
    expect_equal();
  }
  void seal() {
    ASSERT_TRUE(cache_->seal().ok());
    for (auto& each : alone_) ASSERT_TRUE(each->seal().ok());
  }
  void reload() { cache_ = reloaded(*cache_); }
  // Sequences of a cache with pages of its own, or with the same.
  void extend(std::int64_t row) {
    if (batch() == 0 || length(row) == 0) return;
    ASSERT_TRUE(cache_->extend(*alone_[static_cast<std::size_t>(row)]).ok());
    alone_.push_back(sessions::fork_of(*alone_[static_cast<std::size_t>(row)]));
    starts_.push_back(starts_[static_cast<std::size_t>(row)]);
    expect_equal();
  }
  void extend_by_itself() {
    if (batch() > 2) return;
    ASSERT_TRUE(cache_->extend(random_.below(2) == 0 ? *cache_ : *sessions::fork_of(*cache_)).ok());
    for (std::size_t b = 0, batch = alone_.size(); b < batch; ++b) {
      alone_.push_back(sessions::fork_of(*alone_[b]));
      starts_.push_back(starts_[b]);
    }
    expect_equal();
  }
  void go_on_as_clone() {
    std::unique_ptr<Cache> copy;
    ASSERT_TRUE(cache_->clone(&copy).ok());
    if (random_.below(2) == 0) std::swap(copy, cache_);
    kept_ = std::move(copy);  // shares what the other goes on from
  }

 private:
  Cache& alone(const RowCount& each) { return *alone_[static_cast<std::size_t>(each.row)]; }
  void expect_equal() {
    ASSERT_EQ(cache_->batch(), static_cast<int>(alone_.size()));
    std::int64_t longest = 0;
    for (int b = 0; b < cache_->batch(); ++b) {
      const Cache& own = *alone_[static_cast<std::size_t>(b)];
      ASSERT_EQ(cache_->length(b), own.length());
      ASSERT_EQ(cache_->sealed_tokens(b), own.batch() == 0 ? 0 : own.sealed_tokens(0));
      if (own.batch() > 0) {
        ASSERT_EQ(cache_->exact_tokens(b), own.exact_tokens(0));
      }
      longest = std::max(longest, own.length());
    }
    ASSERT_EQ(cache_->length(), longest);
  }

  CacheConfig config_;
  cases::Random random_;
  std::unique_ptr<Cache> cache_, kept_;
  std::vector<std::unique_ptr<Cache>> alone_;
  std::vector<std::int32_t> starts_;
};

inline std::vector<Case> ragged_cases() {
  using sessions::with;
  return {{"default", config_of(Recipe(), 2, 64, 64), 2, {0}},
          {"no sinks, no window", config_of(with(0, 0), 1, 32, 32), 2, {0}},
          {"two head dims", config_of(with(1, 100), 1, 64, 32), 2, {0}},
          {"exact", config_of(Recipe::exact(), 2, 32, 32), 2, {0}},
          {"arrival", config_of(Recipe::paper(), 2, 32, 32), 2, {0}},
          {"sliding window", config_of(with(4, 64), 2, 32, 32, DType::f32, 170), 2, {0}},
          {"sliding window, exact", config_of(Recipe::exact(), 2, 32, 32, DType::f32, 40), 2, {0}}};
}

}  // namespace kv4::saved
