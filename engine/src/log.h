// What ggml and llama.cpp would print: kept, so that an error can say why, and never shown.
#pragma once

#include <string>

namespace kv4::engine {

// While one lives, the calling thread's messages of those libraries go into it. Once the first was made they are never printed.
class LogCapture {
 public:
  LogCapture();
  ~LogCapture();
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;
  // The last warning or error, without its line feed; "" where there was none.
  const std::string& last() const { return last_; }

 private:
  static void take(int level, const char* text, void* unused);
  std::string last_;
  LogCapture* outer_;
};

}  // namespace kv4::engine
