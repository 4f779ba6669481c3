// The cache on a CUDA device: the CPU's sessions against the definition, and what only a device has: non-finite rows
// that are reported late, steps of a captured graph, streams.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cache_session.h"
#include "cuda/memory.h"
#include "cuda/rows.h"
#include "place.h"
#include "save_case.h"

namespace kv4 {
namespace {

using namespace sessions;
using tests::DeviceBytes;
using tests::DevicePlace;

class CudaCache : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }
  void TearDown() override { cuda::set_stream(nullptr); }
};

class CudaSessions : public CudaCache, public ::testing::WithParamInterface<int> {};
TEST_P(CudaSessions, EveryQuerySeesWhatTheDefinitionSays) {
  DevicePlace place(GetParam() % 2 == 0 ? DType::f16 : DType::bf16);
  random_session(GetParam(), &place);
}
INSTANTIATE_TEST_SUITE_P(Seeds, CudaSessions, ::testing::Range(0, kSeeds));

// What no kernel reads is refused when a cache is made.
TEST_F(CudaCache, OtherWidthsAndRefinedKeysAreRefused) {
  const auto refused = [](auto change, const std::string& message) {
    CacheConfig config = saved::config_of(Recipe(), 2, 64, 64, DType::f16);
    config.backend = "cuda";
    change(config.recipe);
    std::unique_ptr<Cache> cache;
    const Status status = Cache::create(config, &cache);
    EXPECT_EQ(status.code(), StatusCode::unsupported);
    EXPECT_EQ(status.message(), message);
    EXPECT_EQ(cache, nullptr);
  };
  refused([](Recipe& r) { r.key.bits = 6; }, "recipe.key.bits: expected 2, 3 or 4 on CUDA; got 6");
  refused([](Recipe& r) { r.value.bits = 8; }, "recipe.value.bits: expected 2, 3 or 4 on CUDA; got 8");
  refused([](Recipe& r) { r.refined = 1; }, "recipe.refined: expected 0 on CUDA; got 1");
  refused([](Recipe& r) { r.value.levels = LevelKind::trellis; },
          "recipe.value.levels: expected lloyd_max or uniform on CUDA; got trellis");
}

// The device's order of codes is not the file's: what it saved the host loads, and the other way round.
TEST_F(CudaCache, HostAndDeviceReadEachOther) {
  for (int n = 0; n < 2 * std::ssize(cases::kHeadDims); ++n) {
    const int dim = cases::kHeadDims[n / 2];
    Recipe recipe;
    if (n % 2 == 1) {
      recipe.key.bits = n % 4 == 1 ? 3 : 4;
      recipe.value.bits = n % 4 == 1 ? 4 : 2;
    }
    SCOPED_TRACE(testing::Message() << dim << ", bits " << recipe.key.bits << " and " << recipe.value.bits);
    DevicePlace place(DType::bf16);
    saved::Case c{"device", saved::config_of(recipe, 2, dim, dim, DType::bf16), 2, {0, 7}};
    saved::Twins t(c, static_cast<std::uint64_t>(dim));
    t.append(300);
    t.attend();
    t.append(1);
    t.attend();
    const saved::Bytes bytes = saved::save(t.cache(0));
    c.config.backend = "cuda";
    auto device = saved::create(c.config);
    const Status status = saved::load(*device, bytes);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(saved::save(*device), bytes);
    ASSERT_GT(device->page_count(1), 1);
    for (int page = 0; page < device->page_count(1); ++page)
      EXPECT_EQ(saved::Twins::slice(*device, 1, page, 1), saved::Twins::slice(t.cache(0), 1, page, 1));
    // Its attention over them is the host's, each within the kernels' bound.
    const std::vector<float> q = cases::normal_rows(2 * 4, dim, 5, 0.3);
    std::vector<float> want(q.size()), got(q.size());
    const std::int32_t starts[] = {0, 7};
    AttendArgs args;
    args.mask.start = starts;
    args.q = view(q, 2, 4, 1, dim);
    ASSERT_TRUE(t.cache(0).attend(args, into(want, 2, 4, 1, dim)).ok());
    args.q = place.queries(q, 2, 4, 1, dim);
    ASSERT_TRUE(device->attend(args, place.into(got, 2, 4, 1, dim)).ok());
    place.fetch();
    double top = 0;
    for (const float x : want) top = std::max(top, std::abs(static_cast<double>(x)));
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 2 * kTolerance * top);
  }
}

