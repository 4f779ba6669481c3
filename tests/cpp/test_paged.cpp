// Operations on memory that a host owns.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocations.h"
#include "guard.h"
#include "kv4/cpu.h"
#include "moments/lambda.h"
#include "paged_server.h"

namespace kv4 {
namespace {

using tests::Held;
using tests::PagedServer;
using tests::ServerShape;

TEST(Paged, AServerReadsWhatPlainViewsRead) {
  const std::pair<ServerShape, int> runs[] = {
      {{}, 60},
      {{.kv_heads = 1, .group = 8, .dim = 128, .dtype = DType::bf16, .sinks = 0, .lambda_per_sequence = true}, 40},
      {{.kv_heads = 3, .group = 1, .dim = 80, .sinks = 64, .window = 100, .lambda = false}, 60},
      {{.group = 2, .window = 33, .lambda_per_sequence = true, .exact = 0}, 60},
  };
  std::uint64_t seed = 1;
  for (const auto& [shape, steps] : runs) ASSERT_NO_FATAL_FAILURE(tests::run_server(shape, seed++, steps));
}

// A prompt of 300 and one of 40 tokens, sealed, and the batch of a step of both.
struct Two {
  PagedServer server{ServerShape{}, 9};
  std::vector<std::int32_t> queries{0, 1, 2};
  std::vector<std::size_t> both{0, 1};

