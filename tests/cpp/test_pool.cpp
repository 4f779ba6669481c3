// The pool of pages: what giving pages back costs, that memory goes back with them, and threads that do it at once.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "cache/pool.h"

namespace kv4 {
namespace {

constexpr std::size_t kPageBytes = 4096;  // 64 of them are a slab

// Pages that share a slab are told by their addresses.
std::vector<PageRef> taken(PagePool& pool, std::size_t count) {
  std::vector<PageRef> pages;
  EXPECT_TRUE(pool.allocate(count, &pages).ok());
  EXPECT_EQ(pages.size(), count);
  return pages;
}

std::uint64_t most_visits_of_one_return(std::size_t count, const std::vector<std::size_t>& order) {
  PagePool pool(*find_backend("cpu"), kPageBytes);
  std::vector<PageRef> pages = taken(pool, count);
  std::uint64_t most = 0;
  for (const std::size_t i : order) {
    const std::uint64_t before = pool.visits();
    pages[i] = PageRef();
    most = std::max(most, pool.visits() - before);
  }
  EXPECT_EQ(pool.bytes(), 0u);
  return most;
}

TEST(Pool, GivingBackAPageVisitsNoMoreWhereThereAreMore) {
  for (const bool scattered : {false, true}) {
    std::uint64_t few = 0;
    for (const std::size_t count : {64, 640, 6400}) {
      std::vector<std::size_t> order(count);
      // One page of every slab after another leaves most of the pool free before the first slab is.
      for (std::size_t i = 0; i < count; ++i) order[i] = scattered ? i % (count / 64) * 64 + i / (count / 64) : i;
      const std::uint64_t most = most_visits_of_one_return(count, order);
      EXPECT_GT(most, 0u);
      if (few == 0) few = most;
      EXPECT_EQ(most, few) << count << " pages" << (scattered ? ", scattered" : "");
    }
  }
}

TEST(Pool, TakingPagesVisitsEachOfThemAndNoOthers) {
  PagePool pool(*find_backend("cpu"), kPageBytes);
  const std::vector<PageRef> held = taken(pool, 6400);
  ASSERT_TRUE(pool.reserve(64).ok());
  const std::uint64_t before = pool.visits();
  const std::vector<PageRef> more = taken(pool, 10);
  EXPECT_EQ(pool.visits() - before, 2u * 10) << "the page and its slab";
}

TEST(Pool, ASlabGoesWithItsLastPageAndASharedPageKeepsIt) {
  PagePool pool(*find_backend("cpu"), kPageBytes);
  EXPECT_EQ(pool.bytes(), 0u);
  std::vector<PageRef> pages = taken(pool, 256);
  const std::size_t full = pool.bytes();
  EXPECT_EQ(full, 256 * (kPageBytes + sizeof(Page)) + 4 * sizeof(Slab));
  const PageRef fork = pages[3];
  pages.clear();
  EXPECT_EQ(pool.bytes(), full / 4) << "three slabs of four went";
  EXPECT_FALSE(fork.shared());
}

TEST(Pool, FreePagesOfSlabsInUseAreTakenBeforeFreshOnes) {
  PagePool pool(*find_backend("cpu"), kPageBytes);
  std::vector<PageRef> pages = taken(pool, 256);
  std::set<const std::uint8_t*> holes;
  for (const std::size_t i : {5, 77, 140, 255}) {
    holes.insert(pages[i].data());
    pages[i] = PageRef();
  }
  const std::size_t bytes = pool.bytes();
  for (const PageRef& page : taken(pool, 4)) EXPECT_EQ(holes.count(page.data()), 1u);
  EXPECT_EQ(pool.bytes(), bytes);
}

TEST(Pool, ThreadsMayTakeAndGiveBackAtOnce) {
  PagePool pool(*find_backend("cpu"), kPageBytes);
  std::vector<PageRef> shared = taken(pool, 100);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&pool, forks = shared, t]() mutable {
      std::mt19937 random(t);
      std::vector<PageRef> mine;
      for (int round = 0; round < 200; ++round) {
        EXPECT_TRUE(pool.allocate(random() % 40, &mine).ok());
        for (const PageRef& page : mine) page.data()[0] = static_cast<std::uint8_t>(t);
        while (mine.size() > 60) {
          const std::size_t i = random() % mine.size();
          EXPECT_EQ(mine[i].data()[0], static_cast<std::uint8_t>(t)) << "nobody else's page";
          std::swap(mine[i], mine.back());
          mine.pop_back();
        }
        if (!forks.empty()) forks.pop_back();
      }
    });
  shared.clear();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.bytes(), 0u);
}

}  // namespace
}  // namespace kv4
