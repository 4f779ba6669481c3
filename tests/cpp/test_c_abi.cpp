// The C ABI: one session through it equals the same session through the C++ API; its errors.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocations.h"
#include "cases.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"
#include "kv4/kv4.h"

namespace {

constexpr int kHeads = 4, kKvHeads = 2, kDim = 64;

kv4_tensor tensor(const std::vector<float>& x, int64_t heads, int64_t tokens) {
  return {
      const_cast<float*>(x.data()), KV4_F32, {1, heads, tokens, kDim}, {heads * tokens * kDim, tokens * kDim, kDim, 1}};
}

kv4_cache_config config() {
  kv4_cache_config c;
  EXPECT_EQ(kv4_cache_config_init(&c, sizeof c), KV4_OK);
  c.kv_heads = kKvHeads;
  c.head_dim_k = c.head_dim_v = kDim;
  return c;
}

kv4_attend_args query(const std::vector<float>& q) {
  kv4_attend_args args;
  EXPECT_EQ(kv4_attend_args_init(&args, sizeof args), KV4_OK);
  args.q = tensor(q, kHeads, 1);
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
  const std::vector<float> k = kv4::cases::key_rows(kKvHeads * tokens, kDim, 1),
                           v = kv4::cases::normal_rows(kKvHeads * tokens, kDim, 2);
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
  const std::vector<float> rows = kv4::cases::key_rows(kKvHeads * tokens, kDim, 1),
                           q = kv4::cases::normal_rows(kHeads, kDim, 3);
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
  EXPECT_EQ(kv4_set_operand_bits(4), KV4_INVALID_ARGUMENT);
  EXPECT_EQ(kv4_operand_bits(), 16);
  EXPECT_EQ(kv4_force_isa("mmx"), KV4_UNSUPPORTED);
  EXPECT_NE(std::string(kv4_active_isa()), "mmx");
  kv4_cache_destroy(nullptr);
}

// Memory whose end is the end of what may be read: a page that traps lies behind it.
class AtTheEnd {
 public:
  explicit AtTheEnd(std::size_t bytes) : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    size_ = (bytes + page_ - 1) / page_ * page_ + page_;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + size_ - page_, page_, PROT_NONE);
    data_ = base_ + size_ - page_ - bytes;
  }
  AtTheEnd(const AtTheEnd&) = delete;
  ~AtTheEnd() { munmap(base_, size_); }
  void* data() const { return data_; }

 private:
  std::size_t page_, size_ = 0;
  char *base_ = nullptr, *data_ = nullptr;
};

kv4_cache_config given_config() {
  kv4_cache_config c = config();
  c.recipe.key.lambda = c.recipe.value.lambda = KV4_LAMBDA_GIVEN;
  c.recipe.key.rotation = c.recipe.value.rotation = KV4_ROTATION_DENSE;
  return c;
}

