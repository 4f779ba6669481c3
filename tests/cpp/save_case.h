// Saved caches: bytes in memory, a cache's twin, and the list of what is saved.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "cache_session.h"
#include "kv4/cache.h"

namespace kv4::saved {

using Bytes = std::vector<std::byte>;

inline Bytes save(const Cache& cache) {
  Bytes bytes;
  const Status status = cache.save([&](std::span<const std::byte> x) {
    bytes.insert(bytes.end(), x.begin(), x.end());
    return Status();
  });
  EXPECT_TRUE(status.ok()) << status.message();
  return bytes;
}

inline const char* kEnd = "file: expected more bytes; got its end";

// Loads from the front of `bytes`; `used`: how many of them were read.
inline Status load(Cache& cache, std::span<const std::byte> bytes, std::size_t* used = nullptr) {
  std::size_t at = 0;
  const Status status = cache.load([&](std::span<std::byte> to) {
    if (to.size() > bytes.size() - at) return Status(StatusCode::out_of_range, kEnd);
    std::memcpy(to.data(), bytes.data() + at, to.size());
    at += to.size();
    return Status();
  });
  if (used != nullptr) *used = at;
  return status;
}

inline std::unique_ptr<Cache> create(const CacheConfig& config) {
  std::unique_ptr<Cache> cache;
  const Status status = Cache::create(config, &cache);
  EXPECT_TRUE(status.ok()) << status.message();
  return cache;
}

inline std::unique_ptr<Cache> reloaded(const Cache& cache) {
  const Bytes bytes = save(cache);
  auto fresh = create(cache.config());
  std::size_t used = 0;
  const Status status = load(*fresh, bytes, &used);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(used, bytes.size());
  EXPECT_EQ(save(*fresh), bytes);  // all of it came back
  return fresh;
}

struct Case {
  const char* name;
  CacheConfig config;
  int group = 2;                           // query heads per KV head
  std::vector<std::int32_t> starts = {0};  // first token of each sequence; what comes before is padding
};

inline CacheConfig config_of(const Recipe& recipe, int kv_heads, int dim_k, int dim_v, DType dtype = DType::f32,
                             int sliding_window = 0) {
  CacheConfig c;
  c.recipe = recipe;
  c.dtype = dtype;
  c.kv_heads = kv_heads;
  c.head_dim_k = dim_k;
  c.head_dim_v = dim_v;
  c.sliding_window = sliding_window;
  return c;
}

// Recipes, head dims and dtypes, batches with ragged padding, sliding windows.
inline std::vector<Case> every_case() {
  using sessions::with;
  std::vector<Case> list;
  int n = 0;
  for (const int dim : cases::kHeadDims) {
    const DType dtype = cases::kEveryDType[n % 3];
    list.push_back({"head dims", config_of(Recipe(), 1 + n % 2, dim, dim, dtype), 1 + n % 3, {0, 7, 3}});
    ++n;
  }
  list.push_back({"no sinks, no window", config_of(with(0, 0), 2, 64, 64), 2, {0, 70}});
  list.push_back({"no window", config_of(with(4, 0), 2, 64, 64, DType::f16), 2, {5}});
  list.push_back({"a window of no whole pages", config_of(with(1, 100), 2, 64, 64, DType::bf16), 3, {0, 9}});
  list.push_back({"two head dims", config_of(Recipe(), 2, 128, 64), 2, {0, 1}});
  list.push_back({"exact", config_of(Recipe::exact(), 2, 64, 64, DType::f16), 2, {0, 7}});
  list.push_back({"exact, odd head dims", config_of(Recipe::exact(), 2, 21, 7), 2, {0, 7}});
  list.push_back({"arrival", config_of(Recipe::paper(), 2, 64, 80), 2, {0, 7}});
  list.push_back({"sliding window", config_of(Recipe(), 2, 64, 64, DType::f32, 150), 2, {0, 7}});
  list.push_back({"sliding window, no window", config_of(with(4, 0), 2, 64, 64, DType::f32, 30), 2, {0}});
  list.push_back({"sliding window, no sinks", config_of(with(0, 64), 2, 64, 64, DType::f32, 150), 2, {0, 20}});
  list.push_back({"sliding window, exact", config_of(Recipe::exact(), 2, 64, 64, DType::bf16, 100), 2, {0, 7}});
  list.push_back({"sliding window, arrival", config_of(Recipe::paper(), 2, 64, 64, DType::f32, 100), 2, {0}});
  Recipe other;
  other.key = {.rotation = RotationKind::householder,
               .reflectors = 5,
               .seed = 9,
               .group = 32,
               .levels = LevelKind::uniform,
               .scale = ScaleRule::abs_max,
               .mean = true,
               .lambda = LambdaMode::given};
  other.value = {.rotation = RotationKind::dense, .group = 64, .lambda = LambdaMode::given};
  Case given{"given lambda and matrix", config_of(other, 2, 64, 128), 2, {0, 7}};
  for (int i = 0; i < 2 * 64; ++i) given.config.lambda_k.push_back(0.5f + static_cast<float>(i % 7));
  for (int i = 0; i < 2 * 128; ++i) given.config.lambda_v.push_back(0.5f + static_cast<float>(i % 5));
  for (int i = 0; i < 128 * 128; ++i) given.config.matrix_v.push_back(i % 129 == 0 ? 1.0f : i % 7 == 0 ? 0.01f : 0.0f);
  list.push_back(given);
  Recipe plain;
  plain.key = {.rotation = RotationKind::srht, .mean = false, .lambda = LambdaMode::none};
  plain.value = {.rotation = RotationKind::identity};
  Recipe widths;
  widths.key.bits = 3;
  widths.value.bits = 6;
  list.push_back({"keys of 3 bits, values of 6", config_of(widths, 2, 64, 80, DType::f16), 2, {0, 7}});
  widths.key.bits = 8;
  widths.value.bits = 2;
  list.push_back({"keys of 8 bits, values of 2", config_of(widths, 2, 96, 64, DType::f32, 150), 2, {0, 7}});
  Recipe refined;
  refined.refined = 1;
  list.push_back({"refined keys", config_of(refined, 2, 64, 80, DType::f16), 2, {0, 7}});
  Recipe trellis = Recipe::trellis();
  list.push_back({"a trellis", config_of(trellis, 2, 64, 80, DType::f16), 2, {0, 7}});
  trellis.key.bits = 2;
  trellis.value.bits = 3;
  trellis.refined = 1;
  list.push_back({"a trellis of 2 and 3 bits", config_of(trellis, 2, 96, 64, DType::f32, 150), 2, {0, 7}});
  refined = other;
  refined.refined = 2;
  Case given_refined{"two refined keys, given lambda", config_of(refined, 2, 64, 128, DType::f32, 150), 2, {0, 7}};
  given_refined.config.lambda_k = given.config.lambda_k;
  given_refined.config.lambda_v = given.config.lambda_v;
  given_refined.config.matrix_v = given.config.matrix_v;
  list.push_back(given_refined);
  Recipe arrival = Recipe::paper();
  arrival.key.levels = arrival.value.levels = LevelKind::lloyd_max;
  arrival.key.bits = 6;
  arrival.value.bits = 3;
  list.push_back({"arrival, keys of 6 bits, values of 3", config_of(arrival, 2, 64, 80), 2, {0, 7}});
  list.push_back({"no lambda, no mean", config_of(plain, 1, 96, 96, DType::f16), 4, {0}});
  return list;
}

// Two caches that get the same; the second is saved and loaded in between.
class Twins {
 public:
  explicit Twins(const Case& c, std::uint64_t seed) : case_(c), starts_(c.starts), random_(seed) {
    for (auto& cache : caches_) cache = create(c.config);
  }

