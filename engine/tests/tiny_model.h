// Models with random weights, small enough to be made for each test.
#pragma once

#include <ggml.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kv4_engine/context.h"

struct gguf_context;

namespace kv4::engine {

struct TinyModel {
  std::string architecture = "llama";
  ggml_type type = GGML_TYPE_F32;  // of the matrices
  std::int64_t layers = 2;
  std::int64_t embedding = 256, heads = 4, kv_heads = 2, head_dim = 64, feed_forward = 512;
  std::int64_t context = 2048;
  std::uint32_t seed = 1;
  bool with_template = true;
  bool never_ends = false;  // qwen2: control tokens are never drawn
  // The last word on the metadata, and which tensors are left out.
  std::function<void(gguf_context*)> change;
  std::string leave_out;
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> extra;  // further tensors, of ones
};

// Tokens: <unk>, <s>, </s>, <|im_start|>, <|im_end|>, the 256 bytes, then the printable characters.
constexpr std::int64_t kTinyVocabulary = 5 + 256 + 95;

void write(const TinyModel& model, const std::string& path);

// All architectures with what each needs.
std::vector<TinyModel> tiny_models();

// A folder that lives as long as the test.
class EngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "kv4-engine-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string make(const TinyModel& model, const std::string& name = "model.gguf") const {
    write(model, path(name));
    return path(name);
  }
  std::shared_ptr<const Model> load(const TinyModel& model) const {
    std::shared_ptr<const Model> out;
    const Status status = Model::load(make(model), nullptr, &out);
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }
  static std::unique_ptr<Context> context(std::shared_ptr<const Model> model, const ContextOptions& options) {
    std::unique_ptr<Context> out;
    const Status status = Context::create(std::move(model), options, &out);
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }

  std::filesystem::path folder_;
};

inline ContextOptions exact(int threads = 2) {
  ContextOptions o;
  o.recipe = Recipe::exact();
  o.context = 2048;
  o.threads = threads;
  o.batch = 128;
  return o;
}
inline ContextOptions packed(int threads = 2) {
  ContextOptions o = exact(threads);
  o.recipe = Recipe::kv4();
  return o;
}

std::vector<std::int32_t> some_tokens(std::int64_t count, std::uint32_t seed = 5);

inline std::vector<float> copy(std::span<const float> x) { return {x.begin(), x.end()}; }

}  // namespace kv4::engine
