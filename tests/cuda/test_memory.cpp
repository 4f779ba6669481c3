// Memory of a CUDA device: what captures may take, uploads, the pool of pages, and none left.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache/pool.h"
#include "cuda/memory.h"
#include "cuda/rows.h"
#include "cuda/scratch.h"
#include "device.h"
#include "save_case.h"

namespace kv4 {
namespace {

using tests::DeviceBytes;

class CudaMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }
  void TearDown() override { cuda::set_stream(nullptr); }
};

TEST_F(CudaMemory, WhatOthersFailedAtIsNotALaunchsError) {
  const tests::DeviceBytes to(16, 0);
  void* much = nullptr;
  ASSERT_EQ(cudaMalloc(&much, std::size_t{1} << 60), cudaErrorMemoryAllocation);
  ASSERT_EQ(cudaPeekAtLastError(), cudaErrorMemoryAllocation);
  const std::uint32_t word = 0x12345678;
  EXPECT_EQ(cuda::launch_put(to.as(), &word, sizeof(word), nullptr), cudaSuccess);
  cudaGetLastError();
  std::uint32_t there = 0;
  ASSERT_EQ(cudaMemcpy(&there, to.as(), sizeof(there), cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(there, word);
}

// To free or to wait would end a capture.
TEST_F(CudaMemory, ACaptureTakesScratchAndFreesNone) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  cuda::set_stream(stream);
  {
    cuda::Memory memory(0);
    cuda::Scratch scratch(memory, 16);
    cuda::Scratch::Held shared;
    for (const std::size_t bytes : {std::size_t{1} << 12, std::size_t{1} << 24, std::size_t{1} << 20}) {
      ASSERT_TRUE(scratch.share(bytes, &shared).ok());
      EXPECT_GE(shared->bytes, bytes);
      ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
      cuda::Scratch::Held first, second, third;
      const Status status = scratch.capture(bytes, &first), again = scratch.capture(bytes / 2, &second),
                   more = scratch.capture(2 * bytes, &third);
      cudaGraph_t graph = nullptr;
      EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      for (const Status& s : {status, again, more}) ASSERT_TRUE(s.ok()) << s.message();
      EXPECT_EQ(first, second);  // one call after another
      EXPECT_NE(first, third);
      EXPECT_GE(third->bytes, 2 * bytes);
      EXPECT_NE(first->data, shared->data);
      if (graph != nullptr) cudaGraphDestroy(graph);
    }
    scratch.leave(&shared);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// Whose memory was lent for the copies once, others write to by the time the graph is replayed.
TEST_F(CudaMemory, ACapturedUploadBringsItsOwnBytes) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  cuda::set_stream(stream);
  {
    cuda::Memory memory(0);
    const std::vector<std::uint8_t> first(50000, 1), then(50000, 2);
    const DeviceBytes to(first.size(), 0), elsewhere(then.size(), 0);
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    const Status captured = memory.upload(to.as(), first.data(), first.size());
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_TRUE(captured.ok()) << captured.message();
    for (int i = 0; i < 3; ++i) {
      const Status status = memory.upload(elsewhere.as(), then.data(), then.size());
      ASSERT_TRUE(status.ok()) << status.message();
    }
    cudaGraphExec_t replayed = nullptr;
    ASSERT_EQ(cudaGraphInstantiate(&replayed, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(replayed, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(to.read(), first);
    EXPECT_EQ(elsewhere.read(), then);
    cudaGraphExecDestroy(replayed);
    cudaGraphDestroy(graph);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// Repeats each call with no memory left the first time that it takes some, then the second, ..., until it succeeds: the
// cache is as before, and in the end as one that nothing happened to.
TEST_F(CudaMemory, ACallThatFindsNoMemoryLeavesNoTrace) {
  for (const SealMode seal : {SealMode::page, SealMode::arrival}) {
    SCOPED_TRACE(static_cast<int>(seal));
    Recipe recipe = seal == SealMode::arrival ? Recipe::paper() : Recipe();
    if (seal == SealMode::page) recipe.value.bits = 3;
    CacheConfig config = saved::config_of(recipe, 2, 64, 64, DType::f16);
    config.backend = "cuda";
    const std::unique_ptr<Cache> cache = saved::create(config), untouched = saved::create(config);
    constexpr std::int64_t kHeads = 2, kDim = 64;
    long failures = 0;
    const auto everywhere = [&](const char* name, auto call) {
      SCOPED_TRACE(name);
      const saved::Bytes before = saved::save(*untouched);
      std::vector<std::uint8_t> out[2];
      for (long long n = 0;; ++n) {
        ASSERT_TRUE(cuda::limit_memory(0, n).ok());
        const Status status = call(*cache, &out[0]);
        ASSERT_TRUE(cuda::limit_memory(0, -1).ok());
        if (status.ok()) break;
        ++failures;
        ASSERT_EQ(status.code(), StatusCode::out_of_memory) << n << ": " << status.message();
        ASSERT_EQ(cache->version(), untouched->version()) << n;
        ASSERT_EQ(saved::save(*cache), before) << n;
      }
      const Status status = call(*untouched, &out[1]);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(out[0], out[1]);
      ASSERT_EQ(saved::save(*cache), saved::save(*untouched));
    };
    cases::Random random(7);
    const auto append = [&](std::int64_t batch, std::int64_t tokens) {
      const DeviceBytes rows(tests::halves(random, static_cast<std::size_t>(batch * kHeads * tokens * kDim)));
      const TensorView view{
          rows.as(), DType::f16, {batch, kHeads, tokens, kDim}, {kHeads * tokens * kDim, tokens * kDim, kDim, 1}};
      everywhere("append", [&](Cache& c, auto*) { return c.append(view, view); });
    };
    const auto attend = [&](std::int64_t batch) {
      const DeviceBytes q(tests::halves(random, static_cast<std::size_t>(batch * 2 * kHeads * kDim)));
      everywhere("attend", [&](Cache& c, std::vector<std::uint8_t>* out) {
        const DeviceBytes to(static_cast<std::size_t>(batch * 2 * kHeads * kDim * 4));
        AttendArgs args;
        args.q = {q.as(), DType::f16, {batch, 2 * kHeads, 1, kDim}, {2 * kHeads * kDim, kDim, kDim, 1}};
        const Status status = c.attend(args, {to.as(), DType::f32, args.q.shape, args.q.stride});
        *out = to.read();
        return status;
      });
    };
    append(2, 300);
    attend(2);
    for (int i = 0; i < 70 && !HasFatalFailure(); ++i) append(2, 1);
    attend(2);
    everywhere("crop", [](Cache& c, auto*) { return c.crop(250); });
    everywhere("repeat", [](Cache& c, auto*) { return c.repeat(2); });
    append(4, 90);
    everywhere("crop one", [](Cache& c, auto*) { return c.crop(1, 180); });
    const std::int64_t rows[] = {2, 0};
    everywhere("select", [&](Cache& c, auto*) { return c.select(rows); });
    everywhere("seal", [](Cache& c, auto*) { return c.seal(); });
    attend(2);
    const saved::Bytes bytes = saved::save(*untouched);
    const std::unique_ptr<Cache> fresh = saved::create(config), other = saved::create(config);
    everywhere("load", [&](Cache& c, auto*) { return saved::load(&c == cache.get() ? *fresh : *other, bytes); });
    EXPECT_EQ(saved::save(*fresh), bytes);
    if (HasFatalFailure()) return;
    EXPECT_GT(failures, 20);
  }
}

// A captured step reads the table of pages that there was. Pages of a size that does not divide 2 MiB, 1.7 GB of them.
TEST_F(CudaMemory, PagesDoNotOutgrowTheirTable) {
  constexpr std::size_t kHeadBytes = 4416, kManyHeads = 20, kPages = 4000;
  PagePool pool(*cuda::backend(), kHeadBytes, kManyHeads);
  ASSERT_TRUE(pool.reserve(100).ok());
  const PageMemory before = pool.memory();
  std::vector<ledger::PageId> ids;
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(pool.allocate(kPages, &ids).ok());
  EXPECT_EQ(pool.memory().chunks, before.chunks);
  EXPECT_GE(pool.bytes(), 5 * kPages * kHeadBytes * kManyHeads);
  EXPECT_LE(pool.bytes(), 5 * kPages * kHeadBytes * kManyHeads / 64 * 66) << "slack";
  std::vector<ledger::PageId> sorted = ids;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(std::unique(sorted.begin(), sorted.end()), sorted.end());
  pool.release(ids);
}

}  // namespace
}  // namespace kv4
