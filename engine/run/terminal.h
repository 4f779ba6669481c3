// What a person sees and does: text as it comes, a bar over a long wait, Ctrl-C.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

namespace kv4::run {

// Set by Ctrl-C from the first call on; the program goes on.
std::atomic<bool>& interrupted();

// Text to standard output in whole characters.
class Stream {
 public:
  explicit Stream(bool shown) : shown_(shown) {}
  void add(const std::string& piece);
  // The rest, a broken character included.
  void end();
  const std::string& text() const { return text_; }

 private:
  bool shown_;
  std::string text_;
  std::size_t written_ = 0;
};

// One line on standard error, if that is a terminal; wiped out at the end.
class Bar {
 public:
  Bar(std::string what, bool wanted);
  ~Bar();
  void show(double share);

 private:
  std::string what_;
  bool shown_;
  std::chrono::steady_clock::time_point begin_, last_;
};

// A line of standard input without its end. False at the end of input. Ctrl-C gives an empty line.
bool read_line(std::string* out);

std::string bytes_text(std::uint64_t bytes);  // "12.3 MiB"

class Timer {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace kv4::run
