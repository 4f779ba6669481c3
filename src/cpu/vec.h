// Vectors of the generic kernels, on GCC's and Clang's vector extensions. An instruction set's
// primitives.h builds on these and replaces what its intrinsics do better.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/target.h"
#include "format/convert.h"

namespace kv4::cpu {

template <int N>
struct VecTypes {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef std::int32_t I __attribute__((vector_size(4 * N)));
};

}  // namespace kv4::cpu