TEST_F(CudaCache, CropOfTheLastCallRestoresOneByOneDecoding) {
  DevicePlace place(DType::bf16);
  crops_of_the_last_call(&place);
}
TEST_F(CudaCache, SlidingWindowEvictsAndStaysRight) {
  DevicePlace place(DType::f16);
  sliding_window(&place);
}
TEST_F(CudaCache, RecordingEvictsNothing) {
  DevicePlace place(DType::f16);
  recording(&place);
}

TEST_F(CudaCache, CreateRefusesWhatNoKernelServes) {
  CacheConfig config;
  config.backend = "cuda";
  config.dtype = DType::f16;
  config.kv_heads = 2;
  config.head_dim_k = config.head_dim_v = 64;
  const auto expect = [](const CacheConfig& c, StatusCode code, const std::string& word) {
    std::unique_ptr<Cache> cache;
    const Status status = Cache::create(c, &cache);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
  };
  expect(config, StatusCode::ok, "");
  CacheConfig bad = config;
  bad.dtype = DType::f32;
  expect(bad, StatusCode::unsupported, "dtype");
  bad = config;
  bad.head_dim_k = bad.head_dim_v = 112;
  expect(bad, StatusCode::unsupported, "head_dim_k");
  bad = config;
  bad.head_dim_v = 128;
  expect(bad, StatusCode::unsupported, "head_dim_v");
  bad = config;
  bad.recipe.key.group = 32;
  expect(bad, StatusCode::unsupported, "group");
  bad = config;
  bad.backend = "cuda:77";
  expect(bad, StatusCode::invalid_argument, "backend");
  bad = config;
  bad.recipe = Recipe::exact();
  expect(bad, StatusCode::ok, "");
  bad.head_dim_k = bad.head_dim_v = 20;
  expect(bad, StatusCode::unsupported, "head_dim_k");
}

