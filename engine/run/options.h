// What the command line says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kv4_engine/context.h"
#include "kv4_engine/sampler.h"

namespace kv4::run {

struct Common {
  std::string model;
  std::string cache = "kv4";  // kv4, exact or f16
  std::string recipe;         // a file, or ""
  std::int64_t context = 0;   // 0: the command's own choice
  int threads = 0;
  int batch = 0;  // 0: the command's own choice
  bool json = false;
};

struct Generate {
  std::string prompt, prompt_file, session, system;
  bool prompt_given = false, system_given = false;  // an empty text, too, is one
  bool chat = false;
  int tokens = -1;  // -1: until the model ends, or the context is full
  engine::SamplerOptions sampler;
};

struct Bench {
  std::vector<std::int64_t> depths = {0, 4096};
  std::vector<std::string> caches = {"kv4"};
  std::vector<std::string> llama = {"f16", "q8_0", "q4_0"};
  std::string text;
  int steps = 16, repeats = 3, prefill = 512;
};

struct Perplexity {
  std::string text;
  std::int64_t window = 2048;
  int windows = 4;
  bool kl = false, llama = false;
};

struct Verify {
  std::string prompts;  // a file of one prompt a line
  int tokens = 256;
};

// The recipe of the options. Errors: those of the file.
Status recipe_of(const Common& common, Recipe* out);
Status load_model(const Common& common, std::shared_ptr<const engine::Model>* out);
// `context`: where the command line gives none.
Status make_context(const Common& common, std::shared_ptr<const engine::Model> model, std::int64_t context, std::unique_ptr<engine::Context>* out);
// Errors: invalid_argument for a folder, or a file that cannot be read.
Status check_file(const std::string& argument, const std::string& path);
Status read_text(const std::string& argument, const std::string& path, std::string* out);

// The commands. Each prints its results; the status is what went wrong.
Status generate(const Common& common, const Generate& options, bool* interrupted);
Status bench(const Common& common, const Bench& options);
Status perplexity(const Common& common, const Perplexity& options);
Status verify(const Common& common, const Verify& options);

}  // namespace kv4::run
