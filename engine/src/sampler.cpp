#include "kv4_engine/sampler.h"

#include <llama.h>

#include <algorithm>
#include <vector>

namespace kv4::engine {

struct Sampler::State {
  struct Free {
    void operator()(llama_sampler* s) const { llama_sampler_free(s); }
  };
  std::unique_ptr<llama_sampler, Free> chain;
  std::vector<llama_token_data> candidates;
};

Sampler::Sampler(std::unique_ptr<State> state) : state_(std::move(state)) {}
Sampler::~Sampler() = default;

Status Sampler::create(const SamplerOptions& o, std::unique_ptr<Sampler>* out) {
  if (!(o.temperature >= 0)) return invalid_argument("temperature", "0 or more", std::to_string(o.temperature));
  if (o.top_k < 0) return invalid_argument("top-k", "0 or more", std::to_string(o.top_k));
  if (!(o.top_p > 0 && o.top_p <= 1)) return invalid_argument("top-p", "above 0, up to 1", std::to_string(o.top_p));
  if (!(o.min_p >= 0 && o.min_p < 1)) return invalid_argument("min-p", "0 to below 1", std::to_string(o.min_p));
  auto state = std::make_unique<State>();
  state->chain.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
  llama_sampler* chain = state->chain.get();
  if (o.temperature == 0) {
    llama_sampler_chain_add(chain, llama_sampler_init_greedy());
  } else {
    if (o.top_k > 0) llama_sampler_chain_add(chain, llama_sampler_init_top_k(o.top_k));
    if (o.top_p < 1) llama_sampler_chain_add(chain, llama_sampler_init_top_p(o.top_p, 1));
    if (o.min_p > 0) llama_sampler_chain_add(chain, llama_sampler_init_min_p(o.min_p, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(o.temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(o.seed));
  }
  out->reset(new Sampler(std::move(state)));
  return {};
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  auto& c = state_->candidates;
  c.resize(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) c[i] = {static_cast<llama_token>(i), logits[i], 0.0f};
  llama_token_data_array array = {c.data(), c.size(), -1, false};
  llama_sampler_apply(state_->chain.get(), &array);
  const llama_token token = array.data[array.selected].id;
  llama_sampler_accept(state_->chain.get(), token);
  return token;
}

std::int32_t most_likely(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace kv4::engine
