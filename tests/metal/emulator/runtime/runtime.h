// Internal declarations of the runtime.
#pragma once

#include "emu.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif

namespace emu {

inline constexpr unsigned kLanes = 32;
enum Space { kDevice, kGroup, kSpaces };  // memory that a barrier can order

// The checker's logical clock. Stamps grow over all launches, so that one comparison tells whether a recorded access
// belongs to this launch, to this threadgroup, and whether it lies behind the last barrier.
struct Clock {
  uint32_t now = 1;
  uint32_t launch = 1, group = 1;  // stamps at which they began
  uint32_t barrier[kSpaces] = {1, 1};
  uint32_t simd_barrier[kSpaces][kLanes] = {};  // per SIMD-group
};
extern Clock clock_;

bool running();                      // inside a kernel
[[noreturn]] void stop_launch();     // after a finding past which a launch cannot continue
bool on_a_stack(uintptr_t address);  // private memory of a lane

// threadgroup memory
void group_memory_start(const EmuLaunch& launch);  // once per launch
void group_memory_poison();                        // once per threadgroup
uint64_t group_memory_used();
bool in_group_memory(uintptr_t address);

// The checker. Installed by hooks.cpp, which is linked into modules built with "check".
extern bool checking;
void checker_start(EmuStats* stats);
enum Access { kRead, kWrite, kAtomicRead, kAtomicWrite };
void memory_access(uintptr_t address, unsigned bytes, Access access, bool aligned, void* pc);

// One array in threadgroup memory, one buffer.
struct Range {
  uintptr_t begin = 0;
  size_t bytes = 0;
  const char* name = "";
  bool holds(uintptr_t address, size_t n) const { return bytes && address >= begin && address - begin + n <= bytes; }
};
const Range* find_group_range(uintptr_t address, unsigned bytes);

struct Buffer : Range {
  uint32_t kind = EMU_INPUT;
  void* mapping = nullptr;
  size_t mapped = 0;
  struct Shadow* shadow = nullptr;  // per byte; written buffers only
  uint32_t* seen = nullptr;         // per byte: threadgroup stamp of the last read; input buffers only
};
Buffer* find_buffer(uintptr_t address, unsigned bytes);
Buffer* nearest_buffer(uintptr_t address);  // whose guard zone holds the address; null if none

inline constexpr size_t kGuard = 4096;

}  // namespace emu
