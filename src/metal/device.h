// Shared by the Metal kernels: elements of any type, and sums in pairs of floats.
#ifndef KV4_METAL_DEVICE_H
#define KV4_METAL_DEVICE_H

#include <metal_stdlib>

#include "format/page.h"
#include "metal/arguments.h"

using namespace metal;

namespace kv4 {
namespace apple {

constant constexpr uint kLanes = 32;
constant constexpr uint kPageTokens = KV4_PAGE_TOKENS;
constant constexpr uint kMaxDim = 256;

// bfloat16 conversion written out: the built-in type needs Metal 3.1.
inline float from_bfloat(ushort x) { return as_type<float>(uint(x) << 16); }
inline ushort to_bfloat(float x) {
  const uint bits = as_type<uint>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return ushort(0x7fc0);
  return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load_element(device const uchar* data, int dtype, long i) {
  if (dtype == 0) return ((device const float*)data)[i];
  if (dtype == 1) return float(((device const half*)data)[i]);
  return from_bfloat(((device const ushort*)data)[i]);
}

// Where a head slice begins, in bytes of the buffer of pages; `pages`: kv4_pages.
inline long slice_offset(device const long* pages, long id, uint head) {
  const long shift = pages[kv4_pages_chunk_shift];
  const long within = id & ((long(1) << shift) - 1);
  return pages[kv4_pages_chunks + (id >> shift)] + within * pages[kv4_pages_page_stride] +
         long(head) * pages[kv4_pages_head_stride];
}

inline uint element_bytes(int dtype) { return dtype == 0 ? 4u : 2u; }

// Elements i ... of a row; `aligned`: i is a multiple of the number loaded, and so is the row's first element in its
// buffer.
inline float4 load_four(device const uchar* row, int dtype, uint i, bool aligned) {
  if (!aligned)
    return float4(load_element(row, dtype, i), load_element(row, dtype, i + 1), load_element(row, dtype, i + 2),
                  load_element(row, dtype, i + 3));
  if (dtype == 0) return ((device const float4*)row)[i / 4];
  if (dtype == 1) return float4(((device const half4*)row)[i / 4]);
  const ushort4 x = ((device const ushort4*)row)[i / 4];
  return float4(from_bfloat(x.x), from_bfloat(x.y), from_bfloat(x.z), from_bfloat(x.w));
}
inline float2 load_two(device const uchar* row, int dtype, uint i, bool aligned) {
  if (!aligned) return float2(load_element(row, dtype, i), load_element(row, dtype, i + 1));
  if (dtype == 0) return ((device const float2*)row)[i / 2];
  if (dtype == 1) return float2(((device const half2*)row)[i / 2]);
  const ushort2 x = ((device const ushort2*)row)[i / 2];
  return float2(from_bfloat(x.x), from_bfloat(x.y));
}

inline void store_element(device uchar* data, int dtype, long i, float x) {
  if (dtype == 0) ((device float*)data)[i] = x;
  else if (dtype == 1) ((device half*)data)[i] = half(x);
  else ((device ushort*)data)[i] = to_bfloat(x);
}

// A sum as a pair of floats (Knuth's two-sum, and the exact product's remainder by fma): means of keys with a bias 10^5
// times their spread keep their last digits. Needs exact floating-point semantics: no fast math.
struct Precise {
  float high;
  float low;
};
inline Precise add(Precise s, float x) {
  const float sum = s.high + x;
  const float z = sum - s.high;
  s.low += (s.high - (sum - z)) + (x - z);
  s.high = sum;
  return s;
}
inline Precise add_product(Precise s, float a, float b) {
  const float p = a * b;
  s = add(s, p);
  s.low += fma(a, b, -p);
  return s;
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_DEVICE_H