TEST(CAbi, SizesAreCheckedBeforeArraysAreRead) {
  const AtTheEnd one(sizeof(float));
  const auto* number = static_cast<const float*>(one.data());
  struct {
    int32_t kv_heads, head_dim_k, head_dim_v;
    const char* text;
    kv4_status status;
  } cases[] = {
      {-1, kDim, kDim, "kv_heads: expected a value from 1 to 65536; got -1", KV4_INVALID_ARGUMENT},
      {-3, -kDim, kDim, "kv_heads: expected a value from 1 to 65536; got -3", KV4_INVALID_ARGUMENT},
      {0, kDim, kDim, "kv_heads: expected a value from 1 to 65536; got 0", KV4_INVALID_ARGUMENT},
      {1 << 20, kDim, kDim, "kv_heads: expected a value from 1 to 65536; got 1048576", KV4_INVALID_ARGUMENT},
      {INT32_MAX, INT32_MAX, INT32_MAX, "kv_heads: expected a value from 1 to 65536; got 2147483647",
       KV4_INVALID_ARGUMENT},
      {kKvHeads, INT32_MIN, kDim, "head_dim_k: expected a value from 1 to 2147483647; got -2147483648",
       KV4_INVALID_ARGUMENT},
      {kKvHeads, kDim, -2, "head_dim_v: expected a value from 1 to 2147483647; got -2", KV4_INVALID_ARGUMENT},
      {kKvHeads, INT32_MAX, kDim, "head_dim_k: expected an even number from 32 to 512", KV4_UNSUPPORTED},
      {kKvHeads, kDim, 1 << 30, "head_dim_v: expected an even number from 32 to 512", KV4_UNSUPPORTED},
  };
  for (const auto& x : cases) {
    kv4_cache_config c = given_config();
    c.kv_heads = x.kv_heads;
    c.head_dim_k = x.head_dim_k;
    c.head_dim_v = x.head_dim_v;
    c.lambda_k = c.lambda_v = c.matrix_k = c.matrix_v = number;
    kv4_cache* cache = nullptr;
    EXPECT_EQ(kv4_cache_create(&c, &cache), x.status) << x.text;
    EXPECT_EQ(std::string(kv4_last_error()).rfind(x.text, 0), 0u) << kv4_last_error();
    EXPECT_EQ(cache, nullptr);
  }
  // Arrays that the recipe does not want are not read.
  for (const float* kv4_cache_config::* field : {&kv4_cache_config::lambda_k, &kv4_cache_config::lambda_v,
                                                 &kv4_cache_config::matrix_k, &kv4_cache_config::matrix_v}) {
    kv4_cache_config c = config();
    c.*field = number;
    kv4_cache* cache = nullptr;
    EXPECT_EQ(kv4_cache_create(&c, &cache), KV4_INVALID_ARGUMENT);
    EXPECT_NE(std::string(kv4_last_error()).find(": expected NULL, since the recipe's "), std::string::npos)
        << kv4_last_error();
  }
}

TEST(CAbi, GivenArraysAreReadWhole) {
  std::vector<float> lambda(kKvHeads * kDim, 1.0f), matrix(kDim * kDim, 0.0f);
  for (int i = 0; i < kDim; ++i) matrix[static_cast<std::size_t>(i) * kDim + i] = 1;
  kv4_cache_config c = given_config();
  c.lambda_k = c.lambda_v = lambda.data();
  c.matrix_k = c.matrix_v = matrix.data();
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK) << kv4_last_error();
  kv4_cache_destroy(cache);
  lambda.back() = -1;
  EXPECT_EQ(kv4_cache_create(&c, &cache), KV4_INVALID_ARGUMENT);
  EXPECT_NE(std::string(kv4_last_error()).find("lambda_k: expected positive finite values"), std::string::npos)
      << kv4_last_error();
}

// A struct of `size` bytes of a newer header, this library's first; 0 behind it.
template <class T>
std::vector<std::uint64_t> newer(const T& known, std::size_t size) {
  std::vector<std::uint64_t> bytes((size + 7) / 8, 0);
  std::memcpy(bytes.data(), &known, sizeof known);
  std::memcpy(bytes.data(), &size, sizeof size);
  return bytes;
}

TEST(CAbi, AnOlderProgramsStructsEndEarlier) {
  // No byte behind the older size is there.
  const std::size_t older = offsetof(kv4_cache_config, backend);
  const AtTheEnd memory(older);
  auto* c = static_cast<kv4_cache_config*>(memory.data());
  ASSERT_EQ(kv4_cache_config_init(c, older), KV4_OK) << kv4_last_error();
  c->kv_heads = kKvHeads;
  c->head_dim_k = c->head_dim_v = kDim;
  EXPECT_EQ(c->recipe.window, kv4_recipe_default().window);
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(c, &cache), KV4_OK) << kv4_last_error();

  const std::size_t older_args = offsetof(kv4_attend_args, host_mask);
  const AtTheEnd args_memory(older_args);
  auto* args = static_cast<kv4_attend_args*>(args_memory.data());
  ASSERT_EQ(kv4_attend_args_init(args, older_args), KV4_OK) << kv4_last_error();
  EXPECT_EQ(args->causal, 1);
  const std::vector<float> k = kv4::cases::key_rows(kKvHeads * 70, kDim, 1),
                           q = kv4::cases::normal_rows(kHeads, kDim, 3);
  std::vector<float> out(kHeads * kDim), want(kHeads * kDim);
  const kv4_tensor kt = tensor(k, kKvHeads, 70), ot = tensor(out, kHeads, 1), wt = tensor(want, kHeads, 1);
  args->q = tensor(q, kHeads, 1);
  ASSERT_EQ(kv4_cache_append(cache, &kt, &kt), KV4_OK);
  ASSERT_EQ(kv4_cache_attend(cache, args, &ot), KV4_OK) << kv4_last_error();
  const kv4_attend_args whole = query(q);
  ASSERT_EQ(kv4_cache_attend(cache, &whole, &wt), KV4_OK) << kv4_last_error();
  EXPECT_EQ(out, want);
  kv4_cache_destroy(cache);
}

