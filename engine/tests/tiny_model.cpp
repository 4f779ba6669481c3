#include "tiny_model.h"

#include <gguf.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <random>

#include "ggml_ptr.h"

namespace kv4::engine {
namespace {

void vocabulary(gguf_context* g, bool with_template) {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"};
  std::vector<std::int32_t> kinds = {2, 3, 3, 3, 3};  // unknown, control
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", b);
    tokens.emplace_back(text);
    kinds.push_back(6);
  }
  for (char c = ' '; c <= '~'; ++c) {
    tokens.emplace_back(c == ' ' ? "\xe2\x96\x81" : std::string(1, c));
    kinds.push_back(1);
  }
  ASSERT_EQ(static_cast<std::int64_t>(tokens.size()), kTinyVocabulary);
  std::vector<const char*> texts;
  for (const std::string& t : tokens) texts.push_back(t.c_str());
  const std::vector<float> scores(tokens.size(), -1.0f);
  gguf_set_val_str(g, "tokenizer.ggml.model", "llama");
  gguf_set_arr_str(g, "tokenizer.ggml.tokens", texts.data(), texts.size());
  gguf_set_arr_data(g, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores.data(), scores.size());
  gguf_set_arr_data(g, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, kinds.data(), kinds.size());
  gguf_set_val_u32(g, "tokenizer.ggml.bos_token_id", 1);
  gguf_set_val_u32(g, "tokenizer.ggml.eos_token_id", 2);
  gguf_set_val_bool(g, "tokenizer.ggml.add_bos_token", true);
  // llama.cpp's library knows ChatML by its first marker.
  if (with_template) gguf_set_val_str(g, "tokenizer.chat_template", "{% for m in messages %}<|im_start|>{{ m.role }}...<|im_end|>{% endfor %}");
}

}  // namespace

