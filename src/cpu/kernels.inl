// The generic algorithms, compiled once per instruction set: the including file defines KV4_ISA
// and provides kv4::cpu::KV4_ISA::Isa and isa_supported(). Everything here lives in that
// namespace, so no two instruction sets share a symbol.
#include "cpu/attend.h"

#include "cpu/rotate.inl"
#include "cpu/seal.inl"
#include "cpu/dequantise.inl"
#include "cpu/attend_exact.inl"
#include "cpu/attend_pages.inl"
#include "cpu/attend_tiles.inl"

#define KV4_STRING_(x) #x
#define KV4_STRING(x) KV4_STRING_(x)

namespace kv4::cpu::KV4_ISA {

const Kernels kernels = {
    .name = KV4_STRING(KV4_ISA),
    .supported = isa_supported,
    .seal = seal<Isa>,
    .seal_scratch = seal_scratch<Isa>,
    .dequantise = dequantise<Isa>,
    .dequantise_scratch = dequantise_scratch<Isa>,
    .rotate = rotate<Isa>,
    .rotate_dual = rotate_dual<Isa>,
    .unrotate = unrotate<Isa>,
    .rotate_scratch = rotate_scratch<Isa>,
    .attend_pages = attend_any_rows<Isa>,
    .operand_bytes = Dot::kOctetBytes / 8,
    .tiles_scratch = tiles_scratch<Isa>,
    .attend_exact = attend_exact<Isa>,
};

}  // namespace kv4::cpu::KV4_ISA
