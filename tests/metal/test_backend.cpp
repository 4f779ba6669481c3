// The Metal backend with an emulated GPU behind gpu.h: the CPU's sessions against the definition, through the C++
// cache. What is left untested is gpu.mm. On macOS the same file is built with KV4_METAL_ON_DEVICE and runs on the
// machine's GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cache_session.h"
#include "metal/gpu.h"
#include "paged_server.h"
#include "script_case.h"
#ifndef KV4_METAL_ON_DEVICE
#include "device.h"
#endif

namespace kv4 {
namespace {

using namespace sessions;

#ifndef KV4_METAL_ON_DEVICE
using tests::Build;

// Memory comes from the one module that holds all kernels.
class EmulatedGpu final : public apple::Gpu {
 public:
  void* alloc(std::size_t bytes) override {
    if (bytes > most || (until_failure > 0 && --until_failure == 0)) return nullptr;
    emu::Buffer<std::uint8_t> buffer = module().buffer<std::uint8_t>(bytes, "memory", EMU_INOUT);
    void* p = buffer.data();
    held_[p] = std::move(buffer);
    bytes_[p] = bytes;
    return p;
  }
  void free(void* p) override {
    held_.erase(p);
    bytes_.erase(p);
  }
  bool holds(const void* p) const override {
    const auto it = held_.upper_bound(const_cast<void*>(p));
    return it != held_.begin() &&
           static_cast<const std::byte*>(p) <
               static_cast<const std::byte*>(std::prev(it)->first) + bytes_.at(std::prev(it)->first);
  }
  // An offset, so that device addresses are not mistaken for host addresses.
  std::uint64_t address(const void* p) const override { return reinterpret_cast<std::uint64_t>(p) + kShift; }
  int cores() const override { return 4; }
  std::size_t buffers() const { return held_.size(); }
  Status run(std::span<const apple::Launch> launches) override {
    for (const apple::Launch& l : launches) {
      std::vector<void*> buffers;
      for (const void* p : l.buffers) buffers.push_back(const_cast<void*>(p));
      const emu::Run done = module().run(
          l.kernel, {{l.threads[0], l.threads[1], l.threads[2]}, {l.group, 1, 1}, ++seed_, 0, {}}, buffers);
      EXPECT_TRUE(done.clean()) << l.kernel << ": result " << done.result << "; " << done.reports;
      EXPECT_EQ(l.dim, 64);
    }
    return failure;
  }

  Build build = Build::fast;
  std::size_t most = std::numeric_limits<std::size_t>::max();
  long until_failure = 0;  // the n-th allocation from now on fails; 0: none
  Status failure;

 private:
  static constexpr std::uint64_t kShift = std::uint64_t{1} << 40;
  const emu::Module& module() {
    std::unique_ptr<emu::Module>& m = modules_[build];
    if (m == nullptr)
      m = std::make_unique<emu::Module>(std::string(KV4_METAL_MODULES) + "/kv4." + tests::name_of(build) + ".so");
    return *m;
  }
  std::map<Build, std::unique_ptr<emu::Module>> modules_;
  std::map<void*, emu::Buffer<std::uint8_t>> held_;
  std::map<void*, std::size_t> bytes_;
  std::uint64_t seed_ = 0;
};

struct Device {
  EmulatedGpu* gpu;
  std::unique_ptr<Backend> backend;
};
Device& device() {
  static Device* const only = [] {
    auto gpu = std::make_unique<EmulatedGpu>();
    EmulatedGpu* raw = gpu.get();
    return new Device{raw, apple::make_backend(std::move(gpu))};
  }();
  return *only;
}

}  // namespace

namespace apple {
Backend* backend(int n) { return n == 0 ? device().backend.get() : nullptr; }
std::string why_not() { return "device: expected an emulated one; got none"; }
}  // namespace apple

namespace {
#endif

class MetalPlace final : public sessions::Place {
 public:
  explicit MetalPlace(DType dtype = DType::f32) : dtype_(dtype) {}
  std::string backend() const override { return "metal"; }
  DType dtype() const override { return dtype_; }
  TensorView rows(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t,
                  std::int64_t d) override {
    TensorView v = view(x, b, h, t, d);
    if (dtype_ == DType::f32) return v;
    std::vector<std::uint16_t>& halves = held_.emplace_back();
    for (const float value : x) halves.push_back(dtype_ == DType::f16 ? f32_to_f16(value) : f32_to_bf16(value));
    v.data = halves.data();
    v.dtype = dtype_;
    return v;
  }

