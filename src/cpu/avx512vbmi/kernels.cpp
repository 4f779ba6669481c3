// Empty elsewhere: the build compiles every folder on every architecture.
#if defined(__x86_64__) || defined(_M_X64)
#define KV4_ISA avx512vbmi
#define KV4_EXTENDS avx512
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header initialises the ignored operand of an unmasked intrinsic with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/standard_headers.h"
#include "cpu/target.h"
#include "cpu/x86.h"

namespace kv4::cpu::avx512vbmi {
static bool isa_supported() { return avx512::kernels.supported() && __builtin_cpu_supports("avx512vbmi"); }
}  // namespace kv4::cpu::avx512vbmi

KV4_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")
#include "cpu/avx512vbmi/primitives.h"
#include "cpu/avx512vbmi/dot.h"
#include "cpu/kernels.inl"
KV4_TARGET_END
#endif
