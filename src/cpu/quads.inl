// Quads: the codes of a head slice's side on their way between [channel][token] vectors and the page
// order of layout.h. quads[q * kPageTokens + t] is one 32-bit word of four code bytes, those of channels
// 4q ... 4q + 3 of token t, the first in the lowest byte.
//
// Keys keep the word's shape: two quads of a token make one page word, low and high nibbles. Values need
// four tokens per word: a 4 x 4 byte transpose inside 16 bytes.
#pragma once

#define KV4_TEXT_(x) #x
#define KV4_TEXT(x) KV4_TEXT_(x)
// clang-format off: a path, not a division
#include KV4_TEXT(cpu/KV4_ISA/seal_ops.h)
// clang-format on
#undef KV4_TEXT
#undef KV4_TEXT_

namespace kv4::cpu::KV4_ISA {

template <int N>
struct LaneTypes {
  typedef std::uint8_t B __attribute__((vector_size(4 * N)));  // bytes of a VecTypes<N>::I
  typedef std::int8_t S __attribute__((vector_size(4 * N)));
};
typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));

template <class V>
KV4_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
KV4_INLINE void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// 16 bytes in every 128 bits: a table of SealOps::lookup16.
template <class Isa>
KV4_INLINE typename Isa::I load_table16(const void* p) {
  typename Isa::I v;
  for (int i = 0; i < Isa::kLanes / 4; ++i) std::memcpy(reinterpret_cast<char*>(&v) + 16 * i, p, 16);
  return v;
}

alignas(64) inline constexpr std::int32_t kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// All ones in lanes [begin, end).
template <class Isa>
KV4_INLINE typename Isa::I lanes_between(int begin, int end) {
  using I = typename Isa::I;
  const I lane = load_as<I>(kLaneIndex);
  return (I)(lane >= (I{} + begin)) & (I)(lane < (I{} + end));
}

// Rows in, columns out; its own inverse.
KV4_INLINE Bytes16 transpose_bytes(Bytes16 v) {
  return __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Tokens [first, first + count) of `padded` channels. Other tokens' codes, some in the same bytes or
// vectors, keep their value.
template <class Isa>
void pack_keys(const std::int32_t* quads, int padded, int first, int count, std::uint8_t* codes) {
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes;
  const int end = first + count;
  for (int t = first / L * L; t < end; t += L) {
    const bool whole = t >= first && t + L <= end;
    const I inside = lanes_between<Isa>(first - t, end - t);
    std::uint8_t* to = codes + key_nibble(t, 0, padded).byte;
    for (int o = 0; o < padded / 8; ++o, to += 64) {
      const std::int32_t* from = quads + 2 * o * kPageTokens + t;
      I word = load_as<I>(from) | load_as<I>(from + kPageTokens) << 4;
      if (!whole) word = (load_as<I>(to) & ~inside) | (word & inside);
      store_as(to, word);
    }
  }
}

template <class Isa>
void unpack_keys(const std::uint8_t* codes, int padded, int first, int count, std::int32_t* quads) {
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes;
  for (int t = first / L * L; t < first + count; t += L) {
    const std::uint8_t* from = codes + key_nibble(t, 0, padded).byte;
    for (int o = 0; o < padded / 8; ++o, from += 64) {
      const I word = load_as<I>(from);
      std::int32_t* to = quads + 2 * o * kPageTokens + t;
      store_as(to, word & 0x0f0f0f0f);
      store_as(to + kPageTokens, word >> 4 & 0x0f0f0f0f);
    }
  }
}

inline void pack_values(const std::int32_t* quads, int padded, int first, int count, std::uint8_t* codes) {
  const int end = first + count;
  for (int o = first / 8; o < (end + 7) / 8; ++o) {
    const bool whole = 8 * o >= first && 8 * o + 8 <= end;
    Bytes16 inside{};
    for (int i = 0; i < 16; ++i) {
      const int low = 8 * o + i % 4, high = low + 4;
      inside[i] =
          static_cast<std::uint8_t>((low >= first && low < end ? 0x0f : 0) | (high >= first && high < end ? 0xf0 : 0));
    }
    for (int q = 0; q < padded / 4; ++q) {
      const std::int32_t* from = quads + q * kPageTokens + 8 * o;
      std::uint8_t* to = codes + value_nibble(8 * o, 4 * q).byte;
      // Tokens outside may hold anything: masked, so that they stay in their nibble.
      Bytes16 bytes = transpose_bytes((load_as<Bytes16>(from) & 0x0f) | load_as<Bytes16>(from + 4) << 4);
      if (!whole) bytes = (load_as<Bytes16>(to) & ~inside) | (bytes & inside);
      store_as(to, bytes);
    }
  }
}

inline void unpack_values(const std::uint8_t* codes, int padded, int first, int count, std::int32_t* quads) {
  for (int o = first / 8; o < (first + count + 7) / 8; ++o) {
    for (int q = 0; q < padded / 4; ++q) {
      const Bytes16 bytes = transpose_bytes(load_as<Bytes16>(codes + value_nibble(8 * o, 4 * q).byte));
      std::int32_t* to = quads + q * kPageTokens + 8 * o;
      store_as(to, bytes & 0x0f);
      store_as(to + 4, bytes >> 4);
    }
  }
}

// Hands out 64-byte aligned parts of a block; with a null block it only counts bytes.
class Parts {
 public:
  explicit Parts(void* block) : block_(static_cast<std::byte*>(block)) {}
  template <class T>
  T* take(std::size_t n) {
    std::byte* p = block_ == nullptr ? nullptr : block_ + used_;
    used_ += (n * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* block_;
  std::size_t used_ = 0;
};

}  // namespace kv4::cpu::KV4_ISA
