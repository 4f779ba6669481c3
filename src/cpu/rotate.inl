// Rotations of contiguous rows (isa.h): kLanes rows are transposed into lanes, rotated
// (rotate_lanes.inl) and transposed back. Per kLanes rows the transposes add 2 * (d / kLanes) square
// transposes, 2 d loads and 2 d stores to the rotation's own work. Few rows, those of a decoding query
// group, take narrower vectors: as many operations, but transposes with less to shuffle and less memory.
// Four rows of d = 256 over 256 tokens: 65.9 to 56.9 ns a token (Emerald Rapids, one thread).
#include "cpu/rotate_lanes.inl"

namespace kv4::cpu::KV4_ISA {

// x[c][lane] = in[lane][c] for lane < rows, 0 beyond: rows past the last are never read. A last
// block of channels that would pass d begins earlier instead (d >= kLanes for every head dim).
template <class Isa>
KV4_INLINE void load_rows(const float* in, int rows, int d, float* x) {
  for (int next = 0; next < d; next += Isa::kLanes) {
    const int c = next + Isa::kLanes <= d ? next : d - Isa::kLanes;
    typename Isa::F v[Isa::kLanes];
    if (rows == Isa::kLanes) {
      KV4_UNROLL
      for (int i = 0; i < Isa::kLanes; ++i) v[i] = Isa::load(in + static_cast<std::ptrdiff_t>(i) * d + c);
    } else {
      KV4_UNROLL
      for (int i = 0; i < Isa::kLanes; ++i)
        v[i] = i < rows ? Isa::load(in + static_cast<std::ptrdiff_t>(i) * d + c) : Isa::set1(0);
    }
    Isa::transpose(v);
    KV4_UNROLL
    for (int i = 0; i < Isa::kLanes; ++i) store_channel<Isa>(x, c + i, v[i]);
  }
}

// out[lane][c] = x[c][lane] for lane < rows: rows past the last are never written.
template <class Isa>
KV4_INLINE void store_rows(const float* x, int rows, int d, float* out) {
  for (int next = 0; next < d; next += Isa::kLanes) {
    const int c = next + Isa::kLanes <= d ? next : d - Isa::kLanes;
    typename Isa::F v[Isa::kLanes];
    KV4_UNROLL
    for (int i = 0; i < Isa::kLanes; ++i) v[i] = load_channel<Isa>(x, c + i);
    Isa::transpose(v);
    if (rows == Isa::kLanes) {
      KV4_UNROLL
      for (int i = 0; i < Isa::kLanes; ++i) Isa::store(out + static_cast<std::ptrdiff_t>(i) * d + c, v[i]);
    } else {
      KV4_UNROLL
      for (int i = 0; i < Isa::kLanes; ++i)
        if (i < rows) Isa::store(out + static_cast<std::ptrdiff_t>(i) * d + c, v[i]);
    }
  }
}

// What rotations need of an instruction set, in vectors of four and of eight lanes.
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
template <class V>
struct Narrow {
  using F = V;
  typedef V Anywhere __attribute__((aligned(4), may_alias));
  static constexpr int kLanes = sizeof(V) / sizeof(float);

  static KV4_INLINE F load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }
  static KV4_INLINE void store(float* p, F v) { *reinterpret_cast<Anywhere*>(p) = v; }
  static KV4_INLINE F set1(float x) { return x - F{}; }  // no operation, unlike a sum with 0
  static KV4_INLINE F fma(F a, F b, F c) { return a * b + c; }
};
// Row i of v becomes column i: blocks of 1, 2 and 4 lanes of two rows change places.
struct Quads : Narrow<Floats4> {
  static KV4_INLINE void transpose(F (&v)[4]) {
    const F a = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6), b = __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
    const F c = __builtin_shufflevector(v[2], v[3], 0, 4, 2, 6), d = __builtin_shufflevector(v[2], v[3], 1, 5, 3, 7);
    v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), v[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    v[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5), v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  }
};
struct Octets : Narrow<Floats8> {
  static KV4_INLINE void transpose(F (&v)[8]) {
    KV4_UNROLL
    for (int i = 0; i < 8; i += 2) {
      const F a = v[i], b = v[i + 1];
      v[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
      v[i + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    KV4_UNROLL
    for (int i = 0; i < 8; ++i) {
      if ((i & 2) != 0) continue;
      const F a = v[i], b = v[i + 2];
      v[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      v[i + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    KV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const F a = v[i], b = v[i + 4];
      v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
      v[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
};

template <class Isa>
std::size_t rotate_scratch(int dim) {
  const std::size_t lanes = static_cast<std::size_t>(dim) * Isa::kLanes;
  return ((lanes + 15) / 16 * 16 + rotate_lanes_scratch<Isa>(dim)) * sizeof(float);
}

// At most kLanes rows.
template <class Isa>
void rotate_few(const Rotation& r, Map map, const float* in, float* out, int rows, void* scratch) {
  const int d = r.dim();
  float* x = static_cast<float*>(scratch);
  float* work = x + (static_cast<std::size_t>(d) * Isa::kLanes + 15) / 16 * 16;
  load_rows<Isa>(in, rows, d, x);
  rotate_lanes<Isa>(r, map, x, work);
  store_rows<Isa>(x, rows, d, out);
}

template <class Isa>
void rotate_rows(const Rotation& r, Map map, const float* in, float* out, std::int64_t rows, void* scratch) {
  const int d = r.dim();
  if (r.kind() == RotationKind::identity) {
    if (in != out && rows > 0) std::memmove(out, in, sizeof(float) * static_cast<std::size_t>(rows) * d);
    return;
  }
  for (std::int64_t row = 0; row < rows; row += Isa::kLanes) {
    const int count = static_cast<int>(rows - row < Isa::kLanes ? rows - row : Isa::kLanes);
    const float* from = in + row * d;
    float* to = out + row * d;
    if constexpr (Isa::kLanes > Quads::kLanes)
      if (count <= Quads::kLanes) {
        rotate_few<Quads>(r, map, from, to, count, scratch);
        continue;
      }
    if constexpr (Isa::kLanes > Octets::kLanes)
      if (count <= Octets::kLanes) {
        rotate_few<Octets>(r, map, from, to, count, scratch);
        continue;
      }
    rotate_few<Isa>(r, map, from, to, count, scratch);
  }
}

template <class Isa>
void rotate(const Rotation& r, const float* in, float* out, std::int64_t rows, void* scratch) {
  rotate_rows<Isa>(r, Map::forward, in, out, rows, scratch);
}
template <class Isa>
void rotate_dual(const Rotation& r, const float* in, float* out, std::int64_t rows, void* scratch) {
  rotate_rows<Isa>(r, Map::dual, in, out, rows, scratch);
}
template <class Isa>
void unrotate(const Rotation& r, const float* in, float* out, std::int64_t rows, void* scratch) {
  rotate_rows<Isa>(r, Map::inverse, in, out, rows, scratch);
}

}  // namespace kv4::cpu::KV4_ISA
