// The C interface of a compiled module of kernels, which C++ (host/module.h) and Python (module.py) tests share. One
// module is one .metal file, the runtime and one way of checking, in one shared library. Not thread-safe: a process
// runs one kernel at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define EMU_GROUP_MEMORY 32768  // bytes of threadgroup memory of every Apple GPU family
#define EMU_MAX_THREADS 1024    // threads of a threadgroup

#pragma GCC visibility push(default)
extern "C" {

struct EmuSize {
  uint32_t x, y, z;
};

enum EmuFlags {
  EMU_FLUSH_DENORMALS = 1,  // fp32 denormals become 0, as an Apple GPU does by default
};

struct EmuLaunch {
  EmuSize grid;             // threads, as dispatchThreads counts: the last threadgroups may be partial
  EmuSize group;            // threads per threadgroup
  uint64_t seed;            // 0: lanes run in order; else in a random order, the threadgroups backwards if it is odd
  uint32_t flags;           // EmuFlags
  uint32_t group_bytes[8];  // length of each [[threadgroup(n)]] argument
};

// Sums over the launch. Bytes are counted by modules built with "check" only.
struct EmuStats {
  uint64_t threads, groups;
  uint64_t simd_operations;              // simd_* and simdgroup matrix operations, each once per SIMD-group
  uint64_t group_barriers;               // threadgroup_barrier, once per threadgroup
  uint64_t device_read, device_written;  // bytes that lanes asked for, device and constant buffers
  uint64_t device_read_unique, device_written_unique;  // each byte once per threadgroup
  uint64_t group_read, group_written;                  // bytes of threadgroup memory
  uint64_t group_bytes;                                // threadgroup memory of one threadgroup
};

enum EmuBuffer {
  EMU_INPUT = 0,   // the host wrote it, kernels may not
  EMU_INOUT = 1,   // the host wrote it
  EMU_OUTPUT = 2,  // uninitialised until a kernel writes it
};

enum EmuResult { EMU_RAN = 0, EMU_NO_KERNEL = 1, EMU_BAD_ARGUMENTS = 2, EMU_BAD_LAUNCH = 3, EMU_STOPPED = 4 };

// Memory that kernels may access. It starts `offset` bytes past a multiple of 256, between guard zones.
void* emu_alloc(size_t bytes, const char* name, uint32_t kind, uint32_t offset);
void emu_free(void* buffer);

// Runs `kernel` to its end. arguments[i] is what [[buffer(i)]] points to. EMU_STOPPED: a report ended the run early.
int emu_run(const char* kernel, const EmuLaunch* launch, void* const* arguments, uint32_t count, EmuStats* stats);

// Names of kernels, one a line, each followed by a tab and its number of buffers.
const char* emu_kernels(void);
// Sets a [[function_constant]]; false where there is none of that name and size.
int emu_set_constant(const char* name, const void* value, size_t bytes);

// Findings since the last emu_clear: "kind: text" lines, without duplicates, 8 of a kind at most; and the number of
// all.
const char* emu_reports(void);
uint64_t emu_report_count(void);
void emu_clear(void);

// Executions of each basic block of the kernels; only in modules built with "count".
uint64_t* emu_block_counts(size_t* blocks);
}
#pragma GCC visibility pop
