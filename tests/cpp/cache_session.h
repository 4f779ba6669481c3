// Random sessions that drive a cache and its reference model (cache_oracle.h) together, for every backend.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cache_oracle.h"
#include "cases.h"
#include "format/convert.h"
#include "kv4/cache.h"

namespace kv4::sessions {

inline constexpr oracle::Shape kShape{4, 2, 64};
// Relative to the largest output: the bound of the attention kernels.
inline constexpr double kTolerance = 1e-3;
// Codes of a page side that may lie within 1e-4 of a step from a decision boundary: 4,096 codes
// expect under one, and a page sealed from the wrong rows or lambda differs in hundreds.
inline constexpr int kBoundaryCodes = 5;

inline TensorView view(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
  return {x.data(), DType::f32, {b, h, t, d}, {h * t * d, t * d, d, 1}};
}
inline MutableTensorView into(std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
  return {x.data(), DType::f32, {b, h, t, d}, {h * t * d, t * d, d, 1}};
}

inline std::unique_ptr<Cache> make(const Recipe& recipe, const oracle::Shape& shape = kShape, int sliding_window = 0,
                                   DType dtype = DType::f32, const std::string& backend = "cpu") {
  CacheConfig config;
  config.recipe = recipe;
  config.dtype = dtype;
  config.kv_heads = shape.kv_heads;
  config.head_dim_k = config.head_dim_v = shape.dim;
  config.sliding_window = sliding_window;
  config.backend = backend;
  std::unique_ptr<Cache> cache;
  const Status status = Cache::create(config, &cache);
  EXPECT_TRUE(status.ok()) << status.message();
  return cache;
}

inline std::unique_ptr<Cache> fork_of(const Cache& cache) {
  std::unique_ptr<Cache> fork;
  const Status status = cache.clone(&fork);
  EXPECT_TRUE(status.ok()) << status.message();
  return fork;
}

// Lambda of a row's keys; empty if not learnt yet.
inline std::vector<float> lambda_of(const Cache& cache, int row) {
  std::vector<float> values;
  const Status status = cache.lambda(row, &values);
  EXPECT_TRUE(status.ok()) << status.message();
  return values;
}

// Memory of a cache's tensors and dtype of its rows: this base class is host memory and float32.
class Place {
 public:
  virtual ~Place() = default;
  virtual std::string backend() const { return "cpu"; }
  virtual DType dtype() const { return DType::f32; }
  // Integer steps in a page's largest weight, where that is coarser than kTolerance; otherwise 0.
  virtual double page_weights() const { return 0; }
  double epsilon() const { return dtype() == DType::f32 ? 0x1p-23 : dtype() == DType::f16 ? 0x1p-10 : 0x1p-7; }
  // Of a row's norm, by how much more its channels may differ when a page is opened again.
  virtual double reopened() const { return 0; }
  float round(float x) const {
    return dtype() == DType::f32 ? x : dtype() == DType::f16 ? f16_to_f32(f32_to_f16(x)) : bf16_to_f32(f32_to_bf16(x));
  }
  // Tensors of rows (rounded before) and of queries; they live until the next fetch.
  virtual TensorView rows(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
    return view(x, b, h, t, d);
  }
  virtual TensorView queries(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t,
                             std::int64_t d) {
    return view(x, b, h, t, d);
  }
  // A tensor whose content is in x after fetch.
  virtual MutableTensorView into(std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t,
                                 std::int64_t d) {
    return kv4::sessions::into(x, b, h, t, d);
  }
  virtual void fetch() {}
};

// A cache and one oracle per sequence.
class Session {
 public:
  Session(const Recipe& recipe, std::vector<std::int32_t> starts, std::uint64_t seed, int sliding_window = 0,
          Place* place = nullptr)
      : place_(place != nullptr ? *place : host_),
        cache_(make(recipe, kShape, sliding_window, place_.dtype(), place_.backend())), starts_(std::move(starts)),
        random_(seed), seed_(seed), window_(sliding_window) {
    for (std::int32_t start : starts_) oracles_.emplace_back(recipe, kShape, start);
  }

