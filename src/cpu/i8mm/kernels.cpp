// Empty elsewhere: the build compiles every folder on every architecture.
#include "cpu/isa.h"
#if defined(KV4_CPU_HAS_I8MM)
#define KV4_ISA i8mm
#define KV4_EXTENDS neon
#include "cpu/standard_headers.h"
#include "cpu/target.h"

// As in neon/kernels.cpp.
#if !defined(__ARM_FEATURE_MATMUL_INT8) || !defined(__ARM_FEATURE_DOTPROD)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define KV4_I8MM_REGION
#endif
#if !defined(__ARM_FEATURE_DOTPROD)
#define __ARM_FEATURE_DOTPROD 1
#endif

namespace kv4::cpu::i8mm {
static bool isa_supported() {
#if defined(KV4_I8MM_REGION)
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers lack
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#else
  return true;  // what the command line asked for, every function of this build needs
#endif
}
}  // namespace kv4::cpu::i8mm

#if defined(KV4_I8MM_REGION)
KV4_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")
#endif
#include "cpu/i8mm/primitives.h"
#include "cpu/i8mm/dot.h"
#include "cpu/kernels.inl"
#if defined(KV4_I8MM_REGION)
KV4_TARGET_END
#endif
#endif
