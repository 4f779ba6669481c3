// Memory placement of the CPU backend, and measured read bandwidth.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "backend/backend.h"
#include "cases.h"
#include "cpu/isa.h"
#include "cpu/measure.h"
#include "cpu/memory.h"
#include "cpu/rows.h"
#include "kv4/cpu.h"

namespace kv4 {
namespace {

TEST(Memory, BlocksAreAlignedWritableAndReturned) {
  constexpr std::size_t kHuge = cpu::kHugePageBytes;
  for (int round = 0; round < 3; ++round) {
    for (std::size_t bytes : {std::size_t{1}, std::size_t{4096}, kHuge - 1, kHuge, kHuge + 1, 5 * kHuge / 2}) {
      auto* p = static_cast<unsigned char*>(cpu::alloc_pages(bytes));
      ASSERT_NE(p, nullptr) << bytes;
#if defined(__linux__)
      const std::size_t alignment = bytes >= kHuge ? kHuge : 64;
#else
      const std::size_t alignment = 64;
#endif
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % alignment, 0u) << bytes;
      std::memset(p, 0xa5, bytes);
      EXPECT_EQ(p[0], 0xa5);
      EXPECT_EQ(p[bytes - 1], 0xa5);
      cpu::free_pages(p, bytes);
    }
  }
  cpu::free_pages(nullptr, kHuge);
  EXPECT_EQ(cpu::alloc_pages(std::size_t{1} << 62), nullptr);
  EXPECT_EQ(cpu::alloc_pages(~std::size_t{0}), nullptr);
}

TEST(Memory, SumReadsEveryNumberOnce) {
  for (const std::string& isa : cpu::compiled_isas()) {
    if (!cpu::supported(isa)) continue;
    const cpu::RowKernels& rows = cpu::row_kernels(*cpu::find(isa.c_str()));
    for (int n : {0, 1, 7, 63, 64, 127, 128, 129, 1000, 4099}) {
      std::vector<float> x(static_cast<std::size_t>(n) + 1, 1.0f);
      x.back() = 1e30f;  // after the end
      std::int64_t expected = 0;
      for (int i = 0; i < n; ++i)
        expected += static_cast<std::int64_t>(x[static_cast<std::size_t>(i)] = static_cast<float>(i % 17));
      EXPECT_EQ(rows.sum(x.data(), n), static_cast<float>(expected)) << isa << " " << n;
    }
  }
}

TEST(Memory, ReadSpeedIsOneFigurePerRepeat) {
  std::vector<double> speed;
  ASSERT_TRUE(cpu::measure_read(1 << 16, 3, &speed).ok());
  ASSERT_EQ(speed.size(), 3u);
  for (double s : speed) EXPECT_GT(s, 0);
  EXPECT_EQ(cpu::measure_read(0, 3, &speed).code(), StatusCode::invalid_argument);
  EXPECT_EQ(cpu::measure_read(64, 0, &speed).code(), StatusCode::invalid_argument);
  EXPECT_EQ(cpu::measure_read(std::size_t{1} << 62, 1, &speed).code(), StatusCode::out_of_memory);
  EXPECT_EQ(cpu::measure_read(~std::size_t{0}, 1, &speed).code(), StatusCode::out_of_memory);
}

}  // namespace
}  // namespace kv4
