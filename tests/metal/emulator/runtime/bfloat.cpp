// Conversions to bfloat that clang calls and Debian's libgcc lacks. Round to nearest, ties to even.
#include <cstdint>
#include <cstring>

namespace {
__bf16 rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t high = static_cast<uint16_t>(
      (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  std::memcpy(&result, &high, sizeof high);
  return result;
}
}  // namespace

extern "C" {
__bf16 __truncsfbf2(float x) { return rounded(x); }
// Rounds twice, through float. No kernel can observe it: MSL has no double.
__bf16 __truncdfbf2(double x) { return rounded(static_cast<float>(x)); }
}
