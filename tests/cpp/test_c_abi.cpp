// The C ABI: one session through it equals the same session through the C++ API; its errors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"
#include "kv4/cache.h"
#include "kv4/kv4.h"

namespace {

constexpr int kHeads = 4, kKvHeads = 2, kDim = 64;

kv4_tensor tensor(const std::vector<float>& x, int64_t heads, int64_t tokens) {
  return {const_cast<float*>(x.data()), KV4_F32, {1, heads, tokens, kDim}, {heads * tokens * kDim, tokens * kDim, kDim, 1}};
}

kv4_cache_config config() {
  kv4_cache_config c = {};
  c.recipe = kv4_recipe_default();
  c.dtype = KV4_F32;
  c.kv_heads = kKvHeads;
  c.head_dim_k = c.head_dim_v = kDim;
  return c;
}

kv4_attend_args query(const std::vector<float>& q) {
  kv4_attend_args args = {};
  args.q = tensor(q, kHeads, 1);
  args.causal = 1;
  return args;
}

TEST(CAbi, AnswersAsTheCppApi) {
  const kv4_cache_config c = config();
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK) << kv4_last_error();
  kv4::CacheConfig same;
  same.kv_heads = kKvHeads;
  same.head_dim_k = same.head_dim_v = kDim;
  std::unique_ptr<kv4::Cache> twin;
  ASSERT_TRUE(kv4::Cache::create(same, &twin).ok());

  const int tokens = 300;
  const std::vector<float> k = kv4::cases::key_rows(kKvHeads * tokens, kDim, 1), v = kv4::cases::normal_rows(kKvHeads * tokens, kDim, 2);
  const std::vector<float> q = kv4::cases::normal_rows(kHeads, kDim, 3);
  const kv4_tensor kt = tensor(k, kKvHeads, tokens), vt = tensor(v, kKvHeads, tokens);
  const kv4::TensorView kv{k.data(), kv4::DType::f32, {1, kKvHeads, tokens, kDim}, {0, tokens * kDim, kDim, 1}};
  const kv4::TensorView vv{v.data(), kv4::DType::f32, {1, kKvHeads, tokens, kDim}, {0, tokens * kDim, kDim, 1}};
  ASSERT_EQ(kv4_cache_append(cache, &kt, &vt), KV4_OK);
  ASSERT_TRUE(twin->append(kv, vv).ok());

  std::vector<float> out(kHeads * kDim), want(kHeads * kDim);
  const kv4_attend_args args = query(q);
  kv4_tensor ot = tensor(out, kHeads, 1);
  kv4::AttendArgs twin_args;
  twin_args.q = {q.data(), kv4::DType::f32, {1, kHeads, 1, kDim}, {kHeads * kDim, kDim, kDim, 1}};
  const kv4::MutableTensorView wt{want.data(), kv4::DType::f32, {1, kHeads, 1, kDim}, {kHeads * kDim, kDim, kDim, 1}};
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(kv4_cache_attend(cache, &args, &ot), KV4_OK) << kv4_last_error();
    ASSERT_TRUE(twin->attend(twin_args, wt).ok());
    EXPECT_EQ(out, want);
    ASSERT_EQ(kv4_cache_seal(cache), KV4_OK);
    ASSERT_TRUE(twin->seal().ok());
  }
  EXPECT_EQ(kv4_cache_length(cache), tokens);
  EXPECT_EQ(kv4_cache_batch(cache), 1);
  EXPECT_EQ(kv4_cache_nbytes(cache), twin->nbytes());

  // Partial state: o / l is the output.
  std::vector<float> o(kHeads * kDim), m(kHeads), l(kHeads);
  ASSERT_EQ(kv4_cache_attend(cache, &args, &ot), KV4_OK);
  ASSERT_EQ(kv4_cache_attend_partial(cache, &args, tokens, o.data(), m.data(), l.data()), KV4_OK) << kv4_last_error();
  for (int h = 0; h < kHeads; ++h)
    for (int ch = 0; ch < kDim; ++ch) EXPECT_NEAR(o[h * kDim + ch] / l[h], out[h * kDim + ch], 1e-5);

  kv4_cache* copy = nullptr;
  ASSERT_EQ(kv4_cache_clone(cache, &copy), KV4_OK);
  const int64_t rows[] = {0, 0};
  ASSERT_EQ(kv4_cache_select(copy, rows, 2), KV4_OK);
  ASSERT_EQ(kv4_cache_repeat(copy, 2), KV4_OK);
  EXPECT_EQ(kv4_cache_batch(copy), 4);
  ASSERT_EQ(kv4_cache_crop(copy, 17), KV4_OK);
  EXPECT_EQ(kv4_cache_length(copy), 17);
  EXPECT_EQ(kv4_cache_length(cache), tokens);
  std::vector<float> dense(4 * kKvHeads * 17 * kDim);
  kv4_tensor dt = {dense.data(), KV4_F32, {4, kKvHeads, 17, kDim}, {kKvHeads * 17 * kDim, 17 * kDim, kDim, 1}};
  ASSERT_EQ(kv4_cache_dense_keys(copy, 0, 17, &dt), KV4_OK) << kv4_last_error();
  EXPECT_EQ(dense[0], k[0]);  // a sink: exact
  ASSERT_EQ(kv4_cache_reset(copy), KV4_OK);
  EXPECT_EQ(kv4_cache_batch(copy), 0);
  kv4_cache_destroy(copy);
  kv4_cache_destroy(cache);
}

