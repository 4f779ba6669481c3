// Empty elsewhere: the build compiles every folder on every architecture.
#if defined(__x86_64__) || defined(_M_X64)
#define KV4_ISA avx2
#include "cpu/standard_headers.h"
#include "cpu/target.h"
#include "cpu/x86.h"

namespace kv4::cpu::avx2 {
static bool isa_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
}
}  // namespace kv4::cpu::avx2

KV4_TARGET_BEGIN("avx2,fma,f16c")
#include "cpu/avx2/primitives.h"
#include "cpu/avx2/dot.h"
#include "cpu/kernels.inl"
KV4_TARGET_END
#endif
