// Numbers as integer operands, and the sides of pages that they are multiplied with.
#pragma once

#include "cpu/softmax.inl"

namespace kv4::cpu::KV4_ISA {

// 64 numbers between 0 and 1, spread evenly over any run of them: 1 less the bits of their places reversed. Small
// weights that are alike are rounded up as often as their sum says; to the nearest, all of them would be lost or
// doubled.
struct Dither {
  alignas(64) float at[kPageTokens];
  constexpr Dither() : at() {
    for (int i = 0; i < kPageTokens; ++i) {
      int reversed = 0;
      for (int bit = 1; bit < kPageTokens; bit <<= 1) reversed = reversed << 1 | (i & bit ? 1 : 0);
      at[i] = 1.0f - (static_cast<float>(reversed) + 0.5f) / kPageTokens;
    }
  }
};
inline constexpr Dither kDither;

// n (a multiple of 16) numbers, x(i) those from i on, to the nearest integers, which pack(i, v) takes 16 at a time: v =
// those of numbers i ... i + 15. Returns the sum of the integers, one part in each lane. kDithered: the fractions of n
// <= 64 numbers, none of them negative, are compared with kDither and not with 1/2.
template <class V, bool kDithered, class X, class Pack>
KV4_INLINE typename V::I quantise(X x, int n, Pack pack) {
  using I = typename V::I;
  I total{};
  for (int i = 0; i < n; i += 16) {
    alignas(64) std::int32_t v[16];
    KV4_UNROLL
    for (int lane = 0; lane < 16; lane += V::kLanes) {
      const typename V::F scaled = x(i + lane);
      const I whole = kDithered ? V::truncate(scaled + V::load(kDither.at + i + lane)) : V::round(scaled);
      const I r = whole & (I)(scaled == scaled);  // what is NaN, or 0 times infinity, has no integer
      total += r;
      std::memcpy(v + lane, &r, sizeof r);
    }
    pack(i, v);
  }
  return total;
}

// Takes integers as operands of D.
template <class D>
struct DotOperand {
  std::uint8_t* operand;
  std::size_t octet_stride;
  KV4_INLINE void operator()(int i, const std::int32_t* v) const {
    D::pack(v, operand + static_cast<std::size_t>(i / 8) * octet_stride, octet_stride);
  }
};

// The units in which numbers of at most `top` become integers of at most kLimit, and their inverses. Where top is next
// to 0 both are 0; where it is not finite the unit is not either, which shows in the products.
template <class V, int kLimit = Dot::kLimit>
KV4_INLINE void units_of(typename V::F top, typename V::F* unit, typename V::F* inverse) {
  using F = typename V::F;
  using I = typename V::I;
  const I tiny = (I)(top <= V::set1(1e-30f)), finite = (I)(top <= V::set1(std::numeric_limits<float>::max()));
  *unit = (F)((I)(top * V::set1(1.0f / kLimit)) & ~tiny);
  *inverse = (F)((I)(V::set1(static_cast<float>(kLimit)) / top) & ~tiny & finite);
}

// Those of n numbers.
template <class V, int kLimit = Dot::kLimit>
KV4_INLINE void units_of_all(const float* from, int n, typename V::F* unit, typename V::F* inverse) {
  using F = typename V::F;
  // max may lose a NaN, which the rotation makes of a query that overflows in it; 0 times it does not.
  F largest = F{}, poison = F{};
  for (int i = 0; i < n; i += V::kLanes) {
    const F x = V::load(from + i);
    largest = V::max(largest, V::abs(x));
    poison = V::fma(x, F{}, poison);
  }
  units_of<V, kLimit>(V::set1(V::reduce_max(largest) + V::reduce_add(poison)), unit, inverse);
}

template <class V>
inline void widen_f16(const std::uint8_t* from, int count, int padded, float* to) {
  const std::uint16_t* h = reinterpret_cast<const std::uint16_t*>(from);
  int i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::store(to + i, V::load_f16(h + i));
  for (; i < count; ++i) to[i] = f16_to_f32(h[i]);
  for (; i < padded; ++i) to[i] = 0.0f;
}

template <class V>
KV4_INLINE typename V::F load_integers(const std::int32_t* p) {
  typename V::I i;
  std::memcpy(&i, p, sizeof i);
  return V::to_float(i);
}

// Where the codes of a side lie in a slice: blocks of 16 lanes, whose octets of positions are counted through.
struct SidePlanes {
  std::size_t codes;   // bytes from a slice's first to its first plane
  std::size_t second;  // from that to the second, which has half as many bits
  std::size_t octet;   // bytes of 16 lanes and 8 positions in the first

