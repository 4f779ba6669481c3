#include "peer.h"

#include <llama.h>

#include <algorithm>

namespace kv4::run {

Status Peer::load(const std::string& path, std::shared_ptr<llama_model>* model) {
  const llama_model_params parameters = llama_model_default_params();
  model->reset(llama_model_load_from_file(path.c_str(), parameters), llama_model_free);
  if (*model == nullptr) return error(StatusCode::unsupported, "model", "a file that llama.cpp's library loads", path);
  return {};
}

Status Peer::create(std::shared_ptr<llama_model> model, const std::string& cache, std::int64_t context, int threads, int batch, std::unique_ptr<Peer>* out) {
  const ggml_type type = cache == "f16" ? GGML_TYPE_F16 : cache == "q8_0" ? GGML_TYPE_Q8_0 : cache == "q4_0" ? GGML_TYPE_Q4_0 : GGML_TYPE_COUNT;
  if (type == GGML_TYPE_COUNT) return invalid_argument("--llama", "f16, q8_0 or q4_0", cache);
  llama_context_params parameters = llama_context_default_params();
  parameters.n_ctx = static_cast<std::uint32_t>(context);
  parameters.n_batch = parameters.n_ubatch = static_cast<std::uint32_t>(batch);
  parameters.n_threads = parameters.n_threads_batch = threads;
  parameters.type_k = parameters.type_v = type;
  parameters.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  auto peer = std::unique_ptr<Peer>(new Peer);
  peer->vocabulary_ = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));
  peer->context_ = llama_init_from_model(model.get(), parameters);
  peer->model_ = std::move(model);
  peer->batch_ = batch;
  if (peer->context_ == nullptr) return error(StatusCode::unsupported, "--llama", "a cache of " + cache + " that llama.cpp's library makes", "none");
  *out = std::move(peer);
  return {};
}

Peer::~Peer() {
  if (context_ != nullptr) llama_free(context_);
}

Status Peer::decode(std::span<const std::int32_t> tokens, std::int64_t answers) {
  const std::int64_t count = static_cast<std::int64_t>(tokens.size());
  logits_.clear();
  for (std::int64_t first = 0; first < count; first += batch_) {
    const std::int64_t size = std::min<std::int64_t>(batch_, count - first);
    llama_batch batch = llama_batch_init(static_cast<std::int32_t>(size), 0, 1);
    batch.n_tokens = static_cast<std::int32_t>(size);
    for (std::int64_t i = 0; i < size; ++i) {
      batch.token[i] = tokens[static_cast<std::size_t>(first + i)];
      batch.pos[i] = static_cast<llama_pos>(length_ + i);
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = first + i >= count - answers;
    }
    const int failed = llama_decode(context_, batch);
    for (std::int64_t i = 0; failed == 0 && i < size; ++i) {
      if (!batch.logits[i]) continue;
      const float* row = llama_get_logits_ith(context_, static_cast<std::int32_t>(i));
      logits_.insert(logits_.end(), row, row + vocabulary_);
    }
    llama_batch_free(batch);
    if (failed != 0) return error(StatusCode::failed_precondition, "llama.cpp", "a batch that it decodes", "code " + std::to_string(failed));
    length_ += size;
  }
  return {};
}

void Peer::crop(std::int64_t length) {
  llama_memory_t memory = llama_get_memory(context_);
  if (length == 0)
    llama_memory_clear(memory, false);
  else
    llama_memory_seq_rm(memory, 0, static_cast<llama_pos>(length), -1);
  length_ = length;
}

}  // namespace kv4::run