  void append(std::int64_t tokens) {
    const std::vector<std::byte> k = rows(tokens, case_.config.head_dim_k), v = rows(tokens, case_.config.head_dim_v);
    const auto view = [&](const std::vector<std::byte>& x, std::int64_t d) {
      const std::int64_t h = case_.config.kv_heads;
      return TensorView{x.data(), case_.config.dtype, {batch(), h, tokens, d}, {h * tokens * d, tokens * d, d, 1}};
    };
    for (auto& cache : caches_) {
      const Status status = cache->append(view(k, case_.config.head_dim_k), view(v, case_.config.head_dim_v));
      ASSERT_TRUE(status.ok()) << status.message();
    }
    newest_ = tokens;
  }

  // Equal outputs, bit for bit, or equal refusals; `masked`: whether padding is.
  void attend(bool masked = true) {
    if (newest_ == 0) return;
    const int heads = case_.config.kv_heads * case_.group;
    const std::int64_t dk = case_.config.head_dim_k, dv = case_.config.head_dim_v;
    const std::vector<float> q =
        cases::normal_rows(batch() * heads * newest_, static_cast<int>(dk), random_.bits(), 0.3);
    AttendArgs args;
    args.q = {q.data(), DType::f32, {batch(), heads, newest_, dk}, {heads * newest_ * dk, newest_ * dk, dk, 1}};
    if (masked) args.mask.start = starts_.data();
    std::vector<float> out[2];
    Status status[2];
    for (int i = 0; i < 2; ++i) {
      out[i].assign(static_cast<std::size_t>(batch() * heads * newest_ * dv), -77.0f);
      status[i] = caches_[i]->attend(
          args,
          {out[i].data(), DType::f32, {batch(), heads, newest_, dv}, {heads * newest_ * dv, newest_ * dv, dv, 1}});
    }
    ASSERT_EQ(status[1].message(), status[0].message());
    if (masked) {
      ASSERT_TRUE(status[0].ok()) << status[0].message();
    }
    ASSERT_EQ(std::memcmp(out[0].data(), out[1].data(), out[0].size() * sizeof(float)), 0) << "length " << length();
  }

