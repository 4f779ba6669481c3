// Visibility against its definition: a token is hidden if no query of the call sees it.
#include <gtest/gtest.h>

#include <vector>

#include "attention/visibility.h"
#include "cases.h"

namespace kv4 {
namespace {

TEST(Visibility, HiddenIsWhatNoQuerySees) {
  cases::Random random(3);
  for (int round = 0; round < 300; ++round) {
    const std::int64_t queries = 1 + random.below(9), length = queries + random.below(20), heads = 1 + random.below(3),
                       columns = random.below(static_cast<int>(length) + 3);
    const std::int64_t offset = random.below(5) - 2;
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(heads * queries * std::max<std::int64_t>(columns, 1)));
    for (std::uint8_t& x : mask) x = random.below(6) == 0;
    const std::int32_t start = random.below(4), window = random.below(2) * random.below(static_cast<int>(length));
    AttendArgs args;
    args.q.shape = {1, heads, queries, 64};
    args.mask.causal = random.below(2) == 0;
    args.mask.offset = offset;
    if (random.below(2) == 0) args.mask.start = &start;
    if (random.below(2) == 0) args.mask.window = &window;
    const bool general = random.below(4) > 0;
    if (general) {
      args.mask.kind = Mask::General::boolean;
      args.mask.general = mask.data();
      args.mask.general_stride = {0, queries * columns, columns, 1};
      args.mask.columns = columns;
    }
    const Visibility visibility(args, {.count = queries}, length);
    std::vector<std::int64_t> all, want;
    for (std::int64_t j = 0; j < length; ++j) {
      bool seen = false;
      for (std::int64_t t = 0; t < queries; ++t) {
        const std::int64_t query = length - queries + t, column = j - offset;
        bool here = (!args.mask.causal || j <= query) && (args.mask.start == nullptr || column >= start) &&
                    (args.mask.window == nullptr || window == 0 || j > query - window);
        if (general) {
          bool any = false;
          for (std::int64_t h = 0; h < heads && column >= 0 && column < columns; ++h)
            any = any || mask[static_cast<std::size_t>((h * queries + t) * columns + column)] != 0;
          here = here && any;
        }
        EXPECT_EQ(visibility.visible(t, j), here);
        seen = seen || here;
      }
      all.push_back(j);
      if (!seen) want.push_back(j);
      EXPECT_EQ(visibility.seen(j), seen) << "round " << round << ", position " << j;
    }
    visibility.leave_hidden(&all);
    EXPECT_EQ(all, want) << "round " << round;
  }
}

}  // namespace
}  // namespace kv4
