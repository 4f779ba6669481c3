// Integer dot products of packed codes for NEON (the names are described in portable/dot.h).
//
// With the dot-product extension (Armv8.2; every Apple M, Neoverse N1 and later), per 4 lanes and 8
// positions: 1 load, 1 and, 1 shift and 2 tbl unpack the nibbles, then each row takes 1 load and 4
// sdot by lane. v = 256 h + l with h and l in int8. An M1 core starts 4 vector instructions and 3 loads
// a cycle: 4 + 4 R vector instructions, so sdot binds from R = 1 on.
//
// Without it: 3 shifts, 3 ands and 4 tbl unpack to 16-bit levels (offset by -L[0], so that the index
// byte 0 reads 0), then each row takes 4 dup, 4 smlal and 4 smlal2.
#pragma once

#include <arm_neon.h>

#include "cpu/neon/unpack.h"
#include "cpu/vec.h"
#include "recipe/levels.h"

namespace kv4::cpu::neon {

struct Dot {
  static constexpr int kLimit = 32512;
  static constexpr int kBlocks = 1;
  static constexpr int kAccumulators = 24;
  static constexpr int kOctetBytes = 16;

#if defined(__ARM_FEATURE_DOTPROD)
  using Table = LevelTable;
  static KV4_INLINE Table table(const Levels& l) { return level_table(l, 0); }
  static KV4_INLINE std::int32_t start(const Levels&, std::int32_t) { return 0; }

  // Each 8 positions: 8 bytes of h, then 8 bytes of l.
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    for (int o = 0; o < 2; ++o, v += 8, operand += octet_stride) {
      const int16x8_t x = vcombine_s16(vmovn_s32(vld1q_s32(v)), vmovn_s32(vld1q_s32(v + 4)));
      const int8x8_t h = vshrn_n_s16(vaddq_s16(x, vdupq_n_s16(128)), 8);
      vst1q_u8(operand, vreinterpretq_u8_s8(vcombine_s8(h, vmovn_s16(x))));
    }
  }

  // |high| and |low| stay below 512 * 127 * 128 < 2^23, the result within int32 (portable/dot.h).
  template <int R, int B, int>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t) {
    products<R, B>(codes, more, octets, operands, start, start_stride, table, next, sums);
  }
  // The same, part of its caller: for instruction sets that add to this one.
  template <int R, int B>
  static KV4_INLINE void products(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                  const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                  const Table& table, const std::uint8_t* next, std::int32_t* sums) {
    using Steps = kv4::cpu::Steps<B, true>;
    constexpr int kQuarters = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // 16-byte columns at a time: 16 sums at most
    const auto unpack = unpack_from<Unpack<B>>(table, codes);
    for (int quarter = 0; quarter < 4; quarter += kQuarters) {
      int32x4_t high[kQuarters][R], low[kQuarters][R];
      KV4_UNROLL
      for (int c = 0; c < kQuarters; ++c) {
        KV4_UNROLL
        for (int r = 0; r < R; ++r) high[c][r] = low[c][r] = vdupq_n_s32(0);
      }
      for (int o = 0; o < octets; o += Steps::kOctets) {
        if (quarter == 0) Steps::prefetch(next, more - codes, o);
        typename Unpack<B>::Codes w[kQuarters];
        KV4_UNROLL
        for (int c = 0; c < kQuarters; ++c)
          w[c] = unpack.load(Steps::first(codes, o), Steps::second(more, o), quarter + c);
        octet<0>(unpack, w, high, low, operands + o * R * kOctetBytes);
        if constexpr (Steps::kOctets == 2) octet<1>(unpack, w, high, low, operands + (o + 1) * R * kOctetBytes);
      }
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        KV4_UNROLL
        for (int c = 0; c < kQuarters; ++c) {
          const int32x4_t sum = vaddq_s32(vshlq_n_s32(high[c][r], 8), low[c][r]);
          vst1q_s32(sums + r * 16 + (quarter + c) * 4, vaddq_s32(sum, vdupq_n_s32(start[r * start_stride])));
        }
      }
    }
  }

 private:
  template <int kOctet, class Unpack, int kQuarters, int R>
  static KV4_INLINE void octet(const Unpack& unpack, const typename Unpack::Codes (&w)[kQuarters],
                               int32x4_t (&high)[kQuarters][R], int32x4_t (&low)[kQuarters][R],
                               const std::uint8_t* operands) {
    int8x16_t first[kQuarters], second[kQuarters];
    KV4_UNROLL
    for (int c = 0; c < kQuarters; ++c) {
      first[c] = vreinterpretq_s8_u8(unpack.template bytes<2 * kOctet>(w[c]));
      second[c] = vreinterpretq_s8_u8(unpack.template bytes<2 * kOctet + 1>(w[c]));
    }
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(operands + r * kOctetBytes));
      KV4_UNROLL
      for (int c = 0; c < kQuarters; ++c) {
        high[c][r] = vdotq_laneq_s32(high[c][r], first[c], v, 0);
        low[c][r] = vdotq_laneq_s32(low[c][r], first[c], v, 2);
        high[c][r] = vdotq_laneq_s32(high[c][r], second[c], v, 1);
        low[c][r] = vdotq_laneq_s32(low[c][r], second[c], v, 3);
      }
    }
  }
