// SRFT kernel: real FFT of d = 2h channels as a complex FFT of length h (even channels real, odd
// channels imaginary) and a split, all on vectors of kLanes rows: element n is the pair of vectors
// x[2n], x[2n+1], so every permutation is an address and nothing is ever transposed.
//
// Passes over the data, each reading and writing d vectors once:
//   first   radix 2, 3, 4, 5 or 8 (a 2 and a 4 together): permutes by the plan's source[], applies
//           the signs with the transform's whole scale (sealing folds both into lambda), needs no twiddles
//   middle  radix 2, 3, 4, 5 with twiddles; k = 0 apart, without
//   last    radix 4 joined with the real split where the plan ends in 4: butterflies k and h/4 - k
//           hold both elements of four split pairs, and share their twiddles
//           (exp(-2 pi i q (h/4 - k) / h) = (-i)^q conj(exp(-2 pi i q k / h)), the (-i)^q being free)
//   primes  from 7 on: a direct transform, its cosine and sine halves shared by outputs q and r - q
//
// Vector operations of the forward transform per kLanes rows (negations folded into fma left out):
//   d     passes              add   mul + fma   loads   stores   broadcasts
//   64    8, 4+split          460       226      128      128        123
//   96    4, 3, 4+split       668       514      288      288        223
//   128   4, 4, 4+split      1020       578      384      384        257
//   256   8, 4, 4+split      2364      1282      768      768        537
// Where adders stand beside the multipliers (Zen: two of each) additions bound it, 510 cycles at d = 128;
// where two ports do all arithmetic (AVX-512 on Intel), their sum, 799 cycles. Loads and stores, at two and
// one per cycle, stay below both. Radix-4 butterflies of 24 fma in place of 12 fma and 16 additions would
// help only the second kind. The inverse has two passes more: its split and its scale stand alone.