  void crop(std::int64_t n) {
    const Status first = caches_[0]->crop(n), second = caches_[1]->crop(n);
    ASSERT_EQ(first.message(), second.message());
    if (first.ok()) newest_ = std::min(newest_, n);
  }
  void select(const std::vector<std::int64_t>& rows) {
    std::vector<std::int32_t> starts;
    for (const std::int64_t row : rows) starts.push_back(starts_[static_cast<std::size_t>(row)]);
    for (auto& cache : caches_) ASSERT_TRUE(cache->select(rows).ok());
    starts_ = starts;
  }
  void seal() {
    for (auto& cache : caches_) ASSERT_TRUE(cache->seal().ok());
  }
  void record_past(bool on) {
    for (auto& cache : caches_) cache->record_past(on);
  }
  void reload() { caches_[1] = reloaded(*caches_[1]); }

  // All that the public interface returns.
  void compare() const {
    const Cache &a = *caches_[0], &b = *caches_[1];
    ASSERT_EQ(a.batch(), b.batch());
    ASSERT_EQ(a.length(), b.length());
    ASSERT_EQ(a.first(), b.first());
    for (int row = 0; row < a.batch(); ++row) {
      ASSERT_EQ(a.sealed_tokens(row), b.sealed_tokens(row));
      ASSERT_EQ(a.exact_tokens(row), b.exact_tokens(row));
      ASSERT_EQ(sessions::lambda_of(a, row), sessions::lambda_of(b, row));
      ASSERT_EQ(a.page_count(row), b.page_count(row));
      for (int page = 0; page < a.page_count(row); ++page)
        for (int h = 0; h < case_.config.kv_heads; ++h) {
          ASSERT_EQ(slice(a, row, page, h), slice(b, row, page, h));
          ASSERT_EQ(second_rows(a, row, page, h), second_rows(b, row, page, h));
        }
    }
    ASSERT_EQ(dense(a, true), dense(b, true));
    ASSERT_EQ(dense(a, false), dense(b, false));
  }

