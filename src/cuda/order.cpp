#include "cuda/order.h"

#include "backend/order.h"
#include "cuda/layout.h"

namespace kv4::cuda {
namespace {

// One side of a slice. Devices and their hosts are little-endian.
struct Side {
  int bits, dim, padded;
  bool keys;

  Side(const SideSpec& spec, bool of_keys)
      : bits(spec.levels.bits), dim(spec.dim), padded(pad_channels(spec.dim)), keys(of_keys) {}

  unsigned half() const { return 1u << (bits - 1); }
  auto places() const {
    return [this](int token, int channel, auto f) {
      const Place at = keys ? key_place(token, channel, padded) : value_place(token, channel);
      const auto part = [&](std::size_t word, int bit, int width, int low) {
        f(word * 4 + static_cast<std::size_t>(bit / 8), bit % 8, width, low);
      };
      if (!is_narrow(bits)) return part(word_index(at.fragment, at.lane), 4 * at.n, 4, 0);
      const int place = keys ? narrow_key(at.fragment, padded) : at.fragment, i = place % 4;
      const std::size_t group = static_cast<std::size_t>(place / 4 * kLanes * bits);
      part(group + static_cast<std::size_t>(at.lane * 2 + i / 2), 4 * at.n + i % 2 * 2, 2, 0);
      if (bits == 3) part(group + static_cast<std::size_t>(2 * kLanes + at.lane), 4 * at.n + i, 1, 2);
    };
  }

  void gather(const std::uint8_t* codes, std::uint8_t* canonical) const {
    gather_planes(codes, bits, dim, canonical, places(),
                  [this](unsigned stored) { return from_stored(stored, half()); });
  }
  void scatter(const std::uint8_t* canonical, std::uint8_t* codes) const {
    scatter_planes(canonical, bits, dim, padded, codes, places(),
                   [this](unsigned code) { return to_stored(code, half()); });
  }
};

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  if (k != nullptr) Side(spec.key, true).gather(slice + spec.layout.k_codes, k);
  if (v != nullptr) Side(spec.value, false).gather(slice + spec.layout.v_codes, v);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  if (k != nullptr) Side(spec.key, true).scatter(k, slice + spec.layout.k_codes);
  if (v != nullptr) Side(spec.value, false).scatter(v, slice + spec.layout.v_codes);
}

}  // namespace kv4::cuda