  Two() {
    server.add();
    server.add();
    for (int n : {80, 80, 80, 60}) server.step({0}, {n});
    server.step({1}, {40});
  }
  PagedBatch batch() { return server.batch_of(both, queries); }
};

TEST(Paged, DequantisedPagesAreTheBackendsRows) {
  Two two;
  PagedServer& server = two.server;
  PagedServer::Sequence& s = server.sequences[0];
  ASSERT_GE(s.sealed, 192);
  s.blocks[1] = 60;  // a block that nobody has
  const PagedBatch batch = two.batch();
  const std::int32_t begin[] = {64, 0}, end[] = {128, 0};
  ASSERT_TRUE(server.format->dequantise(batch, {begin, end, 1}, server.workspace->span()).ok());
  std::vector<std::uint16_t> want(static_cast<std::size_t>(2 * kPageTokens * server.row()));
  DequantiseJob job;
  job.page = s.pages[1];
  job.count = kPageTokens;
  job.dtype = DType::f16;
  job.k = want.data();
  job.v = want.data() + kPageTokens * server.row();
  job.k_head_stride = job.v_head_stride = kPageTokens * 64;
  job.k_stride = job.v_stride = 64;
  job.lambda_k = batch.lambda_k;
  job.lambda_v = batch.lambda_v;
  ASSERT_TRUE(server.backend().dequantise(server.spec, batch.page_memory, 2, {&job, 1}, false).ok());
  EXPECT_EQ(
      std::memcmp(want.data(), server.blocks->as<std::byte>() + 60 * server.format->block_bytes(), want.size() * 2), 0);
}

// Every refusal names what was wrong, and leaves pages, blocks and outputs unchanged.
TEST(Paged, RefusalsNameTheArgumentAndWriteNothing) {
  Two two;
  PagedServer& server = two.server;
  server.sequences[0].length += 1;
  server.sequences[1].length += 1;
  server.sequences[0].pages[static_cast<std::size_t>(server.sequences[0].sealed / kPageTokens)] = 5;
  const PagedBatch good = two.batch();
  const std::vector<float> rows(2 * 6 * 64 * 2, 0.5f);
  const std::vector<std::uint16_t> kv(2 * 2 * 64, 0x3c00);
  std::vector<float> out(rows.size(), 7.0f);
  const TensorView q{rows.data(), DType::f32, {1, 6, 2, 64}, {0, 128, 64, 1}},
      k{kv.data(), DType::f16, {1, 2, 2, 64}, {0, 128, 64, 1}};
  const MutableTensorView to{out.data(), DType::f32, {1, 6, 2, 64}, {0, 128, 64, 1}};
  const std::int32_t sealed = good.sealed[0], first[] = {sealed, 0}, last[] = {sealed + 64, 0};
  struct Call {
    PagedBatch batch;
    AttendArgs args;
    MutableTensorView out;
    TensorView k, v;
    PageRange range;
    std::span<std::byte> workspace;
  };
  AttendArgs asked;
  asked.q = q;
  const Call fine{good, asked, to, k, k, {first, last, 1}, server.workspace->span()};
  const std::vector<std::int32_t> queries{0, 2, 1}, many{0, 1, 3}, odd{63, 0}, far{640, 0},
      ids(2 * PagedServer::kTable, 1000);
  using Change = std::function<void(Call&)>;
  const std::pair<const char*, Change> any[] = {
      {"batch.size", [](Call& c) { c.batch.size = -1; }},
      {"batch.queries", [](Call& c) { c.batch.queries = nullptr; }},
      {"batch.lengths", [](Call& c) { c.batch.lengths = nullptr; }},
      {"batch.sealed", [](Call& c) { c.batch.sealed = nullptr; }},
      {"batch.pages", [](Call& c) { c.batch.pages = nullptr; }},
      {"batch.blocks", [](Call& c) { c.batch.blocks = nullptr; }},
      {"batch.row_memory.k", [](Call& c) { c.batch.row_memory.k = nullptr; }},
      {"batch.row_memory.v", [](Call& c) { c.batch.row_memory.v = nullptr; }},
      {"batch.page_memory", [](Call& c) { c.batch.page_memory.data = nullptr; }},
      {"batch.page_memory.data", [](Call& c) { c.batch.page_memory.data += 32; }},
      {"batch.page_memory.page_stride", [](Call& c) { c.batch.page_memory.page_stride += 8; }},
      {"batch.page_memory.head_stride", [](Call& c) { c.batch.page_memory.head_stride += 8; }},
      {"batch.page_memory.chunk_shift", [](Call& c) { c.batch.page_memory.chunk_shift = 31; }},
      {"batch.sink_tokens", [](Call& c) { c.batch.sink_tokens = 65; }},
      {"batch.window", [](Call& c) { c.batch.window = -1; }},
      {"batch.pages_stride", [](Call& c) { c.batch.pages_stride = -1; }},
      {"batch.blocks_stride", [](Call& c) { c.batch.blocks_stride = -1; }},
      {"batch.page_count", [](Call& c) { c.batch.page_count = -1; }},
      {"batch.block_count", [](Call& c) { c.batch.block_count = -1; }},
      {"workspace", [](Call& c) { c.workspace = c.workspace.first(16); }},
  };
  const std::pair<const char*, Change> tables[] = {
      {"queries[1]", [&](Call& c) { c.batch.queries = queries.data(); }},
      {"queries[1]", [&](Call& c) { c.batch.queries = many.data(); }},
      {"lengths[0]", [&](Call& c) { c.batch.lengths = queries.data(); }},
      {"sealed[0]", [&](Call& c) { c.batch.sealed = odd.data(); }},
      {"sealed[0]", [&](Call& c) { c.batch.sealed = far.data(); }},
      {"blocks[0, ", [&](Call& c) { c.batch.blocks = ids.data(); }},
      {"blocks[0]", [&](Call& c) { c.batch.blocks_stride = 2; }},
  };
  const std::pair<const char*, Change> attend[] = {
      {"pages[0, 0]", [&](Call& c) { c.batch.pages = ids.data(); }},
      {"sinks[0", [&](Call& c) { c.batch.sinks = ids.data(); }},
      {"q", [](Call& c) { c.args.q.shape[0] = 2; }},
      {"q", [](Call& c) { c.args.q.shape[1] = 5; }},
      {"q", [](Call& c) { c.args.q.shape[3] = 32; }},
      {"q", [](Call& c) { c.args.q.data = nullptr; }},
      {"q", [](Call& c) { c.args.q.stride[3] = 2; }},
      {"softcap", [](Call& c) { c.args.softcap = -1; }},
      {"scale", [](Call& c) { c.args.scale = NAN; }},
      {"mask", [](Call& c) { c.args.mask.kind = Mask::General::boolean; }},
      {"out", [](Call& c) { c.out.shape[2] = 3; }},
      {"out", [](Call& c) { c.out.data = nullptr; }},
      {"out", [](Call& c) { c.out.stride[1] = 0; }},
  };
  const std::pair<const char*, Change> store[] = {
      {"k", [](Call& c) { c.k.dtype = DType::f32; }}, {"k", [](Call& c) { c.k.shape[1] = 3; }},
      {"k", [](Call& c) { c.k.data = nullptr; }},     {"v", [](Call& c) { c.v.shape[2] = 1; }},
      {"v", [](Call& c) { c.v.stride[3] = 2; }},
  };
  const std::pair<const char*, Change> range[] = {
      {"range.begin", [](Call& c) { c.range.begin = nullptr; }},
      {"range.end", [](Call& c) { c.range.end = nullptr; }},
      {"range.most", [](Call& c) { c.range.most = -1; }},
      {"range.begin[0]", [&](Call& c) { c.range.begin = odd.data(); }},
      {"range.end[0]", [&](Call& c) { c.range.end = odd.data(); }},
      {"range.end[0]", [&](Call& c) { c.range.end = far.data(); }},
      {"pages[0, ", [&](Call& c) { c.batch.pages = ids.data(); }},
      {"blocks[0, ", [&](Call& c) { c.batch.blocks = ids.data(); }},
  };
  const std::int32_t read[] = {sealed - 64, 0}, one[] = {sealed, 0};
  const std::vector<std::int32_t> same(2 * PagedServer::kTable, 0);
  const std::pair<const char*, Change> step[] = {
      {"q", [](Call& c) { c.args.q.shape[2] = c.out.shape[2] = 1; }},
      {"range.begin[0]",
       [&](Call& c) {
         c.range = {read, one, 1};
         c.batch.blocks = same.data();
       }},
  };
  const PageFormat& format = *server.format;
  const auto run_attend = [&](const Call& c) { return format.attend(c.batch, c.args, c.out, c.workspace); };
  const auto run_store = [&](const Call& c) { return format.store(c.batch, c.k, c.v, c.workspace); };
  const auto run_seal = [&](const Call& c) { return format.seal(c.batch, c.range, c.workspace); };
  const auto run_step = [&](const Call& c) {
    return format.step(c.batch, c.k, c.v, c.range, c.args, c.out, c.workspace);
  };
  const auto run_dequantise = [&](const Call& c) { return format.dequantise(c.batch, c.range, c.workspace); };
  const std::vector<std::uint8_t> pages = server.pages->read(), blocks = server.blocks->read();
  const auto refuse = [&](auto run, std::span<const std::pair<const char*, Change>> changes) {
    for (const auto& [name, change] : changes) {
      Call call = fine;
      change(call);
      const Status status = run(call);
      EXPECT_FALSE(status.ok()) << name;
      EXPECT_EQ(status.message().rfind(name, 0), 0u) << name << ": " << status.message();
      ASSERT_NE(status.message().find("; got "), std::string::npos) << status.message();
      ASSERT_TRUE(server.pages->read() == pages && server.blocks->read() == blocks) << name;
      ASSERT_EQ(out, std::vector<float>(out.size(), 7.0f)) << name;
    }
  };
  refuse(run_attend, any), refuse(run_attend, tables), refuse(run_attend, attend);
  refuse(run_store, any), refuse(run_store, tables), refuse(run_store, store);
  refuse(run_seal, any), refuse(run_seal, range);
  refuse(run_dequantise, any), refuse(run_dequantise, range);
  std::size_t needed = 0;
  ASSERT_TRUE(format.workspace_bytes({.sequences = 2, .q_heads = 6, .longest = 400, .all = 800}, &needed).ok());
  const std::pair<const char*, Change> scratch[] = {
      {"workspace", [&](Call& c) { c.workspace = c.workspace.first(needed / 2); }}};
  refuse(run_step, scratch);
  refuse(run_step, any), refuse(run_step, tables), refuse(run_step, attend);
  refuse(run_step, store), refuse(run_step, range), refuse(run_step, step);
  EXPECT_TRUE(run_store(fine).ok() && run_attend(fine).ok() && run_step(fine).ok());
}

TEST(Paged, AServerReadsPagesOfOtherWidthsAndRefinedKeys) {
  const std::pair<ServerShape, int> runs[] = {
      {{.bits_k = 3, .bits_v = 2}, 40},
      {{.kv_heads = 1, .group = 8, .dim = 128, .dtype = DType::bf16, .sinks = 0, .refined = 1}, 40},
      {{.kv_heads = 3, .group = 1, .dim = 80, .window = 100, .bits_k = 6, .bits_v = 8, .refined = 2}, 40},
      {{.group = 2, .lambda_per_sequence = true, .exact = 0, .bits_k = 2, .bits_v = 4, .refined = 1}, 40},
  };
  std::uint64_t seed = 50;
  for (const auto& [shape, steps] : runs) ASSERT_NO_FATAL_FAILURE(tests::run_server(shape, seed++, steps));
}

// What a page of a host takes is what the format says, also where its parts do not fill whole lines of 64 bytes.
TEST(Paged, SizesAreThoseOfTheFormat) {
  const auto bytes = [](int dim, int bits_k, int bits_v, int refined) {
    CacheConfig config;
    config.kv_heads = 3;
    config.head_dim_k = config.head_dim_v = dim;
    config.recipe.key.bits = bits_k;
    config.recipe.value.bits = bits_v;
    config.recipe.refined = refined;
    std::unique_ptr<PageFormat> format;
    EXPECT_TRUE(PageFormat::create(config, &format).ok());
    EXPECT_EQ(format->page_bytes(), 3 * format->head_bytes());
    return format->head_bytes();
  };
  EXPECT_EQ(bytes(128, 4, 4, 0), 8704u);
  EXPECT_EQ(bytes(128, 3, 3, 0), 6656u);
  EXPECT_EQ(bytes(128, 3, 3, 1), 6656u + 128);
  EXPECT_EQ(bytes(256, 4, 2, 0), 64u * 32 * 6 + 2 * 128 + 512);
  EXPECT_EQ(bytes(256, 4, 2, 1), 64u * 32 * 6 + 2 * 128 + 512 + 192);
}

// A backend that has no kernels for them refuses them before anything is made.
TEST(Paged, ABackendWithPlainPagesRefusesOthersByName) {
  CacheConfig config;
  config.kv_heads = 1;
  config.head_dim_k = config.head_dim_v = 64;
  config.backend = "probe";
  const auto refused = [&](const std::string& message) {
    std::unique_ptr<PageFormat> format;
    std::unique_ptr<Cache> cache;
    for (const Status& status : {PageFormat::create(config, &format), Cache::create(config, &cache)}) {
      EXPECT_EQ(status.code(), StatusCode::unsupported);
      EXPECT_EQ(status.message(), message);
    }
    EXPECT_TRUE(format == nullptr && cache == nullptr);
    config.recipe = Recipe();
  };
  config.recipe.key.bits = 3;
  refused("recipe.key.bits: expected 4 on probe; got 3");
  config.recipe.value.bits = 3;
  refused("recipe.value.bits: expected 4 on probe; got 3");
  config.recipe.refined = 1;
  refused("recipe.refined: expected 0 on probe; got 1");
}

TEST(Paged, NaNIsStoredAsZerosAndReported) {
  Two two;
  PagedServer& server = two.server;
  server.sequences[0].length += 1;
  server.sequences[1].length += 1;
  std::vector<std::uint16_t> k(2 * 2 * 64, 0x3c00), v = k;
  k[64] = 0x7e00;   // row 1, head 0
  v[128] = 0x7c00;  // row 0, head 1
  PagedBatch batch = two.batch();
  std::vector<std::int64_t> reported(4, 0);
  batch.non_finite = reported.data();
  const auto rows = [](const std::vector<std::uint16_t>& x) {
    return TensorView{x.data(), DType::f16, {1, 2, 2, 64}, {0, 128, 64, 1}};
  };
  ASSERT_TRUE(server.format->store(batch, rows(k), rows(v), server.workspace->span()).ok());
  EXPECT_EQ(reported, (std::vector<std::int64_t>{0, server.sequences[0].length, server.sequences[1].length, 0}));
  const PagedServer::Sequence& s = server.sequences[1];
  const auto* block = server.blocks->as<std::uint16_t>() + s.blocks[0] * 2 * kPageTokens * server.row();
  for (int c = 0; c < 64; ++c) {
    EXPECT_EQ(block[40 * 64 + c], 0);                       // key, head 0
    EXPECT_EQ(block[(kPageTokens + 40) * 64 + c], 0x3c00);  // key, head 1
  }
}

// The workspace is the only memory that calls use, and they stay within it.
TEST(Paged, CallsAllocateNothingAndStayInTheWorkspace) {
  if (!KV4_TESTS_OPENMP) {
    ASSERT_TRUE(cpu::set_num_threads(1).ok());
  }
  Two two;
  PagedServer& server = two.server;
  const PagedBatch batch = two.batch();
  for (std::int64_t most : {1, 2}) {
    std::size_t bytes = 0;
    ASSERT_TRUE(
        server.format
            ->workspace_bytes(
                {.sequences = 2, .q_heads = 6, .most_pages = 1, .most_queries = most, .longest = 400, .all = 800},
                &bytes)
            .ok());
    tests::Guarded memory(bytes);
    const std::span<std::byte> workspace{reinterpret_cast<std::byte*>(memory.data()), bytes};
    ASSERT_TRUE(server.format->prepare(workspace).ok());
    const std::vector<float> q(6 * 2 * 64, 0.5f);
    std::vector<float> out(q.size());
    AttendArgs args;
    args.q = {q.data(), DType::f32, {1, 6, 2, 64}, {0, 128, 64, 1}};
    const MutableTensorView to{out.data(), DType::f32, {1, 6, 2, 64}, {0, 128, 64, 1}};
    const std::vector<std::uint16_t> kv(2 * 2 * 64, 0x3c00);
    const TensorView rows{kv.data(), DType::f16, {1, 2, 2, 64}, {0, 128, 64, 1}};
    const std::int32_t nothing[] = {1024, 1024};
    server.sequences[0].blocks[0] = 61;  // a block that nobody has
    const PagedBatch again = two.batch();
    const std::int32_t begin[] = {0, 0}, end[] = {64, 0};
    const auto call = [&] {
      ASSERT_TRUE(server.format->attend(batch, args, to, workspace).ok());
      ASSERT_TRUE(server.format->step(batch, rows, rows, {nothing, nothing, 1}, args, to, workspace).ok());
      ASSERT_TRUE(server.format->dequantise(again, {begin, end, 1}, workspace).ok());
      ASSERT_TRUE(server.format->seal(again, {begin, end, 1}, workspace).ok());
    };
    call();
    const long before = allocations::count();
    for (int i = 0; i < 3; ++i) call();
    EXPECT_EQ(allocations::count(), before);
    EXPECT_TRUE(memory.intact());
  }
}

// A host's threads, and no others, do the work; what they answer is the same.
TEST(Paged, AHostLendsItsThreads) {
  struct Lent final : cpu::Executor {
    int runs = 0;
    int threads() const override { return 3; }
    void run(void (*body)(void*, int), void* context) override {
      ++runs;
      std::thread one([&] { body(context, 1); }), two([&] { body(context, 2); });
      body(context, 0);
      one.join();
      two.join();
    }
  } lent;
  PagedServer server({.kv_heads = 8, .group = 4, .dim = 128}, 3);
  server.add();
  for (int i = 0; i < 12; ++i) server.step({0}, {80});
  const PagedBatch batch = server.batch_of({0}, {0, 1});
  const std::vector<float> q(32 * 128, 0.5f);
  std::vector<float> out[2];
  for (int i = 0; i < 2; ++i) {
    const Place place{nullptr, i == 0 ? nullptr : &lent};
    std::size_t bytes = 0;
    ASSERT_TRUE(server.format->workspace_bytes({.q_heads = 32, .longest = 1000, .all = 1000}, &bytes, place).ok());
    std::vector<std::byte> workspace(bytes);
    out[i].resize(q.size());
    AttendArgs args;
    args.q = {q.data(), DType::f32, {1, 32, 1, 128}, {0, 128, 128, 1}};
    ASSERT_TRUE(
        server.format
            ->attend(batch, args, {out[i].data(), DType::f32, {1, 32, 1, 128}, {0, 128, 128, 1}}, workspace, place)
            .ok());
  }
  EXPECT_GT(lent.runs, 0);
  for (std::size_t i = 0; i < q.size(); ++i) ASSERT_NEAR(out[0][i], out[1][i], 64 * 0x1p-23 * 5);
}

TEST(Paged, LambdaIsThatOfQueriesAndKeys) {
  Two two;
  constexpr int kRows = 128, kQueries = 9;
  cases::Random random(4);
  std::vector<std::uint16_t> k(2 * kRows * 64), q(6 * kQueries * 64);
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = f32_to_f16(static_cast<float>(random.normal() * (1 + i % 64) + 5));
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = f32_to_f16(static_cast<float>(random.normal() * (65 - i % 64)));
  std::vector<float> lambda(2 * 64);
  ASSERT_TRUE(two.server.format
                  ->learn_lambda({q.data(), DType::f16, {1, 6, kQueries, 64}, {0, kQueries * 64, 64, 1}},
                                 {k.data(), DType::f16, {1, 2, kRows, 64}, {0, kRows * 64, 64, 1}}, lambda.data())
                  .ok());
  for (int h = 0; h < 2; ++h) {
    std::vector<double> query(64, 0.0), key(64, 0.0);
    std::vector<float> want(64);
    for (std::size_t c = 0; c < 64; ++c) {
      for (std::size_t g = 0; g < 3; ++g)
        for (std::size_t t = 0; t < kQueries; ++t)
          query[c] += std::pow(f16_to_f32(q[((static_cast<std::size_t>(h) * 3 + g) * kQueries + t) * 64 + c]), 2);
      for (std::size_t b = 0; b < kRows / 64; ++b) {
        const auto at = [&](std::size_t j) {
          return static_cast<double>(f16_to_f32(k[(static_cast<std::size_t>(h) * kRows + b * 64 + j) * 64 + c]));
        };
        double mean = 0;
        for (std::size_t j = 0; j < 64; ++j) mean += at(j) / 64;
        for (std::size_t j = 0; j < 64; ++j) key[c] += std::pow(at(j) - mean, 2);
      }
    }
    lambda_from_energies(query, key, want);
    for (std::size_t c = 0; c < 64; ++c)
      EXPECT_NEAR(lambda[static_cast<std::size_t>(h) * 64 + c], want[c], 1e-5 * want[c]);
  }
}

}  // namespace
}  // namespace kv4
