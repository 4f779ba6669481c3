// Queries and weights are integers as AVX-512's; the matrix unit multiplies them. Included in a target region.
#pragma once

#include "cpu/avx512/dot.h"

namespace kv4::cpu::amx {

using Dot = avx512::Dot;

}  // namespace kv4::cpu::amx
