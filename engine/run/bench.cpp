// Time per token over context: caches of this engine and of llama.cpp's library, on one file, taking turns at every depth.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>

#include "kv4_engine/vocabulary.h"
#include "options.h"
#include "peer.h"
#include "terminal.h"

namespace kv4::run {
namespace {

struct Contender {
  std::string name;
  std::unique_ptr<engine::Context> context;
  std::unique_ptr<Peer> peer;
  std::int64_t marked = 0;

  Status decode(std::span<const std::int32_t> tokens) { return context ? context->decode(tokens) : peer->decode(tokens); }
  std::int64_t length() const { return context ? context->length() : peer->length(); }
  Status mark() {
    if (context) KV4_RETURN_IF_ERROR(context->mark());
    marked = length();
    return {};
  }
  Status rewind() {
    if (context) return context->rewind();
    peer->crop(marked);
    return {};
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

}  // namespace

Status bench(const Common& common, const Bench& options) {
  if (options.depths.empty()) return invalid_argument("--depths", "one or more", "none");
  std::vector<std::int64_t> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  std::shared_ptr<const engine::Model> model;
  KV4_RETURN_IF_ERROR(load_model(common, &model));
  // Depth 0 has to hold something to step from, and every turn is taken back.
  const std::int64_t room = depths.back() + std::max<std::int64_t>(options.prefill, (options.steps + 1)) + 8;
  if (room > model->context_length())
    return invalid_argument("--depths", "up to " + std::to_string(model->context_length() - (room - depths.back())), std::to_string(depths.back()));

  std::vector<std::int32_t> tokens;
  if (!options.text.empty()) {
    std::string text;
    KV4_RETURN_IF_ERROR(read_text("--file", options.text, &text));
    KV4_RETURN_IF_ERROR(model->vocabulary().tokenize(text, true, false, &tokens));
    if (static_cast<std::int64_t>(tokens.size()) < room)
      return invalid_argument("--file", "a text of at least " + std::to_string(room) + " tokens", std::to_string(tokens.size()));
  } else {
    for (std::int64_t i = 0; i < room; ++i) tokens.push_back(static_cast<std::int32_t>((100 + 7 * i % 1000) % model->vocabulary_size()));
  }
  std::vector<Contender> contenders;
  for (const std::string& cache : options.caches) {
    Common own = common;
    own.cache = cache;
    if (cache != "kv4") own.recipe.clear();
    Contender c{cache, nullptr, nullptr, 0};
    KV4_RETURN_IF_ERROR(make_context(own, model, room, &c.context));
    contenders.push_back(std::move(c));
  }
  std::shared_ptr<llama_model> peer_model;
  for (const std::string& cache : options.llama) {
    if (!peer_model) KV4_RETURN_IF_ERROR(Peer::load(common.model, &peer_model));
    Contender c{"llama.cpp " + cache, nullptr, nullptr, 0};
    const engine::ContextOptions& o = contenders.empty() ? engine::ContextOptions() : contenders.front().context->options();
    KV4_RETURN_IF_ERROR(Peer::create(peer_model, cache, room, o.threads > 0 ? o.threads : 1, o.batch, &c.peer));
    contenders.push_back(std::move(c));
  }
  if (contenders.empty()) return invalid_argument("--caches", "at least one of --caches and --llama", "none");

  nlohmann::json rows = nlohmann::json::array();
  const auto part = [&](std::int64_t first, std::int64_t count) {
    return std::span<const std::int32_t>(tokens.data() + first, static_cast<std::size_t>(count));
  };
  // Batch by batch, so that a mark outlives it and Ctrl-C is heard.
  const auto take_in = [&](Contender& c, std::int64_t end, const std::function<void()>& progress) -> Status {
    const std::int64_t batch = common.batch > 0 ? common.batch : engine::ContextOptions().batch;
    while (c.length() < end) {
      if (interrupted().load()) return error(StatusCode::failed_precondition, "bench", "to run to its end", "Ctrl-C");
      KV4_RETURN_IF_ERROR(c.decode(part(c.length(), std::min(batch, end - c.length()))));
      progress();
    }
    return {};
  };
  for (const std::int64_t depth : depths) {
    std::vector<std::vector<double>> step(contenders.size()), prefill(contenders.size());
    {
      Bar bar("filling to " + std::to_string(depth), !common.json);
      for (std::size_t i = 0; i < contenders.size(); ++i) {
        Contender& c = contenders[i];
        KV4_RETURN_IF_ERROR(take_in(c, depth, [&] {
          bar.show((static_cast<double>(i) + static_cast<double>(c.length()) / static_cast<double>(depth)) / static_cast<double>(contenders.size()));
        }));
      }
    }
    // The first turn warms up. Whoever begins moves on by one each turn.
    for (int repeat = 0; repeat <= options.repeats; ++repeat) {
      for (std::size_t k = 0; k < contenders.size(); ++k) {
        if (interrupted().load()) return error(StatusCode::failed_precondition, "bench", "to run to its end", "Ctrl-C");
        const std::size_t i = (k + static_cast<std::size_t>(repeat)) % contenders.size();
        Contender& c = contenders[i];
        KV4_RETURN_IF_ERROR(c.mark());
        KV4_RETURN_IF_ERROR(c.decode(part(depth, 1)));
        const Timer steps;
        for (int s = 0; s < options.steps; ++s) KV4_RETURN_IF_ERROR(c.decode(part(depth + 1 + s, 1)));
        const double seconds = steps.seconds();
        KV4_RETURN_IF_ERROR(c.rewind());
        const Timer whole;
        KV4_RETURN_IF_ERROR(take_in(c, depth + options.prefill, [] {}));
        const double filled = whole.seconds();
        KV4_RETURN_IF_ERROR(c.rewind());
        if (repeat == 0) continue;
        step[i].push_back(1e3 * seconds / options.steps);
        prefill[i].push_back(options.prefill / filled);
      }
    }
    if (!common.json) {
      std::printf("%lld tokens\n", static_cast<long long>(depth));
      for (std::size_t i = 0; i < contenders.size(); ++i)
        std::printf("  %-16s %8.2f ms a token, prefill %8.1f tokens/s%s%s\n", contenders[i].name.c_str(), median(step[i]), median(prefill[i]),
                    contenders[i].context ? ", cache " : "", contenders[i].context ? bytes_text(contenders[i].context->cache_bytes()).c_str() : "");
      std::fflush(stdout);
    }
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      nlohmann::json row = {{"depth", depth}, {"cache", contenders[i].name}, {"ms_per_token", median(step[i])}, {"ms_per_token_all", step[i]},
                            {"prefill_tokens_per_second", median(prefill[i])}, {"prefill_all", prefill[i]}};
      if (contenders[i].context) row["cache_bytes"] = contenders[i].context->cache_bytes();
      rows.push_back(std::move(row));
    }
  }
  if (common.json)
    std::printf("%s\n", nlohmann::json({{"model", common.model}, {"steps", options.steps}, {"repeats", options.repeats}, {"prefill", options.prefill},
                                        {"threads", contenders.front().context ? contenders.front().context->options().threads : common.threads}, {"rows", rows}})
                            .dump(2)
                            .c_str());
  return {};
}

}  // namespace kv4::run
