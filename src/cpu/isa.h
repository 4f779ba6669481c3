// Instruction sets of the CPU backend. Each is a folder with primitives.h (vector types and
// operations) and kernels.cpp (the generic algorithms of src/cpu/*.inl compiled for it).
// KV4_CPU_ISAS is the one list: dispatch, forcing, tests and benchmarks expand it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

// Best first. X(name, compiled where)
#if (defined(__x86_64__) || defined(_M_X64)) && defined(KV4_CPU_FEW_ISAS)
#define KV4_CPU_ISAS_ARCH(X) X(avx2)
#elif defined(__x86_64__) || defined(_M_X64)
#define KV4_CPU_ISAS_ARCH(X) X(amx) X(avx512vbmi) X(avx512) X(avxvnni) X(avx2)
#elif defined(__aarch64__)
// Clang's arm_neon.h may hide what the command line does not ask for.
#if (defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_DOTPROD)) || \
    (defined(__GNUC__) && !defined(__clang__) && defined(__linux__))
#define KV4_CPU_HAS_I8MM
#define KV4_CPU_ISAS_ARCH(X) X(i8mm) X(neon)
#else
#define KV4_CPU_ISAS_ARCH(X) X(neon)
#endif
#else
#define KV4_CPU_ISAS_ARCH(X)
#endif
#define KV4_CPU_ISAS(X) KV4_CPU_ISAS_ARCH(X) X(portable)

namespace kv4::cpu {

struct PagesTask;  // attend.h
struct ExactTask;  // attend.h

// What one instruction set provides. Scratch is per call and per thread, 64-byte aligned.
struct Kernels {
  const char* name;
  bool (*supported)();

  // Seals the slice of one head. scratch: seal_scratch(spec) bytes.
  void (*seal)(const PageSpec& spec, const SealJob& job, int head, std::uint8_t* slice, void* scratch);
  std::size_t (*seal_scratch)(const PageSpec& spec);

  // Backend::dequantise. scratch: dequantise_scratch(spec) bytes.
  void (*dequantise)(const PageSpec& spec, const std::uint8_t* slice, const float* lambda_k, const float* lambda_v,
                     int first, int count, float* k, float* v, void* scratch);
  std::size_t (*dequantise_scratch)(const PageSpec& spec);

  // Rows of `dim` floats, contiguous: out = R^-T in (rotate_dual), R^-1 in (unrotate), R in (rotate).
  // in and out may be the same. scratch: rotate_scratch(dim) bytes.
  void (*rotate)(const Rotation& r, const float* in, float* out, std::int64_t rows, void* scratch);
  void (*rotate_dual)(const Rotation& r, const float* in, float* out, std::int64_t rows, void* scratch);
  void (*unrotate)(const Rotation& r, const float* in, float* out, std::int64_t rows, void* scratch);
  std::size_t (*rotate_scratch)(int dim);

  void (*attend_pages)(const PagesTask& task);
  bool bytes;         // it takes PagesTask::bytes
  int operand_bytes;  // of PagesTask::q_codes, per row and channel
  // Bytes of PagesTask::tiles for up to `rows` rows; 0 where the instruction set has no tiles.
  std::size_t (*tiles_scratch)(const PageSpec& spec, std::int64_t rows);
  void (*attend_exact)(const ExactTask& task);
  const Kernels* trellis;  // which attend where pages are of a trellis, if these do not; else null
};

#define KV4_DECLARE_KERNELS(isa) \
  namespace isa {                \
  extern const Kernels kernels;  \
  }
KV4_CPU_ISAS(KV4_DECLARE_KERNELS)
#undef KV4_DECLARE_KERNELS

// The kernels in use: see kv4/cpu.h.
const Kernels& active();
// Those of them that attend over pages of such a format; null where there are none.
const Kernels& attending(const PageSpec* spec);
// By name, whether this machine runs them or not; null if not compiled in.
const Kernels* find(const char* name);
// Whether queries and weights become bytes at pages of such a format (operand_bits in kv4/cpu.h).
bool takes_bytes(const Kernels& kernels, const PageSpec& spec);

}  // namespace kv4::cpu
