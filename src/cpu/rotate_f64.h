// Rotation of one vector in binary64, through the same plan as the float kernels: once per page,
// for the mean.
#pragma once

#include <cstddef>

#include "cpu/rotate.h"

namespace kv4::cpu {

// Doubles of scratch that rotate_f64 needs for d channels.
constexpr std::size_t rotate_f64_scratch(int d) { return 2 * static_cast<std::size_t>(d); }

// x [d], in place; scratch [rotate_f64_scratch(d)].
void rotate_f64(const Rotation& r, Map map, double* x, double* scratch);

}  // namespace kv4::cpu
