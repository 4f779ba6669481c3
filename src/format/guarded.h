// The library's surface throws nothing: running out of host memory becomes a Status.
#pragma once

#include <new>
#include <stdexcept>

#include "kv4/status.h"

namespace kv4 {

// Returns call()'s result, or out_of_memory naming `what` if the host has no memory left.
template <class Call>
Status guarded(const char* what, Call call) {
  const auto none = [what] { return error(StatusCode::out_of_memory, what, "free memory of the host", "none"); };
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return none();
  } catch (const std::length_error&) {  // of a vector
    return none();
  }
}

}  // namespace kv4
