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
template <class Isa, int kBits>
typename Isa::F trellis_group(const TrellisTables<Isa>& tables, const float* x, int n, typename Isa::F step,
                              typename Isa::F inverse, std::int32_t* back, std::int32_t* quads) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  const auto unit_x = [&](int c) KV4_INLINE_LAMBDA { return Isa::load(x + c * Isa::kLanes) * inverse; };
  F xl{}, ll{};
  trellis_paths<Isa, kBits>(tables, n, back, unit_x, [&](int j, I pairs) KV4_INLINE_LAMBDA {
    store_as(quads + j * kPageTokens, pairs & every_byte<I>((1u << kBits) - 1));
    add_fit<Isa>(
        tables, j, pairs, std::min(4, n - 4 * j), [&](int i) KV4_INLINE_LAMBDA { return unit_x(4 * j + i); }, xl, ll);
  });
  return fitted<Isa>(step, xl, ll);
}

// Quads of codes of the tokens of kLanes channels, from the last quad to the first, on their way into the planes of
// layout.h. Every code of the channels is written.
template <class Isa, int kBits>
class ValuePlanes {
 public:
  using I = typename Isa::I;
  static constexpr int kFirst = first_plane(kBits), kQuads = 8 / kFirst;  // of a register

  // From channel c on.
  KV4_INLINE ValuePlanes(std::uint8_t* codes, int padded, int c)
      : first_(codes + c / 16 * (kPageTokens / kStepPositions) * step_bytes(kFirst) + c % 16 * 4),
        second_(codes + second_plane(kBits, padded) + c / 16 * (kPageTokens / kStepPositions) * step_bytes(1)),
        lane_(c % 16) {}
  KV4_INLINE void put(int j, I quad) {
    low_ = low_ << kFirst | (quad & every_byte<I>((1u << kFirst) - 1));
    if constexpr (kBits == 3) high_ = high_ << 2 | (quad >> 2 & 0x01010101);
    if (j % kQuads != 0) return;
    store_as(first_ + j / kQuads * 64, low_);
    low_ = I{};
    if constexpr (kBits == 3) put_high(second_ + j / kQuads * step_bytes(1));
  }

 private:
  // Lanes 8 to 15 have the odd bits of the bytes of lanes 0 to 7.
  KV4_INLINE void put_high(std::uint8_t* to) {
    alignas(64) std::uint32_t bits[Isa::kLanes];
    store_as(bits, high_);
    high_ = I{};
    for (int i = 0; i < Isa::kLanes; ++i) {
      const int lane = lane_ + i;
      std::uint8_t* const at = to + lane % 8 * 4;
      store_as(at, lane < 8 ? bits[i] : load_as<std::uint32_t>(at) | bits[i] << 1);
    }
  }

  std::uint8_t *first_, *second_;
  int lane_;
  I low_{}, high_{};
};

// Channels [begin, end) of one group, those from d on padding: codes, and scales of the page's tokens.
template <class Isa, int kBits>
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
    ValuePlanes<Isa, kBits> planes(codes, padded, c);
    trellis_paths<Isa, kBits>(tables, kPageTokens, scratch.back, at, [&](int j, I pairs) KV4_INLINE_LAMBDA {
      planes.put(j, pairs & inside & every_byte<I>((1u << kBits) - 1));
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
    scale[t] = scratch.step[group * kPageTokens + t] * (Isa::reduce_add(Isa::load(scratch.xl + t * L)) /
                                                        std::max(Isa::reduce_add(Isa::load(scratch.ll + t * L)), 1.0f));
  for (int t = 0; t < kPageTokens; t += L) Isa::store_f16(halves + t, Isa::load(scale + t));
  std::memcpy(scales + 2 * group * kPageTokens, halves, sizeof halves);
}

}  // namespace kv4::cpu::KV4_ISA
