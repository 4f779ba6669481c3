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

// What rotations need of an instruction set, without one of its own: vectors of four and of eight lanes.
template <int N>
struct Narrow {
  static constexpr int kLanes = N;
  using F = typename VecTypes<N>::F;

  static KV4_INLINE F set1(float x) { return x - F{}; }  // no operation, unlike a sum with 0
  static KV4_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static KV4_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  // a * b + c
  static KV4_INLINE F fma(F a, F b, F c) { return a * b + c; }
};
// transpose: rows[i][j] <-> rows[j][i], kLanes x kLanes. Blocks of 1, 2 and 4 lanes of two rows change places.
struct Quads : Narrow<4> {
  static KV4_INLINE void transpose(F (&r)[4]) {
    const F a = __builtin_shufflevector(r[0], r[1], 0, 4, 2, 6), b = __builtin_shufflevector(r[0], r[1], 1, 5, 3, 7);
    const F c = __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6), d = __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), r[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5), r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  }
};
struct Octets : Narrow<8> {
  static KV4_INLINE void transpose(F (&r)[8]) {
    KV4_UNROLL
    for (int i = 0; i < 8; i += 2) {
      const F a = r[i], b = r[i + 1];
      r[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
      r[i + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    KV4_UNROLL
    for (int i = 0; i < 8; ++i) {
      if ((i & 2) != 0) continue;
      const F a = r[i], b = r[i + 2];
      r[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const F a = r[i], b = r[i + 4];
      r[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
      r[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
};

}  // namespace kv4::cpu
