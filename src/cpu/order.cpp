#include "cpu/order.h"

#include "backend/order.h"
#include "cpu/layout.h"

namespace kv4::cpu {
namespace {

struct Order {
  static Nibble key(int token, int channel, int dim) { return key_nibble(token, channel, pad_channels(dim)); }
  static Nibble value(int token, int channel, int /*dim*/) { return value_nibble(token, channel); }
  template <bool kKeys>
  static auto places(const SideSpec& side) {
    const int bits = side.levels.bits, first = first_plane(bits), padded = pad_channels(side.dim);
    return [=](int token, int channel, auto f) {
      for (int plane = first, low = 0; low < bits; low += plane, plane = bits - first) {
        const Nibble at = kKeys ? key_place(plane, token, channel, padded) : value_place(plane, token, channel);
        f(at.byte + (low > 0 ? second_plane(bits, padded) : 0), at.shift, plane, low);
      }
    };
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

}  // namespace kv4::cpu
