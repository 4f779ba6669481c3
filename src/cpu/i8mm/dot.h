// Integer dot products of packed codes for Armv8.6's int8 matrix products (the names are described in portable/dot.h).
//
// smmla multiplies two tokens of 8 positions by two vectors of 8: twice the products of sdot. The page's order gives
// both operands with little to permute. A 16-byte column unpacks to positions 0 to 3 and 4 to 7 of four tokens; zip1
// and zip2 of the two registers, word by word, are tokens 0, 1 and 2, 3 with all their 8 positions. The other operand
// is what NEON's is already, 8 bytes of h and 8 bytes of l of one row: a row's two halves fill smmla's two columns, so
// that any number of rows pays, odd ones too.
//
// Vector instructions per 4 lanes, 8 positions and R rows, and R loads:
//
//               unpacking    products    R = 1    2     4     6     8
//   sdot            4          4 R           8   12    20    28    36
//   smmla           6          2 R           8   10    14    18    22
//
// Where smmla starts as often as sdot (Neoverse N2: 2 a cycle, V2: 4) it takes 17 % fewer cycles at R = 2 and 36 %
// fewer at R = 6. At R = 1 it gains nothing, and sdot stays. At its end a block takes 2 uzp per 4 lanes and row more,
// 1/16 of its products at d = 128. Counted, not measured.
#pragma once

#include "cpu/neon/dot.h"

namespace kv4::cpu::i8mm {

// NEON's table, limits and operands.
struct Dot : neon::Dot {
  // |high| and |low| stay below 512 * 127 * 128 < 2^23, the result within int32 (portable/dot.h).
  template <int R, int B, int>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t) {
    if constexpr (R == 1) return products<R, B>(codes, more, octets, operands, start, start_stride, table, next, sums);
    using Steps = kv4::cpu::Steps<B, true>;
    constexpr int kColumns = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // of 16 bytes, at a time: 16 sums at most
    const auto unpack = neon::unpack_from<neon::Unpack<B>>(table, codes);
    for (int column = 0; column < 4; column += kColumns) {
      // Lanes: h and l of the first token, h and l of the second.
      int32x4_t first[kColumns][R], second[kColumns][R];
      KV4_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        KV4_UNROLL
        for (int r = 0; r < R; ++r) first[c][r] = second[c][r] = vdupq_n_s32(0);
      }
      for (int o = 0; o < octets; o += Steps::kOctets) {
        if (column == 0) Steps::prefetch(next, more - codes, o);
        typename neon::Unpack<B>::Codes w[kColumns];
        KV4_UNROLL
        for (int c = 0; c < kColumns; ++c)
          w[c] = unpack.load(Steps::first(codes, o), Steps::second(more, o), column + c);
        octet<0>(unpack, w, first, second, operands + o * R * kOctetBytes);
        if constexpr (Steps::kOctets == 2) octet<1>(unpack, w, first, second, operands + (o + 1) * R * kOctetBytes);
      }
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        KV4_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const int32x4_t high = vuzp1q_s32(first[c][r], second[c][r]), low = vuzp2q_s32(first[c][r], second[c][r]);
          const int32x4_t sum = vaddq_s32(vshlq_n_s32(high, 8), low);
          vst1q_s32(sums + r * 16 + (column + c) * 4, vaddq_s32(sum, vdupq_n_s32(start[r * start_stride])));
        }
      }
    }
  }

 private:
  template <int kOctet, class Unpack, int kColumns, int R>
  static KV4_INLINE void octet(const Unpack& unpack, const typename Unpack::Codes (&w)[kColumns],
                               int32x4_t (&first)[kColumns][R], int32x4_t (&second)[kColumns][R],
                               const std::uint8_t* operands) {
    int8x16_t tokens01[kColumns], tokens23[kColumns];
    KV4_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int32x4_t low = vreinterpretq_s32_u8(unpack.template bytes<2 * kOctet>(w[c]));
      const int32x4_t high = vreinterpretq_s32_u8(unpack.template bytes<2 * kOctet + 1>(w[c]));
      tokens01[c] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
      tokens23[c] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    }
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(operands + r * kOctetBytes));
      KV4_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        first[c][r] = vmmlaq_s32(first[c][r], tokens01[c], v);
        second[c][r] = vmmlaq_s32(second[c][r], tokens23[c], v);
      }
    }
  }
};

}  // namespace kv4::cpu::i8mm
