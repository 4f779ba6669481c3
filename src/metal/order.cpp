#include "metal/order.h"

#include "backend/order.h"
#include "metal/layout.h"

namespace kv4::apple {
namespace {

struct Order {
  struct InByte {
    std::size_t byte;
    int shift;
  };
  static InByte key(int token, int channel, int /*dim*/) {
    return {key_byte(static_cast<std::uint32_t>(token), static_cast<std::uint32_t>(channel)), channel % 2 * 4};
  }
  static InByte value(int token, int channel, int dim) {
    return {value_byte(static_cast<std::uint32_t>(token), static_cast<std::uint32_t>(channel),
                       static_cast<std::uint32_t>(dim)),
            channel % 2 * 4};
  }
  static std::uint32_t from(std::uint32_t stored, std::uint32_t /*half*/) { return stored; }
  static std::uint32_t to(std::uint32_t code, std::uint32_t /*half*/) { return code; }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  slice_to_canonical<Order>(spec, slice, k, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  slice_from_canonical<Order>(spec, k, v, slice);
}

}  // namespace kv4::apple
