// Dispatch: every instruction set that is compiled in and supported can be forced, and the forced
// one is what runs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../cases.h"
#include "cpu/isa.h"
#include "cpu/measure.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"

namespace kv4 {
namespace {

class Isa : public ::testing::Test {
 protected:
  void SetUp() override { before_ = cpu::active_isa(); }
  void TearDown() override { EXPECT_TRUE(cpu::force_isa(before_).ok()); }
  std::string before_;
};

TEST_F(Isa, PortableIsAlwaysThere) {
  const std::vector<std::string> names = cpu::compiled_isas();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.back(), "portable");
  EXPECT_TRUE(cpu::supported("portable"));
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
}

// Instruction sets that add integer products to the vectors of another.
std::string extended_by(const std::string& name) {
  static const std::map<std::string, std::string> others = {
      {"amx", "avx512"}, {"avx512vbmi", "avx512"}, {"avxvnni", "avx2"}, {"i8mm", "neon"}};
  const auto found = others.find(name);
  return found == others.end() ? "" : found->second;
}

std::vector<void*> kernels_of_vectors(const cpu::Kernels& k) {
  return {reinterpret_cast<void*>(k.seal),        reinterpret_cast<void*>(k.seal_scratch),
          reinterpret_cast<void*>(k.dequantise),  reinterpret_cast<void*>(k.dequantise_scratch),
          reinterpret_cast<void*>(k.rotate),      reinterpret_cast<void*>(k.rotate_dual),
          reinterpret_cast<void*>(k.unrotate),    reinterpret_cast<void*>(k.rotate_scratch),
          reinterpret_cast<void*>(k.attend_exact)};
}

// A name that is forced cannot run another's code: no table shares a kernel with another, but one that extends another
// has that one's, all but attention over pages.
TEST_F(Isa, EveryKernelIsItsOwn) {
  std::set<void*> addresses;
  std::size_t functions = 0;
  for (const std::string& name : cpu::compiled_isas()) {
    const cpu::Kernels* k = cpu::find(name.c_str());
    ASSERT_NE(k, nullptr) << name;
    EXPECT_EQ(k->name, name);
    std::vector<void*> own = {reinterpret_cast<void*>(k->attend_pages)};
    if (const cpu::Kernels* other = cpu::find(extended_by(name).c_str())) {
      EXPECT_EQ(kernels_of_vectors(*k), kernels_of_vectors(*other)) << name;
    } else {
      const std::vector<void*> vectors = kernels_of_vectors(*k);
      own.insert(own.end(), vectors.begin(), vectors.end());
    }
    for (void* p : own) {
      EXPECT_NE(p, nullptr) << name;
      addresses.insert(p);
      ++functions;
    }
  }
  EXPECT_EQ(addresses.size(), functions);
}

TEST_F(Isa, TheForcedOneRuns) {
  std::shared_ptr<const Rotation> r;
  ASSERT_TRUE(Rotation::srft(64, 1, &r).ok());
  const std::vector<float> x = cases::normal_rows(3, 64, 1);
  int forced = 0;
  for (const std::string& name : cpu::compiled_isas()) {
    if (!cpu::supported(name)) continue;
    ASSERT_TRUE(cpu::force_isa(name).ok());
    EXPECT_EQ(cpu::active_isa(), name);
    EXPECT_EQ(&cpu::active(), cpu::find(name.c_str()));
    const cpu::Kernels& k = cpu::active();
    // Its instructions execute here: an unsupported set would trap.
    std::vector<float> y(x.size()), back(x.size());
    std::vector<std::byte> memory(k.rotate_scratch(64) + 64);
    void* scratch = memory.data() + (64 - reinterpret_cast<std::size_t>(memory.data()) % 64) % 64;
    k.rotate(*r, x.data(), y.data(), 3, scratch);
    k.unrotate(*r, y.data(), back.data(), 3, scratch);
    EXPECT_NE(y, x);
    for (int row = 0; row < 3; ++row) {
      double square = 0, error = 0;
      for (int c = row * 64; c < row * 64 + 64; ++c) {
        square += static_cast<double>(x[c]) * x[c];
        error += std::pow(static_cast<double>(back[c]) - x[c], 2);
      }
      // 18 units of rounding each way: test_rotation.cpp, radix 2, 4, 4.
      EXPECT_LE(std::sqrt(error), 36 * 0x1p-24 * std::sqrt(square)) << name;
    }
    ++forced;
  }
  EXPECT_GE(forced, 1);
}

TEST_F(Isa, EmptyNameReturnsToTheBest) {
  ASSERT_TRUE(cpu::force_isa("portable").ok());
  ASSERT_TRUE(cpu::force_isa("").ok());
  std::string best;
  for (const std::string& name : cpu::compiled_isas())
    if (best.empty() && cpu::supported(name)) best = name;
  EXPECT_EQ(cpu::active_isa(), best);
}

TEST_F(Isa, UnknownAndUnsupportedNamesAreRefused) {
  ASSERT_TRUE(cpu::force_isa("portable").ok());
  std::vector<std::string> refused = {"avx1024", "AVX2", " portable", "portable "};
  for (const std::string& name : cpu::compiled_isas())
    if (!cpu::supported(name)) refused.push_back(name);
  for (const std::string& name : refused) {
    EXPECT_FALSE(cpu::supported(name));
    const Status status = cpu::force_isa(name);
    EXPECT_EQ(status.code(), StatusCode::unsupported);
    EXPECT_EQ(status.message().rfind("isa: expected one of ", 0), 0u) << status.message();
    EXPECT_NE(status.message().find("portable"), std::string::npos) << status.message();
    EXPECT_NE(status.message().find("got " + name), std::string::npos) << status.message();
    EXPECT_EQ(cpu::active_isa(), "portable");
  }
  EXPECT_EQ(cpu::find("avx1024"), nullptr);
}

std::string best_here() {
  for (const std::string& name : cpu::compiled_isas())
    if (cpu::supported(name)) return name;
  return "";
}

// In a lane that forces one by the environment, nothing else may run.
TEST(IsaOfTheEnvironment, IsTheOneInUse) {
  const char* asked = std::getenv("KV4_CPU_ISA");
  const Status status = cpu::check_isa();
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cpu::active_isa(), asked != nullptr && *asked != '\0' ? asked : best_here());
}

