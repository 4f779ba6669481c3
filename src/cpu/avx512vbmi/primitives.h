// VBMI (Ice Lake 2019, Zen 4 2022 and later) adds look-ups of bytes in a register of 64 to AVX-512's vectors. Included
// in a target region.
#pragma once

#include "cpu/avx512/primitives.h"

namespace kv4::cpu::avx512vbmi {

struct Isa : avx512::Isa {};

}  // namespace kv4::cpu::avx512vbmi
