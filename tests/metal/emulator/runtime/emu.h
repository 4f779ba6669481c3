// Interface between the stand-in for <metal_stdlib> and the runtime.
#pragma once

#include "abi.h"

namespace emu {

// Source location of a call: lanes perform the same operation only if all fields agree.
struct Site {
  const char* file;
  int line, column;
};

struct Thread {
  EmuSize group, groups, group_size, in_group, in_grid, grid, full_group_size;
  uint32_t index, lane, simdgroup, simdgroups;
};

// Called once per operation with every lane's argument (null for inactive lanes).
using Collective = void (*)(void** lanes, uint32_t active, void* extra);

Thread& self();
void collective(const char* name, Site site, void* argument, Collective function, void* extra);
void simdgroup_barrier(Site site, unsigned flags);
void threadgroup_barrier(Site site, unsigned flags);
void* group_array(const void* key, size_t bytes, size_t alignment, const char* name);
void* group_argument(int index);
void atomic_access(const volatile void* address, unsigned bytes, bool write, Site site);
// A finding. kind is one of those in docs/metal.md; the text says where.
__attribute__((format(printf, 2, 3))) void report(const char* kind, const char* format, ...);

// The launch table that the translator writes at the end of a kernel file.
struct Kernel {
  Kernel(const char* name, int buffers, void (*body)(void* const*));
  const char* name;
  int buffers;
  void (*body)(void* const*);
  Kernel* next;
};
struct Constant {
  Constant(const char* name, void* value, size_t bytes);
  const char* name;
  void* value;
  size_t bytes;
  Constant* next;
};

}  // namespace emu
