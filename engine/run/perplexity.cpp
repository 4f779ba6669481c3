// Perplexity of a text, the second half of each window scored; against the exact cache and llama.cpp's where asked for.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "kv4_engine/vocabulary.h"
#include "options.h"
#include "peer.h"
#include "scores.h"
#include "terminal.h"

namespace kv4::run {
namespace {

// A page's worth: such a call answers every query as if the tokens had come one by one.
constexpr int kBatch = 64;

struct Sum {
  double nll = 0, kl = 0;
  std::int64_t same_top = 0, scored = 0;
  double perplexity() const { return std::exp(nll / static_cast<double>(scored)); }
};

}  // namespace

Status perplexity(const Common& given, const Perplexity& options) {
  Common common = given;
  if (common.batch == 0) common.batch = kBatch;
  std::string text;
  KV4_RETURN_IF_ERROR(read_text("--file", options.text, &text));
  std::shared_ptr<const engine::Model> model;
  KV4_RETURN_IF_ERROR(load_model(common, &model));
  std::vector<std::int32_t> tokens;
  KV4_RETURN_IF_ERROR(model->vocabulary().tokenize(text, false, false, &tokens));
  std::vector<std::int32_t> opening;  // what the model wants before a text
  KV4_RETURN_IF_ERROR(model->vocabulary().tokenize("", true, false, &opening));
  const std::int64_t fresh = options.window - static_cast<std::int64_t>(opening.size());
  if (static_cast<std::int64_t>(tokens.size()) < fresh * options.windows)
    return invalid_argument("--file", "a text of at least " + std::to_string(fresh * options.windows) + " tokens", std::to_string(tokens.size()));

  std::unique_ptr<engine::Context> context, exact;
  KV4_RETURN_IF_ERROR(make_context(common, model, options.window, &context));
  if (options.kl) {
    Common reference = common;
    reference.cache = "exact";
    reference.recipe.clear();
    KV4_RETURN_IF_ERROR(make_context(reference, model, options.window, &exact));
  }
  std::shared_ptr<llama_model> peer_model;
  std::unique_ptr<Peer> peer;
  if (options.llama) {
    KV4_RETURN_IF_ERROR(Peer::load(common.model, &peer_model));
    KV4_RETURN_IF_ERROR(Peer::create(peer_model, "f16", options.window, context->options().threads, common.batch, &peer));
  }

  Sum own, reference, other;
  const std::size_t vocabulary = static_cast<std::size_t>(model->vocabulary_size());
  const auto score = [&](std::span<const float> logits, std::span<const std::int32_t> next, Sum* sum) {
    for (std::size_t i = 0; i < next.size(); ++i) sum->nll += surprise(logits.subspan(i * vocabulary, vocabulary), next[i]);
    sum->scored += static_cast<std::int64_t>(next.size());
  };
  Bar bar("scoring", !common.json);
  for (int w = 0; w < options.windows; ++w) {
    std::vector<std::int32_t> window = opening;
    window.insert(window.end(), tokens.begin() + w * fresh, tokens.begin() + (w + 1) * fresh);
    KV4_RETURN_IF_ERROR(context->crop(0));
    if (exact) KV4_RETURN_IF_ERROR(exact->crop(0));
    if (peer) peer->crop(0);
    const std::int64_t half = options.window / 2;
    for (std::int64_t at = 0; at < options.window; at += common.batch) {
      if (interrupted().load()) return error(StatusCode::failed_precondition, "perplexity", "to run to its end", "Ctrl-C");
      const std::int64_t size = std::min<std::int64_t>(common.batch, options.window - at);
      const std::span<const std::int32_t> now(window.data() + at, static_cast<std::size_t>(size));
      // Rows whose next token is in the window's second half.
      const std::int64_t first = std::max(at, half - 1), end = std::min(at + size, options.window - 1);
      const std::int64_t rows = std::max<std::int64_t>(0, end - first), answers = rows > 0 ? at + size - first : 1;
      const std::span<const std::int32_t> next(window.data() + first + 1, static_cast<std::size_t>(rows));
      KV4_RETURN_IF_ERROR(context->decode(now, answers));
      score(context->logits(), next, &own);
      if (exact) {
        KV4_RETURN_IF_ERROR(exact->decode(now, answers));
        score(exact->logits(), next, &reference);
        for (std::int64_t i = 0; i < rows; ++i) {
          const auto p = exact->logits().subspan(static_cast<std::size_t>(i) * vocabulary, vocabulary);
          const auto q = context->logits().subspan(static_cast<std::size_t>(i) * vocabulary, vocabulary);
          own.kl += divergence(p, q);
          own.same_top += engine::most_likely(p) == engine::most_likely(q);
        }
      }
      if (peer) {
        KV4_RETURN_IF_ERROR(peer->decode(now, answers));
        score(peer->logits(), next, &other);
      }
      bar.show((static_cast<double>(w) + static_cast<double>(at + size) / static_cast<double>(options.window)) / options.windows);
    }
  }

  nlohmann::json result = {{"cache", common.cache}, {"perplexity", own.perplexity()}, {"scored_tokens", own.scored},
                           {"window", options.window}, {"windows", options.windows}, {"batch", common.batch}};
  if (exact) {
    result["exact_perplexity"] = reference.perplexity();
    result["kl"] = own.kl / static_cast<double>(own.scored);
    result["top1"] = static_cast<double>(own.same_top) / static_cast<double>(own.scored);
  }
  if (peer) result["llama_f16_perplexity"] = other.perplexity();
  if (common.json) {
    std::printf("%s\n", result.dump(2).c_str());
    return {};
  }
  bar.show(1);
  std::printf("%s: perplexity %.4f over %lld tokens\n", common.cache.c_str(), own.perplexity(), static_cast<long long>(own.scored));
  if (exact)
    std::printf("exact: %.4f (%+.2f %%); KL %.5f nats a token, the same most likely token %.1f %%\n", reference.perplexity(),
                100 * (own.perplexity() / reference.perplexity() - 1), result["kl"].get<double>(), 100 * result["top1"].get<double>());
  if (peer) std::printf("llama.cpp f16: %.4f (%+.3f %%)\n", other.perplexity(), 100 * (own.perplexity() / other.perplexity() - 1));
  return {};
}

}  // namespace kv4::run
