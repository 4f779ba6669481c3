// Which map of a rotation a kernel applies.
#pragma once

#include <cstdint>

#include "rotation/rotation.h"

namespace kv4::cpu {

enum class Map : std::uint8_t {
  forward,  // R: keys, values
  dual,     // R^-T: queries
  inverse   // R^-1: outputs
};

}  // namespace kv4::cpu
