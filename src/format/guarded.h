// The library's surface throws nothing: what runs out of the host's memory says so.
#pragma once

#include <new>
#include <stdexcept>

#include "kv4/status.h"

namespace kv4 {

// What call() answers; out_of_memory naming `what` where the host has no memory left.
template <class Call>
Status guarded(const char* what, Call call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {  // of a vector
  }
  return error(StatusCode::out_of_memory, what, "free memory of the host", "none");
}

}  // namespace kv4
