// Lent threads: every share of every loop is done once, whoever comes late.
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <future>
#include <thread>
#include <vector>

#include "team.h"

namespace kv4::engine {
namespace {

TEST(Team, RunsEveryLoopOnEveryThread) {
  for (const int threads : {1, 2, 4}) {
    Team team;
    team.reset(threads);
    constexpr int kOperations = 50, kLoops = 7;
    std::vector<std::vector<int>> done(static_cast<std::size_t>(threads), std::vector<int>(kLoops));
    std::barrier between(threads);  // as ggml has between two operations
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t)
      others.emplace_back([&, t] {
        for (int i = 0; i < kOperations; ++i) {
          if ((i + t) % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
          team.follow(t);
          between.arrive_and_wait();
        }
      });
    for (int i = 0; i < kOperations; ++i) {
      if (i % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
      team.lead(threads, [&] {
        EXPECT_EQ(cpu::num_threads(), threads);
        for (int loop = 0; loop < i % (kLoops + 1); ++loop) {
          struct Job {
            std::vector<std::vector<int>>* done;
            int loop;
          } job = {&done, loop};
          team.run([](void* c, int thread) { ++(*static_cast<Job*>(c)->done)[static_cast<std::size_t>(thread)][static_cast<std::size_t>(static_cast<Job*>(c)->loop)]; }, &job);
        }
      });
      between.arrive_and_wait();
    }
    for (std::thread& t : others) t.join();
    for (int loop = 0; loop < kLoops; ++loop) {
      int expected = 0;
      for (int i = 0; i < kOperations; ++i) expected += loop < i % (kLoops + 1);
      for (const std::vector<int>& of_thread : done) EXPECT_EQ(of_thread[static_cast<std::size_t>(loop)], expected);
    }
  }
}

TEST(Team, WaitsForNobodyWhoHasNotBegun) {
  constexpr int kThreads = 3, kLoops = 5;
  Team team;
  team.reset(kThreads);
  std::vector<int> done(kThreads);
  std::promise<void> left;
  std::thread leader([&] {
    team.lead(kThreads, [&] {
      for (int loop = 0; loop < kLoops; ++loop)
        team.run([](void* counts, int thread) { ++(*static_cast<std::vector<int>*>(counts))[static_cast<std::size_t>(thread)]; }, &done);
    });
    left.set_value();
  });
  // Ample: the leader has nothing else to do.
  EXPECT_EQ(left.get_future().wait_for(std::chrono::seconds(20)), std::future_status::ready);
  std::vector<std::thread> others;
  for (int t = 1; t < kThreads; ++t) others.emplace_back([&, t] { team.follow(t); });
  leader.join();
  for (std::thread& t : others) t.join();
  EXPECT_EQ(done, std::vector<int>(kThreads, kLoops));
}

}  // namespace
}  // namespace kv4::engine