void write(const TinyModel& m, const std::string& path) {
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> gguf(gguf_init_empty(), gguf_free);
  gguf_context* g = gguf.get();
  const std::string prefix = m.architecture + ".";
  const auto count = [&](const char* key, std::int64_t value) { gguf_set_val_u32(g, (prefix + key).c_str(), static_cast<std::uint32_t>(value)); };
  gguf_set_val_str(g, "general.architecture", m.architecture.c_str());
  count("block_count", m.layers);
  count("context_length", m.context);
  count("embedding_length", m.embedding);
  count("feed_forward_length", m.feed_forward);
  count("attention.head_count", m.heads);
  count("attention.head_count_kv", m.kv_heads);
  count("attention.key_length", m.head_dim);
  count("attention.value_length", m.head_dim);
  count("rope.dimension_count", m.head_dim);
  gguf_set_val_f32(g, (prefix + "attention.layer_norm_rms_epsilon").c_str(), 1e-6f);
  gguf_set_val_f32(g, (prefix + "rope.freq_base").c_str(), 50000.0f);
  if (m.architecture == "gemma3") count("attention.sliding_window", 96);
  vocabulary(g, m.with_template);
  if (m.change) m.change(g);

  std::mt19937 random(m.seed);
  const std::size_t bytes = static_cast<std::size_t>(64) << 20;
  const GgmlContext context(ggml_init({.mem_size = bytes, .mem_buffer = nullptr, .no_alloc = false}));
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, float mean, float deviation, ggml_type type) {
    if (name == m.leave_out) return;
    ggml_tensor* t = ggml_new_tensor(context.get(), type, static_cast<int>(shape.size()), shape.data());
    ggml_set_name(t, name.c_str());
    std::vector<float> values(static_cast<std::size_t>(ggml_nelements(t)));
    std::normal_distribution<float> normal(mean, deviation);
    for (float& v : values) v = normal(random);
    if (type == GGML_TYPE_F32)
      std::memcpy(t->data, values.data(), values.size() * sizeof(float));
    else
      ggml_quantize_chunk(type, values.data(), t->data, 0, ggml_nrows(t), t->ne[0], nullptr);
    gguf_add_tensor(g, t);
  };
  const auto matrix = [&](const std::string& name, std::int64_t in, std::int64_t out) {
    add(name, {in, out}, 0, 1.0f / std::sqrt(static_cast<float>(in)), m.type);
  };
  const auto vector = [&](const std::string& name, std::int64_t size, float mean, float deviation) { add(name, {size}, mean, deviation, GGML_TYPE_F32); };
  matrix("token_embd.weight", m.embedding, kTinyVocabulary);
  if (m.never_ends) {
    const std::int64_t size = kTinyVocabulary;
    ggml_tensor* bias = ggml_new_tensor(context.get(), GGML_TYPE_F32, 1, &size);
    ggml_set_name(bias, "output.bias");
    for (std::int64_t i = 0; i < size; ++i) static_cast<float*>(bias->data)[i] = i < 5 ? -100.0f : 0.0f;
    gguf_add_tensor(g, bias);
  }
  vector("output_norm.weight", m.embedding, 1, 0.1f);
  if (m.architecture == "llama") {  // the others' output matrix is the embedding
    matrix("output.weight", m.embedding, kTinyVocabulary);
    vector("rope_freqs.weight", m.head_dim / 2, 2, 0.3f);
  }
  for (std::int64_t i = 0; i < m.layers; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    vector(layer + "attn_norm.weight", m.embedding, 1, 0.1f);
    matrix(layer + "attn_q.weight", m.embedding, m.heads * m.head_dim);
    matrix(layer + "attn_k.weight", m.embedding, m.kv_heads * m.head_dim);
    matrix(layer + "attn_v.weight", m.embedding, m.kv_heads * m.head_dim);
    matrix(layer + "attn_output.weight", m.heads * m.head_dim, m.embedding);
    if (m.architecture == "qwen2") {
      vector(layer + "attn_q.bias", m.heads * m.head_dim, 0, 0.5f);
      vector(layer + "attn_k.bias", m.kv_heads * m.head_dim, 0, 0.5f);
      vector(layer + "attn_v.bias", m.kv_heads * m.head_dim, 0, 0.5f);
    }
    if (m.architecture == "qwen3" || m.architecture == "gemma3") {
      vector(layer + "attn_q_norm.weight", m.head_dim, 1, 0.1f);
      vector(layer + "attn_k_norm.weight", m.head_dim, 1, 0.1f);
    }
    if (m.architecture == "gemma3") {
      vector(layer + "post_attention_norm.weight", m.embedding, 1, 0.1f);
      vector(layer + "post_ffw_norm.weight", m.embedding, 1, 0.1f);
    }
    vector(layer + "ffn_norm.weight", m.embedding, 1, 0.1f);
    matrix(layer + "ffn_gate.weight", m.embedding, m.feed_forward);
    matrix(layer + "ffn_up.weight", m.embedding, m.feed_forward);
    matrix(layer + "ffn_down.weight", m.feed_forward, m.embedding);
  }
  for (const auto& [name, shape] : m.extra) add(name, shape, 1, 0, GGML_TYPE_F32);
  ASSERT_TRUE(gguf_write_to_file(g, path.c_str(), false));
}

std::vector<TinyModel> tiny_models() {
  std::vector<TinyModel> models;
  for (const char* name : {"llama", "qwen2", "qwen3", "gemma3"}) {
    TinyModel m;
    m.architecture = name;
    if (m.architecture == "gemma3") m.layers = 7, m.kv_heads = 1;  // layer 5 is global
    models.push_back(m);
  }
  return models;
}

std::vector<std::int32_t> some_tokens(std::int64_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  for (std::int32_t& t : tokens) t = static_cast<std::int32_t>(5 + random() % (kTinyVocabulary - 5));
  return tokens;
}

}  // namespace kv4::engine
