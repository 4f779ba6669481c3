// Empty elsewhere: the build compiles every folder on every architecture.
#if defined(__x86_64__) || defined(_M_X64)
#define KV4_ISA amx
#define KV4_EXTENDS avx512
#define KV4_TRELLIS_BY avx512vbmi
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header initialises the ignored operand of an unmasked intrinsic with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/standard_headers.h"
#include "cpu/target.h"
#include "cpu/x86.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kv4::cpu::amx {

// Linux gives a process the tile registers' state (8 KiB a thread that uses them) only on request.
static bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static bool isa_supported() {
  static const bool supported = avx512vbmi::kernels.supported() && supports_amx_int8() && ask_for_tiles();
  return supported;
}

}  // namespace kv4::cpu::amx

KV4_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")
#include "cpu/amx/primitives.h"
#include "cpu/amx/dot.h"
#include "cpu/kernels.inl"
KV4_TARGET_END
#endif
