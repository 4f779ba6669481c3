// The generic algorithms, compiled once per instruction set: the including file defines KV4_ISA
// and provides kv4::cpu::KV4_ISA::Isa and isa_supported(). Everything here lives in that
// namespace, so no two instruction sets share a symbol.
//
// An instruction set that adds integer products alone to another's vectors defines KV4_EXTENDS, the other's name: what
// has no such products is compiled there, and is half of all code and of the time that a build takes. One whose matrix
// unit takes no pages of a trellis defines KV4_TRELLIS_BY, the name of one that has the same vectors.
#include "cpu/attend.h"

#if defined(KV4_EXTENDS)
#include "cpu/rows.inl"
#define KV4_VECTORS KV4_EXTENDS
#else
#include "cpu/rotate.inl"
#include "cpu/seal.inl"
#include "cpu/dequantise.inl"
#include "cpu/attend_exact.inl"
#define KV4_VECTORS KV4_ISA
#endif
#include "cpu/attend_pages.inl"
#include "cpu/attend_tiles.inl"

#if defined(KV4_TRELLIS_BY)
#define KV4_TRELLIS &KV4_TRELLIS_BY::kernels
#else
#define KV4_TRELLIS nullptr
#endif

#define KV4_STRING_(x) #x
#define KV4_STRING(x) KV4_STRING_(x)

namespace kv4::cpu::KV4_VECTORS {

#if defined(KV4_EXTENDS)
#define KV4_KERNEL(type, name, arguments) \
  template <class Isa>                    \
  type name arguments;                    \
  extern template type name<Isa> arguments;
#else
#define KV4_KERNEL(type, name, arguments) template type name<Isa> arguments;
#endif
KV4_KERNEL(void, seal, (const PageSpec&, const SealJob&, int, std::uint8_t*, void*))
KV4_KERNEL(std::size_t, seal_scratch, (const PageSpec&))
KV4_KERNEL(void, dequantise,
           (const PageSpec&, const std::uint8_t*, const float*, const float*, int, int, float*, float*, void*))
KV4_KERNEL(std::size_t, dequantise_scratch, (const PageSpec&))
KV4_KERNEL(void, rotate, (const Rotation&, const float*, float*, std::int64_t, void*))
KV4_KERNEL(void, rotate_dual, (const Rotation&, const float*, float*, std::int64_t, void*))
KV4_KERNEL(void, unrotate, (const Rotation&, const float*, float*, std::int64_t, void*))
KV4_KERNEL(std::size_t, rotate_scratch, (int))
KV4_KERNEL(void, attend_exact, (const ExactTask&))
#undef KV4_KERNEL

}  // namespace kv4::cpu::KV4_VECTORS

namespace kv4::cpu::KV4_ISA {

const Kernels kernels = {
    .name = KV4_STRING(KV4_ISA),
    .supported = isa_supported,
    .seal = KV4_VECTORS::seal<KV4_VECTORS::Isa>,
    .seal_scratch = KV4_VECTORS::seal_scratch<KV4_VECTORS::Isa>,
    .dequantise = KV4_VECTORS::dequantise<KV4_VECTORS::Isa>,
    .dequantise_scratch = KV4_VECTORS::dequantise_scratch<KV4_VECTORS::Isa>,
    .rotate = KV4_VECTORS::rotate<KV4_VECTORS::Isa>,
    .rotate_dual = KV4_VECTORS::rotate_dual<KV4_VECTORS::Isa>,
    .unrotate = KV4_VECTORS::unrotate<KV4_VECTORS::Isa>,
    .rotate_scratch = KV4_VECTORS::rotate_scratch<KV4_VECTORS::Isa>,
    .attend_pages = attend_any_rows<Isa>,
    .bytes = kTakesBytes<Isa>,
    .operand_bytes = Dot::kOctetBytes / 8,
    .tiles_scratch = tiles_scratch<Isa>,
    .attend_exact = KV4_VECTORS::attend_exact<KV4_VECTORS::Isa>,
    .trellis = KV4_TRELLIS,
};

}  // namespace kv4::cpu::KV4_ISA
