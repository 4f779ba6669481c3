// Sequences of one cache on a CUDA device that go on in another: they say there what they say alone, and their first
// cache goes on untouched.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "place.h"

namespace kv4 {
namespace {

using namespace sessions;
using tests::DevicePlace;

class CudaExtend : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
    for (cudaStream_t& stream : streams_)
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    cuda::set_stream(nullptr);
    for (const cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }
  // The same rows for each of `batch` sequences, appended and attended; the outputs.
  std::vector<float> step(Cache& cache, int tokens, std::uint64_t seed) {
    const int batch = static_cast<int>(cache.batch()), d = kShape.dim;
    const auto of_each = [&](int heads, std::uint64_t its) {
      const std::vector<float> one = cases::normal_rows(heads * tokens, d, its);
      std::vector<float> all;
      for (int b = 0; b < batch; ++b) all.insert(all.end(), one.begin(), one.end());
      return all;
    };
    const std::vector<float> k = of_each(kShape.kv_heads, seed), v = of_each(kShape.kv_heads, seed + 1),
                             q = of_each(kShape.q_heads, seed + 2);
    std::vector<float> out(q.size());
    const TensorView keys = place_.rows(k, batch, kShape.kv_heads, tokens, d),
                     values = place_.rows(v, batch, kShape.kv_heads, tokens, d);
    AttendArgs args;
    args.q = place_.queries(q, batch, kShape.q_heads, tokens, d);
    const MutableTensorView to = place_.into(out, batch, kShape.q_heads, tokens, d);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // these streams wait for no copy
    const Status appended = cache.append(keys, values);
    EXPECT_TRUE(appended.ok()) << appended.message();
    const Status attended = cache.attend(args, to);
    EXPECT_TRUE(attended.ok()) << attended.message();
    place_.fetch();
    return out;
  }
  std::unique_ptr<Cache> prompted(int tokens, std::uint64_t seed, cudaStream_t stream) {
    auto cache = make(Recipe(), kShape, 0, DType::f16, "cuda");
    EXPECT_TRUE(cache->add(1).ok());
    cache->set_stream(stream);
    step(*cache, tokens, seed);
    step(*cache, 1, seed + 100);
    return cache;
  }
  static void expect_close(const std::vector<float>& got, std::size_t from, const std::vector<float>& want) {
    ASSERT_LE(from + want.size(), got.size());
    double top = 0;
    for (const float x : want) top = std::max(top, std::abs(static_cast<double>(x)));
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[from + i], want[i], 2 * kTolerance * top) << i;
  }

  DevicePlace place_{DType::f16};
  cudaStream_t streams_[2] = {};
};

TEST_F(CudaExtend, SequencesOfAnotherCacheGoOnHere) {
  for (const bool one_stream : {true, false}) {
    SCOPED_TRACE(one_stream);
    const auto here = prompted(330, 1, streams_[0]), there = prompted(200, 7, streams_[one_stream ? 0 : 1]);
    const auto first = fork_of(*here), second = fork_of(*there);
    const Status status = here->extend(*there);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(here->batch(), 2);
    ASSERT_EQ(here->page_count(1), there->page_count(0));
    ASSERT_GT(here->page_count(1), 1);
    // Through a page that is sealed on the way.
    for (std::uint64_t i = 0; i < 70; ++i) {
      const std::vector<float> both = step(*here, 1, 1000 + 10 * i), one = step(*first, 1, 1000 + 10 * i),
                               two = step(*second, 1, 1000 + 10 * i);
      expect_close(both, 0, one);
      expect_close(both, one.size(), two);
      if (HasFatalFailure()) return;
    }
    ASSERT_GT(here->page_count(1), there->page_count(0));
    expect_close(step(*there, 1, 5000), 0, step(*prompted(200, 7, streams_[0]), 1, 5000));
  }
}

TEST_F(CudaExtend, RefusedWhileItsStreamIsCaptured) {
  const auto here = prompted(100, 1, streams_[0]), there = prompted(80, 7, streams_[0]);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(streams_[0], cudaStreamCaptureModeThreadLocal), cudaSuccess);
  const Status status = here->extend(*there);
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(streams_[0], &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  EXPECT_EQ(status.code(), StatusCode::failed_precondition) << status.message();
  EXPECT_EQ(here->batch(), 1);
  EXPECT_EQ(here->length(0), 101);
}

}  // namespace
}  // namespace kv4
