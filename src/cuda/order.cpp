#include "cuda/order.h"

#include "backend/order.h"
#include "cuda/layout.h"

namespace kv4::cuda {
namespace {

struct Order {
  struct InByte {
    std::size_t byte;
    int shift;
  };
  // A word's nibbles in bytes: devices and their hosts are little-endian.
  static InByte in_byte(Nibble n) {
    return {std::size_t{n.word} * 4 + static_cast<std::size_t>(n.shift / 8), n.shift % 8};
  }
  static InByte key(int token, int channel, int dim) { return in_byte(key_nibble(token, channel, pad_channels(dim))); }
  static InByte value(int token, int channel, int /*dim*/) { return in_byte(value_nibble(token, channel)); }
  static std::uint32_t from(std::uint32_t stored) { return from_stored(stored); }
  static std::uint32_t to(std::uint32_t code) { return to_stored(code); }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  slice_to_canonical<Order>(spec, slice, k, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  slice_from_canonical<Order>(spec, k, v, slice);
}

}  // namespace kv4::cuda