TEST(CAbi, ANewerProgramsStructsAreTakenWhereTheyAskForNothingNew) {
  const std::size_t larger = sizeof(kv4_cache_config) + 24;
  std::vector<std::uint64_t> c = newer(config(), larger);
  const auto* config_of_newer = reinterpret_cast<const kv4_cache_config*>(c.data());
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(config_of_newer, &cache), KV4_OK) << kv4_last_error();
  reinterpret_cast<unsigned char*>(c.data())[larger - 1] = 1;
  kv4_cache* refused = nullptr;
  EXPECT_EQ(kv4_cache_create(config_of_newer, &refused), KV4_UNSUPPORTED);
  EXPECT_EQ(std::string(kv4_last_error()),
            "config: expected zeros behind the " + std::to_string(sizeof(kv4_cache_config)) +
                " bytes that this version knows; got a setting of a newer version at byte " +
                std::to_string(larger - 1));
  EXPECT_EQ(refused, nullptr);

  const std::vector<float> k = kv4::cases::key_rows(kKvHeads * 70, kDim, 1),
                           q = kv4::cases::normal_rows(kHeads, kDim, 3);
  std::vector<float> out(kHeads * kDim);
  const kv4_tensor kt = tensor(k, kKvHeads, 70), ot = tensor(out, kHeads, 1);
  ASSERT_EQ(kv4_cache_append(cache, &kt, &kt), KV4_OK);
  std::vector<std::uint64_t> args = newer(query(q), sizeof(kv4_attend_args) + 8);
  const auto* args_of_newer = reinterpret_cast<const kv4_attend_args*>(args.data());
  ASSERT_EQ(kv4_cache_attend(cache, args_of_newer, &ot), KV4_OK) << kv4_last_error();
  args.back() = 1;
  EXPECT_EQ(kv4_cache_attend(cache, args_of_newer, &ot), KV4_UNSUPPORTED);
  EXPECT_EQ(std::string(kv4_last_error()).rfind("args: expected zeros behind", 0), 0u) << kv4_last_error();
  kv4_cache_destroy(cache);

  // What a newer program's init leaves is as long as it said.
  std::vector<std::uint64_t> fresh(larger / 8 + 1, ~0ull);
  ASSERT_EQ(kv4_cache_config_init(reinterpret_cast<kv4_cache_config*>(fresh.data()), larger), KV4_OK);
  EXPECT_EQ(fresh[0], larger);
  EXPECT_EQ(fresh[larger / 8 - 1], 0u);
  EXPECT_EQ(fresh[larger / 8], ~0ull);
}

TEST(CAbi, SizesOfNoVersionAreRefused) {
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, sizeof(kv4_cache_config) - 1, std::size_t{5000}, SIZE_MAX}) {
    kv4_cache_config c = config();
    c.size = size;
    kv4_cache* cache = nullptr;
    EXPECT_EQ(kv4_cache_create(&c, &cache), KV4_INVALID_ARGUMENT) << size;
    const std::string text = kv4_last_error();
    EXPECT_EQ(text.rfind("config.size: expected the struct's, as its init sets it", 0), 0u) << text;
    EXPECT_NE(text.find("; got " + std::to_string(size)), std::string::npos) << text;
    kv4_cache_config untouched = config();
    EXPECT_EQ(kv4_cache_config_init(&untouched, size), KV4_INVALID_ARGUMENT);
    EXPECT_EQ(untouched.kv_heads, kKvHeads);
    kv4_attend_args args = {};
    EXPECT_EQ(kv4_attend_args_init(&args, size), KV4_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(kv4_last_error()).rfind("args.size: ", 0), 0u) << kv4_last_error();
  }
  EXPECT_EQ(kv4_cache_config_init(nullptr, sizeof(kv4_cache_config)), KV4_INVALID_ARGUMENT);
}

