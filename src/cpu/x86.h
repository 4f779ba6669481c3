// A processor feature that Clang's __builtin_cpu_supports does not know by name.
#pragma once

#include <cpuid.h>

namespace kv4::cpu {

inline bool supports_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace kv4::cpu
