#include "cpu/rotate_f64.h"

#define KV4_ISA scalar_f64
#include "cpu/standard_headers.h"
#include "cpu/target.h"

namespace kv4::cpu::scalar_f64 {

// The generic transform with one lane of binary64. No fused operation: on a machine without one
// it would be a library call.
struct Isa {
  static constexpr int kLanes = 1;
  using F = double;
  static KV4_INLINE F set1(double x) { return x; }
  static KV4_INLINE F load(const double* p) { return *p; }
  static KV4_INLINE void store(double* p, F v) { *p = v; }
  static KV4_INLINE F fma(F a, F b, F c) { return a * b + c; }
};

}  // namespace kv4::cpu::scalar_f64

#include "cpu/rotate_lanes.inl"

namespace kv4::cpu {

void rotate_f64(const Rotation& r, Map map, double* x, double* scratch) {
  static_assert(rotate_f64_scratch(64) == scalar_f64::rotate_lanes_scratch(64));
  scalar_f64::rotate_lanes<scalar_f64::Isa>(r, map, x, scratch);
}

}  // namespace kv4::cpu
