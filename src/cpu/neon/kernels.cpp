// Empty elsewhere: the build compiles every folder on every architecture.
#if defined(__aarch64__)
#define KV4_ISA neon
#include "cpu/standard_headers.h"
#include "cpu/target.h"

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// Dot products of int8 get a target region with GCC only: Clang's arm_neon.h may hide them unless the
// command line asks for them, and dot.h then takes its plain NEON path. GCC's C++ front end reads the
// whole file before it acts on the region, so the macro that dot.h asks for is set here.
#if defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(__ARM_FEATURE_DOTPROD)
#define KV4_NEON_REGION
#define __ARM_FEATURE_DOTPROD 1
#endif

namespace kv4::cpu::neon {
static bool isa_supported() {
#if defined(KV4_NEON_REGION)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // what the command line asked for, every function of this build needs
#endif
}
}  // namespace kv4::cpu::neon

#if defined(KV4_NEON_REGION)
KV4_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
#include "cpu/neon/primitives.h"
#include "cpu/neon/dot.h"
#include "cpu/kernels.inl"
#if defined(KV4_NEON_REGION)
KV4_TARGET_END
#endif
#endif
