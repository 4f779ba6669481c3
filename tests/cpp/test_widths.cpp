// Pages of other widths than 4 bits, and with refined keys, on the CPU: the lists of cases of attention against the
// float64 reference, the order of codes, caches whole. Sealing and dequantising of every width are in test_seal.cpp.
#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "attend_cases.h"
#include "cases.h"
#include "cpu/layout.h"
#include "cpu/order.h"
#include "guard.h"
#include "reference/seal.h"

namespace kv4 {
namespace {

using scene::Attend;
using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;
using scene::Widths;

constexpr Widths kWidths[] = {{2, 3},          {3, 2},          {6, 4},          {8, 6},          {4, 8},
                              {3, 3},          {4, 4, 1},       {4, 4, 2},       {3, 8, 1},       {6, 3, 2},
                              {4, 4, 0, true}, {4, 3, 1, true}, {6, 4, 0, true}, {3, 2, 0, true}, {2, 3, 1, true}};

// Shapes made while it lives have these bits.
class At {
 public:
  explicit At(const Widths& widths) : trace_(__FILE__, __LINE__, text(widths)) { scene::widths_of_shapes = widths; }
  ~At() { scene::widths_of_shapes = Widths(); }
  At(const At&) = delete;

 private:
  static std::string text(const Widths& w) {
    return std::to_string(w.k) + " and " + std::to_string(w.v) + " bits, " + std::to_string(w.refined) + " refined" +
           (w.trellis ? ", by a trellis" : "");
  }
  testing::ScopedTrace trace_;
};

class EveryWidth : public Attend, public testing::WithParamInterface<Widths> {};

TEST_P(EveryWidth, HeadDimsAndGroups) {
  const At at(GetParam());
  scene::every_head_dim_and_group(cases::kEveryDType, 1, check);
}
TEST_P(EveryWidth, PagesAndAPartOfOne) {
  const At at(GetParam());
  scene::pages_and_a_part_of_one(check);
}
TEST_P(EveryWidth, ManyQueries) {
  const At at(GetParam());
  scene::many_queries(cases::kEveryDType, {2, 3, 9, 70}, check);
}
TEST_P(EveryWidth, RaggedBatch) {
  const At at(GetParam());
  scene::ragged_batch({1, 5}, 640, check);
}
TEST_P(EveryWidth, GeneralMasks) {
  const At at(GetParam());
  scene::general_masks({true, false}, check);
}
TEST_P(EveryWidth, LargeMeans) {
  const At at(GetParam());
  scene::large_means(check);
}

// Head dims that fill no whole step or product, groups of scales, one row and several tiles of rows.
TEST_P(EveryWidth, Formats) {
  const At at(GetParam());
  struct Format {
    int dim_k, dim_v, group_k, group_v;
  };
  const Format formats[] = {{34, 46, 0, 0},    {46, 34, 0, 0},    {128, 96, 32, 32},
                            {64, 128, 32, 64}, {96, 80, 48, 16},  {160, 112, 80, 0},
                            {512, 512, 0, 0},  {64, 128, 16, 64}, {256, 192, 128, 96}};
  std::uint64_t seed = 31000;
  for (const Format& f : formats) {
    for (int queries : {1, 11}) {
      SCOPED_TRACE("head dims " + std::to_string(f.dim_k) + " and " + std::to_string(f.dim_v));
      Shape shape;
      shape.kv_heads = 1;
      shape.group = queries == 1 ? static_cast<int>(1 + seed % 8) : 3;
      shape.dim_k = f.dim_k;
      shape.dim_v = f.dim_v;
      shape.scale_group_k = f.group_k;
      shape.scale_group_v = f.group_v;
      shape.mean = seed % 3 != 0;
      shape.lambda = seed % 2 == 0;
      shape.seed = seed++;
      const Scene s(shape, {Held{2, 100, 3, 0}});
      check(s, Call(s, queries));
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, EveryWidth, testing::ValuesIn(kWidths), [](const auto& info) {
  const Widths& w = info.param;
  return std::to_string(w.k) + "And" + std::to_string(w.v) +
         (w.refined > 0 ? "Refined" + std::to_string(w.refined) : "") + (w.trellis ? "Trellis" : "");
});

TEST(Order, EveryPlaneHasAPlaceForEveryCode) {
  for (int plane : {1, 2, 4, 8}) {
    for (int padded : {48, 80, 128}) {
      std::set<std::size_t> keys, values;
      for (int j = 0; j < kPageTokens; ++j) {
        for (int c = 0; c < padded; ++c) {
          const cpu::Nibble k = cpu::key_place(plane, j, c, padded), v = cpu::value_place(plane, j, c);
          ASSERT_EQ(k.shift % plane, 0);
          ASSERT_LT(k.shift, 8);
          keys.insert(k.byte * 8 + static_cast<std::size_t>(k.shift));
          values.insert(v.byte * 8 + static_cast<std::size_t>(v.shift));
        }
      }
      const std::size_t codes = static_cast<std::size_t>(kPageTokens * padded), bits = static_cast<std::size_t>(plane);
      EXPECT_EQ(keys.size(), codes);
      EXPECT_EQ(values.size(), codes);
      EXPECT_EQ(*keys.rbegin(), (codes - 1) * bits);
      EXPECT_EQ(*values.rbegin(), (codes - 1) * bits);
    }
  }
}

// The canonical order is the definition's, and a code's planes are its bits from the lowest on.
TEST(Order, CanonicalCodesOfEveryWidth) {
  for (int bits_k : {2, 3, 4, 6, 8}) {
    for (int bits_v : {2, 3, 4, 6, 8}) {
      const int dk = 34 + 2 * bits_k, dv = bits_v == 3 ? 96 : 46;
      PageSpec spec;
      spec.key.dim = dk;
      spec.value.dim = dv;
      spec.key.levels = levels(LevelKind::lloyd_max, bits_k);
      spec.value.levels = levels(LevelKind::lloyd_max, bits_v);
      spec.layout = kv4_make_page_layout(static_cast<std::uint32_t>(dk), static_cast<std::uint32_t>(dv), 1, 1, true,
                                         static_cast<std::uint32_t>(cpu::pad_channels(dk)),
                                         static_cast<std::uint32_t>(cpu::pad_channels(dv)),
                                         static_cast<std::uint32_t>(bits_k), static_cast<std::uint32_t>(bits_v));
      cases::Random random(static_cast<std::uint64_t>(10 * bits_k + bits_v));
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(kPageTokens * dk));
      for (auto& code : codes) code = static_cast<std::uint8_t>(random.below(1 << bits_k));
      const std::vector<std::uint8_t> k = reference::to_canonical(codes, bits_k);
      ASSERT_EQ(k.size(), static_cast<std::size_t>(8 * bits_k * dk));
      EXPECT_EQ(reference::from_canonical(k.data(), kPageTokens, dk, bits_k), codes);
      std::vector<std::uint8_t> v(static_cast<std::size_t>(8 * bits_v * dv));
      for (auto& byte : v) byte = static_cast<std::uint8_t>(random.bits());
      tests::Guarded slice(spec.layout.head_bytes), k2(k.size()), v2(v.size());
      cpu::codes_from_canonical(spec, k.data(), v.data(), slice.data());
      cpu::codes_to_canonical(spec, slice.data(), k2.data(), v2.data());
      EXPECT_EQ(std::memcmp(k.data(), k2.data(), k.size()), 0) << bits_k;
      EXPECT_EQ(std::memcmp(v.data(), v2.data(), v.size()), 0) << bits_v;
      EXPECT_TRUE(slice.intact() && k2.intact() && v2.intact());
      for (std::uint32_t i = spec.layout.k_scales; i < spec.layout.v_codes; ++i)
        ASSERT_EQ(slice.data()[i], tests::kGuard);
      const int first = cpu::first_plane(bits_k), padded = cpu::pad_channels(dk);
      for (int j = 0; j < kPageTokens; ++j) {
        for (int c = 0; c < dk; ++c) {
          const cpu::Nibble at = cpu::key_place(first, j, c, padded);
          ASSERT_EQ(slice.data()[at.byte] >> at.shift & ((1 << first) - 1),
                    codes[static_cast<std::size_t>(j * dk + c)] & ((1 << first) - 1));
        }
      }
    }
  }
}

}  // namespace
}  // namespace kv4
