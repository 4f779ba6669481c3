// Sealing by codes of a trellis (trellis.inl).
#pragma once

#include "cpu/seal_rows.inl"
#include "cpu/trellis.inl"

namespace kv4::cpu::KV4_ISA {

// x times the scale that fits best, in units of a step, of what add_fit added up.
template <class Isa>
KV4_INLINE typename Isa::F fitted(typename Isa::F step, typename Isa::F xl, typename Isa::F ll) {
  return step * (xl / Isa::max(ll, Isa::set1(1.0f)));
}

// One group of n channels of keys at x, in units of 1 / inverse: quads and, per lane, the scale.
template <class Isa>
typename Isa::F trellis_group(const TrellisTables<Isa>& tables, const float* x, int n, typename Isa::F step,
                              typename Isa::F inverse, std::int32_t* back, std::int32_t* quads) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  const auto unit_x = [&](int c) KV4_INLINE_LAMBDA { return Isa::load(x + c * Isa::kLanes) * inverse; };
  F xl{}, ll{};
  trellis_paths<Isa>(tables, n, back, unit_x, [&](int j, I pairs) KV4_INLINE_LAMBDA {
    store_as(quads + j * kPageTokens, pairs & 0x0f0f0f0f);
    add_fit<Isa>(tables, j, pairs, std::min(4, n - 4 * j), [&](int i) KV4_INLINE_LAMBDA { return unit_x(4 * j + i); },
                 xl, ll);
  });
  return fitted<Isa>(step, xl, ll);
}

// Channels [begin, end) of one group, those from d on padding: codes, and scales of the page's tokens.
template <class Isa>
void seal_chains(const TrellisTables<Isa>& tables, const TrellisScratch& scratch, int group, int begin, int end, int d,
                 int padded, std::uint8_t* codes, std::byte* scales) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes;
  std::memset(scratch.xl, 0, sizeof(float) * kPageTokens * L);
  std::memset(scratch.ll, 0, sizeof(float) * kPageTokens * L);
  for (int c = begin; c < end; c += L) {
    const float* const x = scratch.x + c;
    const auto at = [&](int t) KV4_INLINE_LAMBDA { return Isa::load(x + t * padded); };
    const I inside = lanes_between<Isa>(0, d - c);
    const F real = (F)(inside & (I)Isa::set1(1.0f));
    I odd{};
    trellis_paths<Isa>(tables, kPageTokens, scratch.back, at, [&](int j, I pairs) KV4_INLINE_LAMBDA {
      const I code = pairs & inside & 0x0f0f0f0f;
      if (j % 2 != 0) odd = code << 4;
      else store_as(codes + value_nibble(4 * j, c).byte, code | odd);
      const I level = tables.bytes[j % 2].lookup(pairs);
      for (int i = 0; i < 4; ++i) {
        const F one = Isa::to_float((level << (24 - 8 * i)) >> 24) * real;
        float *const xl = scratch.xl + (4 * j + i) * L, *const ll = scratch.ll + (4 * j + i) * L;
        Isa::store(xl, Isa::fma(at(4 * j + i), one, Isa::load(xl)));
        Isa::store(ll, Isa::fma(one, one, Isa::load(ll)));
      }
    });
  }
  alignas(64) float scale[kPageTokens];
  alignas(64) std::uint16_t halves[kPageTokens];
  for (int t = 0; t < kPageTokens; ++t)
    scale[t] = scratch.step[group * kPageTokens + t] *
               (Isa::reduce_add(Isa::load(scratch.xl + t * L)) /
                std::max(Isa::reduce_add(Isa::load(scratch.ll + t * L)), 1.0f));
  for (int t = 0; t < kPageTokens; t += L) Isa::store_f16(halves + t, Isa::load(scale + t));
  std::memcpy(scales + 2 * group * kPageTokens, halves, sizeof halves);
}

}  // namespace kv4::cpu::KV4_ISA