// The environment is read once, at first use: each case needs a process of its own, which prints on stderr what it
// found.
void expect_with_environment(const char* value, const std::string& expected) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  setenv("KV4_CPU_ISA", value, 1);
  EXPECT_EXIT(
      {
        std::cerr << "[" << cpu::active_isa() << "]";
        std::exit(cpu::check_isa().ok() ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "\\[" + expected + "\\]")
      << value;
  unsetenv("KV4_CPU_ISA");
}

TEST(IsaDeathTest, EnvironmentForcesPortable) { expect_with_environment("portable", "portable"); }

TEST(IsaDeathTest, EmptyEnvironmentChoosesNothing) { expect_with_environment("", best_here()); }

// Every way to a kernel.
std::vector<Status> uses_of_kernels() {
  std::unique_ptr<Cache> cache;
  CacheConfig config;
  config.kv_heads = 1;
  config.head_dim_k = config.head_dim_v = 64;
  std::vector<Status> answers = {cpu::check_isa(), Cache::create(config, &cache)};
  config.recipe = Recipe::exact();
  answers.push_back(Cache::create(config, &cache));
  std::vector<double> figures;
  answers.push_back(cpu::measure_seal(64, RotationKind::srft, 64, 1, &figures));
  answers.push_back(cpu::measure_read(1024, 1, &figures));
  return answers;
}

void expect_refusal_of_environment(const std::string& name) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  setenv("KV4_CPU_ISA", name.c_str(), 1);
  const auto run = [&name] {
    bool all = cpu::active_isa().empty();
    for (const Status& status : uses_of_kernels()) {
      std::cerr << "{" << status.message() << "}";
      all &= status.code() == StatusCode::unsupported &&
             status.message().rfind("KV4_CPU_ISA: expected one of ", 0) == 0 &&
             status.message().find("portable on this machine; got " + name) != std::string::npos;
    }
    // The program may choose for itself.
    all &= !cpu::force_isa(name).ok() && cpu::force_isa("").ok() && cpu::active_isa() == best_here();
    for (const Status& status : uses_of_kernels()) all &= status.ok();
    std::exit(all ? 0 : 1);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0), "KV4_CPU_ISA: expected one of .*got " + name);
  unsetenv("KV4_CPU_ISA");
}

TEST(IsaDeathTest, EnvironmentWithUnknownNameIsRefusedByEveryUse) { expect_refusal_of_environment("avx1024"); }

TEST(IsaDeathTest, EnvironmentWithUnsupportedNameIsRefusedByEveryUse) {
  std::string missing;
  for (const std::string& name : cpu::compiled_isas())
    if (!cpu::supported(name)) missing = name;
  if (missing.empty()) GTEST_SKIP() << "this machine has every instruction set of this build";
  expect_refusal_of_environment(missing);
}

TEST_F(Isa, OperandBits) {
  EXPECT_EQ(cpu::operand_bits(), 16);
  for (int bits : {0, 7, 9, 32}) {
    const Status status = cpu::set_operand_bits(bits);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.message(), "bits: expected 8 or 16; got " + std::to_string(bits));
    EXPECT_EQ(cpu::operand_bits(), 16);
  }
  PageSpec narrow, wide, refined;
  narrow.key.levels.bits = narrow.value.levels.bits = refined.key.levels.bits = refined.value.levels.bits = 4;
  wide.key.levels.bits = 4;
  wide.value.levels.bits = 6;
  refined.second.rows = 1;
  for (const std::string& name : cpu::compiled_isas()) {
    const cpu::Kernels& kernels = *cpu::find(name.c_str());
    EXPECT_EQ(kernels.bytes, name == "avx512" || name == "avx512vbmi") << name;
    for (int bits : {8, 16}) {
      ASSERT_TRUE(cpu::set_operand_bits(bits).ok());
      EXPECT_EQ(cpu::takes_bytes(kernels, narrow), kernels.bytes && bits == 8) << name;
      EXPECT_FALSE(cpu::takes_bytes(kernels, wide)) << name;
      EXPECT_FALSE(cpu::takes_bytes(kernels, refined)) << name;
    }
  }
}

// Kernels with a matrix unit leave pages of a trellis, on either side, to others of the same vectors.
TEST_F(Isa, WhoAttendsOverATrellis) {
  for (const std::string& name : cpu::compiled_isas()) {
    const cpu::Kernels& kernels = *cpu::find(name.c_str());
    EXPECT_EQ(kernels.trellis, name == "amx" ? cpu::find("avx512vbmi") : nullptr) << name;
    if (!cpu::supported(name)) continue;
    ASSERT_TRUE(cpu::force_isa(name).ok());
    EXPECT_EQ(&cpu::attending(nullptr), &kernels) << name;
    for (bool keys : {false, true}) {
      PageSpec spec;
      EXPECT_EQ(&cpu::attending(&spec), &kernels) << name;
      (keys ? spec.key : spec.value).levels = levels(LevelKind::trellis);
      EXPECT_EQ(&cpu::attending(&spec), kernels.trellis != nullptr ? kernels.trellis : &kernels) << name;
    }
  }
}

}  // namespace
}  // namespace kv4
