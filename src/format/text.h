// How messages write shapes.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace kv4 {

inline std::string shape_text(const std::array<std::int64_t, 4>& x) {
  return "[" + std::to_string(x[0]) + ", " + std::to_string(x[1]) + ", " + std::to_string(x[2]) + ", " + std::to_string(x[3]) + "]";
}

}  // namespace kv4
