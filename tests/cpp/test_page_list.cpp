// Page tables: references, addresses, and the stamps by which a device's copy is known to be current.
#include <gtest/gtest.h>

#include <vector>

#include "cache/page_list.h"

namespace kv4 {
namespace {

class PageLists : public ::testing::Test {
 protected:
  PagePool pool{*find_backend("cpu"), 4096};
  PageRef page() {
    std::vector<PageRef> one;
    EXPECT_TRUE(pool.allocate(1, &one).ok());
    return one[0];
  }
};

// What a device holds after it copied `list` once and then, while stamps agree, only what is longer.
struct Copy {
  std::uint64_t stamp = 0;
  std::vector<const std::uint8_t*> pages;
  void sync(const PageList& list) {
    if (stamp != list.stamp()) pages.clear();
    stamp = list.stamp();
    for (std::size_t i = pages.size(); i < list.size(); ++i) pages.push_back(list.data()[i]);
  }
  bool holds(const PageList& list) const {
    for (std::size_t i = 0; i < list.size(); ++i)
      if (pages[i] != list[i].data()) return false;
    return pages.size() >= list.size();
  }
};

TEST_F(PageLists, ACopyByStampIsAlwaysRight) {
  Copy copy;
  PageList list;
  const auto expect_held = [&] {
    copy.sync(list);
    ASSERT_TRUE(copy.holds(list));
  };
  for (int i = 0; i < 5; ++i) list.append(page());
  expect_held();
  const std::uint64_t before = list.stamp();
  list.append(page());
  EXPECT_EQ(list.stamp(), before) << "appending sends the new page alone";
  expect_held();
  list.truncate(3);
  list.append(page());
  expect_held();
  list.drop_front();
  expect_held();
  list.replace_back(page());
  expect_held();
  // Two forks go on differently from the same table; a row of the device may hold either's.
  PageList fork = list;
  fork.fork();
  list.fork();
  EXPECT_EQ(fork.stamp(), list.stamp()) << "a fork that nobody wrote to needs no copy";
  fork.append(page());
  list.append(page());
  expect_held();
  std::swap(list, fork);
  expect_held();
  // A draft that was given up after the device had seen its page.
  {
    PageList draft = list;
    draft.append(page());
    EXPECT_EQ(draft.stamp(), list.stamp());
    copy.sync(draft);
    ASSERT_TRUE(copy.holds(draft));
  }
  list.renew();
  list.append(page());
  expect_held();
  list = PageList();
  expect_held();
}

TEST_F(PageLists, ReservedPagesAreThereLater) {
  ASSERT_TRUE(pool.reserve(100).ok());
  const std::size_t bytes = pool.bytes();
  EXPECT_GE(bytes, 100u * 4096);
  std::vector<PageRef> pages;
  ASSERT_TRUE(pool.allocate(100, &pages).ok());
  EXPECT_EQ(pool.bytes(), bytes);
}

}  // namespace
}  // namespace kv4
