// Rotations are interned per process, and caches report the memory they share.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "cache_session.h"
#include "kv4/cache.h"
#include "rotation/interned.h"

namespace kv4 {
namespace {

using Held = std::shared_ptr<const Rotation>;

// Seeds used by this file only: earlier tests of the process may still hold rotations.
constexpr std::uint64_t kSeed = 730'001;

Held make(RotationKind kind, int d, std::uint64_t seed, int reflectors = 7) {
  Held r;
  switch (kind) {
    case RotationKind::identity: EXPECT_TRUE(Rotation::identity(d, &r).ok()); break;
    case RotationKind::srft: EXPECT_TRUE(Rotation::srft(d, seed, &r).ok()); break;
    case RotationKind::srht: EXPECT_TRUE(Rotation::srht(d, seed, &r).ok()); break;
    case RotationKind::householder: EXPECT_TRUE(Rotation::householder(d, reflectors, seed, &r).ok()); break;
    case RotationKind::dense: {
      std::vector<float> matrix(static_cast<std::size_t>(d) * static_cast<std::size_t>(d));
      for (int i = 0; i < d; ++i)
        matrix[static_cast<std::size_t>(i) * static_cast<std::size_t>(d + 1)] = 1 + static_cast<float>(seed);
      EXPECT_TRUE(Rotation::dense(d, matrix, &r).ok());
    }
  }
  return r;
}

constexpr RotationKind kKinds[] = {RotationKind::identity, RotationKind::srft, RotationKind::srht,
                                   RotationKind::householder, RotationKind::dense};

TEST(Shared, EqualDefinitionsAreOneRotationAndOthersAreNot) {
  // An identity has no seed that would make it this test's own.
  const Held identities[] = {make(RotationKind::identity, 64, 0), make(RotationKind::identity, 96, 0)};
  EXPECT_NE(identities[0], identities[1]);
  const std::size_t before = Interned::count();
  {
    std::vector<Held> all;
    for (const RotationKind kind : kKinds) {
      if (kind == RotationKind::identity) continue;
      all.push_back(make(kind, 64, kSeed));
      EXPECT_EQ(all.back(), make(kind, 64, kSeed));
      all.push_back(make(kind, 96, kSeed));
      all.push_back(make(kind, 64, kSeed + 1));
    }
    all.push_back(make(RotationKind::householder, 64, kSeed, 8));
    EXPECT_EQ(Interned::count(), before + all.size());
    EXPECT_EQ(make(RotationKind::identity, 64, 1), identities[0]);
    all.insert(all.end(), std::begin(identities), std::end(identities));
    for (std::size_t i = 0; i < all.size(); ++i)
      for (std::size_t j = 0; j < i; ++j) EXPECT_NE(all[i], all[j]) << i << ' ' << j;
  }
  EXPECT_EQ(Interned::count(), before) << "they went with their last users";
}

TEST(Shared, ARefusedMatrixIsNotKeptAndLeavesTheOutput) {
  const std::size_t before = Interned::count();
  Held r = make(RotationKind::srft, 64, kSeed);
  const Held kept = r;
  EXPECT_FALSE(Rotation::dense(64, std::vector<float>(64 * 64), &r).ok());
  EXPECT_EQ(r, kept);
  EXPECT_EQ(Interned::count(), before + 1);
}

// A device's table that counts how many of it there are.
struct Counted final : RotationTable {
  explicit Counted(std::atomic<int>* n) : alive(n) { ++*alive; }
  ~Counted() override { --*alive; }
  std::size_t bytes() const override { return 1; }
  std::atomic<int>* alive;
};

TEST(Shared, ADeviceKeepsOneTableForAllUsersOfARotationUntilTheLastIsGone) {
  std::atomic<int> alive{0}, made{0};
  const int devices[2] = {};
  const auto table = [&](const Held& r, int device) {
    return r->table_on(&devices[device], [&] {
      ++made;
      return std::make_unique<Counted>(&alive);
    });
  };
  Held one = make(RotationKind::srft, 64, kSeed), two = make(RotationKind::srft, 64, kSeed);
  EXPECT_EQ(one->table_on(&devices[0]), nullptr);
  const RotationTable* first = table(one, 0);
  EXPECT_EQ(table(two, 0), first);
  EXPECT_NE(table(two, 1), first);
  EXPECT_EQ(made, 2);
  one.reset();
  EXPECT_EQ(alive, 2);
  two.reset();
  EXPECT_EQ(alive, 0);
  EXPECT_NE(table(make(RotationKind::srft, 64, kSeed), 1), nullptr);
  EXPECT_EQ(made, 3) << "built anew for the next user";
  EXPECT_EQ(alive, 0);
}

TEST(Shared, ThreadsMayMakeAndLetGoAtOnce) {
  const std::size_t before = Interned::count();
  std::atomic<int> alive{0};
  const int device = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<Held> mine;
      for (int round = 0; round < 400; ++round) {
        const RotationKind kind = kKinds[1 + random() % 4];  // no identity, which other tests of the process may hold
        const std::uint64_t seed = kSeed + random() % 2;
        mine.push_back(make(kind, 32, seed));
        EXPECT_EQ(mine.back()->kind(), kind);
        EXPECT_EQ(mine.back(), make(kind, 32, seed)) << "while one is held";
        EXPECT_NE(mine.back()->table_on(&device, [&] { return std::make_unique<Counted>(&alive); }), nullptr);
        if (mine.size() > random() % 6) mine.clear();
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Interned::count(), before);
  EXPECT_EQ(alive, 0);
}

CacheConfig layer(std::uint64_t seed = kSeed) {
  CacheConfig config;
  config.kv_heads = 2;
  config.head_dim_k = config.head_dim_v = 64;
  config.recipe.key.seed = config.recipe.value.seed = seed;
  return config;
}

std::unique_ptr<Cache> created(const CacheConfig& config) {
  std::unique_ptr<Cache> cache;
  EXPECT_TRUE(Cache::create(config, &cache).ok());
  return cache;
}

std::size_t sum(const std::vector<SharedMemory>& shared) {
  std::size_t bytes = 0;
  for (const SharedMemory& memory : shared) bytes += memory.bytes;
  return bytes;
}

TEST(Shared, LayersOfOneRecipeShareItsRotationAndEachCountsItOnce) {
  const std::size_t before = Interned::count();
  {
    std::vector<std::unique_ptr<Cache>> layers;
    std::map<const void*, std::size_t> distinct;
    for (int i = 0; i < 18; ++i) {
      layers.push_back(created(layer()));
      for (const SharedMemory& memory : layers.back()->shared()) {
        EXPECT_FALSE(memory.on_device);
        distinct[memory.identity] = memory.bytes;
      }
    }
    ASSERT_EQ(distinct.size(), 1u) << "keys and values have one rotation, and so has every layer";
    EXPECT_EQ(Interned::count(), before + 1);
    const std::size_t bytes = distinct.begin()->second;
    EXPECT_EQ(bytes, make(RotationKind::srft, 64, kSeed)->bytes());
    EXPECT_GT(bytes, 64 * (sizeof(float) + sizeof(double))) << "its signs alone";
    EXPECT_EQ(sum(layers[0]->shared()), bytes);
    EXPECT_GT(layers[0]->nbytes(), bytes);
    const auto clone = sessions::fork_of(*layers[0]);
    EXPECT_EQ(clone->shared()[0].identity, layers[0]->shared()[0].identity);
    EXPECT_NE(created(layer(kSeed + 1))->shared()[0].identity, layers[0]->shared()[0].identity);
  }
  EXPECT_EQ(Interned::count(), before);
}

TEST(Shared, ARecipeWithTwoRotationsSharesBothAndOneThatNeverSealsNone) {
  CacheConfig two = layer();
  two.recipe.value.seed = kSeed + 1;
  EXPECT_EQ(created(two)->shared().size(), 2u);
  CacheConfig exact = layer();
  exact.recipe = Recipe::exact();
  EXPECT_TRUE(created(exact)->shared().empty());
}

TEST(Shared, LayersThatAreGivenOneMatrixShareItsRotation) {
  CacheConfig config = layer();
  config.recipe.key.rotation = RotationKind::dense;
  config.matrix_k.assign(64 * 64, 0.0f);
  for (std::size_t i = 0; i < 64; ++i) config.matrix_k[i * 65] = 1.0f + static_cast<float>(i % 3);
  const auto one = created(config), other = created(config);
  EXPECT_EQ(sessions::fork_of(*one)->config().matrix_k.data(), one->config().matrix_k.data())
      << "clones have one configuration";
  const auto shared = one->shared();
  ASSERT_EQ(shared.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_EQ(shared[i].identity, other->shared()[i].identity);
  EXPECT_GT(sum(shared), 64 * 64 * sizeof(float));
  // A saved cache's matrix is still checked.
  std::vector<std::byte> bytes;
  ASSERT_TRUE(one->save([&](std::span<const std::byte> x) {
                   bytes.insert(bytes.end(), x.begin(), x.end());
                   return Status();
                 })
                  .ok());
  config.matrix_k[0] = 7.0f;
  std::size_t at = 0;
  const Status status = created(config)->load([&](std::span<std::byte> x) {
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), x.size(), x.begin());
    at += x.size();
    return Status();
  });
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_NE(status.message().find("matrix_k"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace kv4
