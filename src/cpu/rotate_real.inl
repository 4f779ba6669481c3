// The forward SRFT of d = 64, 128 or 256 channels for machines whose vectors of 16 lanes have two ports for all
// arithmetic, where the number of operations binds and not which they are: real sequences are halved until little is
// left, and nothing is split afterwards.
//
// Of N real numbers, s_n = x_n + x_(n+N/2) has the even frequencies, and d_n = x_n - x_(n+N/2) the odd ones:
//
//   X_(4k+1) = sum over n < N/4 of (d_n - i d_(n+N/4)) exp(-2 pi i n / N) exp(-2 pi i n k / (N/4))
//
// a complex transform of N/4, whose second half of k are the conjugates of the frequencies 4j + 3. Two such steps are
// one pass of radix 4 (fold), the first one beside the transposing of rows. Vector operations per 16 rows, all of them
// arithmetic:
//
//   d     first fold   odd branches by length (turns + transform)                    the rest   sum    rotate_srft.inl
//   64           96    16: 60 + 164, 8: 28 + 52                                            69    469    686
//   128         192    32: 124 + 420, 16: 60 + 164, 8: 28 + 52, 4: 12 + 16                 73   1141   1598
//   256         384    64: 252 + 1028, 32: 124 + 420, 16: 60 + 164, 8: 28 + 52            165   2677   3646
//
// On two ports 570 cycles at d = 128; without its fold, 475, it was sampled at 535.
// Outputs have the factor that inputs have: with scaled_signs twice, those of kv4/rotation.h.

