// I8MM shares NEON's vectors: it adds integer matrix products only (Armv8.6; Neoverse V1 and N2 2021, Apple M2 2022
// and later). Included in a target region.
#pragma once

#include "cpu/neon/primitives.h"

namespace kv4::cpu::i8mm {

struct Isa : neon::Isa {};

}  // namespace kv4::cpu::i8mm
