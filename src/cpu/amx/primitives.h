// AMX shares AVX-512's vectors: it adds the matrix unit (Sapphire Rapids 2023 and later). Included in a target region.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/avx512/primitives.h"

namespace kv4::cpu::amx {

struct Isa : avx512::Isa {
  using Tiles = amx::Tiles;
};

}  // namespace kv4::cpu::amx
