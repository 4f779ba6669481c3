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

constexpr std::int64_t kContext = 4096;  // where neither the prompt, nor the session, nor -c asks for more

// A session that was written with another cache: the options that say which, in place of the entry of a recipe.
Status in_options(const Status& status) {
  const std::string& message = status.message();
  if (status.ok() || !message.starts_with("recipe.")) return status;
  const std::size_t colon = message.find(": expected "), semicolon = message.find("; got ");
  if (colon == std::string::npos || semicolon == std::string::npos || semicolon < colon) return status;
  const std::string entry = message.substr(0, colon), ours = message.substr(colon + 11, semicolon - colon - 11), theirs = message.substr(semicolon + 6);
  const auto cache = [](const std::string& seal) { return seal == "never" ? std::string("exact") : seal == "page" ? "kv4" : "kv4 with a recipe that seals on arrival"; };
  if (entry == "recipe.seal") return invalid_argument("--cache", cache(theirs) + ", with which the session was written", cache(ours));
  return invalid_argument("--recipe", "the one with which the session was written, of " + entry + " " + theirs, entry + " " + ours);
}

class Conversation {
 public:
  Conversation(const Common& common, const Generate& options) : common_(common), options_(options) {}

  Status run(bool* was_interrupted) {
    std::string prompt = options_.prompt;
    if (!options_.prompt_file.empty()) KV4_RETURN_IF_ERROR(read_text(source_, options_.prompt_file, &prompt));
    if (const std::size_t at = engine::invalid_utf8(prompt); at != std::string::npos)
      return invalid_argument(source_, "valid UTF-8", "an invalid byte at offset " + std::to_string(at));
    KV4_RETURN_IF_ERROR(engine::Sampler::create(options_.sampler, &sampler_));
    Recipe recipe;
    KV4_RETURN_IF_ERROR(recipe_of(common_, &recipe));  // a bad file is told of before the model is read
    const bool once = options_.prompt_given || !options_.prompt_file.empty();
    chat_ = options_.chat || !once;
    if (once && chat_ && prompt.empty()) return invalid_argument(source_, "a message", "an empty text");
    if (!options_.session.empty()) {
      if (common_.cache == "f16") return error(StatusCode::unsupported, "--cache", "kv4 or exact, of which a session can be kept", "f16");
      KV4_RETURN_IF_ERROR(engine::check_session_place(options_.session));
    }
    KV4_RETURN_IF_ERROR(load_model(common_, &model_));
    if (chat_ && !model_->vocabulary().has_template())
      return error(StatusCode::unsupported, "chat", "a model with a chat template", "one without; -p or -f complete a text");

    std::vector<std::int32_t> tokens;
    if (once && !chat_) KV4_RETURN_IF_ERROR(model_->vocabulary().tokenize(prompt, false, false, &tokens));
    const std::int64_t held = options_.session.empty() ? 0 : engine::session_tokens(options_.session);
    const std::int64_t wanted = held + static_cast<std::int64_t>(once ? std::max(tokens.size(), prompt.size() / 2) : 0) + std::max(options_.tokens, 512);
    KV4_RETURN_IF_ERROR(make_context(common_, model_, std::min(std::max(kContext, wanted), model_->context_length()), &context_));
    if (!options_.session.empty()) KV4_RETURN_IF_ERROR(restore());
    if (session_.messages.empty() && chat_ && options_.system_given) session_.messages.push_back({"system", options_.system});

    Status status = once ? say(prompt) : talk();
    // What was taken in is kept, whatever came after it; where nothing was, the file is as it would be.
    if (context_->length() > restored_) {
      const Status saved = save();
      if (status.ok()) status = saved;
    }
    *was_interrupted = stopped_ && once;
    if (status.ok()) report();
    return status;
  }

 private:
  Status save() const {
    return options_.session.empty() ? Status() : engine::save_session(options_.session, session_, *context_);
  }

  Status restore() {
    std::FILE* file = std::fopen(options_.session.c_str(), "rb");
    if (file == nullptr) return {};  // a new one
    std::fclose(file);
    KV4_RETURN_IF_ERROR(in_options(engine::load_session(options_.session, context_.get(), &session_)));
    if (session_.messages.empty() != !chat_)
      return invalid_argument("--session", chat_ ? "a session of a chat" : "a session of a completed text", options_.session + ", another kind");
    restored_ = context_->length();
    return {};
  }

  Status talk() {
    talking_ = true;
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
      if (status.code() != StatusCode::invalid_argument && status.code() != StatusCode::out_of_range) return status;
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
    if (tokens.empty()) return invalid_argument(source_, "some text, as the model opens none by itself", "an empty one");
    KV4_RETURN_IF_ERROR(check_room(static_cast<std::int64_t>(tokens.size())));

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

  Status check_room(std::int64_t fresh) const {
    const std::int64_t held = context_->length(), room = context_->options().context, most = model_->context_length();
    if (held + fresh <= room) return {};
    return error(StatusCode::out_of_range, "--context", "at least " + std::to_string(held + fresh) + " tokens, " + std::to_string(held) + " held and " + std::to_string(fresh) + " new",
                 std::to_string(room) + (room == most ? ", the most that the model was trained on" : ""));
  }

  Status answer() {
    bool full = false;
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
        full = true;
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
    if (!full) return status;
    if (!common_.json) std::fprintf(stderr, "%s\n", check_room(1).message().c_str());
    return talking_ ? save() : status;  // such a chat may well be left in some other way than by its end
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
  const char* source_ = options_.prompt_file.empty() ? "--prompt" : "--file";
  bool chat_ = false, talking_ = false, stopped_ = false;
  std::int64_t restored_ = 0, prompt_tokens_ = 0, decode_tokens_ = 0;
  double prompt_seconds_ = 0, decode_seconds_ = 0;
};

}  // namespace

Status generate(const Common& common, const Generate& options, bool* was_interrupted) {
  return Conversation(common, options).run(was_interrupted);
}

}  // namespace kv4::run
