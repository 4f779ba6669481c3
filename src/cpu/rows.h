// Operations on single rows of floats that surround the attention kernels: reading queries,
// joining partial states, writing answers. One table per instruction set, defined in rows.inl.
#pragma once

#include "cpu/isa.h"
#include "kv4/types.h"

namespace kv4::cpu {

// Rows may have any count and alignment.
struct RowKernels {
  // to = from as float; false where some number is NaN or infinite.
  bool (*load)(DType dtype, const void* from, int count, float* to);
  // to = factor * from
  void (*scale)(const float* from, int count, float factor, float* to);
  // to += factor * from
  void (*add)(const float* from, int count, float factor, float* to);
  // to = factor * from, rounded to dtype (f16 saturates at +-65504)
  void (*store)(const float* from, int count, float factor, DType dtype, void* to);
  // The sum of `count` floats, read once, in order, as fast as memory gives them.
  float (*sum)(const float* from, std::int64_t count);
};

#define KV4_DECLARE_ROW_KERNELS(isa)   \
  namespace isa {                      \
  extern const RowKernels row_kernels; \
  }
KV4_CPU_ISAS(KV4_DECLARE_ROW_KERNELS)
#undef KV4_DECLARE_ROW_KERNELS

// Those of the same instruction set.
const RowKernels& row_kernels(const Kernels& kernels);

}  // namespace kv4::cpu
