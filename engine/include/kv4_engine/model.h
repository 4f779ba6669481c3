// A model of a GGUF file: weights in memory, vocabulary, chat template. Shared by any number of conversations; immutable.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "kv4/status.h"

namespace kv4::engine {

class Vocabulary;

class Model {
 public:
  // progress: share of the weights read, 0 to 1, called on this thread; may be null.
  // Errors, nothing kept: invalid_argument for a file that is not a whole GGUF file, lacks a key or a tensor, or has one of
  // another shape; unsupported for an architecture (with the list of those that are built), a RoPE scaling, a tensor type,
  // and for any tensor or any key of the architecture that is not used and might change what the model computes;
  // out_of_memory.
  static Status load(const std::string& path, const std::function<void(double)>& progress, std::shared_ptr<const Model>* out);
  ~Model();

  const Vocabulary& vocabulary() const;
  const std::string& path() const;
  const std::string& architecture() const;
  std::int64_t layers() const;
  std::int64_t vocabulary_size() const;
  std::int64_t context_length() const;  // tokens that it was trained on
  std::size_t nbytes() const;           // of weights in memory
  // Tells models apart: a hash of the file's length, header and samples of its data.
  std::uint64_t identity() const;

  struct State;
  const State& state() const { return *state_; }

 private:
  static Status read(const std::string& path, const std::function<void(double)>& progress, std::shared_ptr<const Model>* out);
  explicit Model(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kv4::engine
