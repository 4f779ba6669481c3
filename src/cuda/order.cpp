#include "cuda/order.h"

#include <cstring>

#include "cuda/layout.h"

namespace kv4::cuda {
namespace {

template <class At>
void gather(const std::uint8_t* codes, int dim, std::uint8_t* canonical, At at) {
  const auto code = [&](int j, int c) {
    const Nibble n = at(j, c);
    std::uint32_t word;
    std::memcpy(&word, codes + std::size_t{n.word} * 4, 4);
    return from_stored(word >> n.shift & 15);
  };
  for (int j = 0; j < kPageTokens; ++j)
    for (int c = 0; c < dim; c += 2) *canonical++ = static_cast<std::uint8_t>(code(j, c) | code(j, c + 1) << 4);
}

template <class At>
void scatter(const std::uint8_t* canonical, int dim, std::uint8_t* codes, std::size_t bytes, At at) {
  std::memset(codes, static_cast<int>(to_stored(0) * 0x11), bytes);
  const auto put = [&](int j, int c, std::uint32_t code) {
    const Nibble n = at(j, c);
    std::uint32_t word;
    std::memcpy(&word, codes + std::size_t{n.word} * 4, 4);
    word = (word & ~(std::uint32_t{15} << n.shift)) | to_stored(code) << n.shift;
    std::memcpy(codes + std::size_t{n.word} * 4, &word, 4);
  };
  for (int j = 0; j < kPageTokens; ++j) {
    for (int c = 0; c < dim; c += 2) {
      const std::uint8_t pair = *canonical++;
      put(j, c, pair & 15);
      put(j, c + 1, pair >> 4);
    }
  }
}

}  // namespace

void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) {
  const int padded = pad_channels(spec.key.dim);
  if (k != nullptr)
    gather(slice + spec.layout.k_codes, spec.key.dim, k, [=](int j, int c) { return key_nibble(j, c, padded); });
  if (v != nullptr) gather(slice + spec.layout.v_codes, spec.value.dim, v, value_nibble);
}

void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) {
  const int padded = pad_channels(spec.key.dim);
  if (k != nullptr)
    scatter(k, spec.key.dim, slice + spec.layout.k_codes, spec.layout.k_code_bytes,
            [=](int j, int c) { return key_nibble(j, c, padded); });
  if (v != nullptr)
    scatter(v, spec.value.dim, slice + spec.layout.v_codes, spec.layout.v_code_bytes, value_nibble);
}

}  // namespace kv4::cuda
