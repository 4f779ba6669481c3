// Saved caches (save_case.h): a loaded cache goes on bit for bit like the original; all other bytes are refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "blob/checksum.h"
#include "kv4/cpu.h"
#include "save_case.h"

namespace kv4 {
namespace {

using namespace saved;

// RFC 3720, appendix B.4, and the check value of the catalogue of CRCs for "123456789".
TEST(Save, ChecksumIsCrc32c) {
  std::array<std::byte, 32> x{};
  EXPECT_EQ(crc32c(x), 0x8a9136aau);
  x.fill(std::byte{0xff});
  EXPECT_EQ(crc32c(x), 0x62a8ab43u);
  for (std::size_t i = 0; i < 32; ++i) x[i] = static_cast<std::byte>(i);
  EXPECT_EQ(crc32c(x), 0x46dd794eu);
  for (std::size_t i = 0; i < 32; ++i) x[i] = static_cast<std::byte>(31 - i);
  EXPECT_EQ(crc32c(x), 0x113fdb5cu);
  EXPECT_EQ(crc32c(std::as_bytes(std::span("123456789", 9))), 0xe3069283u);
  for (std::size_t cut = 0; cut <= x.size(); ++cut) {  // in parts as in one
    Crc32c crc;
    crc.add(std::span(x).first(cut));
    crc.add(std::span(x).subspan(cut));
    EXPECT_EQ(crc.value(), 0x113fdb5cu);
  }
}

class SavedCase : public ::testing::TestWithParam<int> {};

// Random calls; between any two, one twin may be saved and loaded, before or after the first page.
TEST_P(SavedCase, LoadedGoesOnBitForBit) {
  const Case c = every_case()[static_cast<std::size_t>(GetParam())];
  SCOPED_TRACE(c.name);
  constexpr int kSizes[] = {0, 1, 1, 1, 2, 5, 17, 63, 64, 65, 130, 400};
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    Twins t(c, 100 * seed + static_cast<std::uint64_t>(GetParam()));
    cases::Random& random = t.random();
    t.append(seed == 0 ? 1 : seed == 1 ? 200 : 20);
    t.reload();
    for (int i = 0; i < 16; ++i) {
      if (random.below(8) > 0) t.attend(random.below(8) > 0);
      if (HasFatalFailure()) return;
      if (random.below(2) == 0) t.reload();
      const int action = random.below(12);
      if (action == 0) t.crop(std::max<std::int64_t>(0, t.length() - random.below(130)));
      if (action <= 2) t.crop(std::max<std::int64_t>(0, t.length() - random.below(6)));
      if (action == 3) t.select({random.below(static_cast<int>(t.batch())), random.below(static_cast<int>(t.batch()))});
      if (action == 4) t.seal();
      if (action == 5) t.record_past(random.below(2) == 0);
      if (random.below(4) == 0) t.reload();
      t.append(kSizes[random.below(12)]);
      if (HasFatalFailure()) return;
      t.compare();
      if (HasFatalFailure()) return;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Cases, SavedCase, ::testing::Range(0, static_cast<int>(every_case().size())));

// A draft is rejected after its cache was loaded: its exact rows are still there.
TEST(Save, CropsOfTheLastCallStayExact) {
  Twins t({"drafts", config_of(Recipe(), 2, 64, 64)}, 3);
  t.append(100);
  for (int i = 0; i < 40; ++i) {
    t.attend();
    t.reload();
    t.crop(t.length() - t.random().below(8));
    t.append(8);
    if (HasFatalFailure()) return;
  }
  t.compare();
  EXPECT_GT(t.cache(1).sealed_tokens(0), kPageTokens);
}

// Caches move between instruction sets: the same codes, scales and lambda; outputs within the kernels' bound.
class SaveDims : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, SaveDims, ::testing::ValuesIn(cases::kHeadDims), ::testing::PrintToStringParamName());

TEST_P(SaveDims, InstructionSetsReadEachOther) {
  const int dim = GetParam();
  const std::string before = cpu::active_isa();
  std::vector<std::string> names;
  for (const std::string& name : cpu::compiled_isas())
    if (cpu::supported(name)) names.push_back(name);
  for (const std::string& from : names) {
    ASSERT_TRUE(cpu::force_isa(from).ok());
    Twins t({"isa", config_of(Recipe(), 2, dim, dim, DType::bf16), 3, {0, 7}}, static_cast<std::uint64_t>(dim));
    t.append(300);
    t.attend();
    t.append(1);
    t.attend();
    const Bytes bytes = save(t.cache(0));
    const std::vector<float> q = cases::normal_rows(2 * 6, dim, 5, 0.3);
    const std::int32_t starts[] = {0, 7};
    AttendArgs args;
    args.q = {q.data(), DType::f32, {2, 6, 1, dim}, {6 * dim, dim, dim, 1}};
    args.mask.start = starts;
    std::vector<float> want(q.size()), got(q.size());
    ASSERT_TRUE(t.cache(0).attend(args, {want.data(), DType::f32, args.q.shape, args.q.stride}).ok());
    double top = 0;
    for (const float x : want) top = std::max(top, std::abs(static_cast<double>(x)));
    for (const std::string& to : names) {
      SCOPED_TRACE(from + " to " + to + ", head dim " + std::to_string(dim));
      ASSERT_TRUE(cpu::force_isa(to).ok());
      auto other = create(t.cache(0).config());
      ASSERT_TRUE(load(*other, bytes).ok());
      EXPECT_EQ(save(*other), bytes);
      ASSERT_GT(other->page_count(1), 1);
      for (int row = 0; row < 2; ++row)
        for (int page = 0; page < other->page_count(row); ++page)
          ASSERT_EQ(Twins::slice(*other, row, page, 1), Twins::slice(t.cache(0), row, page, 1));
      ASSERT_TRUE(other->attend(args, {got.data(), DType::f32, args.q.shape, args.q.stride}).ok());
      for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 2 * sessions::kTolerance * top);
    }
    ASSERT_TRUE(cpu::force_isa(from).ok());
  }
  ASSERT_TRUE(cpu::force_isa(before).ok());
}

TEST(Save, SharedPagesAreSavedAndHeldOnce) {
  Twins t({"shared", config_of(Recipe(), 2, 128, 128, DType::f16)}, 4);
  t.append(800);
  t.attend();
  t.seal();
  const std::size_t one = save(t.cache(1)).size(), held = t.cache(1).nbytes();
  t.select({0, 0, 0, 0});
  const std::size_t rows = 3 * (4 + 2 * 64 + 64) * std::size_t{2 * 256 * 2};  // sinks and window of three more
  EXPECT_LT(save(t.cache(1)).size(), one + rows);
  t.reload();
  EXPECT_LT(t.cache(1).nbytes(), held + rows);
  t.append(200);
  t.attend();
  t.compare();
}

TEST(Save, EmptyCachesAndSeveralInAFile) {
  const CacheConfig config = config_of(Recipe(), 1, 64, 64);
  Twins t({"several", config}, 5);
  auto empty = create(config);
  Bytes file = save(*empty);
  const std::size_t first = file.size();
  t.append(150);
  const Bytes second = save(t.cache(0));
  file.insert(file.end(), second.begin(), second.end());
  auto a = create(config), b = create(config);
  std::size_t used = 0;
  ASSERT_TRUE(load(*a, file, &used).ok());
  EXPECT_EQ(used, first);
  EXPECT_EQ(a->batch(), 0);
  EXPECT_EQ(a->length(), 0);
  ASSERT_TRUE(load(*b, std::span(file).subspan(used)).ok());
  EXPECT_EQ(b->length(), 150);
  EXPECT_EQ(b->version(), 1u);  // a change, as append is
}

TEST(Save, AnotherConfigurationIsRefusedByName) {
  const std::vector<Case> list = every_case();
  const auto given = std::find_if(list.begin(), list.end(), [](const Case& c) { return !c.config.lambda_k.empty(); });
  ASSERT_NE(given, list.end());
  Twins t(*given, 6);
  t.append(100);
  const Bytes bytes = save(t.cache(0));
  const auto refused = [&](auto change, const std::string& message) {
    CacheConfig config = given->config;
    change(config);
    auto cache = create(config);
    const Status status = load(*cache, bytes);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.message().rfind(message, 0), 0u) << status.message();
    EXPECT_EQ(cache->batch(), 0);
    EXPECT_EQ(cache->version(), 0u);
  };
  refused([](CacheConfig& c) { c.dtype = DType::f16; }, "dtype: expected float16; got float32");
  refused([](CacheConfig& c) { c.sliding_window = 9; }, "sliding_window: expected 9; got 0");
  refused([](CacheConfig& c) { c.recipe.sinks = 3; }, "recipe.sinks: expected 3; got 4");
  refused([](CacheConfig& c) { c.recipe.window = 65; }, "recipe.window: expected 65; got 64");
  refused([](CacheConfig& c) { c.recipe.key.rotation = RotationKind::srft, c.recipe.key.reflectors = 0; },
          "recipe.key.rotation: expected srft; got householder");
  refused([](CacheConfig& c) { c.recipe.key.reflectors = 4; }, "recipe.key.reflectors: expected 4; got 5");
  refused([](CacheConfig& c) { c.recipe.key.seed = ~std::uint64_t{0}; },
          "recipe.key.seed: expected 18446744073709551615; got 9");
  refused([](CacheConfig& c) { c.recipe.key.group = 64; }, "recipe.key.group: expected 64; got 32");
  refused([](CacheConfig& c) { c.recipe.key.levels = LevelKind::lloyd_max; },
          "recipe.key.levels: expected lloyd_max; got uniform");
  refused([](CacheConfig& c) { c.recipe.key.scale = ScaleRule::least_squares; },
          "recipe.key.scale: expected least_squares; got abs_max");
  refused([](CacheConfig& c) { c.recipe.key.mean = false; }, "recipe.key.mean: expected false; got true");
  refused([](CacheConfig& c) { c.recipe.key.lambda = LambdaMode::automatic, c.lambda_k.clear(); },
          "recipe.key.lambda: expected automatic; got given");
  refused([](CacheConfig& c) { c.recipe.value.group = 0; }, "recipe.value.group: expected 0; got 64");
  refused([](CacheConfig& c) { c.lambda_k[3] += 1; }, "lambda_k: expected values of CRC-32C ");
  refused([](CacheConfig& c) { c.lambda_v[3] += 1; }, "lambda_v: expected values of CRC-32C ");
  refused([](CacheConfig& c) { c.matrix_v[3] += 0.1f; }, "matrix_v: expected values of CRC-32C ");
  refused(
      [](CacheConfig& c) {
        c.head_dim_v = 96, c.lambda_v.resize(2 * 96), c.recipe.value.group = 32, c.matrix_v.resize(96 * 96);
        for (int i = 0; i < 96 * 96; ++i) c.matrix_v[static_cast<std::size_t>(i)] = i % 97 == 0;
      },
      "head_dim_v: expected 96; got 128");
  refused([](CacheConfig& c) { c.kv_heads = 1, c.lambda_k.resize(64), c.lambda_v.resize(128); },
          "kv_heads: expected 1; got 2");
}

