// Codes of 4 lanes by 16 positions (layout.h) as bytes of a table, four positions of each lane a register. Beside loads
// and tbl: 2 bits 3 shifts and 3 ands for 16 positions, 3 bits 6 shifts, 2 bsl, 4 ands, 4 bits 2 shifts and 2 ands, 6
// bits 7 shifts, 4 bsl, 4 ands and tbl of four registers, 8 bits an exclusive or each.
#pragma once

#include <arm_neon.h>

#include "cpu/level_table.h"
#include "cpu/steps.h"

namespace kv4::cpu::neon {

template <int kShift>  // right; left where it is negative
KV4_INLINE uint8x16_t shift128(uint8x16_t x) {
  if constexpr (kShift > 0) return vshrq_n_u8(x, kShift);
  else if constexpr (kShift < 0) return vshlq_n_u8(x, -kShift);
  else return x;
}
KV4_INLINE uint8x16_t low_bits(uint8x16_t x, int mask) {
  return vandq_u8(x, vdupq_n_u8(static_cast<std::uint8_t>(mask)));
}
// x where the mask is set, else y.
KV4_INLINE uint8x16_t choose128(int mask, uint8x16_t x, uint8x16_t y) {
  return vbslq_u8(vdupq_n_u8(static_cast<std::uint8_t>(mask)), x, y);
}

// load of a step's quarter, lanes 4 quarter ... 4 quarter + 3, then bytes<i>: positions 4 i ... 4 i + 3.
// Codes of 2 or 4 bits, side by side in one plane; other widths are below.
template <int B>
struct Unpack {
  using Codes = uint8x16_t;
  uint8x16_t table;

  explicit KV4_INLINE Unpack(const LevelTable& t) : table(vld1q_u8(t.levels)) {}
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t*, int quarter) const {
    return vld1q_u8(first + 16 * quarter);
  }
  template <int i>
  KV4_INLINE uint8x16_t bytes(Codes w) const {
    const uint8x16_t index = shift128<B * i>(w);  // nothing stands above a byte's last code
    if constexpr (B * (i + 1) == 8) return vqtbl1q_u8(table, index);
    else return vqtbl1q_u8(table, low_bits(index, (1 << B) - 1));
  }
};

// Two registers of two nibbles each: two bits of the first plane, and above them one of the second.
template <>
struct Unpack<3> {
  struct Codes {
    uint8x16_t nibbles[2];
  };
  uint8x16_t table;

  explicit KV4_INLINE Unpack(const LevelTable& t) : table(vld1q_u8(t.levels)) {}
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t* second, int quarter) const {
    const uint8x16_t two = vld1q_u8(first + 16 * quarter),
                     one = vshlq_u8(vld1q_u8(second + quarter % 2 * 16),
                                    vdupq_n_s8(static_cast<std::int8_t>(-(quarter / 2))));
    return {{choose128(0x33, two, shift128<-2>(one)), choose128(0x33, shift128<2>(two), one)}};
  }
  template <int i>
  KV4_INLINE uint8x16_t bytes(const Codes& w) const {
    return vqtbl1q_u8(table, low_bits(shift128<i / 2 * 4>(w.nibbles[i % 2]), 7));
  }
};

// Of a trellis the codes before go along; those of a block's first step, at `start`, have none.
struct Chains {
  const std::uint8_t* start = nullptr;

  // The register `back` bytes before that at `at`, of the step before.
  KV4_INLINE uint8x16_t before(const std::uint8_t* first, const std::uint8_t* at, int back) const {
    return first == start ? vdupq_n_u8(0) : vld1q_u8(at - back);
  }
};

template <>
struct Unpack<kTrellis + 2> : Chains {
  struct Codes {
    uint8x16_t now, last;
  };
  uint8x16_t table;

  explicit KV4_INLINE Unpack(const LevelTable& t) : table(vld1q_u8(t.levels)) {}
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t*, int quarter) const {
    const std::uint8_t* const at = first + 16 * quarter;
    return {vld1q_u8(at), before(first, at, step_bytes(2))};
  }
  template <int i>
  KV4_INLINE uint8x16_t bytes(const Codes& w) const {
    if constexpr (i == 0)
      return vqtbl1q_u8(table, low_bits(choose128(3, shift128<6>(w.last), shift128<-2>(w.now)), 15));
    else return vqtbl1q_u8(table, low_bits(shift128<2 * i - 2>(w.now), 15));
  }
};

template <>
struct Unpack<kTrellis + 3> : Chains {
  using Plain = Unpack<3>;
  struct Codes {
    Plain::Codes now;
    uint8x16_t last;
  };
  Plain plain;
  uint8x16x2_t table;

  explicit KV4_INLINE Unpack(const LevelTable& t) : plain(t) {
    table.val[0] = vld1q_u8(t.levels);
    table.val[1] = vld1q_u8(t.levels + 16);
  }
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t* second, int quarter) const {
    Codes w{plain.load(first, second, quarter), vdupq_n_u8(0)};
    if (first != start) w.last = plain.load(first - step_bytes(2), second - step_bytes(1), quarter).nibbles[1];
    return w;
  }
  // Position 4 i's code lies from bit 4 (i / 2) on of nibbles[i % 2].
  template <int i>
  KV4_INLINE uint8x16_t bytes(const Codes& w) const {
    const uint8x16_t before = i == 0 ? w.last : w.now.nibbles[1 - i % 2];
    constexpr int kBefore = i == 0 ? 4 : (i - 1) / 2 * 4;  // its first bit there
    return vqtbl2q_u8(
        table, low_bits(choose128(7, shift128<i / 2 * 4>(w.now.nibbles[i % 2]), shift128<kBefore - 3>(before)), 31));
  }
};

