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

// All ones in bytes i with i % 4 in [begin, end).
inline Bytes16 tokens_between(int begin, int end) {
  alignas(16) std::uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = i % 4 >= begin && i % 4 < end ? 0xff : 0;
  return load_as<Bytes16>(bytes);
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

// A whole page by registers of 16 tokens: 11 instructions for four octets of four channels, 48 by 16 bytes.
template <class Isa>
void pack_whole_values(const std::int32_t* quads, int padded, std::uint8_t* codes) {
  using I = typename Isa::I;
  using B = typename LaneTypes<16>::B;
  for (int q = 0; q < padded / 4; ++q) {
    for (int t = 0; t < kPageTokens; t += 32) {
      const I a = load_as<I>(quads + q * kPageTokens + t), b = load_as<I>(quads + q * kPageTokens + t + 16);
      const I low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      const I high = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
      const B words = (B)(low | high << 4);
      const B bytes = __builtin_shufflevector(words, words, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 16,
                                              20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31, 32, 36, 40,
                                              44, 33, 37, 41, 45, 34, 38, 42, 46, 35, 39, 43, 47, 48, 52, 56, 60, 49,
                                              53, 57, 61, 50, 54, 58, 62, 51, 55, 59, 63);
      std::uint8_t* const to = codes + value_nibble(t, 4 * q).byte;
      Bytes16 octet[4];
      std::memcpy(octet, &bytes, sizeof octet);
      KV4_UNROLL
      for (int i = 0; i < 4; ++i) store_as(to + 64 * i, octet[i]);
    }
  }
}

template <class Isa>
void pack_values(const std::int32_t* quads, int padded, int first, int count, std::uint8_t* codes) {
  if constexpr (Isa::kLanes == 16)
    if (first == 0 && count == kPageTokens) return pack_whole_values<Isa>(quads, padded, codes);
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

// The same for codes of B bits in planes (layout.h): q[r] holds positions 4 r ... 4 r + 3 of each lane, as an I of
// tokens or as Bytes16 of channels.

// Every byte `byte`.
template <class T>
KV4_INLINE T every_byte(unsigned byte) {
  if constexpr (std::is_same_v<T, Bytes16>) return T{} + static_cast<std::uint8_t>(byte);
  else return T{} + static_cast<std::int32_t>(byte * 0x01010101u);
}

template <int kPlane>
inline constexpr int kPlaneVectors = kPlane < 2 ? 1 : kPlane / 2;

// Codes below 2^kPlane as vectors of a plane; of 1 bit those of lanes 0 to 7.
template <int kPlane, class T>
KV4_INLINE void join_plane(const T (&q)[4], T (&out)[kPlaneVectors<kPlane>]) {
  if constexpr (kPlane == 8) {
    KV4_UNROLL
    for (int r = 0; r < 4; ++r) out[r] = q[r];
  } else if constexpr (kPlane == 4) {
    out[0] = q[0] | q[1] << 4;
    out[1] = q[2] | q[3] << 4;
  } else {
    out[0] = q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6;
  }
}
// `from` bits of the code and what stands above it, of registers 0 ... 3.
template <int kPlane, class T>
KV4_INLINE T part_of_plane(const T (&in)[kPlaneVectors<kPlane>], int r) {
  const T mask = every_byte<T>((1u << kPlane) - 1);
  if constexpr (kPlane == 8) return in[r];
  else if constexpr (kPlane == 4) return in[r / 2] >> (4 * (r % 2)) & mask;
  else return in[0] >> (2 * r) & mask;
}

// Writes vectors of a plane, `stride` bytes apart, where `inside` is set.
template <class T, int N>
KV4_INLINE void put_plane(const T (&x)[N], bool whole, const T (&inside)[N], std::uint8_t* to, int stride) {
  KV4_UNROLL
  for (int j = 0; j < N; ++j, to += stride)
    store_as(to, whole ? x[j] : (load_as<T>(to) & ~inside[j]) | (x[j] & inside[j]));
}
template <class T, int N>
KV4_INLINE void get_plane(const std::uint8_t* from, int stride, T (&x)[N]) {
  KV4_UNROLL
  for (int j = 0; j < N; ++j) x[j] = load_as<T>(from + j * stride);
}

template <class Isa, int B>
void pack_key_planes(const std::int32_t* quads, int padded, int first, int count, std::uint8_t* codes) {
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes, kFirst = first_plane(B), kSecond = B - kFirst;
  const int end = first + count;
  std::uint8_t* const more = codes + second_plane(B, padded);
  for (int t = first / L * L; t < end; t += L) {
    const bool whole = t >= first && t + L <= end;
    const I lanes = lanes_between<Isa>(first - t, end - t);
    const int at = t % 16 * 4, block = t / 16 * (padded / kStepPositions);
    for (int s = 0; s < padded / kStepPositions; ++s) {
      I low[4], high[4], inside_low[4], inside_high[4];
      KV4_UNROLL
      for (int r = 0; r < 4; ++r) {
        const I q = load_as<I>(quads + (4 * s + r) * kPageTokens + t);
        low[r] = q & every_byte<I>((1u << kFirst) - 1);
        high[r] = (q >> kFirst) & every_byte<I>((1u << kSecond) - 1);
        inside_low[r] = lanes & every_byte<I>((1u << kFirst) - 1);
        inside_high[r] = lanes & every_byte<I>((1u << kSecond) - 1);
      }
      I x[kPlaneVectors<kFirst>], inside[kPlaneVectors<kFirst>];
      join_plane<kFirst>(low, x);
      join_plane<kFirst>(inside_low, inside);
      put_plane(x, whole, inside, codes + (block + s) * step_bytes(kFirst) + at, 64);
      if constexpr (kSecond > 0) {
        I y[1], within[1];
        join_plane<kSecond>(high, y);
        join_plane<kSecond>(inside_high, within);
        std::uint8_t* const to = more + (block + s) * step_bytes(kSecond);
        if constexpr (kSecond == 2) {
          put_plane(y, whole, within, to + at, 64);
        } else {  // lanes 8 to 15 have the odd bits of the bytes of lanes 0 to 7
          alignas(64) std::uint32_t bits[L], places[L];
          store_as(bits, y[0]);
          store_as(places, within[0]);
          for (int i = 0; i < L; ++i) {
            const int lane = t % 16 + i, odd = lane / 8;
            std::uint32_t word;
            std::memcpy(&word, to + lane % 8 * 4, sizeof word);
            word = (word & ~(places[i] << odd)) | (bits[i] & places[i]) << odd;
            std::memcpy(to + lane % 8 * 4, &word, sizeof word);
          }
        }
      }
    }
  }
}

template <class Isa, int B>
void unpack_key_planes(const std::uint8_t* codes, int padded, int first, int count, std::int32_t* quads) {
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes, kFirst = first_plane(B), kSecond = B - kFirst;
  const std::uint8_t* const more = codes + second_plane(B, padded);
  for (int t = first / L * L; t < first + count; t += L) {
    const int at = t % 16 * 4, block = t / 16 * (padded / kStepPositions);
    for (int s = 0; s < padded / kStepPositions; ++s) {
      I low[kPlaneVectors<kFirst>], high[1] = {};
      get_plane(codes + (block + s) * step_bytes(kFirst) + at, 64, low);
      const std::uint8_t* const from = more + (block + s) * step_bytes(kSecond);
      if constexpr (kSecond == 2) get_plane(from + at, 64, high);
      if constexpr (kSecond == 1) {
        alignas(64) std::uint32_t bits[L];
        for (int i = 0; i < L; ++i) {
          std::memcpy(bits + i, from + (t + i) % 8 * 4, sizeof *bits);
          bits[i] >>= (t + i) % 16 / 8;
        }
        high[0] = load_as<I>(bits);
      }
      KV4_UNROLL
      for (int r = 0; r < 4; ++r) {
        I q = part_of_plane<kFirst>(low, r);
        if constexpr (kSecond > 0) q |= part_of_plane<kSecond>(high, r) << kFirst;
        store_as(quads + (4 * s + r) * kPageTokens + t, q);
      }
    }
  }
}

template <int B>
void pack_value_planes(const std::int32_t* quads, int padded, int first, int count, std::uint8_t* codes) {
  constexpr int kFirst = first_plane(B), kSecond = B - kFirst, kSteps = kPageTokens / kStepPositions;
  const int end = first + count;
  std::uint8_t* const more = codes + second_plane(B, padded);
  for (int s = first / kStepPositions; s < (end + kStepPositions - 1) / kStepPositions; ++s) {
    const bool whole = kStepPositions * s >= first && kStepPositions * (s + 1) <= end;
    Bytes16 inside_low[4], inside_high[4];
    KV4_UNROLL
    for (int r = 0; r < 4; ++r) {
      const Bytes16 tokens = tokens_between(first - kStepPositions * s - 4 * r, end - kStepPositions * s - 4 * r);
      inside_low[r] = tokens & every_byte<Bytes16>((1u << kFirst) - 1);
      inside_high[r] = tokens & every_byte<Bytes16>((1u << kSecond) - 1);
    }
    Bytes16 inside[kPlaneVectors<kFirst>], within[1];
    join_plane<kFirst>(inside_low, inside);
    join_plane<kSecond == 0 ? 2 : kSecond>(inside_high, within);
    for (int q = 0; q < padded / 4; ++q) {
      Bytes16 low[4], high[4];
      KV4_UNROLL
      for (int r = 0; r < 4; ++r) {
        const Bytes16 x = transpose_bytes(load_as<Bytes16>(quads + q * kPageTokens + kStepPositions * s + 4 * r));
        low[r] = x & every_byte<Bytes16>((1u << kFirst) - 1);
        high[r] = (x >> (kFirst % 8)) & every_byte<Bytes16>((1u << kSecond) - 1);
      }
      Bytes16 x[kPlaneVectors<kFirst>];
      join_plane<kFirst>(low, x);
      const int step = q / 4 * kSteps + s;
      put_plane(x, whole, inside, codes + step * step_bytes(kFirst) + q % 4 * 16, 64);
      if constexpr (kSecond > 0) {
        Bytes16 y[1];
        join_plane<kSecond>(high, y);
        std::uint8_t* const to = more + step * step_bytes(kSecond);
        if constexpr (kSecond == 2) {
          put_plane(y, whole, within, to + q % 4 * 16, 64);
        } else {  // channels 8 to 15 have the odd bits of the bytes of 0 to 7
          const int odd = q % 4 / 2;
          std::uint8_t* const at = to + q % 2 * 16;
          store_as(at, (load_as<Bytes16>(at) & ~(within[0] << odd)) | (y[0] & within[0]) << odd);
        }
      }
    }
  }
}

template <int B>
void unpack_value_planes(const std::uint8_t* codes, int padded, int first, int count, std::int32_t* quads) {
  constexpr int kFirst = first_plane(B), kSecond = B - kFirst, kSteps = kPageTokens / kStepPositions;
  const std::uint8_t* const more = codes + second_plane(B, padded);
  for (int s = first / kStepPositions; s < (first + count + kStepPositions - 1) / kStepPositions; ++s) {
    for (int q = 0; q < padded / 4; ++q) {
      const int step = q / 4 * kSteps + s;
      Bytes16 low[kPlaneVectors<kFirst>], high[1] = {};
      get_plane(codes + step * step_bytes(kFirst) + q % 4 * 16, 64, low);
      if constexpr (kSecond == 2) get_plane(more + step * step_bytes(2) + q % 4 * 16, 64, high);
      if constexpr (kSecond == 1) high[0] = load_as<Bytes16>(more + step * step_bytes(1) + q % 2 * 16) >> (q % 4 / 2);
      KV4_UNROLL
      for (int r = 0; r < 4; ++r) {
        Bytes16 x = part_of_plane<kFirst>(low, r);
        if constexpr (kSecond > 0) x |= part_of_plane<kSecond>(high, r) << kFirst;
        store_as(quads + q * kPageTokens + kStepPositions * s + 4 * r, transpose_bytes(x));
      }
    }
  }
}

using PackCodes = void (*)(const std::int32_t* quads, int padded, int first, int count, std::uint8_t* codes);
using UnpackCodes = void (*)(const std::uint8_t* codes, int padded, int first, int count, std::int32_t* quads);

template <class Isa>
inline PackCodes pack_of(bool keys, int bits) {
  switch (bits) {
    case 2: return keys ? pack_key_planes<Isa, 2> : pack_value_planes<2>;
    case 3: return keys ? pack_key_planes<Isa, 3> : pack_value_planes<3>;
    case 6: return keys ? pack_key_planes<Isa, 6> : pack_value_planes<6>;
    case 8: return keys ? pack_key_planes<Isa, 8> : pack_value_planes<8>;
    default: return keys ? pack_keys<Isa> : pack_values<Isa>;
  }
}
template <class Isa>
inline UnpackCodes unpack_of(bool keys, int bits) {
  switch (bits) {
    case 2: return keys ? unpack_key_planes<Isa, 2> : unpack_value_planes<2>;
    case 3: return keys ? unpack_key_planes<Isa, 3> : unpack_value_planes<3>;
    case 6: return keys ? unpack_key_planes<Isa, 6> : unpack_value_planes<6>;
    case 8: return keys ? unpack_key_planes<Isa, 8> : unpack_value_planes<8>;
    default: return keys ? unpack_keys<Isa> : unpack_values;
  }
}

// A table of 16 kParts bytes, as vectors of SealOps::lookup16.
template <class Isa, int kParts>
struct ByteTable {
  typename Isa::I part[kParts];

  void set(const std::uint8_t* bytes) {
    for (int i = 0; i < kParts; ++i) part[i] = load_table16<Isa>(bytes + 16 * i);
  }
  // Of index bytes below 16 kParts.
  KV4_INLINE typename Isa::I lookup(typename Isa::I index) const {
    using I = typename Isa::I;
    using B = typename LaneTypes<Isa::kLanes>::B;
    const I low = index & 0x0f0f0f0f;
    const B which = (B)(index >> 4 & 0x0f0f0f0f);
    I found{};
    KV4_UNROLL
    for (int i = 0; i < kParts; ++i)
      found |= SealOps::lookup16(part[i], low) & (I)(which == static_cast<std::uint8_t>(i));
    return found;
  }
};

// How codes are looked up: among 16 in one vector, among 64 in four, as the numbers that they are, or with those before
// them.
enum class LookUp { one, four, none, trellis };
constexpr LookUp look_up_of(int bits) { return bits <= 4 ? LookUp::one : bits == 6 ? LookUp::four : LookUp::none; }

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
