// Model files that are not what they should be: one clear refusal each, and nothing kept.
#include <gguf.h>

#include <fstream>
#include <iterator>

#include "tiny_model.h"

namespace kv4::engine {
namespace {

class Files : public EngineTest {
 protected:
  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void write_bytes(const std::string& name, const std::string& bytes) const {
    std::ofstream file(path(name), std::ios::binary);
    file << bytes;
  }
  void refused(const std::string& file, StatusCode code, const std::string& part) const {
    std::shared_ptr<const Model> model;
    const Status status = Model::load(file, nullptr, &model);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
    EXPECT_EQ(status.message().find('\n'), std::string::npos) << status.message();
    EXPECT_EQ(model, nullptr);
  }
  void refused(const TinyModel& model, StatusCode code, const std::string& part) const { refused(make(model, "changed.gguf"), code, part); }
};

TEST_F(Files, ForeignAndCut) {
  refused(path("none.gguf"), StatusCode::invalid_argument, "none.gguf");
  refused(folder_.string(), StatusCode::invalid_argument, folder_.string() + ", a folder");
  write_bytes("text.gguf", "This is a letter, not a model.");
  refused(path("text.gguf"), StatusCode::invalid_argument, "does not begin with GGUF");
  write_bytes("empty.gguf", "");
  refused(path("empty.gguf"), StatusCode::invalid_argument, "GGUF");

  const std::string whole = read(make(TinyModel()));
  ASSERT_GT(whole.size(), 100000u);
  std::vector<std::size_t> lengths = {4, 8, 16, 23, 24, 25, 100, 1000, 5000, whole.size() / 2, whole.size() - 1};
  for (const std::size_t length : lengths) {
    write_bytes("cut.gguf", whole.substr(0, length));
    refused(path("cut.gguf"), StatusCode::invalid_argument, "model: expected a whole GGUF file; got");
  }
}

TEST_F(Files, DamagedHeadersNeverCrash) {
  const std::string whole = read(make(TinyModel()));
  std::size_t refusals = 0;
  for (std::size_t at = 4; at < 1200; at += 11) {  // counts, keys, types and lengths
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x81);
    write_bytes("damaged.gguf", damaged);
    std::shared_ptr<const Model> model;
    const Status status = Model::load(path("damaged.gguf"), nullptr, &model);
    refusals += !status.ok();
    EXPECT_EQ(status.ok(), model != nullptr);
  }
  EXPECT_GT(refusals, 20u);
}

TEST_F(Files, WhatIsNotBuilt) {
  TinyModel m;
  m.architecture = "mamba";
  refused(m, StatusCode::unsupported, "general.architecture: expected one of llama, qwen2, qwen3, gemma3; got mamba");
  m = TinyModel();
  m.change = [](gguf_context* g) { gguf_set_val_str(g, "llama.rope.scaling.type", "yarn"); };
  refused(m, StatusCode::unsupported, "llama.rope.scaling.type: expected none or linear; got yarn");
  m.change = [](gguf_context* g) { gguf_set_val_u32(g, "llama.expert_count", 8); };
  refused(m, StatusCode::unsupported, "llama.expert_count: expected no experts; got 8");
  m.change = [](gguf_context* g) { gguf_set_val_u16(g, "split.count", 3); };
  refused(m, StatusCode::unsupported, "split.count: expected 1, a model in one file; got 3");
  m.change = [](gguf_context* g) { gguf_set_val_str(g, "general.type", "adapter"); };
  refused(m, StatusCode::unsupported, "general.type: expected model; got adapter");
}

TEST_F(Files, EveryTensorIsUsedOrNamed) {
  for (const TinyModel& tiny : tiny_models()) {
    for (const char* name : {"blk.0.attn_q.scale", "blk.1.ffn_gate_inp.weight", "blk.7.attn_norm.weight", "blk.0.attn_sinks.weight", "output_norm.bias"}) {
      TinyModel m = tiny;
      m.extra = {{name, {4}}};
      refused(m, StatusCode::unsupported, std::string(name) + ": expected tensors that the engine computes with; got one of shape [4] that it does not know");
    }
  }
}

TEST_F(Files, EveryKeyOfTheArchitectureIsUsedOrNamed) {
  struct Case {
    const char* key;
    float value;
    const char* says;
  };
  const Case cases[] = {
      {"logit_scale", 0.5f, "expected 1; got 0.5"},
      {"residual_scale", 2, "expected 1; got 2"},
      {"embedding_scale", 12, "expected 1; got 12"},
      {"attn_logit_softcapping", 50, "expected 0, none; got 50"},
      {"attention.clamp_kqv", 8, "expected 0, none; got 8"},
      {"attention.max_alibi_bias", 8, "expected 0, none; got 8"},
      {"rope.scaling.attn_factor", 1.5f, "expected 1; got 1.5"},
      {"attention.scale", 0.1f, "expected keys that the engine knows"},
      {"attention.temperature_scale", 0.1f, "expected keys that the engine knows"},
      {"rope.scaling.yarn_beta_fast", 32, "expected keys that the engine knows"},
  };
  for (const TinyModel& tiny : tiny_models()) {
    const std::string prefix = tiny.architecture + ".";
    TinyModel m = tiny;
    for (const Case& c : cases) {
      m.change = [&](gguf_context* g) { gguf_set_val_f32(g, (prefix + c.key).c_str(), c.value); };
      refused(m, StatusCode::unsupported, prefix + c.key + ": " + c.says);
    }
    m.change = [&](gguf_context* g) { gguf_set_val_bool(g, (prefix + "attention.causal").c_str(), false); };
    refused(m, StatusCode::unsupported, prefix + "attention.causal: expected true; got 0");
    m.change = [&](gguf_context* g) { gguf_set_val_u32(g, (prefix + "vocab_size").c_str(), 7); };
    refused(m, StatusCode::invalid_argument, prefix + "vocab_size: expected " + std::to_string(kTinyVocabulary));
    m.change = [&](gguf_context* g) { gguf_remove_key(g, (prefix + "attention.layer_norm_rms_epsilon").c_str()); };
    refused(m, StatusCode::invalid_argument, prefix + "attention.layer_norm_rms_epsilon: expected a number");
    if (m.architecture != "gemma3") {
      m.change = [&](gguf_context* g) { gguf_set_val_u32(g, (prefix + "attention.sliding_window").c_str(), 96); };
      refused(m, StatusCode::unsupported, prefix + "attention.sliding_window: expected 0, none; got 96");
    }
    // What leaves the model as it is, and what is said of its origin.
    m.change = [&](gguf_context* g) {
      gguf_set_val_f32(g, (prefix + "logit_scale").c_str(), 1);
      gguf_set_val_u32(g, (prefix + "expert_count").c_str(), 0);
      gguf_set_val_bool(g, (prefix + "attention.causal").c_str(), true);
      gguf_set_val_u32(g, (prefix + "vocab_size").c_str(), static_cast<std::uint32_t>(kTinyVocabulary));
      gguf_set_val_u32(g, (prefix + "rope.scaling.original_context_length").c_str(), 2048);
      gguf_set_val_str(g, (prefix + "tensor_data_layout").c_str(), "Meta AI original pth");
      gguf_set_val_str(g, "general.type", "model");
      gguf_set_val_u16(g, "split.count", 1);
    };
    std::shared_ptr<const Model> model;
    const Status status = Model::load(make(m), nullptr, &model);
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST_F(Files, WhatDoesNotFit) {
  TinyModel m;
  m.leave_out = "blk.1.ffn_up.weight";
  refused(m, StatusCode::invalid_argument, "blk.1.ffn_up.weight: expected a tensor of shape [256, 512]");
  m = TinyModel();
  m.change = [](gguf_context* g) { gguf_set_val_u32(g, "llama.feed_forward_length", 500); };
  refused(m, StatusCode::invalid_argument, "expected shape [256, 500]; got [256, 512]");
  m.change = [](gguf_context* g) { gguf_remove_key(g, "llama.block_count"); };
  refused(m, StatusCode::invalid_argument, "llama.block_count: expected an integer in the model's metadata; got no such key");
  m.change = [](gguf_context* g) { gguf_set_val_str(g, "llama.block_count", "two"); };
  refused(m, StatusCode::invalid_argument, "llama.block_count: expected an integer; got str");
  m.change = [](gguf_context* g) { gguf_set_val_u32(g, "llama.block_count", 0); };
  refused(m, StatusCode::invalid_argument, "llama.block_count");
  m.change = [](gguf_context* g) { gguf_set_val_u32(g, "llama.block_count", 1u << 31); };
  refused(m, StatusCode::invalid_argument, "llama.block_count");
  m.change = [](gguf_context* g) { gguf_set_val_u32(g, "llama.attention.head_count_kv", 3); };
  refused(m, StatusCode::invalid_argument, "llama.attention.head_count_kv: expected a divisor of 4; got 3");
  m.change = [](gguf_context* g) { gguf_set_val_f32(g, "llama.rope.freq_base", 0.0f); };
  refused(m, StatusCode::invalid_argument, "llama.rope.freq_base: expected a positive number");
}

TEST_F(Files, IdentityTellsModelsApart) {
  TinyModel other;
  other.seed = 2;
  std::shared_ptr<const Model> a, again, b;
  ASSERT_TRUE(Model::load(make(TinyModel(), "a.gguf"), nullptr, &a).ok());
  ASSERT_TRUE(Model::load(make(TinyModel(), "again.gguf"), nullptr, &again).ok());
  ASSERT_TRUE(Model::load(make(other, "b.gguf"), nullptr, &b).ok());
  EXPECT_EQ(a->identity(), again->identity());
  EXPECT_NE(a->identity(), b->identity());
}

TEST_F(Files, ProgressReachesTheEnd) {
  std::shared_ptr<const Model> model;
  double last = 0;
  ASSERT_TRUE(Model::load(make(TinyModel()), [&](double share) {
                EXPECT_GE(share, last);
                last = share;
              }, &model).ok());
  EXPECT_DOUBLE_EQ(last, 1);
  EXPECT_EQ(model->architecture(), "llama");
  EXPECT_EQ(model->layers(), 2);
  EXPECT_EQ(model->context_length(), 2048);
}

}  // namespace
}  // namespace kv4::engine
