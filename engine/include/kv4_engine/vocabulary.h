// Text to tokens and back, and the model's chat template, by llama.cpp's library.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kv4/status.h"

namespace kv4::engine {

struct Message {
  std::string role;  // "system", "user", "assistant"
  std::string text;
};

class Vocabulary {
 public:
  static Status load(const std::string& path, std::unique_ptr<Vocabulary>* out);
  ~Vocabulary();

  // begin: with the tokens that open a text, where the model wants them. special: control tokens written out in the text are read
  // as such. Errors: invalid_argument for invalid UTF-8, with the offset of the first such byte.
  Status tokenize(std::string_view text, bool begin, bool special, std::vector<std::int32_t>* out) const;
  // The token's bytes, which may be a part of a character. special: control tokens are written out, else they are "".
  std::string piece(std::int32_t token, bool special = false) const;
  bool ends_generation(std::int32_t token) const;
  std::int32_t size() const;

  bool has_template() const;
  // The messages as the model wants them; `answer`: up to where its own answer begins.
  // Errors: unsupported where the model has no template or one that llama.cpp's library does not know.
  Status apply_template(std::span<const Message> messages, bool answer, std::string* out) const;

  struct State;
  const State& state() const { return *state_; }

 private:
  explicit Vocabulary(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Offset of the first byte that is not part of valid UTF-8, or npos.
std::size_t invalid_utf8(std::string_view text);
// Bytes at the end of `text` that begin a character which is not complete.
std::size_t incomplete_utf8(std::string_view text);

}  // namespace kv4::engine
