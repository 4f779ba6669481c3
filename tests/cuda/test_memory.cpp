// Memory of a CUDA device: what captures may take, uploads, the pool of pages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cache/pool.h"
#include "cuda/memory.h"
#include "cuda/rows.h"
#include "cuda/scratch.h"
#include "device.h"

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
