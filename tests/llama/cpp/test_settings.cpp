// Settings from environment variables.
#include "settings.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace kv4::llama {
namespace {

class Environment : public ::testing::Test {
 protected:
  void TearDown() override {
    for (const char* name : {"KV4_RECIPE", "KV4_VERBOSE", "KV4_CALIBRATION"}) unsetenv(name);
  }
};

TEST_F(Environment, NothingMeansKv4AndFewWords) {
  Settings read;
  ASSERT_TRUE(read_settings(&read).ok());
  EXPECT_FALSE(read.exact);
  EXPECT_FALSE(read.verbose);
  EXPECT_EQ(read.recipe.key.levels, LevelKind::lloyd_max);
}

TEST_F(Environment, RecipesHaveNames) {
  Settings read;
  setenv("KV4_RECIPE", "exact", 1);
  ASSERT_TRUE(read_settings(&read).ok());
  EXPECT_TRUE(read.exact);
  setenv("KV4_RECIPE", "trellis", 1);
  ASSERT_TRUE(read_settings(&read).ok());
  EXPECT_EQ(read.recipe.key.levels, LevelKind::trellis);
  EXPECT_EQ(read.recipe.value.levels, LevelKind::trellis);
  EXPECT_EQ(read.recipe.window, Recipe::kv4().window);
  setenv("KV4_RECIPE", "paper", 1);
  setenv("KV4_VERBOSE", "1", 1);
  ASSERT_TRUE(read_settings(&read).ok());
  EXPECT_FALSE(read.exact);
  EXPECT_TRUE(read.verbose);
  EXPECT_EQ(read.recipe.key.levels, LevelKind::uniform);
  EXPECT_EQ(read.recipe.seal, SealMode::page);
  EXPECT_TRUE(validate(read.recipe).ok());
}

TEST_F(Environment, WhatIsNoneIsRefusedAndChangesNothing) {
  Settings read;
  read.exact = true;
  setenv("KV4_RECIPE", "8 bits", 1);
  EXPECT_EQ(read_settings(&read).message(), "KV4_RECIPE: expected kv4, trellis, exact or paper; got 8 bits");
  setenv("KV4_RECIPE", "paper", 1);
  setenv("KV4_VERBOSE", "yes", 1);
  EXPECT_EQ(read_settings(&read).message(), "KV4_VERBOSE: expected 0 or 1; got yes");
  EXPECT_TRUE(read.exact);
}

TEST(Say, GoesThroughGgmlsLogAndOnceWhereOnceIsAsked) {
  static std::vector<std::string> lines;
  lines.clear();
  ggml_log_callback before = nullptr;
  void* user = nullptr;
  ggml_log_get(&before, &user);
  ggml_log_set([](ggml_log_level, const char* text, void*) { lines.emplace_back(text); }, nullptr);
  say(GGML_LOG_LEVEL_INFO, "one");
  say_once(GGML_LOG_LEVEL_WARN, "two, once");
  say_once(GGML_LOG_LEVEL_WARN, "two, once");
  ggml_log_set(before, user);
  EXPECT_EQ(lines, (std::vector<std::string>{"kv4: one\n", "kv4: two, once\n"}));
  EXPECT_EQ(mebibytes(3 << 19), "1.50 MiB");
}

}  // namespace
}  // namespace kv4::llama
