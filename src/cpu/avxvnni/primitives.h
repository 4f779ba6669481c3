// AVX-VNNI shares AVX2's vectors: it adds integer dot products only (Alder Lake 2021, Zen 5 2024 and later).
// Included in a target region.
#pragma once

#include "cpu/avx2/primitives.h"

namespace kv4::cpu::avxvnni {

struct Isa : avx2::Isa {};

}  // namespace kv4::cpu::avxvnni
