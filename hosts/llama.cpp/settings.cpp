#include "settings.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

namespace kv4::llama {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The paper's numbers, by pages behind an exact window: cells of a llama.cpp cache are written again, which packed ones
// cannot be.
Recipe paper_by_pages() {
  Recipe recipe = Recipe::paper();
  recipe.seal = SealMode::page;
  recipe.window = Recipe::kv4().window;
  return recipe;
}

}  // namespace

Status read_settings(Settings* out) {
  Settings read;
  const std::string recipe = variable("KV4_RECIPE"), verbose = variable("KV4_VERBOSE"),
                    calibration = variable("KV4_CALIBRATION");
  if (recipe == "exact") read.exact = true;
  else if (recipe == "paper") read.recipe = paper_by_pages();
  else if (recipe == "trellis") read.recipe = Recipe::trellis();
  else if (!recipe.empty() && recipe != "kv4")
    return invalid_argument("KV4_RECIPE", "kv4, trellis, exact or paper", recipe);
  if (!verbose.empty() && verbose != "0" && verbose != "1") return invalid_argument("KV4_VERBOSE", "0 or 1", verbose);
  read.verbose = verbose == "1";
  if (!calibration.empty()) {
    if (read.exact) return invalid_argument("KV4_CALIBRATION", "none beside KV4_RECIPE=exact", calibration);
    auto measured = std::make_shared<Calibration>();
    KV4_RETURN_IF_ERROR(Calibration::read(calibration, measured.get()));
    read.recipe.key.lambda = LambdaMode::given;
    if (measured->has_values()) read.recipe.value.lambda = LambdaMode::given;
    read.calibration = std::move(measured);
  }
  *out = read;
  return {};
}

Settings& settings() {
  static Settings instance;
  return instance;
}

void say(ggml_log_level level, const std::string& text) {
  ggml_log_callback callback = nullptr;
  void* user = nullptr;
  ggml_log_get(&callback, &user);
  if (callback != nullptr) callback(level, ("kv4: " + text + "\n").c_str(), user);
}

void say_once(ggml_log_level level, const std::string& text, const std::string& details) {
  static std::mutex mutex;
  static std::set<std::string> said;
  {
    const std::lock_guard lock(mutex);
    if (!said.insert(text).second) return;
  }
  say(level, text + details);
}

std::string mebibytes(std::size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

}  // namespace kv4::llama
