// Scalars, vectors, packed vectors; conversions between them.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double v) { return static_cast<half>(v); }
constexpr half operator""h(unsigned long long v) { return static_cast<half>(v); }
constexpr bfloat operator""bf(long double v) { return static_cast<bfloat>(static_cast<float>(v)); }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define FLT_MAX 3.402823466e38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-7f
#define MAXFLOAT FLT_MAX
#define HALF_MAX static_cast<half>(65504.0f)
#define HALF_MIN static_cast<half>(6.103515625e-05f)
#define HALF_EPSILON static_cast<half>(0.0009765625f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}

namespace emu {

using metal::vec;

// bool2..4: clang's own vectors of bool are bits, Metal's are bytes. Comparisons of vectors give integers of the
// operands' size here and bool vectors there; they convert.
template <int N>
struct bools {
  bool lane[N];
  bools() {}
  bools(bool all) {
    for (int i = 0; i < N; ++i) lane[i] = all;
  }
  template <class T>
  bools(vec<T, N> v) {
    for (int i = 0; i < N; ++i) lane[i] = v[i] != 0;
  }
  bool& operator[](int i) { return lane[i]; }
  bool operator[](int i) const { return lane[i]; }
  bools operator!() const {
    bools r;
    for (int i = 0; i < N; ++i) r.lane[i] = !lane[i];
    return r;
  }
  friend bools operator&&(bools a, bools b) {
    for (int i = 0; i < N; ++i) a.lane[i] = a.lane[i] && b.lane[i];
    return a;
  }
  friend bools operator||(bools a, bools b) {
    for (int i = 0; i < N; ++i) a.lane[i] = a.lane[i] || b.lane[i];
    return a;
  }
  friend bools operator&(bools a, bools b) { return a && b; }
  friend bools operator|(bools a, bools b) { return a || b; }
};

// Number of components and their type; a scalar has 1.
template <class X>
struct traits {
  static constexpr int n = 1;
  static constexpr bool vector = false;
  typedef X element;
};
template <class E, int N>
struct traits<E __attribute__((ext_vector_type(N)))> {
  static constexpr int n = N;
  static constexpr bool vector = true;
  typedef E element;
};
template <int N>
struct traits<bools<N>> {
  static constexpr int n = N;
  static constexpr bool vector = true;
  typedef bool element;
};

template <class A, class B>
struct is_same {
  static constexpr bool value = false;
};
template <class A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <bool B, class T = void>
struct enable {};
template <class T>
struct enable<true, T> {
  typedef T type;
};

template <class V, class A>
inline void put(V& to, int& at, A from) {
  typedef typename traits<V>::element E;
  if constexpr (traits<A>::vector) {
    for (int i = 0; i < traits<A>::n; ++i) to[at++] = static_cast<E>(from[i]);
  } else {
    to[at++] = static_cast<E>(from);
  }
}

// The constructor T(a, b, ...): one scalar fills every component, one vector of as many components is converted,
// several parts follow one another. The translator writes it for every functional cast to a vector type or to a
// template's type parameter.
template <class T, class... A>
inline constexpr T make(A... a) {
  constexpr int given = (0 + ... + traits<A>::n);
  if constexpr (!traits<T>::vector) {
    static_assert(sizeof...(A) <= 1, "constructor of a scalar: expected one value");
    return T(a...);
  } else if constexpr (sizeof...(A) == 0) {
    return T{};
  } else {
    T r{};
    if constexpr (sizeof...(A) == 1 && given == 1) {
      typedef typename traits<T>::element E;
      const E all[] = {static_cast<E>(a)...};
      for (int i = 0; i < traits<T>::n; ++i) r[i] = all[0];
    } else {
      static_assert(given == traits<T>::n, "vector constructor: wrong number of components");
      int at = 0;
      (put(r, at, a), ...);
    }
    return r;
  }
}

}  // namespace emu

#define EMU_VECTORS(t) typedef metal::vec<t, 2> t##2; typedef metal::vec<t, 3> t##3; typedef metal::vec<t, 4> t##4;
EMU_VECTORS(float)
EMU_VECTORS(half)
EMU_VECTORS(bfloat)
EMU_VECTORS(int)
EMU_VECTORS(uint)
EMU_VECTORS(short)
EMU_VECTORS(ushort)
EMU_VECTORS(char)
EMU_VECTORS(uchar)
#undef EMU_VECTORS
// No vector of more than 16 bytes: the checker does not see loads of 32 at once.
typedef metal::vec<long, 2> long2;
typedef metal::vec<ulong, 2> ulong2;
typedef emu::bools<2> bool2;
typedef emu::bools<3> bool3;
typedef emu::bools<4> bool4;

// packed_T2 and packed_T4 lie at any multiple of the element. packed_T3 is three elements, which no clang vector is.
template <class T>
struct emu_packed3 {
  T x, y, z;
  emu_packed3() {}
  emu_packed3(metal::vec<T, 3> v) : x(v.x), y(v.y), z(v.z) {}
  emu_packed3(T a, T b, T c) : x(a), y(b), z(c) {}
  operator metal::vec<T, 3>() const { return metal::vec<T, 3>{x, y, z}; }
  T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
};
#define EMU_PACKED(t)                                                                       \
  typedef t packed_##t##2 __attribute__((ext_vector_type(2), aligned(__alignof__(t))));     \
  typedef t packed_##t##4 __attribute__((ext_vector_type(4), aligned(__alignof__(t))));
#ifdef EMU_STATIC  // members cannot be called in other address spaces; sizes do not matter to this pass
#define EMU_PACKED3(t) typedef t packed_##t##3 __attribute__((ext_vector_type(3)));
#else
#define EMU_PACKED3(t) typedef emu_packed3<t> packed_##t##3;
#endif
#define EMU_PACKED_ALL(t) EMU_PACKED(t) EMU_PACKED3(t)
EMU_PACKED_ALL(float)
EMU_PACKED_ALL(half)
EMU_PACKED_ALL(int)
EMU_PACKED_ALL(uint)
EMU_PACKED_ALL(short)
EMU_PACKED_ALL(ushort)
EMU_PACKED_ALL(char)
EMU_PACKED_ALL(uchar)
#undef EMU_PACKED_ALL
#undef EMU_PACKED3
#undef EMU_PACKED

namespace metal {
template <class T, class U>
inline T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: the sizes differ");
  T t;
  __builtin_memcpy(&t, &u, sizeof t);
  return t;
}
template <class A, class B>
struct is_same : emu::is_same<A, B> {};
template <class A, class B>
constexpr bool is_same_v = emu::is_same<A, B>::value;
template <bool B, class T = void>
struct enable_if : emu::enable<B, T> {};
template <bool B, class T = void>
using enable_if_t = typename emu::enable<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float max() { return FLT_MAX; }
  static constexpr float lowest() { return -FLT_MAX; }
  static constexpr float infinity() { return INFINITY; }
};
template <>
struct numeric_limits<half> {
  static constexpr half max() { return HALF_MAX; }
  static constexpr half lowest() { return -HALF_MAX; }
};
}  // namespace metal