namespace kv4::cpu::KV4_ISA {

constexpr bool has_real_transform(int d) { return d == 64 || d == 128 || d == 256; }

// -a - b in one operation
template <class Isa>
KV4_INLINE typename Isa::F negative_sum(typename Isa::F a, typename Isa::F b) {
  return Isa::fma(-a, Isa::set1(1), -b);
}

// The transform of R elements in natural order; with kConj the second half of the results are conjugates.
template <class Isa, int R, bool kConj>
KV4_INLINE void natural_butterfly(Complex<Isa> (&z)[R]) {
  using C = Complex<Isa>;
  // a - b and a + i b, or their conjugates
  const auto minus = [](const C& a, const C& b)
                         KV4_INLINE_LAMBDA { return C{a.re - b.re, kConj ? b.im - a.im : a.im - b.im}; };
  const auto plus_turned = [](const C& a, const C& b) KV4_INLINE_LAMBDA {
    return C{a.re - b.im, kConj ? negative_sum<Isa>(a.im, b.re) : a.im + b.re};
  };
  if constexpr (R == 2) {
    const C a = z[0], b = z[1];
    z[0] = a + b;
    z[1] = minus(a, b);
  } else if constexpr (R == 4) {
    const C a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = z[1] - z[3];
    z[0] = a + c;
    z[1] = minus_i(b, d);
    z[2] = minus(a, c);
    z[3] = plus_turned(b, d);
  } else {
    static_assert(R == 8);
    const auto r = Isa::set1(0.70710678118654752440f), s = Isa::set1(-0.70710678118654752440f);
    C even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
    natural_butterfly<Isa, 4, false>(even);
    natural_butterfly<Isa, 4, false>(odd);
    z[0] = even[0] + odd[0];
    z[4] = minus(even[0], odd[0]);
    z[2] = minus_i(even[2], odd[2]);
    z[6] = plus_turned(even[2], odd[2]);
    // odd[1] (1 - i) and odd[3] (-1 - i), the imaginary part of which is -q.im
    const C p = {odd[1].re + odd[1].im, odd[1].im - odd[1].re}, q = {odd[3].im - odd[3].re, odd[3].re + odd[3].im};
    z[1] = {Isa::fma(p.re, r, even[1].re), Isa::fma(p.im, r, even[1].im)};
    z[5] = {Isa::fma(p.re, s, even[1].re), kConj ? Isa::fma(p.im, r, -even[1].im) : Isa::fma(p.im, s, even[1].im)};
    z[3] = {Isa::fma(q.re, r, even[3].re), Isa::fma(q.im, s, even[3].im)};
    z[7] = {Isa::fma(q.re, s, even[3].re), kConj ? Isa::fma(q.im, s, -even[3].im) : Isa::fma(q.im, r, even[3].im)};
  }
}

// The odd branch of 2 L real vectors at d, which are scratch then: frequencies first, first + D / L, ... of x.
// circle: exp(-2 pi i n / D).
template <class Isa, int D, int L>
KV4_INLINE void odd_branch(float* d, const float* circle, float* x, int first) {
  using C = Complex<Isa>;
  const auto element = [&](int n, auto whole) KV4_INLINE_LAMBDA {
    const auto re = load_channel<Isa>(d, n), im = load_channel<Isa>(d, n + L);
    if constexpr (decltype(whole)::value)
      if (n == 0) return C{re, -im};
    const C w = broadcast_complex<Isa>(circle, n * (D / (4 * L)));
    return C{Isa::fma(re, w.re, im * w.im), Isa::fma(re, w.im, -(im * w.re))};
  };
  const auto put = [&](int k, const C& z) KV4_INLINE_LAMBDA {  // conjugated where k >= L / 2
    const int frequency = first + k * (D / L);
    store_complex<Isa>(x, k >= L / 2 ? D - frequency : frequency, z);
  };
  if constexpr (L == 1) {
    store_complex<Isa>(x, first, element(0, std::true_type()));
  } else if constexpr (L <= 8) {
    C z[L];
    KV4_UNROLL
    for (int n = 0; n < L; ++n) z[n] = element(n, std::true_type());
    natural_butterfly<Isa, L, true>(z);
    KV4_UNROLL
    for (int k = 0; k < L; ++k) put(k, z[k]);
  } else {
    constexpr int kOuter = L == 64 ? 8 : 4, kInner = L / kOuter;
    // In place: element n at d[n] and d[n + L].
    const auto outer = [&](int m, auto whole) KV4_INLINE_LAMBDA {
      C z[kOuter];
      KV4_UNROLL
      for (int q = 0; q < kOuter; ++q) z[q] = element(m + kInner * q, whole);
      natural_butterfly<Isa, kOuter, false>(z);
      KV4_UNROLL
      for (int q = 0; q < kOuter; ++q) {
        if (q > 0 && !decltype(whole)::value) z[q] = times(z[q], broadcast_complex<Isa>(circle, m * q * (D / L)));
        store_channel<Isa>(d, m + kInner * q, z[q].re);
        store_channel<Isa>(d, m + kInner * q + L, z[q].im);
      }
    };
    outer(0, std::true_type());
    for (int m = 1; m < kInner; ++m) outer(m, std::false_type());
    for (int q = 0; q < kOuter; ++q) {
      C z[kInner];
      KV4_UNROLL
      for (int m = 0; m < kInner; ++m) {
        const int n = m + kInner * q;
        z[m] = {load_channel<Isa>(d, n), load_channel<Isa>(d, n + L)};
      }
      natural_butterfly<Isa, kInner, true>(z);
      KV4_UNROLL
      for (int m = 0; m < kInner; ++m) put(q + kOuter * m, z[m]);
    }
  }
}

// Sums and differences of N real vectors at x, two steps at once: N / 4 sums, the N / 4 differences of the sums and N /
// 2 differences follow one another at `to`. Vectors n = begin ... end - 1 of each quarter.
template <class Isa>
KV4_INLINE void fold(const float* x, int quarter, int begin, int end, float* to) {
  for (int n = begin; n < end; ++n) {
    const auto a = load_channel<Isa>(x, n), b = load_channel<Isa>(x, n + quarter),
               c = load_channel<Isa>(x, n + 2 * quarter), e = load_channel<Isa>(x, n + 3 * quarter);
    const auto even = a + c, odd = b + e;
    store_channel<Isa>(to, n, even + odd);
    store_channel<Isa>(to, n + quarter, even - odd);
    store_channel<Isa>(to, n + 2 * quarter, a - c);
    store_channel<Isa>(to, n + 3 * quarter, b - e);
  }
}

// The frequencies of x that are multiples of D / N, of N folded vectors; those behind them are scratch.
template <class Isa, int D, int N>
KV4_INLINE void folded_transform(float* folded, const float* circle, float* x) {
  constexpr int kQuarter = N / 4;
  const auto root = Isa::set1(0.70710678118654752440f);
  const auto at = [&](int n) KV4_INLINE_LAMBDA { return folded + static_cast<std::ptrdiff_t>(n) * Isa::kLanes; };
  odd_branch<Isa, D, kQuarter>(at(2 * kQuarter), circle, x, D / N);
  const auto a = load_channel<Isa>(folded, 0), b = load_channel<Isa>(folded, 1);
  if constexpr (kQuarter == 1) {
    store_complex<Isa>(x, 0, {a * root, b * root});
    return;
  } else {
    odd_branch<Isa, D, kQuarter / 2>(at(kQuarter), circle, x, 2 * D / N);
    if constexpr (kQuarter == 2) {
      store_complex<Isa>(x, 0, {(a + b) * root, (a - b) * root});
    } else {
      fold<Isa>(folded, kQuarter / 4, 0, kQuarter / 4, at(N));
      folded_transform<Isa, D, kQuarter>(at(N), circle, x);
    }
  }
}

// work: [2 D] vectors whose first D are the fold of the input; results go to x.
template <class Isa, int D>
void real_transform(const Rotation& r, float* work, float* x) {
  folded_transform<Isa, D, D>(work, r.fft().circle.data(), x);
}
template <class Isa>
void real_transform(const Rotation& r, float* work, float* x) {
  switch (r.dim()) {
    case 64: return real_transform<Isa, 64>(r, work, x);
    case 128: return real_transform<Isa, 128>(r, work, x);
    default: return real_transform<Isa, 256>(r, work, x);
  }
}

}  // namespace kv4::cpu::KV4_ISA