  void step(std::int64_t tokens) {
    const std::int64_t batch = static_cast<std::int64_t>(oracles_.size());
    const int d = kShape.dim;
    std::vector<float> k, v;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (int h = 0; h < kShape.kv_heads; ++h) {
        // The same channel statistics in every call, fresh tokens each time.
        const std::vector<float> all =
            cases::key_rows(static_cast<int>(tokens), d, 100 + static_cast<std::uint64_t>(h));
        const std::vector<float> noise = cases::normal_rows(tokens, d, random_.bits(), 0.5);
        for (std::size_t i = 0; i < all.size(); ++i) k.push_back(all[i] + noise[i]);
        const std::vector<float> values = cases::normal_rows(tokens, d, random_.bits());
        v.insert(v.end(), values.begin(), values.end());
      }
    }
    for (std::vector<float>* x : {&k, &v})
      for (float& value : *x) value = place_.round(value);
    const Status appended = cache_->append(place_.rows(k, batch, kShape.kv_heads, tokens, d),
                                           place_.rows(v, batch, kShape.kv_heads, tokens, d));
    ASSERT_TRUE(appended.ok()) << appended.message();
    const std::vector<float> q = cases::normal_rows(batch * kShape.q_heads * tokens, d, random_.bits(), 0.3);
    std::vector<float> out(static_cast<std::size_t>(batch) * kShape.q_heads * tokens * d, -77.0f);
    AttendArgs args;
    args.q = place_.queries(q, batch, kShape.q_heads, tokens, d);
    args.mask.start = starts_.data();
    for (int repeat = 0; repeat < 2; ++repeat) {  // a repeated call gives the same output
      const Status status = cache_->attend(args, place_.into(out, batch, kShape.q_heads, tokens, d));
      ASSERT_TRUE(status.ok()) << status.message();
      place_.fetch();
    }

