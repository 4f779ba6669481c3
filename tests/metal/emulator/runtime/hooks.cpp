// Kernels compiled with -fsanitize=thread call these at every load and store. libtsan is not linked: the
// threads of interest are those of the GPU, not those of the process. Linking this file turns the checker on.
#include <cstring>

#include "runtime.h"

namespace {
const bool on = emu::checking = true;

void see(const void* address, size_t bytes, emu::Access access, bool aligned, void* pc) {
  emu::memory_access(reinterpret_cast<uintptr_t>(address), static_cast<unsigned>(bytes), access, aligned, pc);
}
}  // namespace

#define HERE __builtin_return_address(0)
#define EMU_HOOKS(n)                                                               \
  void __tsan_read##n(void* a) { see(a, n, emu::kRead, true, HERE); }              \
  void __tsan_write##n(void* a) { see(a, n, emu::kWrite, true, HERE); }            \
  void __tsan_unaligned_read##n(void* a) { see(a, n, emu::kRead, false, HERE); }   \
  void __tsan_unaligned_write##n(void* a) { see(a, n, emu::kWrite, false, HERE); } \
  void __tsan_read_write##n(void* a) { __tsan_read##n(a), __tsan_write##n(a); }    \
  void __tsan_unaligned_read_write##n(void* a) { __tsan_unaligned_read##n(a), __tsan_unaligned_write##n(a); }

extern "C" {
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  if (n) see(from, n, emu::kRead, false, HERE), see(to, n, emu::kWrite, false, HERE);
  return std::memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  if (n) see(from, n, emu::kRead, false, HERE), see(to, n, emu::kWrite, false, HERE);
  return std::memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  if (n) see(to, n, emu::kWrite, false, HERE);
  return std::memset(to, value, n);
}
}
