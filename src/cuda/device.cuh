// What the kernels use of the machine: matrix instructions, byte look-ups, numbers of 16 bits.
//
// PTX ISA 8.x, "Warp-level matrix instructions" and "Data movement": the register layouts stated here are its.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/layout.h"
#include "kv4/types.h"

namespace kv4::cuda {

constexpr unsigned kAll = 0xffffffffu;  // every lane of a warp

// Programmatic dependent launch (sm_90): a kernel may begin while the previous one in the stream still runs. The
// previous kernel's writes are visible after wait_for_previous; let_next_begin allows the next kernel to begin. Nothing
// is copied into shared memory before wait_for_previous, not even data that no kernel writes: with several processes
// time-slicing a device, bulk copies issued before it gave wrong data in one call of some thousands (docs/cuda.md).
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A (16 x 32 bytes) times B (32 x 8 bytes), each signed or not, added to C (16 x 8). Lane 4g + t holds of A
// rows g (a.x, a.z) and g + 8 (a.y, a.w), columns 4t ... 4t+3 (x, y) and 16 + 4t ... (z, w); of C rows g
// (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2t and 2t + 1.
template <bool kSignedA, bool kSignedB>
__device__ __forceinline__ void mma_bytes(int (&sum)[4], uint4 a, uint2 b, const int (&c)[4]) {
  static_assert(kSignedA || kSignedB);
#define KV4_MMA_BYTES(types)                                                                                          \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." types ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])                                                        \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
  if constexpr (kSignedA && kSignedB) KV4_MMA_BYTES("s8.s8");
  else if constexpr (kSignedA) KV4_MMA_BYTES("s8.u8");
  else KV4_MMA_BYTES("u8.s8");
#undef KV4_MMA_BYTES
}
template <bool kSignedA, bool kSignedB>
__device__ __forceinline__ void mma_bytes(int (&c)[4], uint4 a, uint2 b) {
  mma_bytes<kSignedA, kSignedB>(c, a, b, c);
}

// A (16 x 16) times B (16 x 8) of 16-bit floats, added to C in float. Lane 4g + t holds of A rows g (x, z) and g + 8
// (y, w), columns 2t, 2t+1 (x, y) and 8 + 2t, 8 + 2t+1 (z, w); of B column g, rows 2t, 2t+1 and 8 + 2t, 8 + 2t+1.
__device__ __forceinline__ void mma_halves(bool bf16, float (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
  if (bf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 (16 bytes).
template <bool kTransposed>
__device__ __forceinline__ uint4 load_matrices(uint32_t shared) {
  uint4 r;
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(shared)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(shared)
                 : "memory");
  return r;
}

// Four bytes of {a, b}, each chosen by the low three bits of a nibble of `selector`; where its fourth is set, that
// byte's sign eight times. (__byte_perm clears the fourth bits.)
__device__ __forceinline__ uint32_t look_up(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// 8 stored codes to the B fragments of mma_bytes that hold their levels: magnitudes of those >= 0 and of those below
// (layout.h). 7 instructions.
struct Levels8 {
  uint2 positive, negative;
};
__device__ __forceinline__ Levels8 levels_of(uint32_t word, const Tables& t) {
  const uint32_t flipped = word ^ 0x88888888u;
  return {{look_up(t.positive[0], t.positive[1], word), look_up(t.positive[0], t.positive[1], word >> 16)},
          {look_up(t.negative[0], t.negative[1], flipped), look_up(t.negative[0], t.negative[1], flipped >> 16)}};
}

// 8 stored codes to 16-bit floats below the normal ones, 2^-24 times their levels, without arithmetic. kEven: levels of
// both signs have the same magnitudes.
template <bool kEven>
struct Halves8 {
  uint32_t low, high;  // magnitudes of nibbles 0 ... 3 and 4 ... 7
  uint32_t even, odd;  // signs, of nibbles 0, 2, 4, 6 and of 1, 3, 5, 7
  __device__ __forceinline__ Halves8(uint32_t word, const Tables& t) {
    if constexpr (kEven) {
      const uint32_t index = word & 0x77777777u;
      low = look_up(t.positive[0], t.positive[1], index);
      high = look_up(t.positive[0], t.positive[1], index >> 16);
    } else {
      const Levels8 both = levels_of(word, t);
      low = both.positive.x | both.negative.x;
      high = both.positive.y | both.negative.y;
    }
    even = word << 4 & 0x80808080u;
    odd = word & 0x80808080u;
  }
  // Nibbles 0, 2, 4, 6, 1, 3, 5, 7: 11 instructions with the look-ups.
  __device__ __forceinline__ uint4 even_first() const {
    return {__byte_perm(low, even, 0x5240), __byte_perm(high, even, 0x7260), __byte_perm(low, odd, 0x5341),
            __byte_perm(high, odd, 0x7361)};
  }
  __device__ __forceinline__ uint4 in_order() const {
    const uint32_t first = __byte_perm(even, odd, 0x5140), second = __byte_perm(even, odd, 0x7362);
    return {__byte_perm(low, first, 0x5140), __byte_perm(low, first, 0x7362), __byte_perm(high, second, 0x5140),
            __byte_perm(high, second, 0x7362)};
  }
};

// Sums of 16-bit numbers times levels: rows g of the accumulators hold the numbers' high bytes, rows g + 8 the low
// ones. Accumulators start from a constant that makes their bits floats, the sum (below 2^22 in magnitude) plus 1.5 *
// 2^23: subtracting those of the negative levels from those of the positive ones takes it away, with no conversion at
// all.
struct Sums {
  int positive[4], negative[4];

  // Not by initialisers of members: of an array of these nvcc 13.0 leaves all but the first at 0.
  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int i = 0; i < 4; ++i) positive[i] = negative[i] = 0x4b400000;
  }
  template <bool kSigned>
  __device__ __forceinline__ void add(uint4 numbers, const Levels8& levels) {
    mma_bytes<kSigned, true>(positive, numbers, levels.positive);
    mma_bytes<kSigned, true>(negative, numbers, levels.negative);
  }
  template <bool kSigned>
  __device__ __forceinline__ void add(uint4 numbers, uint2 levels) {
    mma_bytes<kSigned, true>(positive, numbers, levels);
  }
  // These sums, or the other ones.
  __device__ __forceinline__ Sums or_else(bool other, const Sums& x) const {
    Sums r;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r.positive[i] = other ? x.positive[i] : positive[i];
      r.negative[i] = other ? x.negative[i] : negative[i];
    }
    return r;
  }
  // Of column 2t + e.
  __device__ __forceinline__ float operator[](int e) const {
    return fmaf(__int_as_float(positive[e]) - __int_as_float(negative[e]), 256.0f,
                __int_as_float(positive[e + 2]) - __int_as_float(negative[e + 2]));
  }
};

// Element i of `data`, widened.
__device__ __forceinline__ float load_element(const void* data, DType dtype, long long i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

// Beyond the range of fp16 the largest finite number, as the reference stores it.
__device__ __forceinline__ __half saturated_half(float x) {
  return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
}
__device__ __forceinline__ unsigned short to_half(float x) { return __half_as_ushort(saturated_half(x)); }
__device__ __forceinline__ float from_half(unsigned short h) { return __half2float(__ushort_as_half(h)); }

__device__ __forceinline__ void put_element(void* data, DType dtype, long long i, float x) {
  if (dtype == DType::f32) static_cast<float*>(data)[i] = x;
  else if (dtype == DType::f16) static_cast<__half*>(data)[i] = saturated_half(x);
  else static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
}

// Barriers of a cluster's CTAs (from 9.0 on), all threads of each.
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kBulkCopies) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  if constexpr (kBulkCopies) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// Over the lanes of a warp.
__device__ __forceinline__ float warp_max(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// NaN where either is, unlike fmaxf.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}
__device__ __forceinline__ float warp_max_or_nan(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = max_or_nan(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To the last place but one, without a division's branches.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return fmaf(fmaf(-x, r, 1.0f), r, r);
}

// Over the four lanes that hold one row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
template <class T>
__device__ __forceinline__ T quad_sum(T x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}
// Over the eight lanes that hold one column of an operand B.
__device__ __forceinline__ float octet_max(float x) {
  for (int step = 4; step < kLanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}
__device__ __forceinline__ float octet_sum(float x) {
  for (int step = 4; step < kLanes; step *= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Word i of four, i constant.
__device__ __forceinline__ uint32_t word_of(uint4 x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// Two floats as 16-bit floats, the first in the low half.
__device__ __forceinline__ uint32_t pack_halves(bool bf16, float low, float high) {
  if (bf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
  const __half2 x = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}
__device__ __forceinline__ float2 unpack_halves(bool bf16, uint32_t x) {
  if (bf16) return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&x));
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

// Four numbers as an A fragment of mma_halves whose rows g hold their first 16-bit float and rows g + 8 what it left.
__device__ __forceinline__ uint4 two_halves(bool bf16, float a, float b, float c, float d) {
  const uint32_t ab = pack_halves(bf16, a, b), cd = pack_halves(bf16, c, d);
  const float2 rab = unpack_halves(bf16, ab), rcd = unpack_halves(bf16, cd);
  return {ab, pack_halves(bf16, a - rab.x, b - rab.y), cd, pack_halves(bf16, c - rcd.x, d - rcd.y)};
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// To the same place in the shared memory of the cluster's CTA `rank`, which has begun.
__device__ __forceinline__ void put_in_cluster(const float* p, int rank, float x) {
  if constexpr (kBulkCopies)
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.b32 [there], %2;}" ::"r"(
                     shared_address(p)),
                 "r"(rank), "r"(__float_as_uint(x))
                 : "memory");
}

// Brings the line of L2 that holds *p there.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
constexpr int kIdsPerLine = 128 / static_cast<int>(sizeof(std::int32_t));

// Loads into x's own register: a register copy at the end of a loop, as the compiler would make it, would wait for the
// load.
__device__ __forceinline__ void load_into(uint32_t& x, const int32_t* from, bool any) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.b32 %0, [%1];}"
               : "+r"(x)
               : "l"(from), "r"(static_cast<uint32_t>(any))
               : "memory");
}

// Reloads from shared memory at every use: the compiler would hoist the load out of the loop and run out of registers.
__device__ __forceinline__ uint4 load_again(const uint4* p) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared_address(p)));
  return x;
}

// Before a slot that ordinary stores have written is filled by the copy engine; by every lane that wrote.
__device__ __forceinline__ void fence_shared_writes() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace kv4::cuda
