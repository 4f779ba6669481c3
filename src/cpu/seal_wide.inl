// Codes of even levels (uniform of 4 bits) with 16 lanes: 8 + the whole number next to y, |y| <= 7, by two operations a
// channel, which make and place it.
//
// The sum y + 8.5 + 2^(23 - 4 p), rounded down, has the whole number below y + 8.5 in bits 4 p to 4 p + 3 of its
// mantissa: one fma for the sum, and one choice by bits to join what several channels have in different places. Eight
// channels of keys are a word of the page after 8 fma, 7 choices and a shift; four channels of two times 16 values
// after 8, 7 and 2, and a shuffle. By a table, which serves every kind of levels, they take 8 to 9 a channel.
#pragma once

#include "cpu/quads.inl"

namespace kv4::cpu::KV4_ISA {

inline bool even_levels(const SideSpec& spec) {
  return spec.levels.bits == 4 && spec.levels.top() == 7 && spec.scale == ScaleRule::abs_max && spec.groups == 1 &&
         spec.dim % 16 == 0;
}

template <class Ops, int kPlace>
KV4_INLINE typename Ops::I even_code(const float* x, typename Ops::F inverse) {
  // Without bits below the code there is nothing to round down.
  if constexpr (kPlace == 0) return Ops::sum_nearest(x, inverse, 0x1p23f + 8);
  else return Ops::sum_below(x, inverse, static_cast<float>(1 << (23 - 4 * kPlace)) + 8.5f);
}

// Four channels of lanes: codes in bits 4 kPlace ... 4 kPlace + 3 of every second byte, other bits undefined.
template <class Ops, int kPlace>
KV4_INLINE typename Ops::I even_quad(const float* x, typename Ops::F inverse) {
  constexpr int L = 16;
  using I = typename Ops::I;
  const int mask = 0x0f << (4 * kPlace);
  const I low = Ops::choose(mask, even_code<Ops, kPlace>(x, inverse), even_code<Ops, kPlace + 2>(x + L, inverse));
  const I high =
      Ops::choose(mask, even_code<Ops, kPlace>(x + 2 * L, inverse), even_code<Ops, kPlace + 2>(x + 3 * L, inverse));
  return Ops::choose(0xffff, low, high << 16);
}

// beside: what else is done for every eight channels, of values four.

// Keys of 16 tokens: `channels` vectors at x into their block of the page.
template <class Ops, class Beside>
KV4_INLINE void even_keys(const float* x, int channels, typename Ops::F inverse, std::uint8_t* to, Beside beside) {
  for (int c = 0; c < channels; c += 8, x += 8 * 16, to += 64) {
    beside();
    store_as(to, Ops::choose(0x0f0f0f0f, even_quad<Ops, 0>(x, inverse), even_quad<Ops, 1>(x + 4 * 16, inverse)));
  }
}

// Which token of a page lane i of the block at t has: those that share bytes of values share a lane.
constexpr int even_value_token(int t, int i) { return t / 32 * 32 + i / 4 * 8 + t % 32 / 16 * 4 + i % 4; }

// Values of 16 tokens, in that order, to quads; those of the second block of 32 tokens then to the page.
template <class Ops, class Beside>
KV4_INLINE void even_values(const float* x, int channels, typename Ops::F inverse, int t, std::int32_t* quads,
                            std::uint8_t* codes, Beside beside) {
  using I = typename Ops::I;
  for (int c = 0; c < channels; c += 4, x += 4 * 16, quads += 16) {
    beside();
    if (t % 32 == 0) {
      store_as(quads, even_quad<Ops, 0>(x, inverse));
      continue;
    }
    const I bytes = Ops::transpose_bytes(Ops::choose(0x0f0f0f0f, load_as<I>(quads), even_quad<Ops, 1>(x, inverse)));
    std::uint8_t* const to = codes + value_nibble(t / 32 * 32, c).byte;
    Bytes16 octet[4];
    std::memcpy(octet, &bytes, sizeof octet);
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) store_as(to + 64 * i, octet[i]);
  }
}

}  // namespace kv4::cpu::KV4_ISA