 private:
  DType dtype_;
  std::list<std::vector<std::uint16_t>> held_;
};

class MetalSessions : public ::testing::TestWithParam<int> {};
TEST_P(MetalSessions, EveryQuerySeesWhatTheDefinitionSays) {
  constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
  MetalPlace place(kDTypes[GetParam() % 3]);
  random_session(GetParam(), &place);
}
INSTANTIATE_TEST_SUITE_P(Seeds, MetalSessions, ::testing::Range(0, kSeeds / 2));

TEST(MetalBackend, CropOfTheLastCallRestoresOneByOneDecoding) {
  MetalPlace place(DType::bf16);
  crops_of_the_last_call(&place);
}
TEST(MetalBackend, SlidingWindowEvictsAndStaysRight) {
  MetalPlace place;
  sliding_window(&place);
}
TEST(MetalBackend, RecordingEvictsNothing) {
  MetalPlace place;
  recording(&place);
}

// kv4/paged.h: ragged calls, blocks of exact rows, sinks kept beside their sealed page, sliding windows.
TEST(MetalBackend, AServerReadsWhatPlainViewsRead) {
  tests::run_server({.backend = "metal"}, 21, 25);
  tests::run_server({.backend = "metal",
                     .kv_heads = 3,
                     .group = 1,
                     .dtype = DType::bf16,
                     .sinks = 64,
                     .window = 100,
                     .lambda = false},
                    22, 25);
  tests::run_server({.backend = "metal", .group = 2, .sinks = 0, .window = 33, .lambda_per_sequence = true, .exact = 0},
                    23, 25);
}

#ifndef KV4_METAL_ON_DEVICE
// Races, bounds, uninitialised reads and alignment of everything that the backend hands to kernels.
TEST(MetalBackend, EveryLaunchIsClean) {
  device().gpu->build = Build::check;
  {
    tests::run_server({.backend = "metal", .lambda_per_sequence = true}, 24, 8);
    MetalPlace place(DType::f16);
    Session s(Recipe(), {0, 7}, 3, 0, &place);
    for (const std::int64_t tokens : {150, 1, 5, 70}) s.step(tokens);
    s.crop(100);
    s.step(2);
    const auto arriving = make(Recipe::paper(), kShape, 0, DType::f32, "metal");
    for (const std::int64_t tokens : {70, 1, 5}) {
      const std::vector<float> k = cases::normal_rows(kShape.kv_heads * tokens, kShape.dim, 3),
                               q = cases::normal_rows(kShape.q_heads * tokens, kShape.dim, 4);
      std::vector<float> out(q.size());
      AttendArgs args;
      args.q = view(q, 1, kShape.q_heads, tokens, kShape.dim);
      const TensorView rows = view(k, 1, kShape.kv_heads, tokens, kShape.dim);
      ASSERT_TRUE(arriving->append(rows, rows).ok());
      ASSERT_TRUE(arriving->attend(args, into(out, 1, kShape.q_heads, tokens, kShape.dim)).ok());
    }
  }
  device().gpu->build = Build::fast;
}
#endif

// Masks, sinks, softcap, partial states and several steps in one call, against the CPU's backend.
TEST(MetalBackend, CallsGiveWhatTheCpuGives) {
  const std::int64_t heads = kShape.q_heads, d = kShape.dim;
  std::unique_ptr<Cache> caches[2] = {make(Recipe(), kShape, 0, DType::f32, "metal"), make(Recipe())};
  std::uint64_t seed = 1;
  std::int64_t length = 0;
  for (const std::int64_t tokens : {200, 30, 1}) {
    length += tokens;
    const std::vector<float> k = cases::normal_rows(2 * kShape.kv_heads * tokens, d, ++seed),
                             v = cases::normal_rows(2 * kShape.kv_heads * tokens, d, ++seed);
    const std::vector<float> q = cases::normal_rows(2 * heads * tokens, d, ++seed, 0.3);
    for (const auto& cache : caches)
      ASSERT_TRUE(cache->append(view(k, 2, kShape.kv_heads, tokens, d), view(v, 2, kShape.kv_heads, tokens, d)).ok());
    const std::int64_t columns = length - 3;
    std::vector<std::uint8_t> boolean(static_cast<std::size_t>(2 * tokens * columns));
    std::vector<float> additive(static_cast<std::size_t>(heads * columns));
    cases::Random random(++seed);
    for (std::uint8_t& x : boolean) x = random.below(3) != 0;
    for (float& x : additive)
      x = random.below(4) == 0 ? -std::numeric_limits<float>::infinity() : static_cast<float>(random.below(9)) / 8;
    const std::vector<float> sinks = {0.5f, -1.0f, 2.0f, 0.0f};
    const std::vector<std::int32_t> windows = {90, 0};
    for (int kind = 0; kind < 4; ++kind) {
      SCOPED_TRACE(testing::Message() << tokens << " tokens, kind " << kind);
      AttendArgs args;
      args.q = view(q, 2, heads, tokens, d);
      if (kind == 0) {
        args.mask.kind = Mask::General::boolean;
        args.mask.general = boolean.data();
        args.mask.general_stride = {tokens * columns, 0, columns, 1};
      } else if (kind == 1) {
        args.mask.causal = false;
        args.mask.kind = Mask::General::additive;
        args.mask.general = additive.data();
        args.mask.general_stride = {0, columns, 0, 1};
        args.sinks = sinks.data();
      } else if (kind == 2) {
        args.softcap = 5.0f;
        args.scale = 0.2f;
      } else {
        args.mask.window = windows.data();
      }
      if (kind < 2) {
        args.mask.columns = columns;
        args.mask.offset = 3;
      }
      std::vector<float> out[2];
      double top = 0;
      for (int i = 0; i < 2; ++i) {
        out[i].assign(q.size(), 7.0f);
        const Status status = caches[i]->attend(args, into(out[i], 2, heads, tokens, d));
        ASSERT_TRUE(status.ok()) << status.message();
      }
      for (const float x : out[1]) top = std::max(top, std::abs(static_cast<double>(x)));
      for (std::size_t i = 0; i < out[0].size(); ++i) ASSERT_NEAR(out[0][i], out[1][i], kTolerance * top) << i;
      if (kind == 1) continue;
      std::vector<float> o[2], m[2], l[2];
      for (int i = 0; i < 2; ++i) {
        o[i].assign(q.size(), 0.0f);
        m[i].assign(q.size() / static_cast<std::size_t>(d), 0.0f);
        l[i] = m[i];
        const Status status = caches[i]->attend_partial(args, length, {o[i].data(), m[i].data(), l[i].data()});
        ASSERT_TRUE(status.ok()) << status.message();
      }
      for (std::size_t row = 0; row < l[0].size(); ++row) {
        ASSERT_EQ(l[0][row] > 0, l[1][row] > 0) << row;
        if (l[0][row] <= 0) continue;
        ASSERT_NEAR(m[0][row] + std::log(l[0][row]), m[1][row] + std::log(l[1][row]), 5 * kTolerance) << row;
      }
    }
  }
}

// The paper's recipe: every vector is sealed on arrival; a fork writes to its own copy of the page being filled.
TEST(MetalBackend, SealsOnArrivalWhatTheCpuSeals) {
  const std::int64_t heads = kShape.q_heads, d = kShape.dim;
  std::unique_ptr<Cache> caches[4] = {make(Recipe::paper(), kShape, 0, DType::f32, "metal"), make(Recipe::paper())};
  std::uint64_t seed = 31;
  const auto step = [&](std::unique_ptr<Cache>* both, std::int64_t tokens) {
    const std::vector<float> k = cases::normal_rows(kShape.kv_heads * tokens, d, ++seed),
                             v = cases::normal_rows(kShape.kv_heads * tokens, d, ++seed);
    const std::vector<float> q = cases::normal_rows(heads * tokens, d, ++seed, 0.3);
    AttendArgs args;
    args.q = view(q, 1, heads, tokens, d);
    std::vector<float> out[2];
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(both[i]->append(view(k, 1, kShape.kv_heads, tokens, d), view(v, 1, kShape.kv_heads, tokens, d)).ok());
      out[i].assign(q.size(), 7.0f);
      ASSERT_TRUE(both[i]->attend(args, into(out[i], 1, heads, tokens, d)).ok());
    }
    ASSERT_EQ(both[0]->sealed_tokens(0), both[0]->length());
    ASSERT_EQ(both[0]->page_count(0), both[1]->page_count(0));
    int differ = 0;
    for (int page = 0; page < both[0]->page_count(0); ++page)
      for (int h = 0; h < kShape.kv_heads; ++h) {
        std::vector<std::uint8_t> codes[2][2];
        for (int i = 0; i < 2; ++i) {
          for (std::vector<std::uint8_t>& x : codes[i]) x.resize(static_cast<std::size_t>(kPageTokens * d / 2));
          ASSERT_TRUE(both[i]->page_codes(0, page, h, codes[i][0], codes[i][1]).ok());
        }
        for (int side = 0; side < 2; ++side)
          for (std::size_t n = 0; n < codes[0][side].size(); ++n) differ += codes[0][side][n] != codes[1][side][n];
        ASSERT_LE(differ, kBoundaryCodes);
      }
    double top = 0;
    for (const float x : out[1]) top = std::max(top, std::abs(static_cast<double>(x)));
    if (differ > 0) return;
    for (std::size_t i = 0; i < out[0].size(); ++i) ASSERT_NEAR(out[0][i], out[1][i], kTolerance * top) << i;
  };
  for (const std::int64_t tokens : {1, 40, 3, 64, 1, 130, 1}) ASSERT_NO_FATAL_FAILURE(step(caches, tokens));
  for (int i = 0; i < 2; ++i) caches[2 + i] = fork_of(*caches[i]);
  for (const std::int64_t tokens : {1, 20}) ASSERT_NO_FATAL_FAILURE(step(caches, tokens));
  for (const auto& fork : {caches[2].get(), caches[3].get()}) ASSERT_TRUE(fork->crop(101).ok());
  for (const std::int64_t tokens : {2, 90}) ASSERT_NO_FATAL_FAILURE(step(caches + 2, tokens));
  ASSERT_NO_FATAL_FAILURE(step(caches, 1));
}

TEST(MetalBackend, NonFiniteQueriesAreRefusedWhereTheySeeAToken) {
  const std::int64_t heads = kShape.q_heads, d = kShape.dim;
  const auto cache = make(Recipe(), kShape, 0, DType::f32, "metal");
  const std::vector<float> k = cases::normal_rows(kShape.kv_heads * 3, d, 1);
  ASSERT_TRUE(cache->append(view(k, 1, kShape.kv_heads, 3, d), view(k, 1, kShape.kv_heads, 3, d)).ok());
  std::vector<float> q = cases::normal_rows(heads * 3, d, 2), out(q.size());
  q[static_cast<std::size_t>(d) + 5] = std::numeric_limits<float>::quiet_NaN();  // query 1 of head 0
  AttendArgs args;
  args.q = view(q, 1, heads, 3, d);
  const Status status = cache->attend(args, into(out, 1, heads, 3, d));
  EXPECT_EQ(status.code(), StatusCode::non_finite);
  EXPECT_EQ(status.message(), "q: expected finite values in queries that see a token; got NaN or infinity");
  const std::int32_t start = 2;
  args.mask.start = &start;
  EXPECT_TRUE(cache->attend(args, into(out, 1, heads, 3, d)).ok());
}

#ifndef KV4_METAL_ON_DEVICE
TEST(MetalBackend, WhatItCannotServeIsRefusedBeforeAnythingIsAllocated) {
  CacheConfig config;
  config.backend = "metal";
  config.kv_heads = 2;
  config.head_dim_k = config.head_dim_v = 64;
  const std::size_t most = device().gpu->most;
  device().gpu->most = 0;  // no memory left: other refusals must come first
  const auto expect = [](const CacheConfig& c, StatusCode code, const std::string& text) {
    std::unique_ptr<Cache> cache;
    const Status status = Cache::create(c, &cache);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  CacheConfig bad = config;
  bad.head_dim_k = bad.head_dim_v = 72;
  expect(bad, StatusCode::unsupported, "head_dim_k: expected 64, 80, 96, 128 or 256 on Metal; got 72");
  bad.recipe = Recipe::exact();
  expect(bad, StatusCode::unsupported, "head_dim_k: expected 64, 80, 96, 128 or 256 on Metal; got 72");
  bad = config;
  bad.head_dim_v = 128;
  expect(bad, StatusCode::unsupported, "head_dim_v: expected head_dim_k, 64; got 128");
  bad = config;
  bad.recipe.key.group = 32;
  expect(bad, StatusCode::unsupported, "one scale per vector on Metal");
  bad = config;
  bad.backend = "metal:1";
  expect(bad, StatusCode::invalid_argument, "backend");
  device().gpu->most = most;
  expect(config, StatusCode::ok, "");
}

// Out of device memory, or a failed launch: the cache is unchanged.
TEST(MetalBackend, AFailedCallLeavesTheCacheAsItWas) {
  const auto cache = make(Recipe(), kShape, 0, DType::f32, "metal");
  const std::int64_t heads = kShape.q_heads, d = kShape.dim;
  const std::vector<float> k = cases::normal_rows(kShape.kv_heads * 200, d, 1), q = cases::normal_rows(heads, d, 2);
  ASSERT_TRUE(cache->append(view(k, 1, kShape.kv_heads, 200, d), view(k, 1, kShape.kv_heads, 200, d)).ok());
  std::vector<float> before(q.size()), after(q.size());
  AttendArgs args;
  args.q = view(q, 1, heads, 1, d);
  ASSERT_TRUE(cache->attend(args, into(before, 1, heads, 1, d)).ok());
  device().gpu->most = 100;
  EXPECT_EQ(cache->attend(args, into(after, 1, heads, 1, d)).code(), StatusCode::out_of_memory);
  device().gpu->most = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(cache->sealed_tokens(0), 128);
  ASSERT_TRUE(cache->attend(args, into(after, 1, heads, 1, d)).ok());
  EXPECT_EQ(before, after);

  // Sealing of a due page fails.
  ASSERT_TRUE(cache->append(view(k, 1, kShape.kv_heads, 64, d), view(k, 1, kShape.kv_heads, 64, d)).ok());
  device().gpu->failure = error(StatusCode::failed_precondition, "device", "a launch that completes", "a fault");
  EXPECT_EQ(cache->seal().message(), device().gpu->failure.message());
  device().gpu->failure = {};
  EXPECT_EQ(cache->sealed_tokens(0), 128);
  EXPECT_TRUE(cache->seal().ok());
  EXPECT_EQ(cache->sealed_tokens(0), 192);
}

// Fails every GPU allocation in turn: the cache is unchanged, and the call then succeeds.
TEST(MetalBackend, ACallThatFindsNoMemoryLeavesNoTrace) {
  saved::Case c{"default", saved::config_of(Recipe(), 2, 64, 64), 2, {0, 7}};
  c.config.backend = "metal";
  const auto cache = saved::create(c.config), untouched = saved::create(c.config);
  scripts::Writer w(c, 5);
  for (const std::int64_t tokens : {20, 1, 130, 1}) {
    w.append(tokens);
    w.attend(std::min<std::int64_t>(tokens, 3));
  }
  w.select({1, 0, 1});
  w.append(2);
  w.attend(2, true);
  w.crop(75);
  w.append(60);
  w.seal();
  long failures = 0;
  for (const scripts::Call& call : w.take()) {
    const saved::Bytes before = saved::save(*untouched);
    scripts::Output out(call.outputs), want(call.outputs);
    for (long n = 1;; ++n) {
      device().gpu->until_failure = n;
      const Status status = call.run(*cache, &out);
      const bool failed = device().gpu->until_failure == 0;
      device().gpu->until_failure = 0;
      if (status.ok()) break;
      ++failures;
      ASSERT_TRUE(failed) << call.name << ": " << status.message();
      ASSERT_EQ(status.code(), StatusCode::out_of_memory) << call.name << ", allocation " << n;
      ASSERT_EQ(saved::save(*cache), before) << call.name << ", allocation " << n;
    }
    ASSERT_TRUE(call.run(*untouched, &want).ok()) << call.name;
    ASSERT_EQ(out, want) << call.name;
  }
  EXPECT_GT(failures, 10);
}

TEST(MetalBackend, CachesOfOneRecipeShareARotationsMatricesUntilTheLastIsGone) {
  const std::size_t before = device().gpu->buffers();
  const std::int64_t d = kShape.dim;
  const std::vector<float> k = cases::normal_rows(kShape.kv_heads * 200, d, 1);
  const auto sealed = [&](const Recipe& recipe) {
    auto cache = make(recipe, kShape, 0, DType::f32, "metal");
    const TensorView rows = view(k, 1, kShape.kv_heads, 200, d);
    EXPECT_TRUE(cache->append(rows, rows).ok());
    EXPECT_EQ(cache->shared().size(), 1u) << "nothing on the device before it is used";
    EXPECT_TRUE(cache->seal().ok());
    return cache;
  };
  auto one = sealed(Recipe());
  ASSERT_EQ(one->shared().size(), 2u);
  const SharedMemory table = one->shared()[1];
  EXPECT_TRUE(table.on_device);
  EXPECT_GE(table.bytes, 2 * sizeof(float) * static_cast<std::size_t>(d * d)) << "the matrix that sealing takes";
  EXPECT_GT(one->nbytes(), table.bytes);
  const auto other = make(Recipe(), kShape, 0, DType::f32, "metal");
  EXPECT_EQ(other->shared()[1].identity, table.identity) << "there already";
  Recipe seeded;
  seeded.key.seed = seeded.value.seed = 99;
  auto third = sealed(seeded);
  EXPECT_NE(third->shared()[1].identity, table.identity);
  third.reset();
  one.reset();
  EXPECT_EQ(device().gpu->buffers(), before + 3) << "query, output and sealing matrices, for the other";
  EXPECT_EQ(other->shared()[1].identity, table.identity);
}

TEST(MetalBackend, OneHeadDimsTextHasItsOwnInstances) {
  std::ifstream file(KV4_METAL_TEXT);
  const std::string whole{std::istreambuf_iterator<char>(file), {}};
  const std::string own = apple::library_text(whole, 128);
  EXPECT_EQ(whole.find("#include \""), std::string::npos);
  for (const char* d : {"64", "80", "96", "256"}) {
    const std::string name = std::string("kv4_attend_d") + d + "_r";
    EXPECT_NE(whole.find(name), std::string::npos);
    EXPECT_EQ(own.find(name), std::string::npos);
  }
  for (const char* kernel : {"kv4_attend_d128_r8\"", "kernel void kv4_prepare(", "kernel void kv4_merge(",
                             "kernel void kv4_seal(", "kernel void kv4_dequantise("})
    EXPECT_NE(own.find(kernel), std::string::npos) << kernel;
}

#endif

TEST(MetalBackend, IsListed) {
  EXPECT_EQ(backends().back(), "metal");
  EXPECT_EQ(why_not("metal"), "");
}

}  // namespace
}  // namespace kv4
