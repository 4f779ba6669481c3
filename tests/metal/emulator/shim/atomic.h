// Atomics, relaxed as Metal's are. One thread of the process runs all lanes, so that plain operations are atomic. They
// report to the checker themselves; the accesses to the bytes are not instrumented.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
}  // namespace metal
typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<float> atomic_float;

namespace emu {
namespace names {
using metal::memory_order_relaxed;

#define EMU_QUIET __attribute__((no_sanitize("thread"), noinline))
template <class T>
EMU_QUIET T atomic_load_explicit(const volatile metal::atomic<T>* at, metal::memory_order, EMU_SITE) {
  emu::atomic_access(at, sizeof(T), false, EMU_HERE);
  return at->value;
}
template <class T, class U>
EMU_QUIET void atomic_store_explicit(volatile metal::atomic<T>* at, U value, metal::memory_order, EMU_SITE) {
  emu::atomic_access(at, sizeof(T), true, EMU_HERE);
  at->value = static_cast<T>(value);
}
#define EMU_ATOMIC(name, expression)                                                                          \
  template <class T, class U>                                                                                 \
  EMU_QUIET T atomic_##name##_explicit(volatile metal::atomic<T>* at, U value, metal::memory_order, EMU_SITE) { \
    emu::atomic_access(at, sizeof(T), true, EMU_HERE);                                                        \
    const T x = at->value, y = static_cast<T>(value);                                                         \
    at->value = expression;                                                                                   \
    return x;                                                                                                 \
  }
EMU_ATOMIC(exchange, (static_cast<void>(x), y))
EMU_ATOMIC(fetch_add, x + y)
EMU_ATOMIC(fetch_sub, x - y)
EMU_ATOMIC(fetch_min, (y < x ? y : x))
EMU_ATOMIC(fetch_max, (x < y ? y : x))
EMU_ATOMIC(fetch_and, x & y)
EMU_ATOMIC(fetch_or, x | y)
EMU_ATOMIC(fetch_xor, x ^ y)
#undef EMU_ATOMIC
template <class T>
EMU_QUIET bool atomic_compare_exchange_weak_explicit(volatile metal::atomic<T>* at, T* expected, T desired, metal::memory_order,
                                                     metal::memory_order, EMU_SITE) {
  emu::atomic_access(at, sizeof(T), true, EMU_HERE);
  const T x = at->value;
  if (x == *expected) {
    at->value = desired;
    return true;
  }
  *expected = x;
  return false;
}
#undef EMU_QUIET

}  // namespace names
}  // namespace emu
