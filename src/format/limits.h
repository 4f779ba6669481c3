// How far positions go.
#pragma once

#include <cstdint>

namespace kv4 {

// Tokens that a sequence may have: positions and their sums stay far from the ends of int64.
constexpr std::int64_t kMostTokens = std::int64_t{1} << 36;

}  // namespace kv4
