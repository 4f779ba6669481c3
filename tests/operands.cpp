// Part of every program of tests: caches and backends are compared with float64 and with each other to a few units of
// 16 bits. What bytes round has tests of its own (cpp/attend_call.h).
#include <gtest/gtest.h>

#include "kv4/cpu.h"

namespace {

class OperandsOf16Bits : public ::testing::Environment {
  void SetUp() override { ASSERT_TRUE(kv4::cpu::set_operand_bits(16).ok()); }
};
const auto* const kEnvironment = ::testing::AddGlobalTestEnvironment(new OperandsOf16Bits);

}  // namespace
