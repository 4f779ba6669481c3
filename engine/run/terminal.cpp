#include "terminal.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "kv4_engine/vocabulary.h"

namespace kv4::run {
namespace {

std::atomic<bool> g_interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // a signal handler may write it

}  // namespace

std::atomic<bool>& interrupted() {
  static const bool once = [] {
    struct sigaction action = {};
    action.sa_handler = [](int) { g_interrupted.store(true, std::memory_order_relaxed); };
    sigaction(SIGINT, &action, nullptr);  // without SA_RESTART: a waiting read returns
    return true;
  }();
  static_cast<void>(once);
  return g_interrupted;
}

void Stream::add(const std::string& piece) {
  text_ += piece;
  if (!shown_) return;
  const std::size_t end = text_.size() - engine::incomplete_utf8(text_);
  std::fwrite(text_.data() + written_, 1, end - written_, stdout);
  std::fflush(stdout);
  written_ = end;
}

void Stream::end() {
  if (!shown_) return;
  std::fwrite(text_.data() + written_, 1, text_.size() - written_, stdout);
  written_ = text_.size();
  if (!text_.empty() && text_.back() != '\n') std::fputc('\n', stdout);
  std::fflush(stdout);
}

Bar::Bar(std::string what, bool wanted) : what_(std::move(what)), shown_(wanted && isatty(STDERR_FILENO) == 1), begin_(std::chrono::steady_clock::now()) {}

Bar::~Bar() {
  if (shown_) std::fputs("\r\x1b[K", stderr);
}

void Bar::show(double share) {
  if (!shown_) return;
  const auto now = std::chrono::steady_clock::now();
  if (share < 1 && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  constexpr int kWidth = 30;
  const int full = static_cast<int>(share * kWidth);
  const double spent = std::chrono::duration<double>(now - begin_).count();
  std::fprintf(stderr, "\r%s [", what_.c_str());
  for (int i = 0; i < kWidth; ++i) std::fputc(i < full ? '#' : '.', stderr);
  std::fprintf(stderr, "] %3.0f %%", 100 * share);
  if (share > 0.02) std::fprintf(stderr, ", %.0f s left", spent * (1 - share) / share);
  std::fputs("\x1b[K", stderr);
  std::fflush(stderr);
}

bool read_line(std::string* out) {
  out->clear();
  for (char c = 0;;) {
    const ssize_t count = read(STDIN_FILENO, &c, 1);
    if (count < 0 && errno == EINTR) {
      out->clear();
      return true;
    }
    if (count <= 0) return !out->empty();
    if (c == '\n') return true;
    out->push_back(c);
  }
}

std::string bytes_text(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

}  // namespace kv4::run
