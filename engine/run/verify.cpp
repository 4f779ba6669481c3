// The engine against llama.cpp's library on the same file: the same most likely tokens, prompt by prompt.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>

#include "kv4_engine/vocabulary.h"
#include "options.h"
#include "peer.h"
#include "terminal.h"

namespace kv4::run {
namespace {

const char* const kPrompts[] = {
    "The history of the city of London begins with",
    "Water boils at a lower temperature on a mountain because",
    "def quicksort(values):\n",
    "Once upon a time, in a village by the sea, there lived",
    "The three laws of thermodynamics can be stated as follows:",
    "#include <vector>\n\n// Returns the median of the values.\ndouble median(",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT customer, SUM(amount) FROM orders WHERE",
    "Die Hauptstadt von Frankreich ist",
    "In 1905, Albert Einstein published four papers, which",
};

}  // namespace

Status verify(const Common& common, const Verify& options) {
  std::vector<std::string> prompts(std::begin(kPrompts), std::end(kPrompts));
  if (!options.prompts.empty()) {
    std::string text;
    KV4_RETURN_IF_ERROR(read_text("--prompts", options.prompts, &text));
    prompts.clear();
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
      if (!line.empty()) prompts.push_back(line);
    if (prompts.empty()) return invalid_argument("--prompts", "a prompt on each line", "an empty file");
  }
  std::shared_ptr<const engine::Model> model;
  KV4_RETURN_IF_ERROR(load_model(common, &model));
  std::unique_ptr<engine::Context> context;
  const std::int64_t room = std::min<std::int64_t>(model->context_length(), options.tokens + 1024);
  KV4_RETURN_IF_ERROR(make_context(common, model, room, &context));
  std::shared_ptr<llama_model> peer_model;
  KV4_RETURN_IF_ERROR(Peer::load(common.model, &peer_model));
  std::unique_ptr<Peer> peer;
  KV4_RETURN_IF_ERROR(Peer::create(peer_model, "f16", room, context->options().threads, context->options().batch, &peer));

  Bar bar("comparing", !common.json);
  nlohmann::json rows = nlohmann::json::array();
  int same = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    std::vector<std::int32_t> tokens;
    KV4_RETURN_IF_ERROR(model->vocabulary().tokenize(prompts[i], true, false, &tokens));
    KV4_RETURN_IF_ERROR(context->crop(0));
    peer->crop(0);
    nlohmann::json row = {{"prompt", prompts[i]}, {"first_difference", nullptr}};
    double apart = 0;  // largest difference of two logits, while the tokens are the same
    for (int n = 0; n < options.tokens; ++n) {
      if (interrupted().load()) return error(StatusCode::failed_precondition, "verify", "to run to its end", "Ctrl-C");
      KV4_RETURN_IF_ERROR(context->decode(tokens));
      KV4_RETURN_IF_ERROR(peer->decode(tokens));
      const std::span<const float> a = context->logits(), b = peer->logits();
      for (std::size_t k = 0; k < a.size(); ++k) apart = std::max(apart, static_cast<double>(std::fabs(a[k] - b[k])));
      const std::int32_t ours = engine::most_likely(a), theirs = engine::most_likely(b);
      if (ours != theirs) {
        row["first_difference"] = n;
        // How much each side prefers its own choice: a tie of logits, or a real difference?
        row["margins"] = {a[static_cast<std::size_t>(ours)] - a[static_cast<std::size_t>(theirs)],
                          b[static_cast<std::size_t>(theirs)] - b[static_cast<std::size_t>(ours)]};
        break;
      }
      tokens = {ours};
    }
    row["logits_apart"] = apart;
    same += row["first_difference"].is_null();
    if (!common.json) {
      if (row["first_difference"].is_null())
        std::printf("%2zu: the same %d tokens; logits at most %.4f apart\n", i + 1, options.tokens, apart);
      else
        std::printf("%2zu: token %d differs by margins of %.4f and %.4f; logits at most %.4f apart\n", i + 1, row["first_difference"].get<int>(),
                    row["margins"][0].get<double>(), row["margins"][1].get<double>(), apart);
      std::fflush(stdout);
    }
    rows.push_back(std::move(row));
    bar.show(static_cast<double>(i + 1) / static_cast<double>(prompts.size()));
  }
  if (common.json)
    std::printf("%s\n", nlohmann::json({{"cache", common.cache}, {"tokens", options.tokens}, {"prompts", rows}}).dump(2).c_str());
  else
    std::printf("%d of %zu prompts: the same %d tokens as llama.cpp's f16 cache\n", same, prompts.size(), options.tokens);
  return {};
}

}  // namespace kv4::run
