// Arithmetic functions. Floating-point ones compute in float, correctly to about an ulp, and round to the argument's
// type: an Apple GPU's fast variants err by more.
#pragma once

namespace emu {
namespace names {

#define EMU_FLOAT1(name, expression)                                              \
  template <class T>                                                              \
  inline T name(T a) {                                                            \
    static_assert(!is_same<T, double>::value, #name ": double does not exist");   \
    if constexpr (traits<T>::vector) {                                            \
      T r;                                                                        \
      for (int i = 0; i < traits<T>::n; ++i) r[i] = names::name(typename traits<T>::element(a[i])); \
      return r;                                                                   \
    } else {                                                                      \
      static_assert(is_same<T, float>::value || is_same<T, half>::value || is_same<T, bfloat>::value, \
                    #name ": expected float or half");                            \
      const float x = static_cast<float>(a);                                      \
      return static_cast<T>(expression);                                          \
    }                                                                             \
  }
EMU_FLOAT1(exp, __builtin_expf(x))
EMU_FLOAT1(exp2, __builtin_exp2f(x))
EMU_FLOAT1(exp10, __builtin_powf(10.0f, x))
EMU_FLOAT1(log, __builtin_logf(x))
EMU_FLOAT1(log2, __builtin_log2f(x))
EMU_FLOAT1(log10, __builtin_log10f(x))
EMU_FLOAT1(sqrt, __builtin_sqrtf(x))
EMU_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
EMU_FLOAT1(sin, __builtin_sinf(x))
EMU_FLOAT1(cos, __builtin_cosf(x))
EMU_FLOAT1(tan, __builtin_tanf(x))
EMU_FLOAT1(tanh, __builtin_tanhf(x))
EMU_FLOAT1(fabs, __builtin_fabsf(x))
EMU_FLOAT1(rint, __builtin_rintf(x))
EMU_FLOAT1(round, __builtin_roundf(x))
EMU_FLOAT1(floor, __builtin_floorf(x))
EMU_FLOAT1(ceil, __builtin_ceilf(x))
EMU_FLOAT1(trunc, __builtin_truncf(x))
EMU_FLOAT1(fract, (x - __builtin_floorf(x)))
EMU_FLOAT1(saturate, (x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x))
EMU_FLOAT1(sign, (x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f))
#undef EMU_FLOAT1

inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

#define EMU_INTEGER1(name, expression)                                                                    \
  template <class T>                                                                                      \
  inline T name(T a) {                                                                                    \
    if constexpr (traits<T>::vector) {                                                                    \
      T r;                                                                                                \
      for (int i = 0; i < traits<T>::n; ++i) r[i] = names::name(typename traits<T>::element(a[i]));       \
      return r;                                                                                           \
    } else {                                                                                              \
      const T x = a;                                                                                      \
      return static_cast<T>(expression);                                                                  \
    }                                                                                                     \
  }
EMU_INTEGER1(abs, (x < T(0) ? -x : x))
EMU_INTEGER1(popcount, __builtin_popcountll(static_cast<ulong>(x) & (~0ul >> (64 - 8 * sizeof(T)))))
EMU_INTEGER1(clz, (x == 0 ? int(8 * sizeof(T)) : __builtin_clzll(static_cast<ulong>(x) << (64 - 8 * sizeof(T)))))
EMU_INTEGER1(ctz, (x == 0 ? int(8 * sizeof(T)) : __builtin_ctzll(static_cast<ulong>(x))))
#undef EMU_INTEGER1

// Both operands of one type, or one of them a scalar of a vector's element type. Metal has no overload of mixed
// scalars either: its call is ambiguous.
#define EMU_PAIR(name, expression)                                                                        \
  template <class T>                                                                                      \
  inline T name(T a, T b) {                                                                               \
    if constexpr (traits<T>::vector) {                                                                    \
      T r;                                                                                                \
      for (int i = 0; i < traits<T>::n; ++i) {                                                            \
        typename traits<T>::element x = a[i], y = b[i];                                                   \
        r[i] = expression;                                                                                \
      }                                                                                                   \
      return r;                                                                                           \
    } else {                                                                                              \
      const T x = a, y = b;                                                                               \
      return expression;                                                                                  \
    }                                                                                                     \
  }                                                                                                       \
  template <class T, int N>                                                                               \
  inline vec<T, N> name(vec<T, N> a, T b) {                                                               \
    return names::name(a, make<vec<T, N>>(b));                                                            \
  }                                                                                                       \
  template <class T, int N>                                                                               \
  inline vec<T, N> name(T a, vec<T, N> b) {                                                               \
    return names::name(make<vec<T, N>>(a), b);                                                            \
  }
// A NaN yields the other operand.
EMU_PAIR(max, (x != x ? y : x < y ? y : x))
EMU_PAIR(min, (x != x ? y : y < x ? y : x))
EMU_PAIR(fmax, (x != x ? y : x < y ? y : x))
EMU_PAIR(fmin, (x != x ? y : y < x ? y : x))
EMU_PAIR(pow, static_cast<decltype(x + y)>(__builtin_powf(static_cast<float>(x), static_cast<float>(y))))
EMU_PAIR(fmod, static_cast<decltype(x + y)>(__builtin_fmodf(static_cast<float>(x), static_cast<float>(y))))
EMU_PAIR(copysign, static_cast<decltype(x + y)>(__builtin_copysignf(static_cast<float>(x), static_cast<float>(y))))
EMU_PAIR(step, (y < x ? 0 : 1))
#undef EMU_PAIR

template <class T>
inline T clamp(T a, T low, T high) {
  return names::min(names::max(a, low), high);
}
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> a, T low, T high) {
  return names::min(names::max(a, low), high);
}
template <class T>
inline T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T, int N>
inline vec<T, N> mix(vec<T, N> a, vec<T, N> b, T t) {
  return a + (b - a) * t;
}
template <class T>
inline T fma(T a, T b, T c) {
  if constexpr (traits<T>::vector) {
    T r;
    for (int i = 0; i < traits<T>::n; ++i) r[i] = names::fma(typename traits<T>::element(a[i]), typename traits<T>::element(b[i]), typename traits<T>::element(c[i]));
    return r;
  } else if constexpr (is_same<T, float>::value) {
    return __builtin_fmaf(a, b, c);
  } else {  // the product of two halves is exact in float; the sum rounds in double, then once
    return static_cast<T>(static_cast<float>(static_cast<double>(static_cast<float>(a)) * static_cast<float>(b) + static_cast<float>(c)));
  }
}
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline float powr(float x, float y) { return __builtin_powf(x, y); }
inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }
template <class T>
inline T length(vec<T, 2> a) {
  return names::sqrt(names::dot(a, a));
}
template <class T>
inline T length(vec<T, 3> a) {
  return names::sqrt(names::dot(a, a));
}
template <class T>
inline T length(vec<T, 4> a) {
  return names::sqrt(names::dot(a, a));
}

inline uint mulhi(uint a, uint b) { return static_cast<uint>((static_cast<ulong>(a) * b) >> 32); }
inline int mulhi(int a, int b) { return static_cast<int>((static_cast<long>(a) * b) >> 32); }
template <class T>
inline T rotate(T a, T by) {
  const int bits = 8 * sizeof(T), n = static_cast<int>(by) & (bits - 1);
  return n ? static_cast<T>((a << n) | (a >> (bits - n))) : a;
}
inline uint extract_bits(uint x, uint from, uint bits) { return bits == 0 ? 0 : (x >> from) & (~0u >> (32 - bits)); }
inline int extract_bits(int x, uint from, uint bits) {
  return bits == 0 ? 0 : static_cast<int>(static_cast<uint>(x) << (32 - bits - from)) >> (32 - bits);
}
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }

// 8-bit normalised values, lowest byte first.
inline float4 unpack_unorm4x8_to_float(uint v) {
  return float4{static_cast<float>(v & 255), static_cast<float>(v >> 8 & 255), static_cast<float>(v >> 16 & 255),
                static_cast<float>(v >> 24)} / 255.0f;
}

}  // namespace names
}  // namespace emu

namespace metal {
namespace fast {
using namespace emu::names;
}
namespace precise {
using namespace emu::names;
}
}  // namespace metal
