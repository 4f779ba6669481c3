// simdgroup_matrix: 8 x 8, two elements a lane. Metal does not specify which two: thread_elements() is left out, so
// that no kernel depends on it.
#pragma once

namespace metal {
template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "simdgroup_matrix: expected 8 x 8");
  T element[2];
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T all) : element{all, all} {}
};
template <class T, int C, int R>
inline simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T all) {
  return simdgroup_matrix<T, C, R>(all);
}
}  // namespace metal
typedef metal::simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef metal::simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef metal::simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

namespace emu {

struct MatrixOperands {
  const void *a, *b, *c;
  void* d;
};
inline bool all_active(const char* name, int line, unsigned active) {
  if (active != ~0u) report("inactive-lanes", "%s (line %d) without all 32 lanes", name, line);
  return active == ~0u;
}
template <class T>
inline float matrix_element(void** lanes, const void* MatrixOperands::*which, int i) {
  return static_cast<float>(static_cast<const T*>(static_cast<MatrixOperands*>(lanes[i / 2])->*which)[i & 1]);
}

namespace names {

template <class T>
using tile = metal::simdgroup_matrix<T, 8, 8>;

#define EMU_TILE_SYNC(name)                                                                                   \
  const Site site = EMU_HERE;                                                                                 \
  emu::collective(name, site, nullptr, [](void**, unsigned active, void* s) {                                 \
    all_active(name, static_cast<const Site*>(s)->line, active); }, const_cast<Site*>(&site));                     \
  const uint lane = emu::self().lane;

// Each lane reads its two elements itself, so that the checker sees who read what.
template <class T, class P>
EMU_OPERATION void simdgroup_load(tile<T>& m, const P* from, ulong stride = 8, ulong2 origin = ulong2{0, 0}, bool transposed = false, EMU_SITE) {
  static_assert(is_same<T, P>::value, "simdgroup_load: the element types differ");
  EMU_TILE_SYNC("simdgroup_load")
  for (uint k = 0; k < 2; ++k) {
    const ulong r = (2 * lane + k) / 8, c = (2 * lane + k) % 8;
    m.element[k] = transposed ? from[(c + origin.x) * stride + r + origin.y] : from[(r + origin.y) * stride + c + origin.x];
  }
}
template <class T, class P>
EMU_OPERATION void simdgroup_store(tile<T> m, P* to, ulong stride = 8, ulong2 origin = ulong2{0, 0}, bool transposed = false, EMU_SITE) {
  static_assert(is_same<T, P>::value, "simdgroup_store: the element types differ");
  EMU_TILE_SYNC("simdgroup_store")
  for (uint k = 0; k < 2; ++k) {
    const ulong r = (2 * lane + k) / 8, c = (2 * lane + k) % 8;
    (transposed ? to[(c + origin.x) * stride + r + origin.y] : to[(r + origin.y) * stride + c + origin.x]) = m.element[k];
  }
}
// d = a * b + c, sums in float.
template <class D, class A, class B, class C>
EMU_OPERATION void simdgroup_multiply_accumulate(tile<D>& d, const tile<A>& a, const tile<B>& b, const tile<C>& c, EMU_SITE) {
  MatrixOperands lane{a.element, b.element, c.element, d.element};
  const Site site = EMU_HERE;
  emu::collective("simdgroup_multiply_accumulate", site, &lane, [](void** lanes, unsigned active, void* s) {
    if (!all_active("simdgroup_multiply_accumulate", static_cast<const Site*>(s)->line, active)) return;
    float left[64], right[64], result[64];
    for (int i = 0; i < 64; ++i) {
      left[i] = matrix_element<A>(lanes, &MatrixOperands::a, i);
      right[i] = matrix_element<B>(lanes, &MatrixOperands::b, i);
      result[i] = matrix_element<C>(lanes, &MatrixOperands::c, i);
    }
    for (int r = 0; r < 8; ++r)
      for (int k = 0; k < 8; ++k)
        for (int q = 0; q < 8; ++q) result[r * 8 + q] += left[r * 8 + k] * right[k * 8 + q];
    for (int i = 0; i < 64; ++i)
      static_cast<D*>(static_cast<MatrixOperands*>(lanes[i / 2])->d)[i & 1] = static_cast<D>(result[i]);
  }, const_cast<Site*>(&site));
}
template <class D, class A, class B>
EMU_OPERATION void simdgroup_multiply(tile<D>& d, const tile<A>& a, const tile<B>& b, EMU_SITE) {
  names::simdgroup_multiply_accumulate(d, a, b, tile<D>(D(0)), file_, line_, column_);
}
#undef EMU_TILE_SYNC

}  // namespace names
}  // namespace emu
