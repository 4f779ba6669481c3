// Text out of a prompt, or a chat.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "kv4_engine/memory.h"
#include "kv4_engine/session.h"
#include "kv4_engine/vocabulary.h"
#include "options.h"
#include "terminal.h"

namespace kv4::run {
namespace {

constexpr std::int64_t kContext = 4096;  // where neither the prompt nor -c asks for more

class Conversation {
 public:
  Conversation(const Common& common, const Generate& options) : common_(common), options_(options) {}

  Status run(bool* was_interrupted) {
    std::string prompt = options_.prompt;
    if (!options_.prompt_file.empty()) KV4_RETURN_IF_ERROR(read_text("-f", options_.prompt_file, &prompt));
    if (const std::size_t at = engine::invalid_utf8(prompt); at != std::string::npos)
      return invalid_argument(options_.prompt_file.empty() ? "-p" : "-f", "valid UTF-8", "an invalid byte at offset " + std::to_string(at));
    KV4_RETURN_IF_ERROR(engine::Sampler::create(options_.sampler, &sampler_));
    Recipe recipe;
    KV4_RETURN_IF_ERROR(recipe_of(common_, &recipe));  // a bad file is told of before the model is read
    KV4_RETURN_IF_ERROR(load_model(common_, &model_));
    const bool once = !options_.prompt.empty() || !options_.prompt_file.empty();
    chat_ = options_.chat || !once;
    if (chat_ && !model_->vocabulary().has_template())
      return error(StatusCode::unsupported, "chat", "a model with a chat template", "one without; -p or -f complete a text");

    std::vector<std::int32_t> tokens;
    if (once && !chat_) KV4_RETURN_IF_ERROR(model_->vocabulary().tokenize(prompt, false, false, &tokens));
    const std::int64_t wanted = static_cast<std::int64_t>(once ? std::max(tokens.size(), prompt.size() / 2) : 0) + std::max(options_.tokens, 512);
    KV4_RETURN_IF_ERROR(make_context(common_, model_, std::min(std::max(kContext, wanted), model_->context_length()), &context_));
    if (!options_.session.empty()) KV4_RETURN_IF_ERROR(restore());
    if (session_.messages.empty() && chat_ && !options_.system.empty()) session_.messages.push_back({"system", options_.system});

    Status status = once ? say(prompt) : talk();
    if (status.ok() && !options_.session.empty()) status = engine::save_session(options_.session, session_, *context_);
    *was_interrupted = stopped_ && once;
    if (status.ok()) report();
    return status;
  }

 private:
  Status restore() {
    std::FILE* file = std::fopen(options_.session.c_str(), "rb");
    if (file == nullptr) return {};  // a new one
    std::fclose(file);
    KV4_RETURN_IF_ERROR(engine::load_session(options_.session, context_.get(), &session_));
    if (session_.messages.empty() != !chat_)
      return invalid_argument("--session", chat_ ? "a session of a chat" : "a session of a completed text", options_.session + ", another kind");
    restored_ = context_->length();
    return {};
  }

  Status talk() {
    if (!common_.json) std::fputs("Ctrl-C stops an answer, Ctrl-D ends the chat.\n", stderr);
    for (std::string line;;) {
      if (!common_.json) std::fputs("> ", stderr);
      if (!read_line(&line)) break;
      interrupted().store(false);
      if (line.empty()) {
        if (!common_.json) std::fputc('\n', stderr);
        continue;
      }
      const Status status = say(line);
      if (status.ok()) continue;
      // The conversation is as it was: the next line may do better.
      if (status.code() != StatusCode::invalid_argument) return status;
      std::fprintf(stderr, "%s\n", status.message().c_str());
    }
    return {};
  }

  // What is new of the conversation as the model wants it, then its answer.
  Status say(const std::string& text) {
    const engine::Vocabulary& vocabulary = model_->vocabulary();
    std::string fresh = text;
    const bool opening = session_.tokens.empty() && session_.pending.empty();
    if (chat_) {
      std::string before, after;
      if (!opening) KV4_RETURN_IF_ERROR(vocabulary.apply_template(session_.messages, false, &before));
      std::vector<engine::Message> messages = session_.messages;
      messages.push_back({"user", text});
      KV4_RETURN_IF_ERROR(vocabulary.apply_template(messages, true, &after));
      // The answer was taken in as it was drawn; what the template writes after it comes with the next message.
      fresh = opening ? after : after.substr(std::min(before.size() - trailing(before), after.size()));
    }
    std::vector<std::int32_t> tokens;
    KV4_RETURN_IF_ERROR(vocabulary.tokenize(fresh, opening, chat_, &tokens));
    tokens.insert(tokens.begin(), session_.pending.begin(), session_.pending.end());
    if (tokens.empty()) return invalid_argument("prompt", "some text", "none");

    interrupted().store(false);
    bool stopped = false;
    const Timer prefill;
    {
      Bar bar("reading", !common_.json && static_cast<int>(tokens.size()) > context_->options().batch);
      KV4_RETURN_IF_ERROR(context_->decode(tokens, 1, &interrupted(), &stopped,
                                           [&](std::int64_t done) { bar.show(static_cast<double>(done) / static_cast<double>(tokens.size())); }));
    }
    if (stopped) {
      stopped_ = true;
      return {};
    }
    prompt_tokens_ += static_cast<std::int64_t>(tokens.size());
    prompt_seconds_ += prefill.seconds();
    session_.tokens.insert(session_.tokens.end(), tokens.begin(), tokens.end());
    session_.pending.clear();
    if (chat_) session_.messages.push_back({"user", text});
    return answer();
  }

