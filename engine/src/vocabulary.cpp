#include "kv4_engine/vocabulary.h"

#include <llama.h>

#include "log.h"

namespace kv4::engine {

struct Vocabulary::State {
  struct Free {
    void operator()(llama_model* m) const { llama_model_free(m); }
  };
  std::unique_ptr<llama_model, Free> model;
  const llama_vocab* vocab = nullptr;
};

Vocabulary::Vocabulary(std::unique_ptr<State> state) : state_(std::move(state)) {}
Vocabulary::~Vocabulary() = default;

Status Vocabulary::load(const std::string& path, std::unique_ptr<Vocabulary>* out) {
  const LogCapture log;
  llama_model_params parameters = llama_model_default_params();
  parameters.vocab_only = true;
  auto state = std::make_unique<State>();
  state->model.reset(llama_model_load_from_file(path.c_str(), parameters));
  if (!state->model) return invalid_argument("model", "a vocabulary that llama.cpp's library reads", path + ": " + log.last());
  state->vocab = llama_model_get_vocab(state->model.get());
  out->reset(new Vocabulary(std::move(state)));
  return {};
}

Status Vocabulary::tokenize(std::string_view text, bool begin, bool special, std::vector<std::int32_t>* out) const {
  if (const std::size_t at = invalid_utf8(text); at != std::string_view::npos)
    return invalid_argument("text", "valid UTF-8", "an invalid byte at offset " + std::to_string(at));
  out->resize(text.size() + 8);
  const auto run = [&] {
    return llama_tokenize(state_->vocab, text.data(), static_cast<std::int32_t>(text.size()), out->data(), static_cast<std::int32_t>(out->size()), begin, special);
  };
  std::int32_t count = run();
  if (count < 0) {
    out->resize(static_cast<std::size_t>(-count));
    count = run();
  }
  if (count < 0) return invalid_argument("text", "a text that the model's tokenizer takes", std::to_string(text.size()) + " bytes");
  out->resize(static_cast<std::size_t>(count));
  return {};
}

std::string Vocabulary::piece(std::int32_t token, bool special) const {
  std::string text(64, '\0');
  std::int32_t count = llama_token_to_piece(state_->vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, special);
  if (count < 0) {
    text.resize(static_cast<std::size_t>(-count));
    count = llama_token_to_piece(state_->vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, special);
  }
  text.resize(count > 0 ? static_cast<std::size_t>(count) : 0);
  return text;
}

bool Vocabulary::ends_generation(std::int32_t token) const { return llama_vocab_is_eog(state_->vocab, token); }
std::int32_t Vocabulary::size() const { return llama_vocab_n_tokens(state_->vocab); }
bool Vocabulary::has_template() const { return llama_model_chat_template(state_->model.get(), nullptr) != nullptr; }

Status Vocabulary::apply_template(std::span<const Message> messages, bool answer, std::string* out) const {
  const char* text = llama_model_chat_template(state_->model.get(), nullptr);
  if (text == nullptr) return error(StatusCode::unsupported, "chat", "a model with a chat template", "one without");
  std::vector<llama_chat_message> list;
  std::size_t bytes = 256;
  for (const Message& m : messages) {
    list.push_back({m.role.c_str(), m.text.c_str()});
    bytes += 2 * (m.role.size() + m.text.size()) + 64;
  }
  out->resize(bytes);
  const auto run = [&] { return llama_chat_apply_template(text, list.data(), list.size(), answer, out->data(), static_cast<std::int32_t>(out->size())); };
  std::int32_t count = run();
  if (count > static_cast<std::int32_t>(out->size())) {
    out->resize(static_cast<std::size_t>(count));
    count = run();
  }
  if (count < 0) return error(StatusCode::unsupported, "chat", "a chat template that llama.cpp's library knows", "another");
  out->resize(static_cast<std::size_t>(count));
  return {};
}

namespace {

// Bytes of the character that starts with `lead`; 0 where none does.
std::size_t utf8_length(unsigned char lead) {
  return lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
}

}  // namespace

std::size_t invalid_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(text[i + k]); };
    const std::size_t length = utf8_length(byte(0));
    if (length == 0 || i + length > text.size()) return i;
    for (std::size_t k = 1; k < length; ++k)
      if ((byte(k) & 0xc0) != 0x80) return i;
    // Overlong forms, surrogates and what lies beyond U+10FFFF (Unicode 15, table 3-7).
    if (length >= 3 && ((byte(0) == 0xe0 && byte(1) < 0xa0) || (byte(0) == 0xed && byte(1) > 0x9f) ||
                        (byte(0) == 0xf0 && byte(1) < 0x90) || (byte(0) == 0xf4 && byte(1) > 0x8f)))
      return i;
    i += length;
  }
  return std::string_view::npos;
}

std::size_t incomplete_utf8(std::string_view text) {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const unsigned char byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xc0) == 0x80) continue;
    return utf8_length(byte) > back ? back : 0;
  }
  return 0;
}

}  // namespace kv4::engine
