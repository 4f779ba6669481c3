#include "log.h"

#include <ggml.h>
#include <llama.h>

#include <mutex>

namespace kv4::engine {
namespace {

thread_local LogCapture* t_current = nullptr;

}  // namespace

LogCapture::LogCapture() : outer_(t_current) {
  static std::once_flag once;
  std::call_once(once, [] {
    const auto callback = [](ggml_log_level level, const char* text, void* data) { take(static_cast<int>(level), text, data); };
    ggml_log_set(callback, nullptr);
    llama_log_set(callback, nullptr);
  });
  t_current = this;
}

LogCapture::~LogCapture() { t_current = outer_; }

void LogCapture::take(int level, const char* text, void*) {
  if (t_current == nullptr || text == nullptr || (level != GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_ERROR)) return;
  std::string line = text;
  while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) line.pop_back();
  if (!line.empty()) t_current->last_ = line;
}

}  // namespace kv4::engine
