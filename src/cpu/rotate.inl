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