// Callbacks are C's, but may be written in a language that raises.
TEST(CAbi, AnExceptionOfACallbackEndsInIt) {
  const kv4_cache_config c = config();
  kv4_cache *cache = nullptr, *loaded = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK);
  ASSERT_EQ(kv4_cache_create(&c, &loaded), KV4_OK);
  const std::vector<float> rows = kv4::cases::key_rows(kKvHeads * 5, kDim, 1);
  const kv4_tensor t = tensor(rows, kKvHeads, 5);
  ASSERT_EQ(kv4_cache_append(cache, &t, &t), KV4_OK);
  EXPECT_EQ(
      kv4_cache_save(
          cache, [](void*, const void*, size_t) -> kv4_status { throw std::runtime_error("disk full"); }, nullptr),
      KV4_INVALID_ARGUMENT);
  EXPECT_STREQ(kv4_last_error(), "sink: expected a status; got an exception: disk full");
  EXPECT_EQ(
      kv4_cache_save(cache, [](void*, const void*, size_t) -> kv4_status { throw 5; }, nullptr), KV4_INVALID_ARGUMENT);
  EXPECT_STREQ(kv4_last_error(), "sink: expected a status; got an exception");
  EXPECT_EQ(kv4_cache_load(
                loaded, [](void*, void*, size_t) -> kv4_status { throw std::runtime_error("unplugged"); }, nullptr),
            KV4_INVALID_ARGUMENT);
  EXPECT_STREQ(kv4_last_error(), "source: expected a status; got an exception: unplugged");
  EXPECT_EQ(kv4_cache_batch(loaded), 0);
  File file;
  EXPECT_EQ(kv4_cache_save(cache, put, &file), KV4_OK) << kv4_last_error();
  kv4_cache_destroy(loaded);
  kv4_cache_destroy(cache);
}

// An executor is C++, and a caller's.
class Raising : public kv4::cpu::Executor {
 public:
  int threads() const override { throw std::runtime_error("no pool"); }
  void run(void (*)(void*, int), void*) override {}
};

TEST(CAbi, NothingIsThrownThroughIt) {
  Raising raising;
  kv4::cpu::Executor* before = kv4::cpu::set_executor(&raising);
  EXPECT_EQ(kv4_num_threads(), 1);
  kv4::cpu::set_executor(before);
  EXPECT_STREQ(kv4_last_error(), "kv4: expected no exception; got no pool");
  const kv4_cache_config c = config();
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK);
  const int tokens = 20000;
  const std::vector<float> k = kv4::cases::key_rows(kKvHeads * tokens, kDim, 1),
                           q = kv4::cases::normal_rows(kHeads, kDim, 3);
  std::vector<float> out(kHeads * kDim);
  const kv4_tensor kt = tensor(k, kKvHeads, tokens), ot = tensor(out, kHeads, 1);
  ASSERT_EQ(kv4_cache_append(cache, &kt, &kt), KV4_OK);
  const kv4_attend_args args = query(q);
  kv4::cpu::set_executor(&raising);
  EXPECT_EQ(kv4_cache_attend(cache, &args, &ot), KV4_INTERNAL);
  kv4::cpu::set_executor(before);
  EXPECT_STREQ(kv4_last_error(), "kv4: expected no exception; got no pool");
  EXPECT_EQ(kv4_cache_attend(cache, &args, &ot), KV4_OK) << kv4_last_error();
  kv4_cache_destroy(cache);
}

