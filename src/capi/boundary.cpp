#include "capi/boundary.h"

#include <string>

namespace kv4::capi {
namespace {

// Per thread: `message` points to `text`, or to a literal where no memory for the text was left.
thread_local std::string text;
thread_local const char* message = "";

// A larger size is taken for an uninitialised field, not for a newer version's.
constexpr std::size_t kLargestSize = 4096;

}  // namespace

kv4_status set_last_error(const Status& status) {
  text = status.message();
  message = text.c_str();
  return static_cast<kv4_status>(status.code());
}

void set_exception_error(const char* what) noexcept {
  try {
    text = invalid_argument("kv4", "no exception", what).message();
    message = text.c_str();
  } catch (...) {
    message = "kv4: expected no exception; got one";
  }
}

void set_out_of_memory_error() noexcept { message = "memory: expected free bytes; got none"; }
const char* last_error() noexcept { return message; }

Status null_pointer(const char* name) { return invalid_argument(name, "a pointer", "NULL"); }

Status check_size(const char* name, std::size_t size, std::span<const std::size_t> known) {
  const bool fits = size > known.back() ? size <= kLargestSize
                                        : std::find(known.begin(), known.end(), size) != known.end();
  if (fits) return {};
  std::string sizes;
  for (const std::size_t one : known) sizes += std::to_string(one) + ", ";
  return invalid_argument(std::string(name) + ".size",
                          "the struct's, as its init sets it (" + sizes + "or a newer version's)",
                          std::to_string(size));
}

}  // namespace kv4::capi
