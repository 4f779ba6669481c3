// The checker's shadow memory: last accesses of each byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

// The last write and the last read. A stamp of 0: there was none.
struct Shadow {
  uint32_t written = 0, read = 0;            // the clock's barrier stamp of that space at the access
  uint32_t written_simd = 0, read_simd = 0;  // the SIMD-group's own barrier stamp at the access
  uint16_t writer = 0, reader = 0;           // thread of the threadgroup, or one of the two below
};
inline constexpr uint16_t kSeveral = 0xffff;  // readers of more than one SIMD-group
inline constexpr uint16_t kAtomic = 0xfffe;

size_t group_memory_offset(uintptr_t address);
size_t group_memory_bytes();

}  // namespace emu
