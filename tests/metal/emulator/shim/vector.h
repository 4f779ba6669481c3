// Functions of scalars and vectors that are no arithmetic: selection, comparison, reduction over components.
#pragma once

namespace emu {
namespace names {

// a where c is false, b where it is true.
template <class T>
inline typename enable<!traits<T>::vector, T>::type select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, bools<N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r[i] = c.lane[i] ? b[i] : a[i];
  return r;
}
template <class T, class C, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  return names::select(a, b, bools<N>(c));
}

inline bool any(bool v) { return v; }
inline bool all(bool v) { return v; }
template <int N>
inline bool any(bools<N> v) {
  bool r = false;
  for (int i = 0; i < N; ++i) r = r || v.lane[i];
  return r;
}
template <int N>
inline bool all(bools<N> v) {
  bool r = true;
  for (int i = 0; i < N; ++i) r = r && v.lane[i];
  return r;
}
template <class T, int N>
inline bool any(vec<T, N> v) {
  return names::any(bools<N>(v));
}
template <class T, int N>
inline bool all(vec<T, N> v) {
  return names::all(bools<N>(v));
}

template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum = sum + a[i] * b[i];
  return sum;
}

}  // namespace names
}  // namespace emu