namespace kv4::cpu::KV4_ISA {

template <class Isa>
struct Complex {
  typename Isa::F re, im;
};

template <class Isa>
KV4_INLINE Complex<Isa> operator+(const Complex<Isa>& a, const Complex<Isa>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class Isa>
KV4_INLINE Complex<Isa> operator-(const Complex<Isa>& a, const Complex<Isa>& b) {
  return {a.re - b.re, a.im - b.im};
}
// a - i b and a + i b
template <class Isa>
KV4_INLINE Complex<Isa> minus_i(const Complex<Isa>& a, const Complex<Isa>& b) {
  return {a.re + b.im, a.im - b.re};
}
template <class Isa>
KV4_INLINE Complex<Isa> plus_i(const Complex<Isa>& a, const Complex<Isa>& b) {
  return {a.re - b.im, a.im + b.re};
}
// a * w and a * conj(w)
template <class Isa>
KV4_INLINE Complex<Isa> times(const Complex<Isa>& a, const Complex<Isa>& w) {
  return {Isa::fma(a.re, w.re, -(a.im * w.im)), Isa::fma(a.re, w.im, a.im * w.re)};
}
template <class Isa>
KV4_INLINE Complex<Isa> times_conj(const Complex<Isa>& a, const Complex<Isa>& w) {
  return {Isa::fma(a.re, w.re, a.im * w.im), Isa::fma(a.im, w.re, -(a.re * w.im))};
}

template <class Isa>
KV4_INLINE Complex<Isa> load_complex(const Real<Isa>* slots, int n) {
  return {Isa::load(slots + static_cast<std::ptrdiff_t>(2 * n) * Isa::kLanes),
          Isa::load(slots + static_cast<std::ptrdiff_t>(2 * n + 1) * Isa::kLanes)};
}
template <class Isa>
KV4_INLINE void store_complex(Real<Isa>* slots, int n, const Complex<Isa>& z) {
  Isa::store(slots + static_cast<std::ptrdiff_t>(2 * n) * Isa::kLanes, z.re);
  Isa::store(slots + static_cast<std::ptrdiff_t>(2 * n + 1) * Isa::kLanes, z.im);
}
// Entry n of a table of (re, im) pairs.
template <class Isa>
KV4_INLINE Complex<Isa> broadcast_complex(const Real<Isa>* table, int n) {
  return {Isa::set1(table[2 * n]), Isa::set1(table[2 * n + 1])};
}

// The transform of R elements, in place; legs and results in slot order (radix 8: two stages).
template <class Isa, int R>
KV4_INLINE void butterfly(Complex<Isa>* z) {
  using C = Complex<Isa>;
  if constexpr (R == 1) {
    // Only permuted: a prime stage follows.
  } else if constexpr (R == 2) {
    const C a = z[0];
    z[0] = a + z[1];
    z[1] = a - z[1];
  } else if constexpr (R == 3) {
    constexpr double kSin = 0.86602540378443864676;  // sin(2 pi / 3)
    const auto s = Isa::set1(kSin), half = Isa::set1(-0.5);
    const C t = z[1] + z[2], d = z[1] - z[2];
    const C m = {Isa::fma(t.re, half, z[0].re), Isa::fma(t.im, half, z[0].im)};
    z[0] = z[0] + t;
    z[1] = {Isa::fma(d.im, s, m.re), Isa::fma(d.re, -s, m.im)};
    z[2] = {Isa::fma(d.im, -s, m.re), Isa::fma(d.re, s, m.im)};
  } else if constexpr (R == 4) {
    const C a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = z[1] - z[3];
    z[0] = a + c;
    z[1] = minus_i(b, d);
    z[2] = a - c;
    z[3] = plus_i(b, d);
  } else if constexpr (R == 5) {
    // cos and sin of 2 pi / 5 and 4 pi / 5
    const auto c1 = Isa::set1(0.30901699437494742410), c2 = Isa::set1(-0.80901699437494742410);
    const auto s1 = Isa::set1(0.95105651629515357212), s2 = Isa::set1(0.58778525229247312917);
    const C t1 = z[1] + z[4], t2 = z[2] + z[3], d1 = z[1] - z[4], d2 = z[2] - z[3];
    const C a1 = {Isa::fma(t2.re, c2, Isa::fma(t1.re, c1, z[0].re)), Isa::fma(t2.im, c2, Isa::fma(t1.im, c1, z[0].im))};
    const C a2 = {Isa::fma(t2.re, c1, Isa::fma(t1.re, c2, z[0].re)), Isa::fma(t2.im, c1, Isa::fma(t1.im, c2, z[0].im))};
    const C b1 = {Isa::fma(d2.re, s2, d1.re * s1), Isa::fma(d2.im, s2, d1.im * s1)};
    const C b2 = {Isa::fma(d2.re, -s1, d1.re * s2), Isa::fma(d2.im, -s1, d1.im * s2)};
    z[0] = z[0] + (t1 + t2);
    z[1] = minus_i(a1, b1);
    z[2] = minus_i(a2, b2);
    z[3] = plus_i(a2, b2);
    z[4] = plus_i(a1, b1);
  } else {
    static_assert(R == 8);
    const auto r = Isa::set1(0.70710678118654752440);
    C even[4], odd[4];
    KV4_UNROLL
    for (int q = 0; q < 4; ++q) {
      even[q] = z[2 * q] + z[2 * q + 1];
      odd[q] = z[2 * q] - z[2 * q + 1];
    }
    odd[1] = {(odd[1].re + odd[1].im) * r, (odd[1].im - odd[1].re) * r};   // times (1 - i) / sqrt2
    odd[2] = {odd[2].im, -odd[2].re};                                      // times -i
    odd[3] = {(odd[3].im - odd[3].re) * r, (odd[3].re + odd[3].im) * -r};  // times (-1 - i) / sqrt2
    butterfly<Isa, 4>(even);
    butterfly<Isa, 4>(odd);
    KV4_UNROLL
    for (int q = 0; q < 4; ++q) {
      z[2 * q] = even[q];
      z[2 * q + 1] = odd[q];
    }
  }
}

// First pass of the forward transform: x [d] -> slots, with signs and scale unless x carries them already.
template <class Isa, int R, bool kScaled>
KV4_INLINE void first_pass(const Real<Isa>* x, const Real<Isa>* scaled_signs, const std::uint16_t* source,
                           Real<Isa>* slots, int h) {
  for (int base = 0; base < h; base += R) {
    Complex<Isa> z[R];
    KV4_UNROLL
    for (int leg = 0; leg < R; ++leg) {
      // Leg `leg` of the block is element source[base] + digit * h/R; in a radix 8 of (2, 4) the
      // slower digit is the 4's.
      const int digit = R == 8 ? leg / 2 + leg % 2 * 4 : leg;
      const int n = source[base] + digit * (h / R);
      z[leg] = load_complex<Isa>(x, n);
      if constexpr (!kScaled) {
        const Complex<Isa> sign = broadcast_complex<Isa>(scaled_signs, n);
        z[leg] = {z[leg].re * sign.re, z[leg].im * sign.im};
      }
    }
    butterfly<Isa, R>(z);
    KV4_UNROLL
    for (int leg = 0; leg < R; ++leg) store_complex<Isa>(slots, base + leg, z[leg]);
  }
}

// One stage of `span`, in place; twiddle: its table, (R-1) entries per k.
template <class Isa, int R>
KV4_INLINE void middle_pass(Real<Isa>* slots, const Real<Isa>* twiddle, int span, int h) {
  for (int base = 0; base < h; base += R * span) {
    Complex<Isa> z[R];
    KV4_UNROLL
    for (int q = 0; q < R; ++q) z[q] = load_complex<Isa>(slots, base + q * span);
    butterfly<Isa, R>(z);
    KV4_UNROLL
    for (int q = 0; q < R; ++q) store_complex<Isa>(slots, base + q * span, z[q]);
  }
  for (int k = 1; k < span; ++k) {
    Complex<Isa> w[R];
    KV4_UNROLL
    for (int q = 1; q < R; ++q) w[q] = broadcast_complex<Isa>(twiddle, k * (R - 1) + q - 1);
    for (int base = k; base < h; base += R * span) {
      Complex<Isa> z[R];
      z[0] = load_complex<Isa>(slots, base);
      KV4_UNROLL
      for (int q = 1; q < R; ++q) z[q] = times(load_complex<Isa>(slots, base + q * span), w[q]);
      butterfly<Isa, R>(z);
      KV4_UNROLL
      for (int q = 0; q < R; ++q) store_complex<Isa>(slots, base + q * span, z[q]);
    }
  }
}

// One stage of a prime radix r, in place. root: exp(-2 pi i j / r); work [2r] vectors.
template <class Isa>
void prime_pass(Real<Isa>* slots, const Real<Isa>* twiddle, const Real<Isa>* root, int r, int span, int h,
                Real<Isa>* work) {
  using C = Complex<Isa>;
  const int half = (r - 1) / 2;
  Real<Isa>* sums = work;                                                               // z_j + z_(r-j), j = 1 ... half
  Real<Isa>* differences = work + static_cast<std::ptrdiff_t>(2 * half) * Isa::kLanes;  // z_j - z_(r-j)
  for (int k = 0; k < span; ++k) {
    const Real<Isa>* w = twiddle + static_cast<std::ptrdiff_t>(k) * (r - 1) * 2;
    for (int base = k; base < h; base += r * span) {
      const C z0 = load_complex<Isa>(slots, base);
      C total = z0;
      for (int j = 1; j <= half; ++j) {
        const C a = times(load_complex<Isa>(slots, base + j * span), broadcast_complex<Isa>(w, j - 1));
        const C b = times(load_complex<Isa>(slots, base + (r - j) * span), broadcast_complex<Isa>(w, r - j - 1));
        const C sum = a + b;
        total = total + sum;
        store_complex<Isa>(sums, j - 1, sum);
        store_complex<Isa>(differences, j - 1, a - b);
      }
      store_complex<Isa>(slots, base, total);
      for (int q = 1; q <= half; ++q) {
        C even = z0, odd = {Isa::set1(0), Isa::set1(0)};
        for (int j = 1, index = q; j <= half; ++j, index = index + q < r ? index + q : index + q - r) {
          const C w_jq = broadcast_complex<Isa>(root, index), s = load_complex<Isa>(sums, j - 1),
                  d = load_complex<Isa>(differences, j - 1);
          even = {Isa::fma(s.re, w_jq.re, even.re), Isa::fma(s.im, w_jq.re, even.im)};
          odd = {Isa::fma(d.re, w_jq.im, odd.re), Isa::fma(d.im, w_jq.im, odd.im)};
        }
        store_complex<Isa>(slots, base + q * span, plus_i(even, odd));  // w.im = -sin
        store_complex<Isa>(slots, base + (r - q) * span, minus_i(even, odd));
      }
    }
  }
}

// The split of elements 0 and h/2, whose partners are themselves, and of a pair n, h - n with
// w = exp(-2 pi i n / d). Inputs carry 1 / sqrt(2d).
template <class Isa>
KV4_INLINE void split_zero(Real<Isa>* x, const Complex<Isa>& z) {
  const auto root2 = Isa::set1(1.41421356237309504880);
  store_complex<Isa>(x, 0, {(z.re + z.im) * root2, (z.re - z.im) * root2});
}
template <class Isa>
KV4_INLINE void split_half(Real<Isa>* x, int n, const Complex<Isa>& z) {
  store_complex<Isa>(x, n, {z.re + z.re, -(z.im + z.im)});
}
template <class Isa>
KV4_INLINE void split_pair(Real<Isa>* x, int n, int h, const Complex<Isa>& a, const Complex<Isa>& b,
                           const Complex<Isa>& w) {
  const auto even_re = a.re + b.re, even_im = a.im - b.im, d_re = a.re - b.re, d_im = a.im + b.im;
  const auto odd_re = Isa::fma(d_im, w.re, d_re * w.im), odd_im = Isa::fma(d_im, w.im, -(d_re * w.re));
  store_complex<Isa>(x, n, {even_re + odd_re, even_im + odd_im});
  store_complex<Isa>(x, h - n, {even_re - odd_re, odd_im - even_im});
}

// The last radix-4 stage joined with the split: slots -> x.
template <class Isa>
KV4_INLINE void last_pass_split(const Real<Isa>* slots, const Real<Isa>* twiddle, const Real<Isa>* split, Real<Isa>* x,
                                int h) {
  using C = Complex<Isa>;
  const int span = h / 4;
  {
    C z[4];
    KV4_UNROLL
    for (int q = 0; q < 4; ++q) z[q] = load_complex<Isa>(slots, q * span);
    butterfly<Isa, 4>(z);
    split_zero<Isa>(x, z[0]);
    split_pair<Isa>(x, span, h, z[1], z[3], broadcast_complex<Isa>(split, span));
    split_half<Isa>(x, 2 * span, z[2]);
  }
  for (int k = 1; 2 * k < span; ++k) {
    C z[4], y[4];  // elements k + q span and (span - k) + q span
    C w[4];
    KV4_UNROLL
    for (int q = 1; q < 4; ++q) w[q] = broadcast_complex<Isa>(twiddle, k * 3 + q - 1);
    z[0] = load_complex<Isa>(slots, k);
    y[0] = load_complex<Isa>(slots, span - k);
    KV4_UNROLL
    for (int q = 1; q < 4; ++q) {
      z[q] = times(load_complex<Isa>(slots, k + q * span), w[q]);
      y[q] = times_conj(load_complex<Isa>(slots, span - k + q * span), w[q]);
    }
    butterfly<Isa, 4>(z);
    // The radix-4 butterfly of y[q] (-i)^q, those factors absorbed.
    const C a = y[0] - y[2], b = y[0] + y[2], e = y[1] - y[3], f = y[1] + y[3];
    y[0] = minus_i(a, e);
    y[1] = b - f;
    y[2] = plus_i(a, e);
    y[3] = b + f;
    KV4_UNROLL
    for (int q = 0; q < 4; ++q)
      split_pair<Isa>(x, k + q * span, h, z[q], y[3 - q], broadcast_complex<Isa>(split, k + q * span));
  }
  if (span % 2 == 0) {
    const int k = span / 2;
    C z[4];
    z[0] = load_complex<Isa>(slots, k);
    KV4_UNROLL
    for (int q = 1; q < 4; ++q)
      z[q] = times(load_complex<Isa>(slots, k + q * span), broadcast_complex<Isa>(twiddle, k * 3 + q - 1));
    butterfly<Isa, 4>(z);
    split_pair<Isa>(x, k, h, z[0], z[3], broadcast_complex<Isa>(split, k));
    split_pair<Isa>(x, k + span, h, z[1], z[2], broadcast_complex<Isa>(split, k + span));
  }
}

template <class Isa>
KV4_INLINE void split_pass(const Real<Isa>* slots, const Real<Isa>* split, Real<Isa>* x, int h) {
  split_zero<Isa>(x, load_complex<Isa>(slots, 0));
  for (int n = 1; 2 * n < h; ++n)
    split_pair<Isa>(x, n, h, load_complex<Isa>(slots, n), load_complex<Isa>(slots, h - n),
                    broadcast_complex<Isa>(split, n));
  if (h % 2 == 0) split_half<Isa>(x, h / 2, load_complex<Isa>(slots, h / 2));
}

// Undoes the split into slot order, real and imaginary parts swapped: the inverse transform is the
// forward one between two swaps.
template <class Isa>
KV4_INLINE void unsplit_pass(const Real<Isa>* x, const Real<Isa>* split, const std::uint16_t* slot, Real<Isa>* slots,
                             int h) {
  using C = Complex<Isa>;
  const auto root2 = Isa::set1(1.41421356237309504880);
  const C first = load_complex<Isa>(x, 0);
  store_complex<Isa>(slots, slot[0], {(first.re - first.im) * root2, (first.re + first.im) * root2});
  for (int n = 1; 2 * n < h; ++n) {
    const C a = load_complex<Isa>(x, n), b = load_complex<Isa>(x, h - n), w = broadcast_complex<Isa>(split, n);
    const auto even_re = a.re + b.re, even_im = a.im - b.im, d_re = a.re - b.re, d_im = a.im + b.im;
    const auto odd_re = Isa::fma(d_re, w.im, -(d_im * w.re)), odd_im = Isa::fma(d_re, w.re, d_im * w.im);
    store_complex<Isa>(slots, slot[n], {even_im + odd_im, even_re + odd_re});
    store_complex<Isa>(slots, slot[h - n], {odd_im - even_im, even_re - odd_re});
  }
  if (h % 2 == 0) {
    const C half = load_complex<Isa>(x, h / 2);
    store_complex<Isa>(slots, slot[h / 2], {-(half.im + half.im), half.re + half.re});
  }
}

// Forward transform for h = a power of two known at compile time: loops of constant bounds and strides.
template <class Isa, int H, bool kScaled>
void srft_power_of_two(const Rotation& r, Real<Isa>* x, Real<Isa>* slots) {
  const Tables<Real<Isa>> t(r);
  const std::uint16_t* source = r.fft().source.data();
  constexpr bool kOdd = H == 32 || H == 128;  // an odd power of two: the plan begins with 2, 4
  constexpr int kFirst = kOdd ? 8 : 4, kFirstTwiddles = kOdd ? 1 + 2 * 3 : 3;
  first_pass<Isa, kFirst, kScaled>(x, t.scaled_signs, source, slots, H);
  const Real<Isa>* twiddle = t.twiddle + 2 * kFirstTwiddles;
  if constexpr (H >= kFirst * 16) {
    middle_pass<Isa, 4>(slots, twiddle, kFirst, H);
    twiddle += 2 * 3 * kFirst;
  }
  if constexpr (H >= kFirst * 64) {
    middle_pass<Isa, 4>(slots, twiddle, kFirst * 4, H);
    twiddle += 2 * 3 * kFirst * 4;
  }
  static_assert(H >= kFirst * 4 && H < kFirst * 256);
  last_pass_split<Isa>(slots, twiddle, t.split, x, H);
}

// Stages [stage, end) of the plan, in place, from the given span on.
template <class Isa>
void run_stages(const Rotation& r, Real<Isa>* slots, Real<Isa>* work, std::size_t stage, std::size_t end, int span,
                const Real<Isa>* twiddle) {
  const FftPlan& plan = r.fft();
  const Real<Isa>* root = Tables<Real<Isa>>(r).root;
  for (std::size_t s = 0; s < stage; ++s) root += plan.radix[s] > 5 ? 2 * plan.radix[s] : 0;
  for (; stage < end; ++stage) {
    const int radix = plan.radix[stage];
    switch (radix) {
      case 2: middle_pass<Isa, 2>(slots, twiddle, span, plan.length); break;
      case 3: middle_pass<Isa, 3>(slots, twiddle, span, plan.length); break;
      case 4: middle_pass<Isa, 4>(slots, twiddle, span, plan.length); break;
      case 5: middle_pass<Isa, 5>(slots, twiddle, span, plan.length); break;
      default: prime_pass<Isa>(slots, twiddle, root, radix, span, plan.length, work); root += 2 * radix;
    }
    twiddle += 2 * static_cast<std::ptrdiff_t>(span) * (radix - 1);
    span *= radix;
  }
}

// x [d] vectors, in place; work [2d] vectors: slots, then the primes' sums. kScaled: x was multiplied with
// scaled_signs before.
template <class Isa, bool kScaled = false>
void srft_forward(const Rotation& r, Real<Isa>* x, Real<Isa>* work) {
  const FftPlan& plan = r.fft();
  const int h = plan.length;
  switch (h) {
    case 16: return srft_power_of_two<Isa, 16, kScaled>(r, x, work);
    case 32: return srft_power_of_two<Isa, 32, kScaled>(r, x, work);
    case 64: return srft_power_of_two<Isa, 64, kScaled>(r, x, work);
    case 128: return srft_power_of_two<Isa, 128, kScaled>(r, x, work);
    case 256: return srft_power_of_two<Isa, 256, kScaled>(r, x, work);
    default: break;
  }
  const Tables<Real<Isa>> t(r);
  Real<Isa>* spare = work + static_cast<std::ptrdiff_t>(2 * h) * Isa::kLanes;
  const std::vector<int>& radix = plan.radix;
  const std::uint16_t* source = plan.source.data();
  std::size_t stage = 1;
  int span = radix[0];
  if (radix.size() >= 2 && radix[0] == 2 && radix[1] == 4) {
    first_pass<Isa, 8, kScaled>(x, t.scaled_signs, source, work, h);
    stage = 2;
    span = 8;
  } else {
    switch (radix[0]) {
      case 2: first_pass<Isa, 2, kScaled>(x, t.scaled_signs, source, work, h); break;
      case 3: first_pass<Isa, 3, kScaled>(x, t.scaled_signs, source, work, h); break;
      case 4: first_pass<Isa, 4, kScaled>(x, t.scaled_signs, source, work, h); break;
      case 5: first_pass<Isa, 5, kScaled>(x, t.scaled_signs, source, work, h); break;
      default:
        first_pass<Isa, 1, kScaled>(x, t.scaled_signs, source, work, h);
        stage = 0;
        span = 1;
    }
  }
  const Real<Isa>* twiddle = t.twiddle;
  for (int s = 0, length = 1; s < static_cast<int>(stage); length *= radix[s++])
    twiddle += 2 * static_cast<std::ptrdiff_t>(length) * (radix[s] - 1);
  const bool joined = radix.back() == 4 && radix.size() > stage;
  run_stages<Isa>(r, work, spare, stage, radix.size() - (joined ? 1 : 0), span, twiddle);
  if (joined)
    last_pass_split<Isa>(work, t.twiddle + plan.twiddle.size() - 2 * 3 * static_cast<std::size_t>(h / 4), t.split, x,
                         h);
  else split_pass<Isa>(work, t.split, x, h);
}

template <class Isa>
void srft_inverse(const Rotation& r, Real<Isa>* x, Real<Isa>* work) {
  const FftPlan& plan = r.fft();
  const int h = plan.length;
  const Tables<Real<Isa>> t(r);
  unsplit_pass<Isa>(x, t.split, plan.slot.data(), work, h);
  run_stages<Isa>(r, work, work + static_cast<std::ptrdiff_t>(2 * h) * Isa::kLanes, 0, plan.radix.size(), 1, t.twiddle);
  for (int n = 0; n < h; ++n) {
    const Complex<Isa> z = load_complex<Isa>(work, n), sign = broadcast_complex<Isa>(t.scaled_signs, n);
    store_complex<Isa>(x, n, {z.im * sign.re, z.re * sign.im});
  }
}

}  // namespace kv4::cpu::KV4_ISA
