// The CPU backend's switches: which instruction set runs, and on how many threads.
#pragma once

#include <string>
#include <vector>

#include "kv4/export.h"
#include "kv4/status.h"

namespace kv4::cpu {

// Names of the instruction sets compiled in, best first ("avx512", "avxvnni", "avx2", "neon", "portable").
KV4_API std::vector<std::string> compiled_isas();
// True where this machine can run it.
KV4_API bool supported(const std::string& isa);
// The one in use: the best supported, unless force_isa or the environment variable KV4_CPU_ISA chooses another. The
// variable is read once, at first use; empty, it chooses nothing. "" where it names what this build or machine lacks:
// then nothing runs on the CPU backend, Cache::create included, until force_isa chooses, and every call answers as
// check_isa does.
KV4_API std::string active_isa();
// ok where there is one in use; else unsupported, naming KV4_CPU_ISA, those that this build and machine have, and what
// came; KV4_CPU_OPERAND_BITS alike (operand_bits).
KV4_API Status check_isa();
// Chooses an instruction set for the process, whatever KV4_CPU_ISA says; "" chooses the best.
// Errors: unsupported, with the list of those that this build and machine have; the one in use then stays.
KV4_API Status force_isa(const std::string& isa);

// Bits of the integers that queries and attention weights become where they meet packed codes: 8 (the default) lets
// instruction sets that multiply bytes faster (avx512) use them where no code has more than 4 bits and no key is
// refined; what that rounds is a few hundredths of what the codes have (docs/quality.md). 16 everywhere else, and for
// all when set: outputs are then within some 1e-5 of float64 arithmetic over the same pages. The environment variable
// KV4_CPU_OPERAND_BITS chooses too, read once; where it is neither, this is 0 and every call answers as check_isa does.
KV4_API int operand_bits();
// Errors: invalid_argument where bits is neither 8 nor 16.
KV4_API Status set_operand_bits(int bits);

// Threads that a call may use; the default is the OpenMP runtime's own number. On a thread that has an executor: its
// own. How long OpenMP's threads spin while they wait is the program's to say, before it starts: GNU's default, some
// milliseconds, makes calls many times as long where other programs want the CPUs (docs/huggingface.md, "On a loaded
// machine").
KV4_API int num_threads();
// Errors: invalid_argument where n < 1.
KV4_API Status set_num_threads(int n);

// Threads that a program lends: its own pool's, where a second pool would fight for the same cores.
class KV4_API Executor {
 public:
  virtual ~Executor() = default;
  virtual int threads() const = 0;  // at least 1
  // Calls body(context, i) once for every i in [0, threads()), on as many threads as are free, one of them the
  // caller's; returns when all calls have returned. body takes pieces of the work until none is left and never throws.
  // So the caller need not wait for a thread that the system has put aside before it began: it may make that one's call
  // itself, after its own, at no cost.
  virtual void run(void (*body)(void* context, int thread), void* context) = 0;
};
// Calls that the calling thread makes from here on share their work through `executor`, which must outlive them; null:
// through the process's own threads again. Returns the one before.
KV4_API Executor* set_executor(Executor* executor);

}  // namespace kv4::cpu
