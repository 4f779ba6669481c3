// Declarations for the address-space pass: nothing is run. Pointers keep their spaces, so that a kernel which mixes
// them does not compile.
#pragma once

namespace metal {
template <class T, int C, int R>
struct simdgroup_matrix {
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
};
template <class T, int C, int R>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
#define EMU_MATRIX(space)                                                  \
  template <class T, int C, int R>                                         \
  matrix<T, R, C> transpose(const space matrix<T, C, R>&);                 \
  template <class T, int C, int R>                                         \
  vec<T, R> operator*(const space matrix<T, C, R>&, vec<T, C>);            \
  template <class T, int C, int R>                                         \
  vec<T, C> operator*(vec<T, R>, const space matrix<T, C, R>&);
EMU_MATRIX(device)
EMU_MATRIX(constant)
EMU_MATRIX(threadgroup)
#undef EMU_MATRIX
}  // namespace metal
typedef metal::simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef metal::simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef metal::simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<float> atomic_float;

namespace emu {
namespace names {
#define EMU_LANES(name) \
  template <class T>    \
  T name(T, ushort);
EMU_LANES(simd_shuffle) EMU_LANES(simd_broadcast) EMU_LANES(simd_shuffle_xor) EMU_LANES(simd_shuffle_down)
EMU_LANES(simd_shuffle_up) EMU_LANES(simd_shuffle_rotate_down) EMU_LANES(simd_shuffle_rotate_up) EMU_LANES(quad_shuffle)
EMU_LANES(quad_broadcast) EMU_LANES(quad_shuffle_xor)
#undef EMU_LANES
#define EMU_LANE(name) \
  template <class T>   \
  T name(T);
EMU_LANE(simd_broadcast_first) EMU_LANE(simd_sum) EMU_LANE(simd_product) EMU_LANE(simd_max) EMU_LANE(simd_min)
EMU_LANE(simd_or) EMU_LANE(simd_and) EMU_LANE(simd_xor) EMU_LANE(simd_prefix_inclusive_sum)
EMU_LANE(simd_prefix_exclusive_sum)
#undef EMU_LANE
bool simd_any(bool);
bool simd_all(bool);
enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(unsigned(a) | unsigned(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T>
using tile = metal::simdgroup_matrix<T, 8, 8>;
#define EMU_IN(space)                                                                       \
  template <class T>                                                                        \
  void simdgroup_load(tile<T>&, const space T*, ulong = 8, ulong2 = {}, bool = false);      \
  template <class T>                                                                        \
  void simdgroup_store(tile<T>, space T*, ulong = 8, ulong2 = {}, bool = false);            \
  template <class T>                                                                        \
  T atomic_load_explicit(const volatile space metal::atomic<T>*, metal::memory_order);      \
  template <class T, class U>                                                               \
  void atomic_store_explicit(volatile space metal::atomic<T>*, U, metal::memory_order);     \
  template <class T>                                                                        \
  bool atomic_compare_exchange_weak_explicit(volatile space metal::atomic<T>*, T*, T, metal::memory_order, metal::memory_order);
#define EMU_ATOMIC(name, space) \
  template <class T, class U>   \
  T atomic_##name##_explicit(volatile space metal::atomic<T>*, U, metal::memory_order);
#define EMU_ATOMICS(space)                                                                              \
  EMU_IN(space)                                                                                         \
  EMU_ATOMIC(exchange, space) EMU_ATOMIC(fetch_add, space) EMU_ATOMIC(fetch_sub, space)                 \
  EMU_ATOMIC(fetch_min, space) EMU_ATOMIC(fetch_max, space) EMU_ATOMIC(fetch_and, space)                \
  EMU_ATOMIC(fetch_or, space) EMU_ATOMIC(fetch_xor, space)
EMU_ATOMICS(device)
EMU_ATOMICS(threadgroup)
#undef EMU_ATOMICS
#undef EMU_ATOMIC
#undef EMU_IN
using metal::memory_order_relaxed;
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(tile<D>&, const tile<A>&, const tile<B>&, const tile<C>&);
template <class D, class A, class B>
void simdgroup_multiply(tile<D>&, const tile<A>&, const tile<B>&);
}  // namespace names
}  // namespace emu