// Version 4 is for other widths only: a 4-bit cache is written in the old version, for older readers.
TEST(Save, WidthsAreOfVersionFour) {
  const auto version = [](const Bytes& bytes) { return static_cast<int>(bytes[8]); };
  const auto saved_with = [](int key, int value, std::vector<std::int32_t> starts) {
    Recipe recipe;
    recipe.key.bits = key;
    recipe.value.bits = value;
    Twins t({"widths", config_of(recipe, 1, 64, 64), 2, std::move(starts)}, 8);
    t.append(300);
    t.attend();
    return save(t.cache(0));
  };
  const Bytes four = saved_with(4, 4, {0}), wide = saved_with(3, 4, {0}), other = saved_with(4, 8, {0});
  EXPECT_EQ(version(four), 2);
  EXPECT_EQ(version(wide), 4);
  EXPECT_EQ(version(other), 4);
  const auto refusal = [](int key, int value, const Bytes& bytes) {
    Recipe recipe;
    recipe.key.bits = key;
    recipe.value.bits = value;
    auto cache = create(config_of(recipe, 1, 64, 64));
    const Status status = load(*cache, bytes);
    EXPECT_EQ(cache->batch(), status.ok() ? 1 : 0);
    return status.message();
  };
  EXPECT_EQ(refusal(4, 4, wide), "recipe.key.bits: expected 4; got 3");
  EXPECT_EQ(refusal(3, 4, four), "recipe.key.bits: expected 3; got 4");
  EXPECT_EQ(refusal(4, 4, other), "recipe.value.bits: expected 4; got 8");
  EXPECT_EQ(refusal(3, 8, other), "recipe.key.bits: expected 3; got 4");
  EXPECT_EQ(refusal(3, 4, wide), "");
}

