// Rotations of kLanes rows at once, one row per lane: x is [d][kLanes], so that each channel is one
// vector and no kernel needs a horizontal operation or a shuffle.
//
// Vector operations per kLanes rows:
//   srft         rotate_srft.inl
//   srht         d log2(2^k) adds, d mul, d m fma for an odd part m; radix-8 passes: one load and one
//                store per 3 adds of a channel, additions bound it where two run per cycle
//   householder  2 d fma, 2 d broadcasts, d loads, d stores per reflector: the update by one
//                reflector and the product with the next are one pass; loads bound it (3 per 2 fma)
//   dense        d^2 fma, d^2 broadcasts, d^2 / 8 loads: fma and loads alike
#include "cpu/rotate.h"

namespace kv4::cpu::KV4_ISA {

template <class F>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
// The element type of Isa::F: float, or double for the scalar instantiation.
template <class Isa>
using Real = typename RealOf<typename Isa::F>::type;

// The tables of a rotation in the precision of a kernel.
template <class R>
struct Tables;
template <>
struct Tables<float> {
  const float *scaled_signs, *twiddle, *split, *root, *odd_dft, *reflectors;
  explicit Tables(const Rotation& r)
      : scaled_signs(r.scaled_signs().data()), twiddle(r.fft().twiddle.data()), split(r.fft().split.data()),
        root(r.fft().root.data()), odd_dft(r.odd_dft().data()), reflectors(r.reflector_vectors().data()) {}
};
template <>
struct Tables<double> {
  const double *scaled_signs, *twiddle, *split, *root, *odd_dft, *reflectors;
  explicit Tables(const Rotation& r)
      : scaled_signs(r.scaled_signs_f64().data()), twiddle(r.fft().twiddle_f64.data()), split(r.fft().split_f64.data()),
        root(r.fft().root_f64.data()), odd_dft(r.odd_dft_f64().data()), reflectors(r.reflector_vectors_f64().data()) {}
};

// Vector c of x.
template <class Isa>
KV4_INLINE typename Isa::F load_channel(const Real<Isa>* x, int c) {
  return Isa::load(x + static_cast<std::ptrdiff_t>(c) * Isa::kLanes);
}
template <class Isa>
KV4_INLINE void store_channel(Real<Isa>* x, int c, typename Isa::F v) {
  Isa::store(x + static_cast<std::ptrdiff_t>(c) * Isa::kLanes, v);
}

}  // namespace kv4::cpu::KV4_ISA

#include "cpu/rotate_srft.inl"
#include "cpu/rotate_real.inl"

