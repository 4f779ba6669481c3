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

bool fours(const PageSpec& spec) { return spec.key.levels.bits == 4 && spec.value.levels.bits == 4; }

// One side of a slice.
struct Side {
  int bits, dim, padded;
  bool keys;
  std::size_t second;

  Side(const SideSpec& spec, bool of_keys)
      : bits(spec.levels.bits), dim(spec.dim), padded(pad_channels(spec.dim)), keys(of_keys),
        second(second_plane(bits, padded)) {}

  auto places() const {
    return [this](int token, int channel, auto f) {
      const int first = first_plane(bits);
      for (int plane = first, low = 0; low < bits; low += plane, plane = bits - first) {
        const Nibble at = keys ? key_place(plane, token, channel, padded) : value_place(plane, token, channel);
        f(at.byte + (low > 0 ? second : 0), at.shift, plane, low);
      }
    };
  }

  void gather(const std::uint8_t* codes, std::uint8_t* canonical) const {
    gather_planes(codes, bits, dim, canonical, places(), Order::from);
  }
  void scatter(const std::uint8_t* canonical, std::uint8_t* codes) const {
    scatter_planes(canonical, bits, dim, padded, codes, places(), Order::to);
  }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  if (fours(spec)) return slice_to_canonical<Order>(spec, slice, k, v);
  if (k != nullptr) Side(spec.key, true).gather(slice + spec.layout.k_codes, k);
  if (v != nullptr) Side(spec.value, false).gather(slice + spec.layout.v_codes, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  if (fours(spec)) return slice_from_canonical<Order>(spec, k, v, slice);
  if (k != nullptr) Side(spec.key, true).scatter(k, slice + spec.layout.k_codes);
  if (v != nullptr) Side(spec.value, false).scatter(v, slice + spec.layout.v_codes);
}

}  // namespace kv4::cpu