#else
  using Table = LevelTable;  // L[n] - L[0], 0 ... 254
  static KV4_INLINE Table table(const Levels& l) { return level_table(l, l.table[0]); }
  // Modulo 2^32, as all sums: scales of a damaged page, negative or NaN, make integers beyond kLimit.
  static KV4_INLINE std::int32_t start(const Levels& l, std::int32_t sum) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(l.table[0]) * static_cast<std::uint32_t>(sum));
  }

  // Positions (0, 2), (4, 6), (1, 3), (5, 7) of each 8 as pairs of int16: the order in which block() unpacks.
  static KV4_INLINE void pack(const std::int32_t* v, std::uint8_t* operand, std::size_t octet_stride) {
    for (int o = 0; o < 2; ++o, v += 8, operand += octet_stride) {
      const int16x4_t a = vmovn_s32(vld1q_s32(v)), b = vmovn_s32(vld1q_s32(v + 4));
      const std::int16_t order[8] = {vget_lane_s16(a, 0), vget_lane_s16(a, 2), vget_lane_s16(b, 0),
                                     vget_lane_s16(b, 2), vget_lane_s16(a, 1), vget_lane_s16(a, 3),
                                     vget_lane_s16(b, 1), vget_lane_s16(b, 3)};
      std::memcpy(operand, order, sizeof order);
    }
  }

  // Sums wrap modulo 2^32 on the way; the result does not overflow (portable/dot.h).
  template <int R, int B, int>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums, std::size_t) {
    using Steps = kv4::cpu::Steps<B, true>;
    const auto unpack = unpack_from<Pairs<B>>(table, codes);
    for (int quarter = 0; quarter < 4; ++quarter) {
      int32x4_t first[R], second[R];
      KV4_UNROLL
      for (int r = 0; r < R; ++r) first[r] = second[r] = vdupq_n_s32(0);
      for (int o = 0; o < octets; o += Steps::kOctets) {
        if (quarter == 0) Steps::prefetch(next, more - codes, o);
        const auto w = unpack.load(Steps::first(codes, o), Steps::second(more, o), quarter);
        octet<0>(unpack, w, first, second, operands + o * R * kOctetBytes);
        if constexpr (Steps::kOctets == 2) octet<1>(unpack, w, first, second, operands + (o + 1) * R * kOctetBytes);
      }
      KV4_UNROLL
      for (int r = 0; r < R; ++r)
        vst1q_s32(sums + r * 16 + quarter * 4,
                  vaddq_s32(vpaddq_s32(first[r], second[r]), vdupq_n_s32(start[r * start_stride])));
    }
  }

 private:
  template <int kOctet, class Pairs, int R>
  static KV4_INLINE void octet(const Pairs& unpack, const typename Pairs::Codes& w, int32x4_t (&first)[R],
                               int32x4_t (&second)[R], const std::uint8_t* operands) {
    int16x8_t levels[4];
    unpack.template levels<kOctet>(w, levels);
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      const std::uint8_t* v = operands + r * kOctetBytes;
      KV4_UNROLL
      for (int i = 0; i < 4; ++i) {
        std::int32_t pair;
        std::memcpy(&pair, v + 4 * i, 4);
        const int16x8_t x = vreinterpretq_s16_s32(vdupq_n_s32(pair));
        first[r] = vmlal_s16(first[r], vget_low_s16(levels[i]), vget_low_s16(x));
        second[r] = vmlal_high_s16(second[r], levels[i], x);
      }
    }
  }
#endif
};

}  // namespace kv4::cpu::neon
