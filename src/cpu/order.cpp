#include "cpu/order.h"

#include "backend/order.h"
#include "cpu/layout.h"

namespace kv4::cpu {
namespace {

struct Order {
  static Nibble key(int token, int channel, int dim) { return key_nibble(token, channel, pad_channels(dim)); }
  static Nibble value(int token, int channel, int /*dim*/) { return value_nibble(token, channel); }
  static std::uint32_t from(std::uint32_t stored) { return stored; }
  static std::uint32_t to(std::uint32_t code) { return code; }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  slice_to_canonical<Order>(spec, slice, k, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  slice_from_canonical<Order>(spec, k, v, slice);
}

}  // namespace kv4::cpu