    for (std::int64_t b = 0; b < batch; ++b) {
      oracle::Sequence& o = oracles_[static_cast<std::size_t>(b)];
      const std::int64_t before = o.length();
      std::vector<oracle::Token> rows(static_cast<std::size_t>(tokens));
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (int h = 0; h < kShape.kv_heads; ++h) {
          const std::size_t at = static_cast<std::size_t>(((b * kShape.kv_heads + h) * tokens + t) * d);
          rows[static_cast<std::size_t>(t)].k.insert(rows[static_cast<std::size_t>(t)].k.end(), k.begin() + at,
                                                     k.begin() + at + d);
          rows[static_cast<std::size_t>(t)].v.insert(rows[static_cast<std::size_t>(t)].v.end(), v.begin() + at,
                                                     v.begin() + at + d);
        }
      }
      o.append(rows);
      const auto query = [&](std::int64_t t) {
        std::vector<double> row;
        for (int h = 0; h < kShape.q_heads; ++h) {
          const std::size_t at = static_cast<std::size_t>(((b * kShape.q_heads + h) * tokens + t) * d);
          row.insert(row.end(), q.begin() + at, q.begin() + at + d);
        }
        return row;
      };
      for (std::int64_t t = 0; t < tokens; ++t) o.record(before + t, query(t));
      adopt_codes(b, o);
      if (::testing::Test::HasFatalFailure()) return;
      const std::int64_t stride = std::max<std::int64_t>(1, tokens / 4);
      for (std::int64_t t = tokens - 1; t >= 0; t -= stride) {
        std::vector<double> unit_error;
        const std::vector<double> want =
            o.attend(before + t, query(t), 1 / std::sqrt(static_cast<double>(d)), window_, &unit_error);
        double top = 1e-6;
        for (double x : want) top = std::max(top, std::abs(x));
        for (int h = 0; h < kShape.q_heads; ++h) {
          double allowed = kTolerance * top;
          if (place_.page_weights() > 0) allowed += 6 * unit_error[static_cast<std::size_t>(h)] / place_.page_weights();
          for (int c = 0; c < d; ++c)
            ASSERT_NEAR(out[static_cast<std::size_t>(((b * kShape.q_heads + h) * tokens + t) * d + c)],
                        want[static_cast<std::size_t>(h) * d + c], allowed)
                << "seed " << seed_ << ", sequence " << b << ", position " << before + t << ", head " << h
                << ", channel " << c;
        }
      }
    }
  }

  void adopt_codes(std::int64_t b, oracle::Sequence& o) {
    const std::int64_t evicted = std::max<std::int64_t>(0, cache_->first() - o.body()) / kPageTokens;
    for (int p = 0; p < cache_->page_count(static_cast<int>(b)); ++p) {
      for (int h = 0; h < kShape.kv_heads; ++h) {
        std::vector<std::uint8_t> k(kPageTokens * kShape.dim / 2), v(k.size());
        std::vector<std::uint16_t> k_scales(kPageTokens), v_scales(kPageTokens);
        ASSERT_TRUE(cache_->page_codes(static_cast<int>(b), p, h, k, v).ok());
        ASSERT_TRUE(cache_->page_scales(static_cast<int>(b), p, h, k_scales, v_scales).ok());
        for (const bool key : {true, false}) {
          const auto codes = reference::from_canonical(key ? k.data() : v.data(), kPageTokens, kShape.dim);
          ASSERT_LE(o.adopt(evicted + p, key, h, codes, key ? k_scales : v_scales), kBoundaryCodes)
              << "seed " << seed_ << ", sequence " << b << ", page " << evicted + p << ", head " << h
              << (key ? ", keys" : ", values");
        }
      }
    }
  }

  void crop(std::int64_t n) {
    const Status status = cache_->crop(n);
    ASSERT_TRUE(status.ok()) << status.message();
    for (oracle::Sequence& o : oracles_) o.crop(n);
    if (place_.dtype() != DType::f32) adopt_rows(n);
  }
  // A reopened page is held in the rows' dtype, rounded from inexact values.
  void adopt_rows(std::int64_t n) {
    const std::int64_t batch = static_cast<std::int64_t>(oracles_.size()), d = kShape.dim;
    std::vector<float> k(static_cast<std::size_t>(batch * kShape.kv_heads * n * d)), v(k.size());
    ASSERT_TRUE(cache_->dense_keys(0, n, place_.into(k, batch, kShape.kv_heads, n, d)).ok());
    ASSERT_TRUE(cache_->dense_values(0, n, place_.into(v, batch, kShape.kv_heads, n, d)).ok());
    place_.fetch();
    for (std::int64_t b = 0; b < batch; ++b) {
      oracle::Sequence& o = oracles_[static_cast<std::size_t>(b)];
      for (std::int64_t j = o.first_exact(); j < n; ++j)
        for (int h = 0; h < kShape.kv_heads; ++h) {
          const std::size_t at = static_cast<std::size_t>(((b * kShape.kv_heads + h) * n + j) * d);
          ASSERT_TRUE(o.adopt_row(j, h, k.data() + at, v.data() + at, place_.epsilon(), place_.reopened()))
              << "seed " << seed_ << ", sequence " << b << ", position " << j;
        }
    }
  }
  void select(const std::vector<std::int64_t>& rows) {
    ASSERT_TRUE(cache_->select(rows).ok());
    std::vector<oracle::Sequence> next;
    std::vector<std::int32_t> starts;
    for (std::int64_t r : rows)
      next.push_back(oracles_[static_cast<std::size_t>(r)]), starts.push_back(starts_[static_cast<std::size_t>(r)]);
    oracles_ = std::move(next);
    starts_ = std::move(starts);
  }
  void clone() { cache_ = fork_of(*cache_); }
  // Continues from a saved copy.
  void reload() {
    std::vector<std::byte> bytes;
    const Status saved = cache_->save([&](std::span<const std::byte> x) {
      bytes.insert(bytes.end(), x.begin(), x.end());
      return Status();
    });
    ASSERT_TRUE(saved.ok()) << saved.message();
    std::unique_ptr<Cache> fresh;
    ASSERT_TRUE(Cache::create(cache_->config(), &fresh).ok());
    std::size_t at = 0;
    const Status loaded = fresh->load([&](std::span<std::byte> to) {
      if (to.size() > bytes.size() - at) return Status(StatusCode::out_of_range, "bytes: expected more; got their end");
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), to.size(), to.begin());
      at += to.size();
      return Status();
    });
    ASSERT_TRUE(loaded.ok()) << loaded.message();
    cache_ = std::move(fresh);
  }

  Cache& cache() { return *cache_; }
  cases::Random& random() { return random_; }
  std::int64_t batch() const { return static_cast<std::int64_t>(oracles_.size()); }

 private:
  Place host_;
  Place& place_;
  std::unique_ptr<Cache> cache_;
  std::vector<std::int32_t> starts_;
  std::vector<oracle::Sequence> oracles_;
  cases::Random random_;
  std::uint64_t seed_;
  int window_;
};

