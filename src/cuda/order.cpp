#include "cuda/order.h"

#include "backend/order.h"
#include "cuda/layout.h"

namespace kv4::cuda {
namespace {

// Devices and their hosts are little-endian.
struct Order {
  struct InByte {
    std::size_t byte;
    int shift;
  };
  static InByte in_byte(std::size_t word, int bit) { return {word * 4 + static_cast<std::size_t>(bit / 8), bit % 8}; }
  static InByte of_four(const Place& at) { return in_byte(word_index(at.fragment, at.lane), 4 * at.n); }
  static InByte key(int token, int channel, int dim) { return of_four(key_place(token, channel, pad_channels(dim))); }
  static InByte value(int token, int channel, int /*dim*/) { return of_four(value_place(token, channel)); }
  template <bool kKeys>
  static auto places(const SideSpec& side) {
    return [bits = side.levels.bits, padded = pad_channels(side.dim)](int token, int channel, auto f) {
      const Place at = kKeys ? key_place(token, channel, padded) : value_place(token, channel);
      const int place = kKeys ? narrow_key(at.fragment, padded) : at.fragment, i = place % 4;
      const auto part = [&](int word, int bit, int width, int low) {
        const InByte b = in_byte(static_cast<std::size_t>(place / 4 * kLanes * bits + word), bit);
        f(b.byte, b.shift, width, low);
      };
      part(at.lane * 2 + i / 2, 4 * at.n + i % 2 * 2, 2, 0);
      if (bits == 3) part(2 * kLanes + at.lane, 4 * at.n + i, 1, 2);
    };
  }
  static std::uint32_t from(std::uint32_t stored, std::uint32_t half) { return from_stored(stored, half); }
  static std::uint32_t to(std::uint32_t code, std::uint32_t half) { return to_stored(code, half); }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  slice_to_canonical<Order>(spec, slice, k, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  slice_from_canonical<Order>(spec, k, v, slice);
}

}  // namespace kv4::cuda
