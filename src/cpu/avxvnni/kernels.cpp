// Empty elsewhere: the build compiles every folder on every architecture.
#if defined(__x86_64__) || defined(_M_X64)
#define KV4_ISA avxvnni
#define KV4_EXTENDS avx2
#include "cpu/standard_headers.h"
#include "cpu/target.h"
#include "cpu/x86.h"

namespace kv4::cpu::avxvnni {
static bool isa_supported() {
  return supports_avx_vnni() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
}
}  // namespace kv4::cpu::avxvnni

KV4_TARGET_BEGIN("avxvnni,avx2,fma,f16c")
#include "cpu/avxvnni/primitives.h"
#include "cpu/avxvnni/dot.h"
#include "cpu/kernels.inl"
KV4_TARGET_END
#endif
