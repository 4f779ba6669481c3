#include "capi/boundary.h"

#include <string>

namespace kv4::capi {
namespace {

// Per thread: `said` points to `last`, or to a literal if there was no memory for the text.
thread_local std::string last;
thread_local const char* said = "";

// A larger size is not that of a newer version but an uninitialised number.
constexpr std::size_t kLargestSize = 4096;

}  // namespace

kv4_status answer(const Status& status) {
  last = status.message();
  said = last.c_str();
  return static_cast<kv4_status>(status.code());
}

void say_exception(const char* what) noexcept {
  try {
    last = invalid_argument("kv4", "no exception", what).message();
    said = last.c_str();
  } catch (...) {
    said = "kv4: expected no exception; got one";
  }
}

void say_no_memory() noexcept { said = "memory: expected free bytes; got none"; }
const char* last_error() noexcept { return said; }

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
