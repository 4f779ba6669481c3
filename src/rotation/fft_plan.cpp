#include "rotation/kinds.h"

namespace kv4 {
namespace {

std::vector<int> radices(int length) {
  int twos = 0;
  for (; length % 2 == 0; length /= 2) ++twos;
  std::vector<int> radix;
  if (twos % 2 != 0) {
    radix.push_back(2);
    twos -= 1;
    if (twos != 0) {
      radix.push_back(4);
      twos -= 2;
    }
  } else if (twos >= 4) {
    radix.push_back(4);
    twos -= 2;
  }
  for (int p = 3; length > 1; p += 2)
    for (; length % p == 0; length /= p) radix.push_back(p);
  for (; twos > 0; twos -= 2) radix.push_back(4);
  return radix;
}

void append(std::complex<double> z, std::vector<float>* f32, std::vector<double>* f64) {
  f64->insert(f64->end(), {z.real(), z.imag()});
  f32->insert(f32->end(), {static_cast<float>(z.real()), static_cast<float>(z.imag())});
}

}  // namespace

FftPlan make_fft_plan(int length) {
  FftPlan plan;
  plan.length = length;
  plan.radix = radices(length);
  plan.slot.resize(length);
  plan.source.resize(length);
  for (int n = 0; n < length; ++n) {
    // The last stage joins the residues of n modulo its radix, each a transform of the quotients.
    int slot = 0, size = length, rest = n;
    for (std::size_t s = plan.radix.size(); s-- > 0;) {
      size /= plan.radix[s];
      slot += rest % plan.radix[s] * size;
      rest /= plan.radix[s];
    }
    plan.slot[n] = static_cast<std::uint16_t>(slot);
    plan.source[slot] = static_cast<std::uint16_t>(n);
  }
  int span = 1;
  for (const int radix : plan.radix) {
    for (int k = 0; k < span; ++k)
      for (int q = 1; q < radix; ++q) append(root_of_unity(q * k, radix * span), &plan.twiddle, &plan.twiddle_f64);
    if (radix > 5)
      for (int j = 0; j < radix; ++j) append(root_of_unity(j, radix), &plan.root, &plan.root_f64);
    span *= radix;
  }
  for (int k = 0; k <= length; ++k) append(root_of_unity(k, 2 * length), &plan.split, &plan.split_f64);
  for (int k = 0; k < 2 * length; ++k) {
    const std::complex<double> z = root_of_unity(k, 2 * length);
    plan.circle.insert(plan.circle.end(), {static_cast<float>(z.real()), static_cast<float>(z.imag())});
  }
  return plan;
}

}  // namespace kv4
