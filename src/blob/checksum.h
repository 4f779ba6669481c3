// CRC-32C: polynomial 0x1EDC6F41 (Castagnoli, Braeuer and Herrmann, IEEE Transactions on Communications 41(6), 1993),
// reflected, begun with all ones and inverted at the end, as iSCSI has it (RFC 3720; test vectors in its appendix B.4).
// It detects every burst error of up to 32 bits. Eight bytes at a time by tables: Kounavis and Berry, "A systematic
// approach to building high performance software-based CRC generators", ISCC 2005.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kv4 {

class Crc32c {
 public:
  void add(std::span<const std::byte> bytes) {
    std::size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
      std::uint32_t next = 0;
      for (std::size_t j = 0; j < 8; ++j) {
        const std::uint32_t mixed = j < 4 ? state_ >> 8 * j : 0;
        next ^= kTables[7 - j][(mixed ^ std::to_integer<std::uint32_t>(bytes[i + j])) & 255u];
      }
      state_ = next;
    }
    for (; i < bytes.size(); ++i)
      state_ = state_ >> 8 ^ kTables[0][(state_ ^ std::to_integer<std::uint32_t>(bytes[i])) & 255u];
  }
  std::uint32_t value() const { return ~state_; }

 private:
  using Tables = std::array<std::array<std::uint32_t, 256>, 8>;
  // tables[j][b]: byte b followed by j zero bytes.
  static constexpr Tables make_tables() {
    Tables t{};
    for (std::uint32_t b = 0; b < 256; ++b) {
      std::uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1u ? 0x82f63b78u : 0u);
      t[0][b] = crc;
    }
    for (std::size_t j = 1; j < 8; ++j)
      for (std::size_t b = 0; b < 256; ++b) t[j][b] = t[j - 1][b] >> 8 ^ t[0][t[j - 1][b] & 255u];
    return t;
  }
  static const Tables kTables;

  std::uint32_t state_ = ~0u;
};

inline constexpr Crc32c::Tables Crc32c::kTables = Crc32c::make_tables();

inline std::uint32_t crc32c(std::span<const std::byte> bytes) {
  Crc32c crc;
  crc.add(bytes);
  return crc.value();
}

}  // namespace kv4
