// Bytes of a page: layout, 16-bit floats, and the CPU's code order against the canonical one.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cases.h"
#include "cpu/layout.h"
#include "cpu/order.h"
#include "format/convert.h"
#include "format/page.h"
#include "guard.h"

namespace kv4 {
namespace {

TEST(PageLayout, PartsFollowEachOther) {
  for (int dk : cases::kRotationDims) {
    for (int dv : cases::kRotationDims) {
      for (int groups : {1, 2, 4}) {
        for (bool mean : {false, true}) {
          const auto l = kv4_make_page_layout(dk, dv, groups, 1, mean, cpu::pad_channels(dk), cpu::pad_channels(dv));
          EXPECT_EQ(l.k_scales, l.k_codes + 32 * cpu::pad_channels(dk));
          EXPECT_EQ(l.k_mean, l.k_scales + 128 * groups);
          EXPECT_GE(l.v_codes, l.k_mean + (mean ? 2 * dk : 0));
          EXPECT_EQ(l.v_scales, l.v_codes + 32 * cpu::pad_channels(dv));
          EXPECT_GE(l.head_bytes, l.v_scales + 128);
          for (std::uint32_t offset : {l.k_codes, l.k_scales, l.k_mean, l.v_codes, l.v_scales})
            EXPECT_EQ(offset % 16, 0u);
          EXPECT_EQ(l.head_bytes % 64, 0u);
          for (unsigned bits : {2u, 3u, 6u, 8u}) {
            const auto w = kv4_make_page_layout(dk, dv, groups, 1, mean, dk, dv, bits, 4);
            EXPECT_EQ(w.k_code_bytes, 8 * bits * static_cast<unsigned>(dk));
            EXPECT_EQ(w.v_code_bytes, 32u * static_cast<unsigned>(dv));
            for (std::uint32_t offset : {w.k_scales, w.k_mean, w.v_codes, w.v_scales}) EXPECT_EQ(offset % 16, 0u);
          }
          for (unsigned rows : {0u, 1u, 2u}) {
            const unsigned channels = static_cast<unsigned>(cpu::pad_channels(dk));
            const auto w = kv4_make_page_layout(dk, dv, groups, 1, mean, channels, cpu::pad_channels(dv), 4, 4, rows);
            const auto second = kv4_make_second_layout(w, channels, rows);
            EXPECT_EQ(w.v_scales, l.v_scales);  // what came before is where it was
            EXPECT_EQ(w.head_bytes % 64, 0u);
            if (rows == 0) {
              EXPECT_EQ(w.head_bytes, l.head_bytes);
              continue;
            }
            EXPECT_EQ(second.codes, l.v_scales + 128);
            EXPECT_EQ(second.row_bytes, channels / 2);
            EXPECT_GE(second.scales, second.codes + rows * channels / 2);
            EXPECT_GE(second.places, second.scales + rows * static_cast<unsigned>(groups) * 2);
            EXPECT_GE(w.head_bytes, second.places + rows);
            EXPECT_LT(w.head_bytes, second.places + rows + 64);
            for (std::uint32_t offset : {second.codes, second.scales, second.places}) EXPECT_EQ(offset % 16, 0u);
          }
        }
      }
    }
  }
}

// The value of an fp16 by its definition.
double half_value(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

TEST(Convert, HalfEveryValue) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const std::uint16_t h = static_cast<std::uint16_t>(bits);
    const float x = f16_to_f32(h);
    if ((bits & 0x7c00) == 0x7c00) {
      EXPECT_EQ(std::isnan(x), (bits & 0x3ff) != 0);
      EXPECT_EQ(std::isinf(x), (bits & 0x3ff) == 0);
      continue;
    }
    ASSERT_EQ(static_cast<double>(x), half_value(bits));
    ASSERT_EQ(f32_to_f16(x), h);
  }
}

TEST(Convert, HalfRoundsToNearestEven) {
  for (int bits = 0; bits < 0x7bff; ++bits) {
    const double low = half_value(bits), high = half_value(bits + 1), middle = (low + high) / 2;
    const float m = static_cast<float>(middle);  // exact: one more bit than fp16
    ASSERT_EQ(static_cast<double>(m), middle);
    ASSERT_EQ(f32_to_f16(m), bits + bits % 2);
    ASSERT_EQ(f32_to_f16(-m), 0x8000 + bits + bits % 2);
    ASSERT_EQ(f32_to_f16(std::nextafter(m, 0.0f)), bits);
    ASSERT_EQ(f32_to_f16(std::nextafter(m, 1e9f)), bits + 1);
  }
  EXPECT_EQ(f32_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(f32_to_f16(1e30f), 0x7bff);
  EXPECT_EQ(f32_to_f16(-INFINITY), 0xfbff);
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(NAN))));
}

