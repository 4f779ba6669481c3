// What the environment says, and how this backend speaks: one line a message, through ggml's own log.
#pragma once

#include <memory>
#include <string>

#include "calibration.h"
#include "ggml.h"
#include "kv4/recipe.h"
#include "kv4/status.h"

namespace kv4::llama {

struct Settings {
  Recipe recipe = Recipe::kv4();
  bool exact = false;                              // nothing is ever packed
  bool verbose = false;                            // also what is packed, and the memory held
  std::shared_ptr<const Calibration> calibration;  // null: lambda is learnt
};

// From KV4_RECIPE (kv4, trellis, exact or paper), KV4_CALIBRATION (a file) and KV4_VERBOSE (0 or 1). Errors:
// invalid_argument naming the variable.
Status read_settings(Settings* out);
// Of the process; read once, as the backend is loaded.
Settings& settings();

void say(ggml_log_level level, const std::string& text);
// The same text is said once, with the details of the first time.
void say_once(ggml_log_level level, const std::string& text, const std::string& details = "");

std::string mebibytes(std::size_t bytes);

}  // namespace kv4::llama
