// The policy of a sequence against what it stands for, in random programs.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "ledger_model.h"

namespace kv4::ledger {

void PrintTo(const Extent& x, std::ostream* out) {
  *out << "length " << x.length << ", start " << x.start << (x.anchored ? ", anchored" : "") << ", lambda "
       << static_cast<int>(x.lambda) << ", sinks " << x.sinks << ", pages " << x.first_page << " + " << x.pages << " ("
       << x.last_page_tokens << "), window from " << x.window_position << ", evicted " << x.evicted;
}

namespace {

Policy policy(int sinks, int window, std::int64_t sliding = 0, SealMode seal = SealMode::page) {
  Recipe recipe = seal == SealMode::page ? Recipe::kv4() : seal == SealMode::never ? Recipe::exact() : Recipe::paper();
  if (seal == SealMode::page) {
    recipe.sinks = sinks;
    recipe.window = window;
  }
  return Policy::of(recipe, sliding);
}

const Policy kPolicies[] = {
    policy(4, 64),
    policy(0, 0),
    policy(4, 0),
    policy(1, 128),
    policy(0, 64),
    policy(4, 64, 100),
    policy(4, 0, 200),
    policy(4, 64, 512),
    policy(0, 64, 33),
    policy(4, 64, 1),
    policy(0, 0, 0, SealMode::never),
    policy(0, 0, 70, SealMode::never),
    policy(0, 0, 0, SealMode::arrival),
    policy(0, 0, 150, SealMode::arrival),
};

std::uint64_t seed_of_run() {
  const char* given = std::getenv("KV4_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 20261129;
}

// What holds whenever nothing is left due.
void check_settled(const Ledger& ledger) {
  const Extent& x = ledger.extent();
  const Policy& p = ledger.policy();
  if (!p.seals()) return;
  const std::int64_t first = x.anchored ? x.start : 0;
  const std::int64_t due = ledger.pages_due(x.length);
  ASSERT_EQ(x.anchored || due == 0, true);
  if (!x.anchored) return;
  ASSERT_GE(x.page_end(), due);  // more after a crop to tokens whose exact rows were gone
  ASSERT_EQ(x.window_position, std::max(x.page_position(p, x.page_end()), first + p.sinks))
      << "exact rows of sealed pages are still held";
  if (p.sliding_window == 0) {
    ASSERT_LT(x.window_rows(), p.window + kPageTokens);
    ASSERT_EQ(x.sinks, p.sinks);
  }
}

// Of one policy; programs are short, since a query's view is read token by token.
constexpr std::int64_t kSteps = 100000;

class RandomPrograms : public testing::TestWithParam<int> {};

// Steps: appends of one, a few and many tokens, attention (or none), crops, forks, sealing early, the past recorded or
// not.
TEST_P(RandomPrograms, EveryQueryReadsEachTokenOnceAndPagesAreGivenBackOnce) {
  const Policy& p = kPolicies[GetParam()];
  const std::uint64_t seed = seed_of_run() + static_cast<std::uint64_t>(GetParam());
  SCOPED_TRACE("KV4_TEST_SEED=" + std::to_string(seed_of_run()));
  std::mt19937_64 random(seed);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  Pages pages;
  Token name = 0;
  std::int64_t steps = 0;
  while (steps < kSteps) {
    std::vector<std::unique_ptr<Model>> models;
    models.push_back(std::make_unique<Model>(p, &pages));
    const std::int64_t padding = below(3) == 0 ? below(100) : 0;
    if (padding > 0) {
      models[0]->append(padding, name, true);
      name += padding;
    }
    for (std::int64_t i = 0; i < 200 && !HasFatalFailure(); ++i, ++steps) {
      Model& m = *models[static_cast<std::size_t>(below(static_cast<std::int64_t>(models.size())))];
      switch (below(10)) {
        default: {
          if (m.length() > 1200) m.crop(m.length() - 500);
          const std::int64_t kind = below(12), count = kind < 9    ? 1
                                                       : kind < 11 ? 1 + below(kPageTokens)
                                                                   : 1 + below(200);
          const bool hole = below(40) == 0;
          m.append(count, name, hole);
          name += count;
          if (below(8) != 0) m.attend(count);
          break;
        }
        case 7: {
          const std::int64_t n = m.length();
          if (n > 0 && below(3) == 0) m.crop(below(3) == 0 ? below(n + 1) : n - std::min(n, below(70)));
          break;
        }
        case 8:
          if (models.size() < 4 && below(4) == 0) models.push_back(std::make_unique<Model>(m));
          else if (models.size() > 1 && below(6) == 0) models.pop_back();
          else if (below(20) == 0) m.record_past(below(2) == 0);
          break;
        case 9:
          if (const std::int64_t n = m.length(); n > 0 && below(4) == 0) {
            const std::int64_t first = n - 1 - below(std::min<std::int64_t>(n, 150));
            m.erase(first, below(n - first + 1));
          }
          if (below(4) == 0) {
            m.settle();
            if (!p.sliding_window) check_settled(m.ledger());
          }
          break;
      }
    }
    if (HasFatalFailure()) return;
  }
  EXPECT_EQ(pages.held(), 0u) << "pages that nobody refers to";
}

INSTANTIATE_TEST_SUITE_P(Ledger, RandomPrograms, testing::Range(0, static_cast<int>(std::size(kPolicies))));

// What a sequence holds, for comparisons. Where the sliding window is no longer than the exact one no page is ever
// read, and whether lambda was learnt for one is nothing to compare.
Extent held(const Model& model) {
  Extent x = model.ledger().extent();
  const Policy& p = model.ledger().policy();
  if (p.sliding_window > 0 && p.sliding_window <= p.window) x.lambda = Lambda::open;
  // Without a page it does not matter whether the sinks are a region of their own.
  if (p.seals() && x.anchored && x.page_end() == 0 && x.sinks == std::min<std::int64_t>(p.sinks, x.length - x.start)) {
    x.window_position = x.start;
    x.start = x.sinks = 0;
    x.anchored = false;
  }
  return x;
}

// However the tokens of a sequence arrive, after the next settle the same ones are exact, sealed and dropped.
TEST(Ledger, SizesOfCallsLeaveNoTrace) {
  std::mt19937_64 random(seed_of_run());
  for (const Policy& p : kPolicies) {
    if (p.seal == SealMode::never && p.sliding_window > 0) continue;  // its rows go in batches
    for (int round = 0; round < 20; ++round) {
      Pages pages;
      Model one(p, &pages), many(p, &pages);
      const std::int64_t padding = static_cast<std::int64_t>(random() % 80);
      one.append(padding, 0, true);
      many.append(padding, 0, true);
      Token name = 1000;
      for (int call = 0; call < 12; ++call) {
        const std::int64_t count = 1 + static_cast<std::int64_t>(random() % (call % 3 == 0 ? 300 : 64));
        many.append(count, name, false);
        many.attend(count);
        for (std::int64_t i = 0; i < count; ++i) {
          one.append(1, name + i, false);
          one.attend(1);
        }
        name += count;
      }
      one.settle();
      many.settle();
      ASSERT_EQ(held(one), held(many)) << "sinks " << p.sinks << ", window " << p.window << ", sliding "
                                       << p.sliding_window;
    }
  }
}

// A crop of tokens of the last call brings back what would be held had they never come.
TEST(Ledger, CropOfTheLastCallLeavesNoTrace) {
  std::mt19937_64 random(seed_of_run());
  for (const Policy& p : kPolicies) {
    for (int round = 0; round < 40; ++round) {
      Pages pages;
      Model kept(p, &pages);
      kept.record_past(p.sliding_window > 0);
      const std::int64_t first = 1 + static_cast<std::int64_t>(random() % 300);
      kept.append(first, 0, false);
      kept.attend(first);
      kept.settle();
      Model cropped(kept);
      const std::int64_t good = static_cast<std::int64_t>(random() % 64),
                         bad = 1 + static_cast<std::int64_t>(random() % 64);
      const std::int64_t call = std::min<std::int64_t>(good + bad, kPageTokens);
      cropped.append(call, 10000, false);
      cropped.attend(call);
      ASSERT_TRUE(cropped.crop(first + std::min(good, call)));
      kept.append(std::min(good, call), 10000, false);
      if (good > 0) kept.attend(std::min(good, call));
      kept.settle();
      cropped.settle();
      ASSERT_EQ(held(kept), held(cropped))
          << "sinks " << p.sinks << ", window " << p.window << ", sliding " << p.sliding_window;
    }
  }
}

TEST(Ledger, PlanningChangesNothing) {
  Pages pages;
  Model model(policy(4, 64, 512), &pages);
  model.append(700, 0, false);
  model.attend(700);
  Ledger ledger = model.ledger();
  const Extent before = ledger.extent();
  const std::vector<PageId> table(ledger.pages().begin(), ledger.pages().end());
  const std::vector<Seen> marks(ledger.marks().begin(), ledger.marks().end());
  Plan plan;
  ledger.plan_append(100, false, &plan);
  ledger.plan_settle(false, &plan);
  ledger.plan_attend(1, std::vector<std::uint8_t>(marks.size(), 0), &plan);
  ASSERT_TRUE(ledger.plan_crop(650, &plan).ok());
  ledger.make_room(plan);
  EXPECT_EQ(ledger.extent(), before);
  EXPECT_TRUE(std::equal(table.begin(), table.end(), ledger.pages().begin(), ledger.pages().end()));
  EXPECT_TRUE(std::equal(marks.begin(), marks.end(), ledger.marks().begin(), ledger.marks().end()));
}

TEST(Ledger, CropIsRefusedByWhatIsAskedAndWhatIsHeld) {
  Pages pages;
  Model model(policy(4, 64, 512), &pages);
  model.append(2000, 0, false);
  model.attend(2000);
  model.append(1, 2000, false);
  const Ledger& ledger = model.ledger();
  Plan plan;
  EXPECT_EQ(ledger.plan_crop(-1, &plan).message(), "length: expected 0 to 2001; got -1");
  EXPECT_EQ(ledger.plan_crop(2002, &plan).message(), "length: expected 0 to 2001; got 2002");
  const std::int64_t least = ledger.extent().evicted + 511;
  EXPECT_EQ(ledger.plan_crop(900, &plan).message(),
            "length: expected at least " + std::to_string(least) +
                " (older tokens left the sliding window), or 0 by reset; got 900");
  EXPECT_TRUE(ledger.plan_crop(least, &plan).ok());
}

TEST(Ledger, EraseTakesExactTokensOutAndRefusesTheOthersWithTheReason) {
  Pages pages;
  Model model(policy(4, 64, 512), &pages);
  model.append(2000, 0, false);
  model.attend(2000);
  model.append(1, 2000, false);
  const Ledger& ledger = model.ledger();
  Plan plan;
  const auto refuses = [&](std::int64_t first, std::int64_t count, const std::string& message) {
    EXPECT_EQ(ledger.plan_erase(first, count, false, &plan).message(), message);
    EXPECT_EQ(ledger.extent().length, 2001);
  };
  refuses(-1, 2, "first, count: expected positions within 0 to 2001; got -1, 2");
  refuses(1990, 12, "first, count: expected positions within 0 to 2001; got 1990, 12");
  const std::string evicted = std::to_string(ledger.extent().evicted),
                    exact = std::to_string(ledger.extent().window_position);
  refuses(3, 1, "first: expected at least " + evicted + " (older tokens left the sliding window); got 3");
  refuses(1900, 90, "first: expected at least " + exact + " (older tokens are sealed); got 1900");
  const std::vector<Seen> marks(ledger.marks().begin(), ledger.marks().end());
  const std::int64_t most = 2001 - 511 - ledger.extent().evicted;
  ASSERT_GT(most, 0);
  refuses(1960, most + 1,
          "count: expected at most " + std::to_string(most) + " (older tokens left the sliding window); got " +
              std::to_string(most + 1));
  ASSERT_TRUE(model.erase(1960, most));
  EXPECT_EQ(ledger.extent().length, 2001 - most);
  EXPECT_EQ(ledger.marks().size(), marks.size() - static_cast<std::size_t>(most));
  EXPECT_EQ(ledger.marks().back(), Seen::unknown);

  Model sinks(policy(4, 64), &pages);
  sinks.append(200, 0, false);
  sinks.attend(200);
  sinks.settle();
  EXPECT_EQ(sinks.ledger().plan_erase(2, 1, false, &plan).message(),
            "first: expected at least 4 (the first tokens are sinks); got 2");
  Ledger noted(policy(4, 64));
  noted.plan_append(20, false, &plan);
  noted.commit(plan, {});
  for (const std::int64_t position : {3, 6, 9}) noted.note({position, true, false});
  ASSERT_TRUE(noted.plan_erase(5, 3, false, &plan).ok());
  noted.commit(plan, {});
  ASSERT_EQ(noted.non_finite().size(), 2u);
  EXPECT_EQ(noted.non_finite()[0].position, 3);
  EXPECT_EQ(noted.non_finite()[1].position, 6);
}

TEST(Ledger, PagesThatNoQueryWillSeeAreNotSealed) {
  Policy p = policy(4, 64, 512);
  Ledger ledger(p);
  Plan plan;
  ledger.plan_append(4096, false, &plan);
  ledger.commit(plan, {});
  ledger.plan_attend(4096, std::vector<std::uint8_t>(4096, 1), &plan);
  ledger.commit(plan, {});
  ledger.plan_append(1, false, &plan);
  // 4,096 tokens: 62 pages are due; the next query sees positions from 3,585 on, so that page 55 (4 + 55 * 64 = 3,524)
  // is the first.
  EXPECT_EQ(plan.first_sealed, 55);
  EXPECT_EQ(plan.new_pages, 7);
  EXPECT_EQ(plan.lambda, (Rows{4, 4 + 128})) << "lambda is that of the first page due, sealed or not";
}

TEST(Ledger, MaskedAndNonFiniteRowsStayOutOfPagesAndOfLambda) {
  Ledger ledger(policy(4, 64));
  Plan plan;
  ledger.plan_append(200, false, &plan);
  ledger.commit(plan, {});
  ledger.note({90, true, false});
  std::vector<std::uint8_t> seen(200, 1);
  seen[0] = seen[1] = 0;  // padding
  seen[20] = 0;           // a hole
  ledger.plan_attend(200, seen, &plan);
  ledger.commit(plan, {});
  ledger.plan_append(1, false, &plan);
  EXPECT_EQ(plan.sinks, (Rows{2, 6}));
  ASSERT_EQ(plan.sealed, (Rows{6, 6 + 128}));
  for (std::int64_t i = 0; i < 128; ++i)
    EXPECT_EQ(plan.skip[static_cast<std::size_t>(i)], i == 20 - 6 || i == 90 - 6) << i;
  ASSERT_EQ(plan.lambda, (Rows{6, 6 + 128}));
  EXPECT_EQ(plan.lambda_skip, plan.skip);
}

TEST(Ledger, LambdaIsOpenAgainUntilItsPageCannotBeUndone) {
  Ledger ledger(policy(4, 64));
  Plan plan;
  const auto call = [&](std::int64_t tokens) {
    ledger.plan_append(tokens, false, &plan);
    ledger.commit(plan, std::vector<PageId>(static_cast<std::size_t>(plan.new_pages), 7));
    ledger.plan_attend(tokens, std::vector<std::uint8_t>(ledger.marks().size(), 1), &plan);
    ledger.commit(plan, std::vector<PageId>(static_cast<std::size_t>(plan.new_pages), 7));
  };
  call(100);
  EXPECT_EQ(ledger.extent().lambda, Lambda::open);
  call(40);  // the page is due at 132
  EXPECT_EQ(ledger.extent().lambda, Lambda::learnt);
  ASSERT_TRUE(ledger.plan_crop(120, &plan).ok());
  EXPECT_EQ(plan.after.lambda, Lambda::open);
  call(1);
  EXPECT_EQ(ledger.extent().lambda, Lambda::fixed);
  ASSERT_TRUE(ledger.plan_crop(60, &plan).ok());
  EXPECT_EQ(plan.after.lambda, Lambda::fixed);
}

}  // namespace
}  // namespace kv4::ledger
