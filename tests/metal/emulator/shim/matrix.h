// floatCxR: C columns of R floats, as Metal stores them.
#pragma once

namespace metal {
template <class T, int C, int R>
struct matrix {
  vec<T, R> columns[C];
  matrix() {}
  explicit matrix(T diagonal) {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) columns[c][r] = c == r ? diagonal : T(0);
  }
  template <class... V, class = typename emu::enable<sizeof...(V) == C && C != 1>::type>
  matrix(V... column) : columns{column...} {}
  vec<T, R>& operator[](int c) { return columns[c]; }
  const vec<T, R>& operator[](int c) const { return columns[c]; }
};
template <class T, int C, int R>
inline vec<T, R> operator*(const matrix<T, C, R>& m, vec<T, C> v) {
  vec<T, R> r = m.columns[0] * v[0];
  for (int c = 1; c < C; ++c) r = r + m.columns[c] * v[c];
  return r;
}
template <class T, int C, int R>
inline vec<T, C> operator*(vec<T, R> v, const matrix<T, C, R>& m) {
  vec<T, C> r;
  for (int c = 0; c < C; ++c) r[c] = emu::names::dot(v, m.columns[c]);
  return r;
}
template <class T, int K, int R, int C>
inline matrix<T, C, R> operator*(const matrix<T, K, R>& a, const matrix<T, C, K>& b) {
  matrix<T, C, R> r;
  for (int c = 0; c < C; ++c) r.columns[c] = a * b.columns[c];
  return r;
}
template <class T, int C, int R>
inline matrix<T, R, C> transpose(const matrix<T, C, R>& m) {
  matrix<T, R, C> t;
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) t.columns[r][c] = m.columns[c][r];
  return t;
}
}  // namespace metal
typedef metal::matrix<float, 2, 2> float2x2;
typedef metal::matrix<float, 3, 3> float3x3;
typedef metal::matrix<float, 4, 4> float4x4;
typedef metal::matrix<float, 2, 4> float2x4;
typedef metal::matrix<float, 4, 2> float4x2;
typedef metal::matrix<half, 2, 2> half2x2;
typedef metal::matrix<half, 4, 4> half4x4;
typedef metal::matrix<half, 2, 4> half2x4;