  SidePlanes(const SideSpec& side, std::size_t at)
      : codes(at), second(second_plane(side.levels.bits, pad_channels(side.dim))),
        octet(static_cast<std::size_t>(step_bytes(first_plane(side.levels.bits)) / 2)) {}
  std::size_t first_at(std::size_t i) const { return codes + i * octet; }
  std::size_t second_at(std::size_t i) const { return codes + second + i * octet / 2; }
};

// D::block of R rows, codes of B bits and N blocks.
using DotBlock = void (*)(const std::uint8_t* codes, const std::uint8_t* more, int octets, const std::uint8_t* operands,
                          const std::int32_t* start, std::size_t start_stride, const Dot::Table& table,
                          const std::uint8_t* next, std::int32_t* sums, std::size_t stride);
template <class D, int R, int B, int N>
inline constexpr DotBlock kDotBlock = D::template block<R, B, N>;
template <class D, int B, int N>
inline constexpr DotBlock kDotBlocks[kTileRows] = {kDotBlock<D, 1, B, N>, kDotBlock<D, 2, B, N>, kDotBlock<D, 3, B, N>,
                                                   kDotBlock<D, 4, B, N>, kDotBlock<D, 5, B, N>, kDotBlock<D, 6, B, N>,
                                                   kDotBlock<D, 7, B, N>, kDotBlock<D, 8, B, N>};

// How one side of a task's pages is read with the products of D: its levels, D::block of its width, where its planes
// lie.
template <class D>
struct PackedSide : SidePlanes {
  Dot::Table table;
  const DotBlock* blocks[D::kBlocks];

  PackedSide(const SideSpec& side, std::size_t at) : SidePlanes(side, at), table(D::table(side.levels)) {
    switch (coding_of(side.levels)) {
      case kTrellis + 2: take<kTrellis + 2>(); break;
      case kTrellis + 3: take<kTrellis + 3>(); break;
      case kTrellis + 4: take<kTrellis + 4>(); break;
      case 2: take<2>(); break;
      case 3: take<3>(); break;
      case 6: take<6>(); break;
      case 8: take<8>(); break;
      default: take<4>();
    }
  }
  // The sums of N blocks of 16 lanes, `apart` octets behind each other, over `octets` octets, the first of them number
  // `at` of the side's, of a page's slice; the same place of the slice `next` is prefetched.
  template <int R, int N>
  KV4_INLINE void block(const std::uint8_t* slice, const std::uint8_t* next, std::size_t at, int octets,
                        const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                        std::int32_t* sums, std::size_t apart) const {
    const std::uint8_t *first = slice + first_at(at), *more = slice + second_at(at), *fetched = next + first_at(at);
    const std::size_t stride = apart * octet;
    // Called by name, so that the compiler makes a copy for the octets of a page's values: AVX-512 takes 4 to 7 %
    // longer at one row without.
    if (blocks[0] == kDotBlocks<D, 4, 1>)
      D::template block<R, 4, N>(first, more, octets, operands, start, start_stride, table, fetched, sums, stride);
    else blocks[N - 1][R - 1](first, more, octets, operands, start, start_stride, table, fetched, sums, stride);
  }

 private:
  template <int B>
  void take() {
    // Bytes are never chosen for wider codes, and have no code for them.
    constexpr int kBits = D::kLimit <= 255 && bits_of(B) > 4 ? 4 : B;
    blocks[0] = kDotBlocks<D, kBits, 1>;
    if constexpr (D::kBlocks == 2) blocks[1] = kDotBlocks<D, kBits, 2>;
  }
};

// f(i, n), n an integral_constant: blocks i ... i + n - 1 of `count`, as many at once as D takes.
template <class D, class F>
KV4_INLINE void for_blocks(int count, F f) {
  int i = 0;
  for (; i + D::kBlocks <= count; i += D::kBlocks) f(i, std::integral_constant<int, D::kBlocks>{});
  if constexpr (D::kBlocks > 1)
    if (i < count) f(i, std::integral_constant<int, 1>{});
}

}  // namespace kv4::cpu::KV4_ISA