TEST(CAbi, TensorsThatCannotBeAreRefusedByName) {
  const kv4_cache_config c = config();
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK);
  const std::vector<float> rows = kv4::cases::key_rows(kKvHeads * 5, kDim, 1),
                           q = kv4::cases::normal_rows(kHeads, kDim, 3);
  const kv4_tensor good = tensor(rows, kKvHeads, 5);
  const auto refused = [](kv4_status status, const std::string& begins) {
    EXPECT_EQ(status, KV4_INVALID_ARGUMENT) << begins;
    EXPECT_EQ(std::string(kv4_last_error()).rfind(begins, 0), 0u) << kv4_last_error();
  };
  kv4_tensor bad = good;
  bad.shape[2] = -5;
  refused(kv4_cache_append(cache, &bad, &good), "k.shape: expected axes of 0 or more; got [1, 2, -5, 64]");
  bad = good;
  bad.dtype = 3;
  refused(kv4_cache_append(cache, &good, &bad), "v.dtype: expected a value from 0 to 2; got 3");
  bad = good;
  bad.data = nullptr;
  refused(kv4_cache_append(cache, &bad, &good), "k.data: expected a pointer; got NULL");
  for (const int64_t stride : {INT64_MAX, INT64_MIN, INT64_MAX / 4}) {
    bad = good;
    bad.stride[1] = stride;
    refused(kv4_cache_append(cache, &bad, &good), "k.stride: expected distances of 63 bits; got [640, ");
  }
  bad = good;
  bad.shape[2] = INT64_MAX / 2;
  refused(kv4_cache_append(cache, &bad, &good), "k.stride: expected distances of 63 bits");
  EXPECT_EQ(kv4_cache_batch(cache), 0);

  ASSERT_EQ(kv4_cache_append(cache, &good, &good), KV4_OK);
  std::vector<float> out(kHeads * kDim, 7.0f);
  const kv4_tensor ot = tensor(out, kHeads, 1);
  kv4_attend_args args = query(q);
  args.mask_kind = 3;
  refused(kv4_cache_attend(cache, &args, &ot), "mask_kind: expected a value from 0 to 2; got 3");
  args.mask_kind = KV4_MASK_BOOLEAN;
  refused(kv4_cache_attend(cache, &args, &ot), "mask: expected a pointer; got NULL");
  args.mask = rows.data();
  args.columns = -1;
  refused(kv4_cache_attend(cache, &args, &ot), "mask.shape: expected axes of 0 or more");
  args.columns = INT64_MAX;
  args.mask_stride[3] = 2;
  refused(kv4_cache_attend(cache, &args, &ot), "mask.stride: expected distances of 63 bits");
  args = query(q);
  args.mask_kind = KV4_MASK_ADDITIVE;
  args.mask = rows.data();
  args.mask_dtype = -1;
  refused(kv4_cache_attend(cache, &args, &ot), "mask_dtype: expected a value from 0 to 2; got -1");
  const int64_t row = 0;
  refused(kv4_cache_select(cache, &row, SIZE_MAX), "count: expected at most 2147483647 rows");
  EXPECT_EQ(out, std::vector<float>(kHeads * kDim, 7.0f));
  kv4_cache_destroy(cache);
}

extern "C" const char* kv4_c_program(void);  // c_abi_program.c

// A program's threads do the work of a cache's calls; what they may be is checked.
TEST(CAbi, AProgramLendsItsThreads) {
  static int runs = 0;
  kv4_executor executor = {2,
                           [](void*, void (*body)(void*, int32_t), void* context) {
                             ++runs;
                             body(context, 1);
                             body(context, 0);
                           },
                           nullptr};
  ASSERT_EQ(kv4_set_executor(&executor), KV4_OK) << kv4_last_error();
  EXPECT_EQ(kv4_num_threads(), 2);
  const kv4_cache_config c = config();
  kv4_cache* cache = nullptr;
  ASSERT_EQ(kv4_cache_create(&c, &cache), KV4_OK);
  const std::vector<float> k(kKvHeads * 4000 * kDim, 0.5f), q(kHeads * kDim, 0.5f);
  std::vector<float> out(kHeads * kDim);
  const kv4_tensor kt = tensor(k, kKvHeads, 4000), ot = tensor(out, kHeads, 1);
  const kv4_attend_args args = query(q);
  ASSERT_EQ(kv4_cache_append(cache, &kt, &kt), KV4_OK);
  ASSERT_EQ(kv4_cache_attend(cache, &args, &ot), KV4_OK);
  EXPECT_GT(runs, 0);
  kv4_cache_destroy(cache);
  executor.threads = 0;
  EXPECT_EQ(kv4_set_executor(&executor), KV4_INVALID_ARGUMENT);
  executor = {1, nullptr, nullptr};
  EXPECT_EQ(kv4_set_executor(&executor), KV4_INVALID_ARGUMENT);
  EXPECT_EQ(kv4_num_threads(), 2);
  EXPECT_EQ(kv4_set_executor(nullptr), KV4_OK);
}

