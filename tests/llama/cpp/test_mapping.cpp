// Memory is committed where it was written, until it is released.
#include "mapping.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

namespace kv4::llama {
namespace {

std::size_t resident(const Mapping& m) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> present((m.size() + page - 1) / page);
  EXPECT_EQ(mincore(m.data(), m.size(), present.data()), 0);
  std::size_t bytes = 0;
  for (const unsigned char p : present) bytes += p & 1 ? page : 0;
  return bytes;
}

TEST(Mapping, TakesMemoryWhereItIsWrittenAndGivesItBack) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  Mapping m;
  ASSERT_TRUE(m.reserve(std::size_t{1} << 30));
  EXPECT_EQ(resident(m), 0u);
  std::memset(m.data() + 10 * page, 1, 5 * page);
  EXPECT_EQ(resident(m), 5 * page);
  // Only pages that lie wholly within.
  Mapping::release(m.data() + 10 * page + 1, 4 * page);
  EXPECT_EQ(resident(m), 2 * page);
  EXPECT_EQ(m.data()[10 * page], std::byte{1});
  EXPECT_EQ(m.data()[11 * page], std::byte{0});
  EXPECT_EQ(m.data()[14 * page], std::byte{1});
  Mapping::release(m.data() + 1, page / 2);  // none does
  EXPECT_EQ(m.data()[10 * page], std::byte{1});
}

TEST(Mapping, MovesAndRefusesWhatIsNotThere) {
  Mapping a;
  ASSERT_TRUE(a.reserve(100));
  std::byte* const data = a.data();
  data[99] = std::byte{7};
  Mapping b(std::move(a));
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(), nullptr);
  a = std::move(b);
  EXPECT_EQ(a.data()[99], std::byte{7});
  EXPECT_FALSE(a.reserve(std::size_t{1} << 62));
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(a.size(), 0u);
}

TEST(Mapping, TheMachineHasMemory) {
  std::size_t free = 0, total = 0;
  machine_memory(&free, &total);
  EXPECT_GT(free, std::size_t{1} << 20);
  EXPECT_LE(free, total);
}

}  // namespace
}  // namespace kv4::llama