// Version 5 is for refined keys, of any width.
TEST(Save, RefinedKeysAreOfVersionFive) {
  const auto saved_with = [](int refined, int bits) {
    Recipe recipe;
    recipe.refined = refined;
    recipe.key.bits = bits;
    Twins t({"refined", config_of(recipe, 1, 64, 64), 2, {0, 3}}, 8);
    t.append(300);
    t.attend();
    return save(t.cache(0));
  };
  const auto refusal = [](int refined, int bits, const Bytes& bytes) {
    Recipe recipe;
    recipe.refined = refined;
    recipe.key.bits = bits;
    auto cache = create(config_of(recipe, 1, 64, 64));
    const Status status = load(*cache, bytes);
    EXPECT_EQ(cache->batch(), status.ok() ? 2 : 0);
    return status.message();
  };
  const Bytes none = saved_with(0, 4), one = saved_with(1, 4), narrow = saved_with(2, 3);
  EXPECT_EQ(static_cast<int>(none[8]), 2);
  EXPECT_EQ(static_cast<int>(one[8]), 5);
  EXPECT_EQ(static_cast<int>(narrow[8]), 5);
  EXPECT_EQ(refusal(0, 4, one), "recipe.refined: expected 0; got 1");
  EXPECT_EQ(refusal(1, 4, none), "recipe.refined: expected 1; got 0");
  EXPECT_EQ(refusal(1, 3, narrow), "recipe.refined: expected 1; got 2");
  EXPECT_EQ(refusal(2, 4, narrow), "recipe.key.bits: expected 4; got 3");
  EXPECT_EQ(refusal(1, 4, one), "");
  EXPECT_EQ(refusal(2, 3, narrow), "");
}

