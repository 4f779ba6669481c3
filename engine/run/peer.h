// llama.cpp's own library on the same file, for comparison.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kv4/status.h"

struct llama_model;
struct llama_context;

namespace kv4::run {

class Peer {
 public:
  // cache: "f16", "q8_0" or "q4_0", of keys and values both; flash attention is on. Peers of one `model` share its weights.
  // Errors: invalid_argument for another cache; unsupported where the library refuses.
  static Status load(const std::string& path, std::shared_ptr<llama_model>* model);
  static Status create(std::shared_ptr<llama_model> model, const std::string& cache, std::int64_t context, int threads, int batch, std::unique_ptr<Peer>* out);
  ~Peer();

  // As engine::Context::decode. Errors: failed_precondition where the library fails.
  Status decode(std::span<const std::int32_t> tokens, std::int64_t answers = 1);
  std::span<const float> logits() const { return logits_; }  // [answers, vocabulary]
  std::int64_t length() const { return length_; }
  void crop(std::int64_t length);

 private:
  Peer() = default;
  std::shared_ptr<llama_model> model_;
  llama_context* context_ = nullptr;
  int batch_ = 0;
  std::int64_t length_ = 0, vocabulary_ = 0;
  std::vector<float> logits_;
};

}  // namespace kv4::run
