// Page tables: planned changes are not visible before commit, and forks do not write to each other's memory.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "cache/page_table.h"

namespace kv4 {
namespace {

struct Held {
  PageTable table;
  std::vector<PageId> ids;

  void expect_held() const {
    for (std::size_t i = 0; i < ids.size(); ++i) ASSERT_EQ(table.data()[i], ids[i]) << i;
  }
};

TEST(PageTable, PlansThatAreGivenUpAndForksLeaveNoTrace) {
  Backend& cpu = *find_backend("cpu");
  std::mt19937 random(11);
  const auto below = [&](std::size_t n) { return static_cast<std::int64_t>(random() % n); };
  std::vector<Held> all(1);
  PageId next = 0;
  for (int step = 0; step < 5000; ++step) {
    Held& held = all[static_cast<std::size_t>(below(all.size()))];
    const auto count = static_cast<std::int64_t>(held.ids.size());
    ledger::Rows kept{0, count};
    std::vector<PageId> fresh;
    PageId last = -1;
    switch (below(8)) {
      case 0: kept.end -= below(held.ids.size() + 1); break;
      case 1: kept.begin = below(held.ids.size() + 1); break;
      case 2: kept.begin = std::min<std::int64_t>(1, count); [[fallthrough]];
      case 3:
        if (kept.count() > 0) last = next++;
        [[fallthrough]];
      default:
        for (std::int64_t i = below(5); i > 0; --i) fresh.push_back(next++);
    }
    PageTable changed = held.table;
    ASSERT_TRUE(changed.change(cpu, held.ids, kept, last, fresh).ok());
    for (const Held& each : all) each.expect_held();
    std::vector<PageId> ids(held.ids.begin() + kept.begin, held.ids.begin() + kept.end);
    if (last >= 0) ids.back() = last;
    ids.insert(ids.end(), fresh.begin(), fresh.end());
    Held{changed, ids}.expect_held();
    if (below(3) == 0) continue;  // as if the call had failed later
    held = {changed, ids};
    if (below(10) == 0 && all.size() < 5) {
      held.table.fork();
      Held fork = held;
      all.push_back(fork);
    } else if (below(10) == 0 && all.size() > 1) {
      all.pop_back();
    } else if (below(20) == 0) {
      ASSERT_TRUE(held.table.reserve(cpu, held.ids, static_cast<std::int64_t>(held.ids.size()) + below(100)).ok());
    }
    for (const Held& each : all) each.expect_held();
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace kv4
