// The page pool: cost of freeing pages, memory returned with them, and concurrent use.
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

class TestPool : public PagePool {
 public:
  TestPool() : PagePool(*find_backend("cpu"), kPageBytes / 2, 2) {}
  std::vector<PageId> taken(std::size_t count) {
    std::vector<PageId> pages;
    EXPECT_TRUE(allocate(count, &pages).ok());
    EXPECT_EQ(pages.size(), count);
    return pages;
  }
  void give_back(PageId id) { release({&id, 1}); }
};

std::uint64_t most_visits_of_one_return(std::size_t count, const std::vector<std::size_t>& order) {
  TestPool pool;
  const std::vector<PageId> pages = pool.taken(count);
  std::uint64_t most = 0;
  for (const std::size_t i : order) {
    const std::uint64_t before = pool.visits();
    pool.give_back(pages[i]);
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
      // Freeing one page of each slab in turn frees most of the pool before any slab is empty.
      for (std::size_t i = 0; i < count; ++i) order[i] = scattered ? i % (count / 64) * 64 + i / (count / 64) : i;
      const std::uint64_t most = most_visits_of_one_return(count, order);
      EXPECT_GT(most, 0u);
      if (few == 0) few = most;
      EXPECT_EQ(most, few) << count << " pages" << (scattered ? ", scattered" : "");
    }
  }
}

TEST(Pool, TakingPagesVisitsEachOfThemAndNoOthers) {
  TestPool pool;
  const std::vector<PageId> held = pool.taken(6400);
  ASSERT_TRUE(pool.reserve(64).ok());
  const std::uint64_t before = pool.visits();
  const std::vector<PageId> more = pool.taken(10);
  EXPECT_EQ(pool.visits() - before, 2u * 10) << "the page and its slab";
}

TEST(Pool, ASlabGoesWithItsLastPageAndASharedPageKeepsIt) {
  TestPool pool;
  EXPECT_EQ(pool.bytes(), 0u);
  const std::vector<PageId> pages = pool.taken(256);
  constexpr std::size_t kSlab = 64 * (kPageBytes + sizeof(Page)) + sizeof(Slab), kTables = 256;
  const std::size_t full = pool.bytes();
  EXPECT_GE(full, 4 * kSlab);
  EXPECT_LE(full, 4 * kSlab + kTables);
  pool.retain({&pages[3], 1});
  EXPECT_TRUE(pool.shared(pages[3]));
  pool.release(pages);
  EXPECT_EQ(full - pool.bytes(), 3 * kSlab) << "three slabs of four went";
  EXPECT_FALSE(pool.shared(pages[3]));
  pool.give_back(pages[3]);
  EXPECT_EQ(pool.bytes(), 0u);
}

TEST(Pool, FreePagesOfSlabsInUseAreTakenBeforeFreshOnes) {
  TestPool pool;
  const std::vector<PageId> pages = pool.taken(256);
  std::set<PageId> holes;
  for (const std::size_t i : {5, 77, 140, 255}) {
    holes.insert(pages[i]);
    pool.give_back(pages[i]);
  }
  const std::size_t bytes = pool.bytes();
  for (const PageId page : pool.taken(4)) EXPECT_EQ(holes.count(page), 1u);
  EXPECT_EQ(pool.bytes(), bytes);
}

TEST(Pool, ReservedPagesAreThereLater) {
  TestPool pool;
  ASSERT_TRUE(pool.reserve(100).ok());
  const std::size_t bytes = pool.bytes();
  EXPECT_GE(bytes, 100u * kPageBytes);
  static_cast<void>(pool.taken(100));
  EXPECT_EQ(pool.bytes(), bytes);
}

// Kernels and host compute the same page addresses, also through a table that the pool has outgrown.
TEST(Pool, EveryTableLeadsToThePagesThatWereThere) {
  TestPool pool;
  std::vector<PageId> pages;
  std::vector<std::pair<PageMemory, std::size_t>> tables;
  for (const std::size_t count : {1, 63, 400, 3000}) {
    for (const PageId id : pool.taken(count)) pages.push_back(id);
    tables.emplace_back(pool.memory(), pages.size());
  }
  EXPECT_NE(tables.front().first.chunks, tables.back().first.chunks);
  EXPECT_EQ(std::set<PageId>(pages.begin(), pages.end()).size(), pages.size());
  for (const auto& [memory, count] : tables) {
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(page_at(memory, pages[i]), pool.page(pages[i])) << i;
      ASSERT_EQ(slice_at(memory, pages[i], 1), pool.page(pages[i]) + kPageBytes / 2) << i;
    }
  }
}

// A long-lived pool reuses chunk ids: ids and table stay as small as its largest size needs.
TEST(Pool, IdsOfSlabsThatWentAreUsedAgain) {
  TestPool pool;
  const std::vector<PageId> first = pool.taken(640);
  const PageId most = *std::max_element(first.begin(), first.end());
  const PageId kept = first.front();  // its slab stays
  const std::uint8_t* const* chunks = pool.memory().chunks;
  pool.release(std::span(first).subspan(1));
  for (int round = 0; round < 50; ++round) {
    const std::vector<PageId> pages = pool.taken(639);
    ASSERT_LE(*std::max_element(pages.begin(), pages.end()), most);
    ASSERT_EQ(pool.memory().chunks, chunks);
    pool.release(pages);
  }
  pool.give_back(kept);
}

TEST(Pool, ThreadsMayTakeAndGiveBackAtOnce) {
  TestPool pool;
  std::vector<PageId> shared = pool.taken(100);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    pool.retain(shared);
    threads.emplace_back([&pool, forks = shared, t]() mutable {
      std::mt19937 random(t);
      std::vector<PageId> mine;
      for (int round = 0; round < 200; ++round) {
        const std::size_t had = mine.size();
        EXPECT_TRUE(pool.allocate(random() % 40, &mine).ok());
        const PageMemory memory = pool.memory();
        for (std::size_t i = had; i < mine.size(); ++i) page_at(memory, mine[i])[0] = static_cast<std::uint8_t>(t);
        while (mine.size() > 60) {
          std::swap(mine[random() % mine.size()], mine.back());
          EXPECT_EQ(page_at(memory, mine.back())[0], static_cast<std::uint8_t>(t)) << "nobody else's page";
          pool.give_back(mine.back());
          mine.pop_back();
        }
        if (forks.empty()) continue;
        pool.give_back(forks.back());
        forks.pop_back();
      }
      pool.release(mine);
      pool.release(forks);
    });
  }
  pool.release(shared);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.bytes(), 0u);
}

}  // namespace
}  // namespace kv4