  Status answer() {
    Stream stream(!common_.json);
    const Timer decode;
    std::int64_t steps = 0;
    Status status;
    for (int drawn = 0; options_.tokens < 0 || drawn < options_.tokens; ++drawn) {
      const std::int32_t token = sampler_->sample(context_->logits());
      if (model_->vocabulary().ends_generation(token)) break;
      answer_.push_back(token);
      stream.add(model_->vocabulary().piece(token));
      session_.pending = {token};
      const bool last = options_.tokens >= 0 && drawn + 1 == options_.tokens;
      if (last) break;  // it is taken in with what comes next
      if (context_->length() + 1 > context_->options().context) {
        full_ = true;
        break;
      }
      bool stopped = false;
      status = context_->decode(session_.pending, 1, &interrupted(), &stopped);
      if (!status.ok()) break;
      if (stopped) {
        stopped_ = true;
        break;
      }
      ++steps;
      session_.tokens.push_back(token);
      session_.pending.clear();
    }
    stream.end();
    decode_tokens_ += steps;
    decode_seconds_ += decode.seconds();
    text_ += stream.text();
    if (chat_) session_.messages.push_back({"assistant", stream.text()});
    if (full_ && !common_.json)
      std::fprintf(stderr, "context: expected room for one more token; got %lld of %lld in use (-c takes more)\n",
                   static_cast<long long>(context_->length()), static_cast<long long>(context_->options().context));
    return status;
  }

  // Bytes of the template after the last answer, such as "<|im_end|>\n".
  std::size_t trailing(const std::string& formatted) const {
    std::string last = session_.messages.back().text;  // which some templates trim
    last.erase(last.find_last_not_of(" \t\r\n") + 1);
    const std::size_t at = last.empty() ? std::string::npos : formatted.rfind(last);
    return at == std::string::npos ? 0 : formatted.size() - at - last.size();
  }

  void report() const {
    const double per_token = decode_tokens_ > 0 ? 1e3 * decode_seconds_ / static_cast<double>(decode_tokens_) : 0;
    const double per_second = prompt_seconds_ > 0 ? static_cast<double>(prompt_tokens_) / prompt_seconds_ : 0;
    if (common_.json) {
      const nlohmann::json result = {{"text", text_},
                                     {"tokens", answer_},
                                     {"prompt_tokens", prompt_tokens_},
                                     {"restored_tokens", restored_},
                                     {"generated_tokens", answer_.size()},
                                     {"prefill_tokens_per_second", per_second},
                                     {"decode_ms_per_token", per_token},
                                     {"context_tokens", context_->length()},
                                     {"cache", common_.cache},
                                     {"cache_bytes", context_->cache_bytes()},
                                     {"model_bytes", model_->nbytes()},
                                     {"resident_bytes", engine::resident_memory()},
                                     {"threads", context_->options().threads},
                                     {"stopped", stopped_}};
      std::printf("%s\n", result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
      return;
    }
    std::fprintf(stderr, "\nread %lld tokens at %.1f tokens/s", static_cast<long long>(prompt_tokens_), per_second);
    if (restored_ > 0) std::fprintf(stderr, " after %lld restored", static_cast<long long>(restored_));
    std::fprintf(stderr, "; wrote %zu", answer_.size());
    if (decode_tokens_ > 0) std::fprintf(stderr, " at %.1f ms a token (%.1f tokens/s)", per_token, 1e3 / per_token);
    std::fprintf(stderr, "; cache %s of %lld tokens: %s\n", common_.cache.c_str(), static_cast<long long>(context_->length()),
                 bytes_text(context_->cache_bytes()).c_str());
  }

  const Common& common_;
  const Generate& options_;
  std::shared_ptr<const engine::Model> model_;
  std::unique_ptr<engine::Context> context_;
  std::unique_ptr<engine::Sampler> sampler_;
  engine::Session session_;
  std::vector<std::int32_t> answer_;
  std::string text_;
  bool chat_ = false, stopped_ = false, full_ = false;
  std::int64_t restored_ = 0, prompt_tokens_ = 0, decode_tokens_ = 0;
  double prompt_seconds_ = 0, decode_seconds_ = 0;
};

}  // namespace

Status generate(const Common& common, const Generate& options, bool* was_interrupted) {
  return Conversation(common, options).run(was_interrupted);
}

}  // namespace kv4::run