inline Recipe with(int sinks, int window) {
  Recipe r;
  r.sinks = sinks;
  r.window = window;
  return r;
}

constexpr int kSeeds = 20;
inline void random_session(int seed, Place* place = nullptr) {
  const Recipe recipes[] = {Recipe(), with(0, 0), with(4, 0), with(1, 100), Recipe::exact()};
  Session s(recipes[seed % 5], {0, 7}, static_cast<std::uint64_t>(seed), 0, place);
  constexpr int kSizes[] = {1, 1, 1, 2, 5, 17, 63, 64, 65, 130};
  s.step(20);
  for (int i = 0; i < 14; ++i) {
    s.step(kSizes[s.random().below(10)]);
    if (::testing::Test::HasFatalFailure()) return;
    const int action = s.random().below(8);
    const std::int64_t length = s.cache().length();
    if (action == 0) s.crop(std::max<std::int64_t>(9, length - s.random().below(90)));
    if (action == 1) s.crop(length - s.random().below(6));
    if (action == 2)
      s.select({s.random().below(static_cast<int>(s.batch())), s.random().below(static_cast<int>(s.batch()))});
    if (action == 3) s.clone();
    if (action == 4) s.reload();
    if (::testing::Test::HasFatalFailure()) return;
  }
}

inline void crops_of_the_last_call(Place* place = nullptr) {
  // Speculative decoding: drafts of 8, partly rejected, across many page boundaries.
  Session s(Recipe(), {0}, 5, 0, place);
  s.step(100);
  for (int i = 0; i < 40; ++i) {
    s.step(8);
    s.crop(s.cache().length() - s.random().below(8));
    if (::testing::Test::HasFatalFailure()) return;
  }
  EXPECT_GT(s.cache().sealed_tokens(0), 64);
}

inline void sliding_window(Place* place = nullptr) {
  for (const Recipe& recipe : {Recipe(), with(4, 0), Recipe::exact()}) {
    Session s(recipe, {0}, 9, 150, place);
    std::size_t most = 0;
    s.step(40);
    for (int i = 0; i < 60; ++i) {
      s.step(1 + s.random().below(40));
      if (::testing::Test::HasFatalFailure()) return;
      if (s.cache().length() > 500) most = std::max(most, s.cache().nbytes());
    }
    EXPECT_GT(s.cache().length(), 900);
    EXPECT_GT(s.cache().first(), s.cache().length() - 150 - 2 * kPageTokens - 40);
    // All visible tokens, and at most two pages and one call's tokens more.
    EXPECT_LT(most, (150u + 2 * 64 + 41 + 64) * 2 * 2 * 64 * 4 * 9 / 8 + 65536);
    EXPECT_EQ(s.cache().crop(s.cache().first() + 10).code(), StatusCode::out_of_range);
  }
}

inline void recording(Place* place = nullptr) {
  Session s(Recipe(), {0}, 3, 100, place);
  s.cache().record_past(true);
  for (int i = 0; i < 12; ++i) s.step(50);
  EXPECT_EQ(s.cache().first(), 0);
  s.crop(300);
  s.step(3);
  s.cache().record_past(false);
  s.step(1);
  s.step(1);
  EXPECT_GT(s.cache().first(), 0);
}

}  // namespace kv4::sessions
