// Rotations on a CUDA device: one table for all who use one, gone with the last of them, whatever is being captured.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "cache_session.h"
#include "cuda/backend.h"
#include "device.h"

namespace kv4 {
namespace {

using namespace sessions;
using tests::DeviceBytes;

class CudaShared : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }
};

constexpr int kHeads = 2, kDim = 128, kTokens = 300;

std::unique_ptr<Cache> sealed(std::uint64_t seed) {
  CacheConfig config;
  config.dtype = DType::f16;
  config.kv_heads = kHeads;
  config.head_dim_k = config.head_dim_v = kDim;
  config.backend = "cuda";
  config.recipe.key.seed = config.recipe.value.seed = seed;
  std::unique_ptr<Cache> cache;
  EXPECT_TRUE(Cache::create(config, &cache).ok());
  const std::vector<float> rows = cases::normal_rows(kHeads * kTokens, kDim, 1);
  std::vector<std::uint16_t> halves;
  for (const float x : rows) halves.push_back(f32_to_f16(x));
  const DeviceBytes memory(halves);
  TensorView k = view(rows, 1, kHeads, kTokens, kDim);
  k.data = memory.as<void>();
  k.dtype = DType::f16;
  EXPECT_TRUE(cache->append(k, k).ok());
  EXPECT_EQ(cache->shared().size(), 1u) << "nothing on the device before it is used";
  EXPECT_TRUE(cache->seal().ok());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  return cache;
}

TEST_F(CudaShared, CachesOfOneRecipeShareATableAndEachCountsItOnce) {
  const auto one = sealed(11), two = sealed(12);
  const auto shared = one->shared();
  ASSERT_EQ(shared.size(), 2u);
  EXPECT_FALSE(shared[0].on_device);
  EXPECT_TRUE(shared[1].on_device);
  EXPECT_EQ(shared[1].bytes, std::size_t{32} * kDim * kDim);
  EXPECT_GT(one->nbytes(), shared[1].bytes);
  EXPECT_NE(two->shared()[1].identity, shared[1].identity);
  const auto clone = sessions::fork_of(*one);
  EXPECT_EQ(clone->shared()[1].identity, shared[1].identity);
  CacheConfig config = one->config();
  std::unique_ptr<Cache> fresh;
  ASSERT_TRUE(Cache::create(config, &fresh).ok());
  EXPECT_EQ(fresh->shared()[1].identity, shared[1].identity) << "there already";
}

TEST_F(CudaShared, ATableGoesWithItsLastUser) {
  const auto rotation = [] {
    std::shared_ptr<const Rotation> r;
    EXPECT_TRUE(Rotation::srft(kDim, 13, &r).ok());
    return r;
  };
  auto one = sealed(13);
  auto two = sessions::fork_of(*one);
  one.reset();
  EXPECT_NE(cuda::backend()->table_of(*rotation()), nullptr);
  two.reset();
  EXPECT_EQ(cuda::backend()->table_of(*rotation()), nullptr);
}

TEST_F(CudaShared, ATableMayGoWhileAStreamIsCaptured) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  std::shared_ptr<const Rotation> last;
  ASSERT_TRUE(Rotation::srft(kDim, 14, &last).ok());
  sealed(14).reset();
  ASSERT_NE(cuda::backend()->table_of(*last), nullptr);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  last.reset();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  if (graph != nullptr) cudaGraphDestroy(graph);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

}  // namespace
}  // namespace kv4
