#include "metal/order.h"

#include "backend/order.h"
#include "metal/layout.h"

namespace kv4::apple {
namespace {

struct InByte {
  std::size_t byte;
  int shift;
};

InByte key(int token, int channel) {
  return {key_byte(static_cast<std::uint32_t>(token), static_cast<std::uint32_t>(channel)), channel % 2 * 4};
}

// The values' order depends on their head dim.
auto value(int dim) {
  return [dim](int token, int channel) {
    return InByte{value_byte(static_cast<std::uint32_t>(token), static_cast<std::uint32_t>(channel), static_cast<std::uint32_t>(dim)),
                  channel % 2 * 4};
  };
}

std::uint32_t same(std::uint32_t code) { return code; }

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  if (k != nullptr) gather_codes(slice + spec.layout.k_codes, spec.key.dim, k, key, same);
  if (v != nullptr) gather_codes(slice + spec.layout.v_codes, spec.value.dim, v, value(spec.value.dim), same);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  if (k != nullptr) scatter_codes(k, spec.key.dim, slice + spec.layout.k_codes, spec.layout.k_code_bytes, key, same);
  if (v != nullptr)
    scatter_codes(v, spec.value.dim, slice + spec.layout.v_codes, spec.layout.v_code_bytes, value(spec.value.dim), same);
}

}  // namespace kv4::apple
