// Status: how every fallible call of the library answers. The library never throws on
// purpose, prints, exits or aborts; language bindings turn a failed Status into an exception.
#pragma once

#include <string>
#include <string_view>
#include <utility>

namespace kv4 {

enum class StatusCode : int {
  ok = 0,
  invalid_argument = 1,  // an argument is malformed by itself (shape, dtype, stride, range)
  out_of_range = 2,      // an index or length lies outside what the cache holds
  unsupported = 3,       // well-formed, but no kernel or recipe serves it; the message says why
  non_finite = 4,        // NaN or infinity where a visible value was expected
  out_of_memory = 5,
  failed_precondition = 6,  // the object is not in a state that allows the call
  data_loss = 7             // bytes that are no intact saved cache
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::ok; }
  StatusCode code() const { return code_; }
  // "argument: expected ...; got ..." for every failure.
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::ok;
  std::string message_;
};

// The one form of every error message: the argument, what was expected, what came.
inline Status error(StatusCode code, std::string_view argument, std::string_view expected, std::string_view got) {
  std::string text;
  text.reserve(argument.size() + expected.size() + got.size() + 20);
  text.append(argument).append(": expected ").append(expected).append("; got ").append(got);
  return Status(code, std::move(text));
}

inline Status invalid_argument(std::string_view argument, std::string_view expected, std::string_view got) {
  return error(StatusCode::invalid_argument, argument, expected, got);
}

}  // namespace kv4

// Returns the failed Status to the caller; continues where it is ok.
#define KV4_RETURN_IF_ERROR(expr)                                                  \
  do {                                                                             \
    if (::kv4::Status kv4_status_ = (expr); !kv4_status_.ok()) return kv4_status_; \
  } while (false)