  // Codes and scales of a head slice.
  static std::pair<std::vector<std::uint8_t>, std::vector<std::uint16_t>> slice(const Cache& c, int row, int page,
                                                                                int head) {
    const SideRecipe &key = c.config().recipe.key, &value = c.config().recipe.value;
    const int dk = c.config().head_dim_k, dv = c.config().head_dim_v;
    const auto groups = [](const SideRecipe& side, int dim) {
      return static_cast<std::size_t>(side.group == 0 ? 1 : dim / side.group);
    };
    const auto k = static_cast<std::size_t>(kPageTokens / 8 * key.bits * dk);
    std::vector<std::uint8_t> codes(k + static_cast<std::size_t>(kPageTokens / 8 * value.bits * dv));
    std::vector<std::uint16_t> scales((groups(key, dk) + groups(value, dv)) * kPageTokens);
    const std::size_t ks = groups(key, dk) * kPageTokens;
    const std::span<std::uint8_t> all(codes);
    const std::span<std::uint16_t> all_scales(scales);
    EXPECT_TRUE(c.page_codes(row, page, head, all.first(k), all.subspan(k)).ok());
    EXPECT_TRUE(c.page_scales(row, page, head, all_scales.first(ks), all_scales.subspan(ks)).ok());
    return {codes, scales};
  }

  static std::tuple<std::vector<int>, std::vector<std::uint8_t>, std::vector<std::uint16_t>> second_rows(const Cache& c,
                                                                                                         int row,
                                                                                                         int page,
                                                                                                         int head) {
    SecondRows rows;
    EXPECT_TRUE(c.page_second_rows(row, page, head, &rows).ok());
    EXPECT_EQ(rows.places.size(), static_cast<std::size_t>(c.config().recipe.refined));
    return {rows.places, rows.codes, rows.scales};
  }

  static std::vector<float> dense(const Cache& c, bool keys) {
    const std::int64_t b = c.batch(), h = c.config().kv_heads, d = keys ? c.config().head_dim_k : c.config().head_dim_v;
    const std::int64_t first = c.first(), n = c.length() - first;
    std::vector<float> out(static_cast<std::size_t>(b * h * n * d));
    const MutableTensorView to{out.data(), DType::f32, {b, h, n, d}, {h * n * d, n * d, d, 1}};
    const Status status = keys ? c.dense_keys(first, n, to) : c.dense_values(first, n, to);
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }

  std::int64_t batch() const { return static_cast<std::int64_t>(starts_.size()); }
  std::int64_t length() const { return caches_[0]->length(); }
  cases::Random& random() { return random_; }
  Cache& cache(int i) { return *caches_[i]; }

 private:
  // [batch, kv_heads, tokens, dim] in the cache's dtype; NaN in padding.
  std::vector<std::byte> rows(std::int64_t tokens, int dim) {
    const std::int64_t at = caches_[0]->length();
    std::vector<std::byte> bytes;
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (int h = 0; h < case_.config.kv_heads; ++h) {
        const std::vector<float> shape =
            cases::key_rows(static_cast<int>(tokens), dim, 100 + static_cast<std::uint64_t>(h));
        std::vector<float> x = cases::normal_rows(tokens, dim, random_.bits(), 0.5);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] += shape[i];
        for (std::int64_t t = at; t < std::min<std::int64_t>(at + tokens, starts_[static_cast<std::size_t>(b)]); ++t)
          x[static_cast<std::size_t>((t - at) * dim)] = std::numeric_limits<float>::quiet_NaN();
        for (const float value : x) put(value, &bytes);
      }
    }
    return bytes;
  }
  void put(float x, std::vector<std::byte>* to) const {
    const std::uint16_t half = case_.config.dtype == DType::f16 ? f32_to_f16(x) : f32_to_bf16(x);
    const auto* bytes = case_.config.dtype == DType::f32 ? reinterpret_cast<const std::byte*>(&x)
                                                         : reinterpret_cast<const std::byte*>(&half);
    to->insert(to->end(), bytes, bytes + size_of(case_.config.dtype));
  }

  Case case_;
  std::vector<std::int32_t> starts_;
  cases::Random random_;
  std::unique_ptr<Cache> caches_[2];
  std::int64_t newest_ = 0;
};

}  // namespace kv4::saved