// Each vector is sealed as it comes, into parts of pages that forks share: the CPU's codes, but for numbers next to a
// boundary between two, and its answers. A row with NaN is zeros, and refused.
TEST_F(CudaCache, SealsOnArrivalWhatTheCpuSeals) {
  DevicePlace place(DType::f16);
  const int d = kShape.dim, heads = kShape.q_heads, kv_heads = kShape.kv_heads;
  std::unique_ptr<Cache> device = make(Recipe::paper(), kShape, 0, DType::f16, "cuda"),
                         host = make(Recipe::paper(), kShape), fork;
  std::uint64_t seed = 31;
  const auto step = [&](int tokens) {
    std::vector<float> k = cases::normal_rows(kv_heads * tokens, d, ++seed),
                       v = cases::normal_rows(kv_heads * tokens, d, ++seed);
    std::vector<float> q = cases::normal_rows(heads * tokens, d, ++seed, 0.3), out[2] = {q, q};
    for (std::vector<float>* x : {&k, &v, &q})
      for (float& f : *x) f = place.round(f);
    ASSERT_TRUE(device->append(place.rows(k, 1, kv_heads, tokens, d), place.rows(v, 1, kv_heads, tokens, d)).ok());
    ASSERT_TRUE(host->append(view(k, 1, kv_heads, tokens, d), view(v, 1, kv_heads, tokens, d)).ok());
    AttendArgs args;
    args.q = place.queries(q, 1, heads, tokens, d);
    ASSERT_TRUE(device->attend(args, place.into(out[0], 1, heads, tokens, d)).ok());
    place.fetch();
    args.q = view(q, 1, heads, tokens, d);
    ASSERT_TRUE(host->attend(args, into(out[1], 1, heads, tokens, d)).ok());
    ASSERT_EQ(device->sealed_tokens(0), device->length());
    std::size_t differ = 0, all = 0;
    for (int page = 0; page < device->page_count(0); ++page)
      for (int h = 0; h < kv_heads; ++h) {
        std::vector<std::uint8_t> codes[2][2];
        for (int i = 0; i < 2; ++i) {
          for (std::vector<std::uint8_t>& x : codes[i]) x.resize(static_cast<std::size_t>(kPageTokens * d / 2));
          ASSERT_TRUE((i == 0 ? device : host)->page_codes(0, page, h, codes[i][0], codes[i][1]).ok());
        }
        const std::int64_t arrived = std::min<std::int64_t>(kPageTokens, device->length() - page * kPageTokens);
        for (int side = 0; side < 2; ++side)
          for (std::size_t n = 0; n < static_cast<std::size_t>(arrived * d / 2); ++n, ++all)
            differ += codes[0][side][n] != codes[1][side][n];
      }
    ASSERT_LE(differ * 1000, all);  // within 1e-4 of a step from a boundary lies less than one in a thousand bytes
    for (std::size_t i = 0; i < out[0].size(); ++i) ASSERT_NEAR(out[0][i], out[1][i], 0.02) << i;
  };
  for (const int tokens : {1, 40, 3, 64, 1, 130, 1}) ASSERT_NO_FATAL_FAILURE(step(tokens));
  ASSERT_TRUE(device->clone(&fork).ok());  // its last page is not filled on
  std::vector<std::uint8_t> before[2], after[2];
  for (std::vector<std::uint8_t>& x : before) x.resize(static_cast<std::size_t>(kPageTokens * d / 2));
  for (int i = 0; i < 2; ++i) after[i] = before[i];
  const int last = fork->page_count(0) - 1;
  ASSERT_TRUE(fork->page_codes(0, last, 0, before[0], before[1]).ok());
  for (const int tokens : {1, 10}) ASSERT_NO_FATAL_FAILURE(step(tokens));
  ASSERT_TRUE(fork->page_codes(0, last, 0, after[0], after[1]).ok());
  EXPECT_TRUE(before[0] == after[0] && before[1] == after[1]);
  std::vector<float> k = cases::normal_rows(kv_heads, d, 5), q = cases::normal_rows(heads, d, 6), out(q.size());
  k[3] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_TRUE(device->append(place.rows(k, 1, kv_heads, 1, d), place.rows(k, 1, kv_heads, 1, d)).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  AttendArgs args;
  args.q = place.queries(q, 1, heads, 1, d);
  EXPECT_EQ(device->attend(args, place.into(out, 1, heads, 1, d)).code(), StatusCode::non_finite);
  ASSERT_TRUE(device->crop(device->length() - 1).ok());
  ASSERT_TRUE(device->attend(args, place.into(out, 1, heads, 1, d)).ok());
  place.fetch();
  for (const float x : out) EXPECT_TRUE(std::isfinite(x));
}

// A query that does not wait first sees zeros; the error is reported once the device has run the append.
TEST_F(CudaCache, NonFiniteRowsAreRefusedOnceSeen) {
  DevicePlace place(DType::f16);
  const int d = kShape.dim;
  auto cache = make(Recipe(), kShape, 0, DType::f16, "cuda");
  std::vector<float> k = cases::normal_rows(kShape.kv_heads * 10, d, 1), v = k;
  for (int c = 0; c < 3 * d; ++c) {  // head 0, tokens 0 ... 2
    k[static_cast<std::size_t>(c)] = std::numeric_limits<float>::quiet_NaN();
    v[static_cast<std::size_t>(c)] = std::numeric_limits<float>::quiet_NaN();
  }
  ASSERT_TRUE(cache->append(place.rows(k, 1, kShape.kv_heads, 10, d), place.rows(v, 1, kShape.kv_heads, 10, d)).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<float> q = cases::normal_rows(kShape.q_heads, d, 2);
  std::vector<float> out(q.size());
  AttendArgs args;
  args.q = place.queries(q, 1, kShape.q_heads, 1, d);
  const Status status = cache->attend(args, place.into(out, 1, kShape.q_heads, 1, d));
  EXPECT_EQ(status.code(), StatusCode::non_finite);
  EXPECT_NE(status.message().find("k: expected finite values"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("position 2"), std::string::npos) << status.message();
  const std::int32_t start = 3;
  args.mask.start = &start;
  ASSERT_TRUE(cache->attend(args, place.into(out, 1, kShape.q_heads, 1, d)).ok());
  place.fetch();
  for (float x : out) EXPECT_TRUE(std::isfinite(x));
  // The rows were held as zeros.
  std::vector<float> keys(static_cast<std::size_t>(kShape.kv_heads) * 10 * d, -1.0f);
  ASSERT_TRUE(cache->dense_keys(0, 10, place.into(keys, 1, kShape.kv_heads, 10, d)).ok());
  place.fetch();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const float want = i < static_cast<std::size_t>(3 * d) ? 0.0f : place.round(k[i]);
    ASSERT_EQ(keys[i], want) << i;
  }
  // A crop of them forgets them.
  ASSERT_TRUE(cache->crop(0).ok());
  args.mask.start = nullptr;
  const std::vector<float> fine = cases::normal_rows(kShape.kv_heads * 4, d, 3);
  ASSERT_TRUE(
      cache->append(place.rows(fine, 1, kShape.kv_heads, 4, d), place.rows(fine, 1, kShape.kv_heads, 4, d)).ok());
  EXPECT_TRUE(cache->attend(args, place.into(out, 1, kShape.q_heads, 1, d)).ok());
}

// Holes of a general mask stay out of a page's mean, where the host can read the mask.
TEST_F(CudaCache, HolesOfAGeneralMaskStayOutOfMeans) {
  DevicePlace place(DType::f16);
  const int d = kShape.dim, tokens = 200, hole = 20;
  std::vector<float> k = cases::normal_rows(kShape.kv_heads * tokens, d, 1),
                     v = cases::normal_rows(kShape.kv_heads * tokens, d, 2);
  std::vector<std::uint8_t> mask(tokens * tokens, 0);
  for (int t = 0; t < tokens; ++t)
    for (int j = 0; j <= t; ++j) mask[static_cast<std::size_t>(t * tokens + j)] = j != hole;
  const std::vector<float> q = cases::normal_rows(kShape.q_heads * tokens, d, 3);
  const DeviceBytes device_mask(mask);
  const auto codes = [&](float at_the_hole, bool host_copy) {
    for (int h = 0; h < kShape.kv_heads; ++h)
      for (int c = 0; c < d; ++c) k[static_cast<std::size_t>((h * tokens + hole) * d + c)] = at_the_hole;
    auto cache = make(Recipe(), kShape, 0, DType::f16, "cuda");
    EXPECT_TRUE(
        cache->append(place.rows(k, 1, kShape.kv_heads, tokens, d), place.rows(v, 1, kShape.kv_heads, tokens, d)).ok());
    AttendArgs args;
    args.q = place.queries(q, 1, kShape.q_heads, tokens, d);
    args.mask.causal = false;
    args.mask.kind = Mask::General::boolean;
    args.mask.general = device_mask.as<void>();
    args.mask.general_stride = {0, 0, tokens, 1};
    args.mask.columns = tokens;
    if (host_copy) args.mask.host_general = mask.data();
    args.mask.host_general_stride = args.mask.general_stride;
    std::vector<float> out(static_cast<std::size_t>(kShape.q_heads) * tokens * d);
    EXPECT_TRUE(cache->attend(args, place.into(out, 1, kShape.q_heads, tokens, d)).ok());
    EXPECT_TRUE(cache->seal().ok());
    place.fetch();
    for (float x : out) EXPECT_TRUE(std::isfinite(x));
    EXPECT_EQ(cache->page_count(0), 2);
    std::vector<std::uint8_t> key(32u * static_cast<unsigned>(d)), value(key.size());
    EXPECT_TRUE(cache->page_codes(0, 0, 0, key, value).ok());
    const std::size_t row = static_cast<std::size_t>((hole - 4) * d / 2);  // the hole's own codes say nothing
    std::fill(key.begin() + static_cast<std::ptrdiff_t>(row), key.begin() + static_cast<std::ptrdiff_t>(row) + d / 2,
              0);
    return key;
  };
  EXPECT_EQ(codes(0, true), codes(500, true));
  EXPECT_NE(codes(0, false), codes(500, false));
}

// Decoding by a replayed graph gives what the same steps give one by one, through seals and on another stream.
TEST_F(CudaCache, CapturedStepsAreTheSame) {
  const int d = kShape.dim, prompt = 150, steps = 200, batch = 2;
  DevicePlace place(DType::bf16);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  for (const int window : {0, 100}) {
    for (const Recipe& recipe : {Recipe(), with(4, 0), Recipe::exact()}) {
      auto eager = make(recipe, kShape, window, DType::bf16, "cuda"),
           captured = make(recipe, kShape, window, DType::bf16, "cuda");
      for (Cache* c : {eager.get(), captured.get()}) c->set_stream(stream);
      std::vector<float> out(static_cast<std::size_t>(batch * kShape.q_heads * d)), again(out.size());
      const std::int32_t starts[] = {0, 5};
      const auto step = [&](Cache& c, std::int64_t tokens, std::uint64_t seed, std::vector<float>& to) {
        std::vector<float> k = cases::key_rows(static_cast<int>(batch * kShape.kv_heads * tokens), d, seed),
                           v = cases::normal_rows(batch * kShape.kv_heads * tokens, d, seed + 1);
        ASSERT_TRUE(
            c.append(place.rows(k, batch, kShape.kv_heads, tokens, d), place.rows(v, batch, kShape.kv_heads, tokens, d))
                .ok());
        const std::vector<float> q = cases::normal_rows(batch * kShape.q_heads * tokens, d, seed + 2);
        std::vector<float> all(q.size());
        AttendArgs args;
        args.q = place.queries(q, batch, kShape.q_heads, tokens, d);
        args.mask.start = starts;
        const Status status = c.attend(args, place.into(all, batch, kShape.q_heads, tokens, d));
        ASSERT_TRUE(status.ok()) << status.message();
        place.fetch();
        if (tokens == 1) to = all;
      };
      step(*eager, prompt, 10, out);
      step(*captured, prompt, 10, again);
      step(*eager, 1, 20, out);
      step(*captured, 1, 20, again);
      ASSERT_EQ(out, again);
      ASSERT_TRUE(captured->reserve(steps + 1).ok());
      const std::size_t bytes = static_cast<std::size_t>(batch * kShape.kv_heads * d) * 2;
      const DeviceBytes k(bytes), v(bytes), q(out.size() * 4), o(out.size() * 4);
      const TensorView keys{k.as<void>(), DType::bf16, {batch, kShape.kv_heads, 1, d}, {kShape.kv_heads * d, d, d, 1}};
      TensorView values = keys;
      values.data = v.as<void>();
      AttendArgs args;
      args.q = {q.as<void>(), DType::f32, {batch, kShape.q_heads, 1, d}, {kShape.q_heads * d, d, d, 1}};
      args.mask.start = starts;
      const MutableTensorView result{o.as<void>(), DType::f32, args.q.shape, args.q.stride};
      ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
      const std::int64_t length = captured->length();
      Status status = captured->append(keys, values);
      const Status attended = captured->attend(args, result);
      cudaGraph_t graph = nullptr;
      ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_TRUE(attended.ok()) << attended.message();
      EXPECT_EQ(captured->length(), length);
      cudaGraphExec_t exec = nullptr;
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      for (int i = 0; i < steps; ++i) {
        const std::uint64_t seed = 1000 + static_cast<std::uint64_t>(3 * i);
        step(*eager, 1, seed, out);
        const std::vector<float> kr = cases::key_rows(batch * kShape.kv_heads, d, seed),
                                 vr = cases::normal_rows(batch * kShape.kv_heads, d, seed + 1);
        const std::vector<float> qr = cases::normal_rows(batch * kShape.q_heads, d, seed + 2);
        const auto put = [&](const DeviceBytes& to, const void* from, std::size_t n) {
          ASSERT_EQ(cudaMemcpy(to.as<void>(), from, n, cudaMemcpyHostToDevice), cudaSuccess);
          // From memory that is not pinned it returns before the device has it, and the graph's stream does not wait.
          ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
        };
        std::vector<std::uint16_t> kh(kr.size()), vh(vr.size());
        for (std::size_t j = 0; j < kr.size(); ++j) kh[j] = f32_to_bf16(kr[j]), vh[j] = f32_to_bf16(vr[j]);
        put(k, kh.data(), bytes);
        put(v, vh.data(), bytes);
        put(q, qr.data(), qr.size() * 4);
        status = captured->advance();
        ASSERT_TRUE(status.ok()) << status.message();
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        const std::vector<std::uint8_t> got = o.read();
        ASSERT_EQ(std::memcmp(got.data(), out.data(), got.size()), 0) << "window " << window << ", step " << i;
      }
      EXPECT_EQ(captured->length(), eager->length());
      EXPECT_EQ(captured->sealed_tokens(1), eager->sealed_tokens(1));
      // And back to single calls.
      step(*eager, 1, 7, out);
      step(*captured, 1, 7, again);
      ASSERT_EQ(out, again);
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    }
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// NaN that is reported only after a fork or a crop: each sequence reports its own rows and those it shares.
TEST_F(CudaCache, LateErrorsReachTheSequencesThatHoldTheRows) {
  const int d = kShape.dim, heads = kShape.kv_heads;
  DevicePlace place(DType::f16);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  {
    const std::vector<float> fine = cases::normal_rows(heads, d, 1), q = cases::normal_rows(kShape.q_heads, d, 2);
    std::vector<float> bad = fine;
    bad[0] = std::numeric_limits<float>::quiet_NaN();
    const TensorView good_row = place.rows(fine, 1, heads, 1, d), bad_row = place.rows(bad, 1, heads, 1, d);
    std::vector<float> out(q.size());
    AttendArgs args;
    args.q = place.queries(q, 1, kShape.q_heads, 1, d);
    const auto attend = [&](Cache& c) { return c.attend(args, place.into(out, 1, kShape.q_heads, 1, d)).code(); };
    // What follows on the stream waits until the host has gone on.
    const auto hold = [&] {
      ASSERT_EQ(cudaLaunchHostFunc(
                    stream, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(50)); }, nullptr),
                cudaSuccess);
    };
    const auto filled = [&] {
      auto cache = make(Recipe(), kShape, 0, DType::f16, "cuda");
      cache->set_stream(stream);
      for (int i = 0; i < 5; ++i) EXPECT_TRUE(cache->append(good_row, good_row).ok());
      return cache;
    };
    auto one = filled();
    auto fork = fork_of(*one);
    hold();
    ASSERT_TRUE(one->append(bad_row, good_row).ok());
    ASSERT_TRUE(fork->append(good_row, good_row).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(attend(*one), StatusCode::non_finite);
    EXPECT_EQ(attend(*fork), StatusCode::ok);

    auto shared = filled();
    hold();
    ASSERT_TRUE(shared->append(good_row, bad_row).ok());
    auto second = fork_of(*shared);
    for (Cache* c : {shared.get(), second.get()}) ASSERT_TRUE(c->append(good_row, good_row).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(attend(*shared), StatusCode::non_finite);
    EXPECT_EQ(attend(*second), StatusCode::non_finite);

    auto cropped = filled();
    hold();
    ASSERT_TRUE(cropped->append(bad_row, bad_row).ok());
    ASSERT_TRUE(cropped->crop(5).ok());
    ASSERT_TRUE(cropped->append(good_row, good_row).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(attend(*cropped), StatusCode::ok);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// A captured step replays after the thread that captured it has ended, and after eager calls have taken larger scratch.
TEST_F(CudaCache, CapturedStepsOutliveTheirThread) {
  const int d = kShape.dim, heads = kShape.kv_heads, prompt = 150;
  DevicePlace place(DType::f16);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  {
    const std::vector<float> rows = cases::key_rows(heads * prompt, d, 1), row = cases::key_rows(heads, d, 2),
                             q = cases::normal_rows(kShape.q_heads, d, 3);
    auto cache = make(Recipe(), kShape, 0, DType::f16, "cuda");
    cache->set_stream(stream);
    const TensorView many = place.rows(rows, 1, heads, prompt, d), one = place.rows(row, 1, heads, 1, d);
    std::vector<float> first(q.size()), second(q.size());
    AttendArgs args;
    args.q = place.queries(q, 1, kShape.q_heads, 1, d);
    const MutableTensorView out = place.into(second, 1, kShape.q_heads, 1, d);
    cudaGraphExec_t exec = nullptr;
    std::thread([&] {
      // Lambda is fixed by the first page, which the third call seals.
      ASSERT_TRUE(cache->append(many, many).ok());
      ASSERT_TRUE(cache->attend(args, place.into(first, 1, kShape.q_heads, 1, d)).ok());
      ASSERT_TRUE(cache->append(one, one).ok());
      ASSERT_TRUE(cache->attend(args, place.into(first, 1, kShape.q_heads, 1, d)).ok());
      ASSERT_TRUE(cache->reserve(8).ok());
      cudaGraph_t graph = nullptr;
      ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
      const Status appended = cache->append(one, one), attended = cache->attend(args, out);
      ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      ASSERT_TRUE(appended.ok()) << appended.message();
      ASSERT_TRUE(attended.ok()) << attended.message();
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      cudaGraphDestroy(graph);
    }).join();
    ASSERT_NE(exec, nullptr);
    // A call of more rows, on the same stream.
    const std::vector<float> wide = cases::normal_rows(kShape.q_heads * 64, d, 4);
    std::vector<float> ignored(wide.size());
    AttendArgs more;
    more.q = place.queries(wide, 1, kShape.q_heads, 64, d);
    auto other = make(Recipe(), kShape, 0, DType::f16, "cuda");
    other->set_stream(stream);
    ASSERT_TRUE(other->append(many, many).ok());
    ASSERT_TRUE(other->attend(more, place.into(ignored, 1, kShape.q_heads, 64, d)).ok());

    auto eager = fork_of(*cache);
    ASSERT_TRUE(cache->advance().ok());
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_TRUE(eager->append(one, one).ok());
    ASSERT_TRUE(eager->attend(args, place.into(first, 1, kShape.q_heads, 1, d)).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    place.fetch();
    EXPECT_EQ(first, second);
    cudaGraphExecDestroy(exec);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_F(CudaCache, CaptureSaysWhatItNeeds) {
  const int d = kShape.dim;
  DevicePlace place(DType::f16);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  {
    auto cache = make(Recipe(), kShape, 0, DType::f16, "cuda");
    cache->set_stream(stream);
    EXPECT_EQ(cache->advance().code(), StatusCode::failed_precondition);
    const std::vector<float> rows = cases::normal_rows(kShape.kv_heads * 2, d, 1),
                             q = cases::normal_rows(kShape.q_heads, d, 2);
    const TensorView two = place.rows(rows, 1, kShape.kv_heads, 2, d),
                     one{two.data, two.dtype, {1, kShape.kv_heads, 1, d}, {2 * d, d, d, 1}};
    ASSERT_TRUE(cache->append(two, two).ok());
    const auto captured = [&](const TensorView& x) {
      EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
      const Status status = cache->append(x, x);
      cudaGraph_t graph = nullptr;
      EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      if (graph != nullptr) cudaGraphDestroy(graph);
      return status;
    };
    Status status = captured(two);
    EXPECT_EQ(status.code(), StatusCode::failed_precondition);
    EXPECT_NE(status.message().find("one token"), std::string::npos) << status.message();
    status = captured(one);
    EXPECT_EQ(status.code(), StatusCode::failed_precondition);
    EXPECT_NE(status.message().find("lambda"), std::string::npos) << status.message();
    EXPECT_EQ(cache->length(), 2);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

}  // namespace
}  // namespace kv4
