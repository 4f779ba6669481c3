// The boundary between C and C++: it returns status codes and keeps the last error text per thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>
#include <span>
#include <utility>

#include "kv4/kv4.h"
#include "kv4/status.h"

namespace kv4::capi {

// Stores the text of a status for kv4_last_error; returns its C code.
kv4_status set_last_error(const Status& status);
void set_exception_error(const char* what) noexcept;
void set_out_of_memory_error() noexcept;
const char* last_error() noexcept;
Status null_pointer(const char* name);

// Returns f()'s result. Every C function goes through guard, so that no exception leaves it.
template <class R, class F>
R guard(R out_of_memory, R internal, F&& f) noexcept {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    set_out_of_memory_error();
    return out_of_memory;
  } catch (const std::exception& e) {
    set_exception_error(e.what());
  } catch (...) {
    set_exception_error("one of another type than std::exception");
  }
  return internal;
}

// Runs f, which returns a Status, if no pointer is null.
template <class F>
kv4_status guarded(std::initializer_list<std::pair<const char*, const void*>> pointers, F&& f) noexcept {
  return guard(KV4_OUT_OF_MEMORY, KV4_INTERNAL, [&] {
    for (const auto& [name, p] : pointers)
      if (p == nullptr) return set_last_error(null_pointer(name));
    return set_last_error(f());
  });
}

// Structs with a size. known: where the struct ended in each version, the newest last.
Status check_size(const char* name, std::size_t size, std::span<const std::size_t> known);

// Copies as much of `given` as its size states over the defaults in *out.
template <class T>
Status read_struct(const char* name, const T* given, std::span<const std::size_t> known, T* out) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  std::size_t size = 0;
  std::memcpy(&size, bytes, sizeof size);
  KV4_RETURN_IF_ERROR(check_size(name, size, known));
  for (std::size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      return error(StatusCode::unsupported, name,
                   "zeros behind the " + std::to_string(sizeof(T)) + " bytes that this version knows",
                   "a setting of a newer version at byte " + std::to_string(i));
  std::memcpy(out, bytes, std::min(size, sizeof(T)));
  return {};
}

template <class T>
kv4_status init_struct(const char* name, T* out, std::size_t size, std::span<const std::size_t> known,
                       T (*defaults)()) noexcept {
  return guarded({{name, out}}, [&]() -> Status {
    KV4_RETURN_IF_ERROR(check_size(name, size, known));
    auto* bytes = reinterpret_cast<unsigned char*>(out);
    const T values = defaults();
    std::memset(bytes, 0, size);
    std::memcpy(bytes, &values, std::min(size, sizeof(T)));
    std::memcpy(bytes, &size, sizeof size);
    return {};
  });
}

}  // namespace kv4::capi