struct File {
  std::vector<unsigned char> bytes;
  size_t at = 0, most = SIZE_MAX;  // most: a disk's size
};

kv4_status put(void* context, const void* data, size_t bytes) {
  auto* file = static_cast<File*>(context);
  if (bytes > file->most - file->bytes.size()) return KV4_OUT_OF_MEMORY;
  const auto* from = static_cast<const unsigned char*>(data);
  file->bytes.insert(file->bytes.end(), from, from + bytes);
  return KV4_OK;
}

kv4_status get(void* context, void* data, size_t bytes) {
  auto* file = static_cast<File*>(context);
  if (bytes > file->bytes.size() - file->at) return KV4_OUT_OF_RANGE;
  std::copy_n(file->bytes.begin() + static_cast<std::ptrdiff_t>(file->at), bytes, static_cast<unsigned char*>(data));
  file->at += bytes;
  return KV4_OK;
}

TEST(CAbi, SavesAndLoads) {
  const kv4_cache_config c = config();
  kv4_cache *cache = nullptr, *loaded = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK);
  ASSERT_EQ(kv4_cache_create(&c, &loaded), KV4_OK);
  const int tokens = 200;
  const std::vector<float> rows = kv4::cases::key_rows(kKvHeads * tokens, kDim, 1), q = kv4::cases::normal_rows(kHeads, kDim, 3);
  const kv4_tensor t = tensor(rows, kKvHeads, tokens);
  const kv4_attend_args args = query(q);
  std::vector<float> want(kHeads * kDim), got(kHeads * kDim);
  const kv4_tensor wt = tensor(want, kHeads, 1), gt = tensor(got, kHeads, 1);
  ASSERT_EQ(kv4_cache_append(cache, &t, &t), KV4_OK);
  ASSERT_EQ(kv4_cache_seal(cache), KV4_OK);
  File file;
  ASSERT_EQ(kv4_cache_save(cache, put, &file), KV4_OK) << kv4_last_error();
  ASSERT_EQ(kv4_cache_load(loaded, get, &file), KV4_OK) << kv4_last_error();
  EXPECT_EQ(file.at, file.bytes.size());
  EXPECT_EQ(kv4_cache_length(loaded), tokens);
  ASSERT_EQ(kv4_cache_attend(cache, &args, &wt), KV4_OK);
  ASSERT_EQ(kv4_cache_attend(loaded, &args, &gt), KV4_OK);
  EXPECT_EQ(got, want);

  // What a callback returns is what the call returns.
  File small;
  small.most = 5000;
  EXPECT_EQ(kv4_cache_save(cache, put, &small), KV4_OUT_OF_MEMORY);
  EXPECT_STREQ(kv4_last_error(), "sink: expected KV4_OK; got status 5");
  ASSERT_EQ(kv4_cache_reset(loaded), KV4_OK);
  EXPECT_EQ(kv4_cache_load(loaded, get, &small), KV4_OUT_OF_RANGE);
  EXPECT_STREQ(kv4_last_error(), "source: expected KV4_OK; got status 2");
  EXPECT_EQ(kv4_cache_batch(loaded), 0);
  file.at = 0;
  file.bytes[file.bytes.size() / 2] ^= 1;
  EXPECT_EQ(kv4_cache_load(loaded, get, &file), KV4_DATA_LOSS);
  EXPECT_EQ(kv4_cache_save(cache, nullptr, nullptr), KV4_INVALID_ARGUMENT);
  EXPECT_STREQ(kv4_last_error(), "sink: expected a pointer; got NULL");
  EXPECT_EQ(kv4_cache_load(loaded, nullptr, nullptr), KV4_INVALID_ARGUMENT);
  EXPECT_EQ(kv4_cache_load(nullptr, get, &file), KV4_INVALID_ARGUMENT);
  kv4_cache_destroy(loaded);
  kv4_cache_destroy(cache);
}

TEST(CAbi, ErrorsSayWhatWasExpected) {
  kv4_cache* cache = nullptr;
  kv4_cache_config bad = config();
  bad.recipe.key.rotation = 9;
  EXPECT_EQ(kv4_cache_create(&bad, &cache), KV4_INVALID_ARGUMENT);
  EXPECT_STREQ(kv4_last_error(), "recipe.rotation: expected a value from 0 to 4; got 9");
  bad = config();
  bad.dtype = 7;
  EXPECT_EQ(kv4_cache_create(&bad, &cache), KV4_INVALID_ARGUMENT);
  bad = config();
  bad.head_dim_v = 20;
  EXPECT_EQ(kv4_cache_create(&bad, &cache), KV4_UNSUPPORTED);
  EXPECT_EQ(kv4_cache_create(nullptr, &cache), KV4_INVALID_ARGUMENT);
  EXPECT_EQ(cache, nullptr);
  EXPECT_EQ(kv4_cache_append(nullptr, nullptr, nullptr), KV4_INVALID_ARGUMENT);
  EXPECT_STREQ(kv4_last_error(), "cache: expected a pointer; got NULL");
  EXPECT_EQ(kv4_set_num_threads(0), KV4_INVALID_ARGUMENT);
  EXPECT_EQ(kv4_force_isa("mmx"), KV4_UNSUPPORTED);
  EXPECT_NE(std::string(kv4_active_isa()), "mmx");
  kv4_cache_destroy(nullptr);
}

}  // namespace