extern "C" const char* kv4_c_rows_program(void);
extern "C" const char* kv4_c_paged_program(void);

TEST(CAbi, AProgramInCHoldsSequencesOfTheirOwnLength) {
  const char* failed = kv4_c_rows_program();
  EXPECT_EQ(failed, nullptr) << failed;
}

TEST(CAbi, AProgramInCRunsOnItsOwnMemory) {
  const char* failed = kv4_c_paged_program();
  EXPECT_EQ(failed, nullptr) << failed;
}

TEST(CAbi, AProgramInCRuns) {
  const char* failed = kv4_c_program();
  EXPECT_EQ(failed, nullptr) << failed;
}

// Each allocation of each call fails in turn: KV4_OUT_OF_MEMORY with a text, no handle, and the cache as it was.
TEST(CAbi, EveryCallFindsNoMemory) {
  long failures = 0;
  const auto fail_every_allocation = [&](const char* name, auto call, auto unchanged) {
    for (long n = 1;; ++n) {
      kv4::allocations::fail_at(n);
      const kv4_status status = call();
      const bool failed = kv4::allocations::failed();
      if (status == KV4_OK) break;
      ++failures;
      ASSERT_TRUE(failed) << name << ": " << kv4_last_error();
      ASSERT_EQ(status, KV4_OUT_OF_MEMORY) << name << ", allocation " << n << ": " << kv4_last_error();
      ASSERT_NE(std::string(kv4_last_error()), "") << name;
      ASSERT_TRUE(unchanged()) << name << ", allocation " << n;
    }
  };
  kv4_cache_config c = config();
  c.recipe.value.seed = 78;  // unique to this cache, so that its tables are built
  kv4_cache *cache = nullptr, *copy = nullptr;
  fail_every_allocation("create", [&] { return kv4_cache_create(&c, &cache); }, [&] { return cache == nullptr; });
  const std::vector<float> rows = kv4::cases::normal_rows(kKvHeads * 300, kDim, 1),
                           q = kv4::cases::normal_rows(kHeads, kDim, 2);
  std::vector<float> out(kHeads * kDim);
  const kv4_tensor t = tensor(rows, kKvHeads, 300), ot = tensor(out, kHeads, 1);
  const kv4_attend_args args = query(q);
  int64_t length = 0;
  const auto unchanged = [&] { return kv4_cache_length(cache) == length; };
  fail_every_allocation("append", [&] { return kv4_cache_append(cache, &t, &t); }, unchanged);
  length = 300;
  fail_every_allocation("seal", [&] { return kv4_cache_seal(cache); }, unchanged);
  fail_every_allocation("attend", [&] { return kv4_cache_attend(cache, &args, &ot); }, unchanged);
  fail_every_allocation("clone", [&] { return kv4_cache_clone(cache, &copy); }, [&] { return copy == nullptr; });
  std::size_t bytes = 0;
  const auto count = [](void* to, const void*, std::size_t size) {
    *static_cast<std::size_t*>(to) += size;
    return KV4_OK;
  };
  fail_every_allocation("save", [&] { return kv4_cache_save(cache, count, &bytes); }, unchanged);
  EXPECT_GT(bytes, 0u);
  const std::vector<int64_t> both{0, 0};
  fail_every_allocation(
      "select", [&] { return kv4_cache_select(cache, both.data(), 2); }, [&] { return kv4_cache_batch(cache) == 1; });
  EXPECT_EQ(kv4_cache_batch(cache), 2);
  EXPECT_GT(failures, 30);
  kv4_cache_destroy(copy);
  kv4_cache_destroy(cache);
}

}  // namespace
