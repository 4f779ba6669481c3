// The pieces that a call's work is split into: none so large that the call hangs on one thread, none too small to pay.
#include "cpu/share.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace kv4::cpu {
namespace {

constexpr std::int64_t kNoLimit = std::int64_t{1} << 40;

double largest(const std::vector<double>& items, int threads) {
  const Share s = share(std::accumulate(items.begin(), items.end(), 0.0), threads);
  double most = 0;
  for (const double work : items) most = std::max(most, work / pieces(work, s, kNoLimit));
  return most;
}

TEST(Share, LeavesNoPieceOnWhichACallHangsWhateverItsItems) {
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform(0.01, 1);
  for (const int threads : {2, 3, 8}) {
    for (int round = 0; round < 400; ++round) {
      std::vector<double> items(static_cast<std::size_t>(1 + round % 9));
      for (double& x : items) x = uniform(random);
      const double sum = std::accumulate(items.begin(), items.end(), 0.0);
      const double total = kSharedWork * std::exp2(14 * uniform(random));
      for (double& x : items) x *= total / sum;
      const double most = largest(items, threads), slack = 1 + 1e-6;
      EXPECT_LE(most, std::max(total / (2 * threads), 1.5 * kPieceWork) * slack)
          << items.size() << " items on " << threads << " threads";
      EXPECT_LE(most, std::max(total / (8 * threads), kLongPieceWork) * slack)
          << items.size() << " items on " << threads << " threads";
    }
  }
}

TEST(Share, EqualHeadsOfACallAreCutAlike) {
  for (const int heads : {1, 2, 3, 5, 8}) {
    const double total = 8 * kPieceWork * heads;
    const Share s = share(total, 2);
    EXPECT_EQ(pieces(total / heads, s, kNoLimit), (heads == 1 ? 4 : heads <= 3 ? 2 : 1)) << heads << " heads";
  }
}

TEST(Share, PiecesPayForTheirJoining) {
  for (const int threads : {2, 3, 8}) {
    for (double total = kSharedWork; total < 1e4 * kSharedWork; total *= 1.07) {
      for (const double part : {1.0, 0.5, 1.0 / 3, 0.49}) {
        const double work = total * part;
        const int count = pieces(work, share(total, threads), kNoLimit);
        if (count > 1) {
          EXPECT_GE(work / count, 0.75 * kPieceWork);
        }
      }
    }
  }
}

TEST(Share, SmallCallsAndSingleThreadsAreNotCut) {
  EXPECT_EQ(share(0.99 * kSharedWork, 8).threads, 1);
  EXPECT_EQ(pieces(0.99 * kSharedWork, share(0.99 * kSharedWork, 8), kNoLimit), 1);
  EXPECT_EQ(share(1e3 * kSharedWork, 1).threads, 1);
  EXPECT_EQ(pieces(1e3 * kSharedWork, share(1e3 * kSharedWork, 1), kNoLimit), 1);
  EXPECT_EQ(share(kSharedWork, 2).threads, 2);
}

TEST(Share, NeverCutsFinerThanTokensAllow) {
  const Share s = share(1e3 * kSharedWork, 2);
  EXPECT_EQ(pieces(1e3 * kSharedWork, s, 3), 3);
  EXPECT_EQ(pieces(0, s, 3), 1);
}

}  // namespace
}  // namespace kv4::cpu