TEST(Convert, Bfloat) {
  for (int bits = 0; bits < 0x7f80; ++bits) {
    const std::uint16_t h = static_cast<std::uint16_t>(bits);
    const float x = bf16_to_f32(h), next = bf16_to_f32(static_cast<std::uint16_t>(bits + 1));
    ASSERT_EQ(f32_to_bf16(x), h);
    if (bits == 0x7f7f) continue;
    const float middle = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) + 0x8000u);
    ASSERT_EQ(f32_to_bf16(middle), bits + bits % 2);
    ASSERT_EQ(f32_to_bf16(std::nextafter(middle, next)), bits + 1);
  }
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(NAN))));
  EXPECT_TRUE(std::isinf(bf16_to_f32(f32_to_bf16(INFINITY))));
}

PageSpec page(int dk, int dv) {
  PageSpec spec;
  spec.key.dim = dk;
  spec.value.dim = dv;
  spec.layout = kv4_make_page_layout(dk, dv, 1, 1, true, cpu::pad_channels(dk), cpu::pad_channels(dv));
  return spec;
}

TEST(Order, EveryNibbleHasOnePlace) {
  for (int d : cases::kRotationDims) {
    const int padded = cpu::pad_channels(d);
    std::vector<int> keys(64 * padded), values(64 * padded);
    for (int j = 0; j < kPageTokens; ++j) {
      for (int c = 0; c < padded; ++c) {
        const cpu::Nibble k = cpu::key_nibble(j, c, padded), v = cpu::value_nibble(j, c);
        ASSERT_LT(k.byte, 32u * padded);
        ASSERT_LT(v.byte, 32u * padded);
        ++keys[2 * k.byte + k.shift / 4];
        ++values[2 * v.byte + v.shift / 4];
      }
    }
    for (int n = 0; n < 64 * padded; ++n) ASSERT_TRUE(keys[n] == 1 && values[n] == 1) << d << " " << n;
  }
}

TEST(Order, CanonicalRoundTrip) {
  for (int dk : cases::kRotationDims) {
    const int dv = dk == 512 ? 34 : dk + (dk % 4 == 0 ? 16 : 2);
    const PageSpec spec = page(dk, dv);
    cases::Random random(dk);
    std::vector<std::uint8_t> k(32 * dk), v(32 * dv);
    for (auto& b : k) b = static_cast<std::uint8_t>(random.bits());
    for (auto& b : v) b = static_cast<std::uint8_t>(random.bits());
    tests::Guarded slice(spec.layout.head_bytes), k2(k.size()), v2(v.size());
    cpu::codes_from_canonical(spec, k.data(), v.data(), slice.data());
    cpu::codes_to_canonical(spec, slice.data(), k2.data(), v2.data());
    EXPECT_EQ(std::memcmp(k.data(), k2.data(), k.size()), 0) << dk;
    EXPECT_EQ(std::memcmp(v.data(), v2.data(), v.size()), 0) << dv;
    EXPECT_TRUE(slice.intact() && k2.intact() && v2.intact());
    // Scales and mean are not codes.
    for (std::uint32_t i = spec.layout.k_scales; i < spec.layout.v_codes; ++i)
      ASSERT_EQ(slice.data()[i], tests::kGuard);

    const int padded = cpu::pad_channels(dk);
    for (int j = 0; j < kPageTokens; ++j) {
      for (int c = 0; c < padded; ++c) {
        const cpu::Nibble at = cpu::key_nibble(j, c, padded);
        const int code = slice.data()[spec.layout.k_codes + at.byte] >> at.shift & 15;
        ASSERT_EQ(code, c < dk ? k[j * (dk / 2) + c / 2] >> (c % 2 * 4) & 15 : 0);
      }
      for (int c = dv; c < cpu::pad_channels(dv); ++c) {
        const cpu::Nibble at = cpu::value_nibble(j, c);
        ASSERT_EQ(slice.data()[spec.layout.v_codes + at.byte] >> at.shift & 15, 0);
      }
    }
  }
}

}  // namespace
}  // namespace kv4