TEST(Save, WhatSinkAndSourceSayIsPassedOn) {
  Twins t({"passed on", config_of(Recipe(), 1, 64, 64)}, 7);
  t.append(200);
  t.attend();
  const Bytes before = save(t.cache(0));
  int calls = 0;
  ASSERT_TRUE(t.cache(0).save([&](std::span<const std::byte>) { return ++calls, Status(); }).ok());
  ASSERT_GT(calls, 5);
  for (int fail = 1; fail <= calls; ++fail) {
    int n = 0;
    const Status status = t.cache(0).save([&](std::span<const std::byte>) {
      return ++n == fail ? Status(StatusCode::out_of_memory, "disk: full") : Status();
    });
    EXPECT_EQ(status.message(), "disk: full");
    EXPECT_EQ(status.code(), StatusCode::out_of_memory);
    EXPECT_EQ(n, fail);  // and nothing after it
  }
  EXPECT_EQ(save(t.cache(0)), before);
  EXPECT_EQ(t.cache(0).save({}).code(), StatusCode::invalid_argument);
  auto cache = create(t.cache(0).config());
  EXPECT_EQ(cache->load({}).code(), StatusCode::invalid_argument);
  const Status taken = load(t.cache(0), before);
  EXPECT_EQ(taken.code(), StatusCode::failed_precondition);
  EXPECT_EQ(taken.message(), "cache: expected an empty cache (reset empties it); got 1 sequences");
  EXPECT_EQ(save(t.cache(0)), before);
  t.cache(0).reset();
  ASSERT_TRUE(load(t.cache(0), before).ok());
  EXPECT_EQ(save(t.cache(0)), before);
}

}  // namespace
}  // namespace kv4