template <>
struct Unpack<kTrellis + 4> : Chains {
  struct Codes {
    uint8x16_t now, last;
  };
  uint8x16x4_t even, odd;

  explicit KV4_INLINE Unpack(const LevelTable& t) {
    KV4_UNROLL
    for (int n = 0; n < 4; ++n) {
      even.val[n] = vld1q_u8(t.levels + 16 * n);
      odd.val[n] = vld1q_u8(t.odd_by_byte + 16 * n);
    }
  }
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t*, int quarter) const {
    const std::uint8_t* const at = first + 16 * quarter;
    return {vld1q_u8(at), before(first, at, 64)};
  }
  template <int i>
  KV4_INLINE uint8x16_t bytes(const Codes& w) const {
    if constexpr (i == 0) return vqtbl4q_u8(even, low_bits(choose128(15, w.now, w.last), 63));
    else return vqtbl4q_u8(odd, shift128<2>(w.now));
  }
};
// The block of an unpacker begins at `codes`.
template <class U>
KV4_INLINE U unpack_from(const LevelTable& t, const std::uint8_t* codes) {
  U unpack(t);
  if constexpr (requires { unpack.start; }) unpack.start = codes;
  return unpack;
}

template <>
struct Unpack<6> {
  struct Codes {
    uint8x16_t four[2], two;
  };
  uint8x16x4_t table;

  explicit KV4_INLINE Unpack(const LevelTable& t) {
    KV4_UNROLL
    for (int n = 0; n < 4; ++n) table.val[n] = vld1q_u8(t.levels + 16 * n);
  }
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t* second, int quarter) const {
    return {{vld1q_u8(first + 16 * quarter), vld1q_u8(first + 64 + 16 * quarter)}, vld1q_u8(second + 16 * quarter)};
  }
  template <int i>
  KV4_INLINE uint8x16_t bytes(const Codes& w) const {
    const uint8x16_t low = shift128<i % 2 * 4>(w.four[i / 2]), upper = shift128<2 * i - 4>(w.two);
    return vqtbl4q_u8(table, low_bits(choose128(15, low, upper), 63));
  }
};

template <>
struct Unpack<8> {
  struct Codes {
    uint8x16_t registers[4];
  };
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr int kOffset = 128;  // levels as they are
#else
  static constexpr int kOffset = 0;  // less the least
#endif

  explicit KV4_INLINE Unpack(const LevelTable&) {}
  KV4_INLINE Codes load(const std::uint8_t* first, const std::uint8_t*, int quarter) const {
    first += 16 * quarter;
    return {{vld1q_u8(first), vld1q_u8(first + 64), vld1q_u8(first + 128), vld1q_u8(first + 192)}};
  }
  template <int i>
  KV4_INLINE uint8x16_t bytes(const Codes& w) const {
    return veorq_u8(w.registers[i], vdupq_n_u8(kOffset));
  }
};

#if !defined(__ARM_FEATURE_DOTPROD)
// The same as 16-bit levels: positions (0, 2), (4, 6), (1, 3), (5, 7) of an octet.
template <int B>
struct Pairs : Unpack<B> {
  explicit KV4_INLINE Pairs(const LevelTable& t) : Unpack<B>(t) {}
  template <int kOctet>
  KV4_INLINE void levels(const typename Unpack<B>::Codes& w, int16x8_t (&out)[4]) const {
    const uint16x8_t a = vreinterpretq_u16_u8(this->template bytes<2 * kOctet>(w)),
                     b = vreinterpretq_u16_u8(this->template bytes<2 * kOctet + 1>(w)), byte = vdupq_n_u16(255);
    out[0] = vreinterpretq_s16_u16(vandq_u16(a, byte));
    out[1] = vreinterpretq_s16_u16(vandq_u16(b, byte));
    out[2] = vreinterpretq_s16_u16(vshrq_n_u16(a, 8));
    out[3] = vreinterpretq_s16_u16(vshrq_n_u16(b, 8));
  }
};

// Each nibble becomes an index whose upper byte is 0, where the level is 0.
template <>
struct Pairs<4> : Unpack<4> {
  explicit KV4_INLINE Pairs(const LevelTable& t) : Unpack<4>(t) {}
  template <int kOctet>
  KV4_INLINE void levels(uint8x16_t codes, int16x8_t (&out)[4]) const {
    const uint16x8_t nibble = vdupq_n_u16(15), w = vreinterpretq_u16_u8(codes);
    const uint16x8_t index[4] = {vandq_u16(w, nibble), vandq_u16(vshrq_n_u16(w, 4), nibble),
                                 vandq_u16(vshrq_n_u16(w, 8), nibble), vshrq_n_u16(w, 12)};
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = vreinterpretq_s16_u8(vqtbl1q_u8(table, vreinterpretq_u8_u16(index[i])));
  }
};
#endif

}  // namespace kv4::cpu::neon
