// The default rotation, an orthonormal real FFT of a sign-flipped row, as a butterfly: by one SIMD-group in threadgroup
// memory, where the matrix of rotate.h takes all threads and 4 dim^2 bytes. A complex FFT of half the length
// (Stockham's, which needs no reordering: Swarztrauber 1984), and the split of its spectrum into the real row's
// (kv4/rotation.h has the formula).
//
// Table [3 dim] floats: signs / sqrt(2 dim) [dim], then exp(-2 pi i n / dim) [dim] as pairs.
// Counted at d = 128 for a row, either way (tests/metal/measure.py): 4,900 lane-instructions and 1,536 bytes of table;
// the matrix takes 33,500 and 65,536. At d = 64, 80, 96 and 256: 3,200, 3,700, 4,200 and 10,600.
#ifndef KV4_METAL_BUTTERFLY_H
#define KV4_METAL_BUTTERFLY_H

#include "metal/device.h"

namespace kv4 {
namespace apple {

inline float2 complex_product(float2 a, float2 b) {
  return float2(fma(a.x, b.x, -(a.y * b.y)), fma(a.x, b.y, a.y * b.x));
}
inline float2 conjugate(float2 a) { return float2(a.x, -a.y); }
// a - i b and a + i b
inline float2 minus_i(float2 a, float2 b) { return float2(a.x + b.y, a.y - b.x); }
inline float2 plus_i(float2 a, float2 b) { return float2(a.x - b.y, a.y + b.x); }

// Forward DFT of Radix numbers in place.
template <uint Radix>
struct Dft;
template <>
struct Dft<2> {
  static void run(thread float2* a) {
    const float2 b = a[1];
    a[1] = a[0] - b;
    a[0] += b;
  }
};
template <>
struct Dft<3> {
  static void run(thread float2* a) {
    const float2 sum = a[1] + a[2], difference = 0.86602540378443865f * (a[1] - a[2]), rest = a[0] - 0.5f * sum;
    a[0] += sum;
    a[1] = minus_i(rest, difference);
    a[2] = plus_i(rest, difference);
  }
};
template <>
struct Dft<4> {
  static void run(thread float2* a) {
    const float2 b0 = a[0] + a[2], b1 = a[0] - a[2], b2 = a[1] + a[3], b3 = a[1] - a[3];
    a[0] = b0 + b2;
    a[1] = minus_i(b1, b3);
    a[2] = b0 - b2;
    a[3] = plus_i(b1, b3);
  }
};
template <>
struct Dft<5> {
  static void run(thread float2* a) {
    constexpr float c1 = 0.30901699437494742f, c2 = -0.80901699437494742f, s1 = 0.95105651629515357f,
                    s2 = 0.58778525229247313f;
    const float2 t1 = a[1] + a[4], t2 = a[2] + a[3], t3 = a[1] - a[4], t4 = a[2] - a[3];
    const float2 m1 = a[0] + c1 * t1 + c2 * t2, m2 = a[0] + c2 * t1 + c1 * t2, n1 = s1 * t3 + s2 * t4,
                 n2 = s2 * t3 - s1 * t4;
    a[0] += t1 + t2;
    a[1] = minus_i(m1, n1);
    a[2] = minus_i(m2, n2);
    a[3] = plus_i(m2, n2);
    a[4] = plus_i(m1, n1);
  }
};

// One stage: transforms of Span numbers become transforms of Radix * Span.
template <uint D, uint Radix, uint Span>
inline void fft_stage(device const float2* root, threadgroup const float2* from, threadgroup float2* to, uint lane) {
  constexpr uint kCount = D / 2 / Radix;
  for (uint i = lane; i < kCount; i += kLanes) {
    const uint k = i % Span;
    float2 a[Radix];
    a[0] = from[i];
#pragma unroll
    for (uint q = 1; q < Radix; ++q) {
      a[q] = from[i + q * kCount];
      if (Span > 1) a[q] = complex_product(a[q], root[q * k * (D / (Radix * Span))]);
    }
    Dft<Radix>::run(a);
    threadgroup float2* place = to + (i - k) * Radix + k;
#pragma unroll
    for (uint q = 0; q < Radix; ++q) place[q * Span] = a[q];
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The FFT of D / 2 numbers in x, with y to work in; true where the result is in y.
template <uint D>
inline bool fft(device const float2* root, threadgroup float2* x, threadgroup float2* y, uint lane) {
  if (D == 80) {
    fft_stage<80, 5, 1>(root, x, y, lane);
    fft_stage<80, 4, 5>(root, y, x, lane);
    fft_stage<80, 2, 20>(root, x, y, lane);
    return true;
  }
  fft_stage<D, 4, 1>(root, x, y, lane);
  fft_stage<D, 4, 4>(root, y, x, lane);
  if (D == 64) {
    fft_stage<64, 2, 16>(root, x, y, lane);
  } else if (D == 96) {
    fft_stage<96, 3, 16>(root, x, y, lane);
  } else {
    fft_stage<D, 4, 16>(root, x, y, lane);
    if (D == 256) {
      fft_stage<256, 2, 64>(root, y, x, lane);
      return false;
    }
  }
  return true;
}

// y = R x of one row, or R^-1 x. Of the threadgroup's threads those of the first SIMD-group, which overwrite x.
template <uint D>
inline void srft_row_of(device const float* table, threadgroup float2* x, threadgroup float2* y, bool inverse,
                        uint lane) {
  constexpr uint kHalf = D / 2;
  constexpr float kRoot2 = 1.41421356237309505f;
  device const float2* signs = (device const float2*)table;
  device const float2* root = (device const float2*)(table + D);
  if (inverse) {
    // Spectrum of the half-length row, conjugated, so that a forward FFT inverts it.
    for (uint k = lane; k <= kHalf / 2; k += kLanes) {
      if (k == 0) {
        x[0] = kRoot2 * float2(x[0].x + x[0].y, x[0].y - x[0].x);
        continue;
      }
      const float2 low = x[k], high = conjugate(x[kHalf - k]);
      const float2 a = low + high, twiddled = complex_product(low - high, conjugate(root[k]));
      x[kHalf - k] = minus_i(a, twiddled);
      x[k] = conjugate(plus_i(a, twiddled));
    }
  } else {
    for (uint n = lane; n < kHalf; n += kLanes) x[n] *= signs[n];
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float2* z = fft<D>(root, x, y, lane) ? y : x;
  if (inverse) {
    for (uint n = lane; n < kHalf; n += kLanes) y[n] = conjugate(z[n]) * signs[n];
  } else {
    for (uint k = lane; k <= kHalf / 2; k += kLanes) {
      if (k == 0) {
        y[0] = kRoot2 * float2(z[0].x + z[0].y, z[0].x - z[0].y);
        continue;
      }
      const float2 low = z[k], high = conjugate(z[kHalf - k]);
      const float2 a = low + high, twiddled = complex_product(low - high, root[k]);
      y[kHalf - k] = conjugate(plus_i(a, twiddled));
      y[k] = minus_i(a, twiddled);
    }
  }
}

// x and y [dim] of threadgroup memory. All threads; x is complete before the call, y is after it.
inline void srft_row(device const float* table, uint dim, threadgroup float4* x4, threadgroup float4* y4, bool inverse,
                     uint tid) {
  threadgroup float2* x = (threadgroup float2*)x4;
  threadgroup float2* y = (threadgroup float2*)y4;
  if (tid < kLanes) {
    if (dim == 128) srft_row_of<128>(table, x, y, inverse, tid);
    else if (dim == 64) srft_row_of<64>(table, x, y, inverse, tid);
    else if (dim == 256) srft_row_of<256>(table, x, y, inverse, tid);
    else if (dim == 80) srft_row_of<80>(table, x, y, inverse, tid);
    else srft_row_of<96>(table, x, y, inverse, tid);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_BUTTERFLY_H