namespace kv4::cpu::KV4_ISA {

// One pass of the Walsh-Hadamard transform: radix R over legs `stride` vectors apart. kSignIn and
// kSignOut: the signs and the scale before or after it.
template <class Isa, int R, bool kSignIn, bool kSignOut>
KV4_INLINE void hadamard_pass(Real<Isa>* x, const Real<Isa>* scaled_signs, int stride, int d) {
  for (int block = 0; block < d; block += R * stride)
    for (int i = block; i < block + stride; ++i) {
      typename Isa::F v[R];
      KV4_UNROLL
      for (int q = 0; q < R; ++q) {
        v[q] = load_channel<Isa>(x, i + q * stride);
        if constexpr (kSignIn) v[q] = v[q] * Isa::set1(scaled_signs[i + q * stride]);
      }
      KV4_UNROLL
      for (int half = 1; half < R; half *= 2) KV4_UNROLL
      for (int q = 0; q < R; ++q)
        if ((q & half) == 0) {
          const auto a = v[q], b = v[q + half];
          v[q] = a + b;
          v[q + half] = a - b;
        }
      KV4_UNROLL
      for (int q = 0; q < R; ++q) {
        if constexpr (kSignOut) v[q] = v[q] * Isa::set1(scaled_signs[i + q * stride]);
        store_channel<Isa>(x, i + q * stride, v[q]);
      }
    }
}

template <class Isa, bool kSignIn, bool kSignOut>
KV4_INLINE void hadamard_pass(int radix, Real<Isa>* x, const Real<Isa>* scaled_signs, int stride, int d) {
  switch (radix) {
    case 2: return hadamard_pass<Isa, 2, kSignIn, kSignOut>(x, scaled_signs, stride, d);
    case 4: return hadamard_pass<Isa, 4, kSignIn, kSignOut>(x, scaled_signs, stride, d);
    default: return hadamard_pass<Isa, 8, kSignIn, kSignOut>(x, scaled_signs, stride, d);
  }
}

// H_order over blocks of m = d / order channels, with the signs before (forward) or after it.
template <class Isa>
void hadamard(const Rotation& r, bool forward, Real<Isa>* x) {
  const Real<Isa>* signs = Tables<Real<Isa>>(r).scaled_signs;
  const int d = r.dim();
  int rest = std::countr_zero(static_cast<unsigned>(r.hadamard_order())), stride = d;
  for (bool first = true; rest > 0; first = false) {
    const int bits = rest == 4 ? 2 : rest < 3 ? rest : 3;
    rest -= bits;
    stride >>= bits;
    if (forward && first) hadamard_pass<Isa, true, false>(1 << bits, x, signs, stride, d);
    else if (!forward && rest == 0) hadamard_pass<Isa, false, true>(1 << bits, x, signs, stride, d);
    else hadamard_pass<Isa, false, false>(1 << bits, x, signs, stride, d);
  }
}

// Rows [row, row + T) of y = A x, A[i][c] at a[i * row_stride + c * column_stride].
template <class Isa, int T>
KV4_INLINE void matrix_tile(const Real<Isa>* a, std::ptrdiff_t row_stride, std::ptrdiff_t column_stride, int d,
                            const Real<Isa>* x, Real<Isa>* y, int row) {
  typename Isa::F sum[T];
  KV4_UNROLL
  for (int i = 0; i < T; ++i) sum[i] = Isa::set1(0);
  a += row * row_stride;
  for (int c = 0; c < d; ++c) {
    const auto v = load_channel<Isa>(x, c);
    KV4_UNROLL
    for (int i = 0; i < T; ++i) sum[i] = Isa::fma(v, Isa::set1(a[i * row_stride + c * column_stride]), sum[i]);
  }
  KV4_UNROLL
  for (int i = 0; i < T; ++i) store_channel<Isa>(y, row + i, sum[i]);
}

// x = A x, A [d][d]; y [d] vectors of scratch.
template <class Isa>
void multiply(const Real<Isa>* a, std::ptrdiff_t row_stride, std::ptrdiff_t column_stride, int d, Real<Isa>* x,
              Real<Isa>* y) {
  int row = 0;
  for (; row + 8 <= d; row += 8) matrix_tile<Isa, 8>(a, row_stride, column_stride, d, x, y, row);
  for (; row < d; ++row) matrix_tile<Isa, 1>(a, row_stride, column_stride, d, x, y, row);
  std::memcpy(x, y, sizeof(Real<Isa>) * Isa::kLanes * static_cast<std::size_t>(d));
}

template <class Isa>
void srht(const Rotation& r, bool forward, Real<Isa>* x, Real<Isa>* work) {
  const int m = r.dim() / r.hadamard_order();
  if (forward) hadamard<Isa>(r, true, x);
  if (m > 1) {
    const Real<Isa>* f = Tables<Real<Isa>>(r).odd_dft;
    for (int block = 0; block < r.dim(); block += m)
      multiply<Isa>(f, forward ? m : 1, forward ? 1 : m, m, x + static_cast<std::ptrdiff_t>(block) * Isa::kLanes, work);
  }
  if (!forward) hadamard<Isa>(r, false, x);
}

template <class Isa>
void householder(const Rotation& r, bool forward, Real<Isa>* x) {
  const int d = r.dim(), count = r.reflectors();
  const Real<Isa>* u = Tables<Real<Isa>>(r).reflectors + (forward ? 0 : static_cast<std::ptrdiff_t>(count - 1) * d);
  const std::ptrdiff_t step = forward ? d : -d;
  // Two sums hide half of the fma latency; the pass is bound by its loads.
  auto s0 = Isa::set1(0), s1 = Isa::set1(0);
  for (int c = 0; c < d; c += 2) {
    s0 = Isa::fma(load_channel<Isa>(x, c), Isa::set1(u[c]), s0);
    s1 = Isa::fma(load_channel<Isa>(x, c + 1), Isa::set1(u[c + 1]), s1);
  }
  for (int i = 0; i + 1 < count; ++i, u += step) {
    const Real<Isa>* next = u + step;
    const auto s = -((s0 + s1) + (s0 + s1));
    s0 = s1 = Isa::set1(0);
    for (int c = 0; c < d; c += 2) {
      const auto a = Isa::fma(s, Isa::set1(u[c]), load_channel<Isa>(x, c));
      const auto b = Isa::fma(s, Isa::set1(u[c + 1]), load_channel<Isa>(x, c + 1));
      store_channel<Isa>(x, c, a);
      store_channel<Isa>(x, c + 1, b);
      s0 = Isa::fma(a, Isa::set1(next[c]), s0);
      s1 = Isa::fma(b, Isa::set1(next[c + 1]), s1);
    }
  }
  const auto s = -((s0 + s1) + (s0 + s1));
  for (int c = 0; c < d; ++c) store_channel<Isa>(x, c, Isa::fma(s, Isa::set1(u[c]), load_channel<Isa>(x, c)));
}

template <class Isa>
void dense(const Rotation& r, Map map, Real<Isa>* x, Real<Isa>* work) {
  const int d = r.dim();
  if constexpr (sizeof(Real<Isa>) == sizeof(float)) {
    const float* a = (map == Map::forward ? r.matrix() : map == Map::dual ? r.inverse_transpose() : r.inverse()).data();
    multiply<Isa>(a, d, 1, d, x, work);
  } else {
    const double* a = (map == Map::forward ? r.dense_f64() : r.dense_inverse_f64()).data();
    multiply<Isa>(a, map == Map::dual ? 1 : d, map == Map::dual ? d : 1, d, x, work);
  }
}

// Numbers of scratch for rotate_lanes.
template <class I = Isa>
constexpr std::size_t rotate_lanes_scratch(int d) {
  return 2 * static_cast<std::size_t>(d) * I::kLanes;
}

// x [d][kLanes], one row per lane, 64-byte aligned, in place; scratch [rotate_lanes_scratch(d)],
// 64-byte aligned, apart from x.
template <class Isa>
void rotate_lanes(const Rotation& r, Map map, Real<Isa>* x, Real<Isa>* scratch) {
  const bool forward = map != Map::inverse;  // orthonormal: the dual map is R itself
  switch (r.kind()) {
    case RotationKind::identity: break;
    case RotationKind::srft: forward ? srft_forward<Isa>(r, x, scratch) : srft_inverse<Isa>(r, x, scratch); break;
    case RotationKind::srht: srht<Isa>(r, forward, x, scratch); break;
    case RotationKind::householder: householder<Isa>(r, forward, x); break;
    case RotationKind::dense: dense<Isa>(r, map, x, scratch); break;
  }
}

}  // namespace kv4::cpu::KV4_ISA
