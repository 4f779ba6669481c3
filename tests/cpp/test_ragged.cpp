// Sequences of different lengths in one cache, against caches of one sequence each.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "blob/checksum.h"
#include "kv4/cpu.h"
#include "probe.h"
#include "ragged_case.h"

namespace kv4 {
namespace {

using namespace saved;

struct OneThread {
  OneThread() { EXPECT_TRUE(cpu::set_num_threads(1).ok()); }
  ~OneThread() { EXPECT_TRUE(cpu::set_num_threads(before).ok()); }
  int before = cpu::num_threads();
};

void random_program(const Case& c, std::uint64_t seed) {
  SCOPED_TRACE(std::string(c.name) + ", seed " + std::to_string(seed));
  Ragged s(c.config, seed);
  cases::Random& random = s.random();
  s.add(3);
  constexpr int kSizes[] = {0, 1, 1, 1, 1, 2, 7, 30, 63, 64, 65, 150};
  for (int step = 0; step < 60; ++step) {
    const std::vector<RowCount> rows = s.some([&](std::int64_t) { return kSizes[random.below(12)]; });
    s.append(rows);
    if (::testing::Test::HasFatalFailure()) return;
    std::vector<RowCount> asked;
    for (const RowCount& each : rows)
      if (each.tokens > 0 && random.below(8) > 0) asked.push_back({each.row, random.below(4) > 0 ? each.tokens : 1});
    s.attend(asked, random.below(4) == 0);
    if (::testing::Test::HasFatalFailure()) return;
    const std::int64_t row = s.batch() > 0 ? random.below(static_cast<int>(s.batch())) : 0;
    const std::int64_t n = s.batch() > 0 ? s.length(row) : 0;
    switch (random.below(16)) {
      case 0: s.add(1 + random.below(2)); break;
      case 1:
        if (s.batch() > 2) s.remove({s.batch() - 1, 0});
        break;
      case 2:
        if (s.batch() > 0) s.remove({row});
        break;
      case 3: s.crop(row, std::max<std::int64_t>(0, n - random.below(100))); break;
      case 4: s.crop(row, std::max<std::int64_t>(0, n - random.below(6))); break;
      case 5:
        if (n > 0) {
          const std::int64_t first = n - 1 - random.below(static_cast<int>(std::min<std::int64_t>(n, 70)));
          s.erase(row, first, random.below(static_cast<int>(n - first) + 1));
        }
        break;
      case 6: s.go_on_as_clone(); break;
      case 7: s.reload(); break;
      case 8: s.seal(); break;
      case 9: s.extend(row); break;
      case 10: s.extend_by_itself(); break;
      default: break;
    }
    if (::testing::Test::HasFatalFailure()) return;
    if (s.batch() == 0) s.add(2);
  }
}

class RaggedCase : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, RaggedCase, ::testing::ValuesIn(ragged_cases()));

TEST_P(RaggedCase, RandomProgramsAnswerAsCachesOfOneSequenceEach) {
  const OneThread one;  // work is split among threads by the whole call
  for (std::uint64_t seed = 1; seed <= 6 && !HasFatalFailure(); ++seed) random_program(GetParam(), seed);
}

TEST(Ragged, DecodingSixtyFourSequencesOfTheirOwnLengthIsDecodingEach) {
  const OneThread one;
  Ragged s(config_of(Recipe(), 1, 64, 64), 5);
  s.add(64);
  std::vector<RowCount> prompts, tokens;
  for (std::int64_t b = 0; b < 64; ++b) {
    prompts.push_back({b, 1 + b * 5});
    tokens.push_back({b, 1});
  }
  s.append(prompts);
  s.attend(prompts);
  for (int i = 0; i < 70 && !HasFatalFailure(); ++i) {
    s.append(tokens);
    s.attend(tokens);
  }
}

// Equal calls and ragged ones are calls of the same cache.
TEST(Ragged, EqualCallsGoOnWhereLengthsDiffer) {
  const OneThread one;
  const CacheConfig config = config_of(Recipe(), 2, 64, 64);
  const std::unique_ptr<Cache> equal = create(config), ragged = create(config);
  ASSERT_TRUE(equal->add(2).ok());
  ASSERT_TRUE(ragged->add(2).ok());
  cases::Random random(3);
  const std::int64_t dim = 64, heads = 2;
  for (const std::int64_t tokens : {100, 1, 1, 60, 1}) {
    // [2, heads, tokens, dim] and the same as [1, heads, 2 * tokens, dim].
    const std::vector<float> x = cases::normal_rows(2 * heads * tokens, 64, random.bits(), 0.5);
    const TensorView rows{x.data(), DType::f32, {2, heads, tokens, dim}, {heads * tokens * dim, tokens * dim, dim, 1}};
    std::vector<float> y(x.size());
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        std::copy_n(x.data() + (b * heads + h) * tokens * dim, tokens * dim, y.data() + (h * 2 + b) * tokens * dim);
    const TensorView joined{
        y.data(), DType::f32, {1, heads, 2 * tokens, dim}, {2 * heads * tokens * dim, 2 * tokens * dim, dim, 1}};
    const std::vector<RowCount> counts{{0, tokens}, {1, tokens}};
    ASSERT_TRUE(equal->append(rows, rows).ok());
    ASSERT_TRUE(ragged->append(counts, joined, joined).ok());
    AttendArgs args;
    args.q = rows;
    std::vector<float> one_out(x.size()), two_out(x.size());
    ASSERT_TRUE(equal->attend(args, {one_out.data(), DType::f32, rows.shape, rows.stride}).ok());
    args.q = joined;
    ASSERT_TRUE(ragged->attend(counts, args, {two_out.data(), DType::f32, joined.shape, joined.stride}).ok());
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        ASSERT_TRUE(std::equal(one_out.begin() + (b * heads + h) * tokens * dim,
                               one_out.begin() + (b * heads + h + 1) * tokens * dim,
                               two_out.begin() + (h * 2 + b) * tokens * dim));
    ASSERT_EQ(save(*equal), save(*ragged));
    for (Cache* each : {equal.get(), ragged.get()}) ASSERT_TRUE(each->crop(0, each->length(0) - 1).ok());
  }
  EXPECT_EQ(equal->length(0), 163 - 5);
  EXPECT_EQ(equal->length(1), 163);
  EXPECT_EQ(equal->length(), 163);
}

// Equal lengths are saved in the old version; different ones in a version that lists each.
TEST(Ragged, SavedLengthsAreHeldAgainstWhatIsThere) {
  const std::unique_ptr<Cache> cache = create(config_of(Recipe(), 1, 64, 64));
  const std::vector<float> x = cases::normal_rows(60, 64, 1, 0.5);
  const auto rows = [&](std::int64_t n) { return TensorView{x.data(), DType::f32, {1, 1, n, 64}, {0, 0, 64, 1}}; };
  ASSERT_TRUE(cache->add(2).ok());
  ASSERT_TRUE(cache->append(std::vector<RowCount>{{0, 20}, {1, 20}}, rows(40), rows(40)).ok());
  EXPECT_EQ(save(*cache)[8], std::byte{2});
  ASSERT_TRUE(cache->append(std::vector<RowCount>{{1, 5}}, rows(5), rows(5)).ok());
  const Bytes good = save(*cache);
  EXPECT_EQ(good[8], std::byte{3});
  std::size_t at = 12;  // of the block of lengths: the third
  for (int block = 0; block < 2; ++block) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, &good[at + 4], sizeof bytes);
    at += 12 + bytes + 4;
  }
  ASSERT_EQ(good[at], std::byte{13});
  for (const std::uint64_t lie : {0ull, 19ull, 21ull, 25ull, 26ull, ~0ull}) {
    for (const int which : {0, 1}) {
      Bytes bytes = good;
      std::memcpy(&bytes[at + 12 + static_cast<std::size_t>(which) * 8], &lie, sizeof lie);
      const std::uint32_t crc = crc32c(std::span(bytes).subspan(at, 12 + 16));
      std::memcpy(&bytes[at + 12 + 16], &crc, sizeof crc);
      if (bytes == good) continue;
      const std::unique_ptr<Cache> fresh = create(cache->config());
      EXPECT_EQ(load(*fresh, bytes).code(), StatusCode::data_loss) << which << ": " << lie;
      EXPECT_EQ(fresh->batch(), 0);
    }
  }
}

TEST(Ragged, PagesOfRemovedSequencesAreUsedAgain) {
  const CacheConfig config = config_of(Recipe(), 1, 64, 64);
  const std::unique_ptr<Cache> cache = create(config);
  const std::vector<float> x = cases::normal_rows(6400, 64, 1, 0.5);
  const TensorView rows{x.data(), DType::f32, {1, 1, 6400, 64}, {0, 0, 64, 1}};
  ASSERT_TRUE(cache->add(2).ok());
  ASSERT_TRUE(cache->append(std::vector<RowCount>{{0, 6400}}, rows, rows).ok());
  ASSERT_TRUE(cache->seal().ok());
  const std::size_t one = cache->nbytes();
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(cache->remove(std::vector<std::int64_t>{0}).ok());
    EXPECT_LT(cache->nbytes(), one / 2) << "its memory went";
    ASSERT_TRUE(cache->add(1).ok());
    ASSERT_EQ(cache->length(0), 0) << "the other one moved up";
    ASSERT_TRUE(cache->append(std::vector<RowCount>{{0, 6400}}, rows, rows).ok());
    ASSERT_TRUE(cache->seal().ok());
    ASSERT_LE(cache->nbytes(), one + 4096);
  }
  ASSERT_TRUE(cache->remove(std::vector<std::int64_t>{1, 0}).ok());
  EXPECT_EQ(cache->batch(), 0);
  ASSERT_TRUE(cache->append(rows, rows).ok()) << "without sequences the first call makes them";
  EXPECT_EQ(cache->length(0), 6400);
}

// All invalid arguments of ragged calls, between the calls of a script.
TEST(Ragged, ARefusedCallLeavesNoTrace) {
  for (const Case& c : ragged_cases()) {
    SCOPED_TRACE(c.name);
    const std::unique_ptr<Cache> cache = create(c.config);
    ASSERT_TRUE(cache->add(3).ok());
    const std::int64_t heads = c.config.kv_heads, dk = c.config.head_dim_k, dv = c.config.head_dim_v;
    const std::vector<float> x = cases::normal_rows(heads * kGroup * 400, 64, 7, 0.5);
    std::vector<float> out(x.size());
    const auto tensor = [&](std::int64_t h, std::int64_t tokens, std::int64_t dim) {
      return TensorView{x.data(), DType::f32, {1, h, tokens, dim}, {0, tokens * dim, dim, 1}};
    };
    const auto append = [&](const std::vector<RowCount>& rows, std::int64_t tokens) {
      return cache->append(rows, tensor(heads, tokens, dk), tensor(heads, tokens, dv));
    };
    const auto attend = [&](const std::vector<RowCount>& rows, std::int64_t tokens, float softcap = 0) {
      AttendArgs args;
      args.q = tensor(heads * kGroup, tokens, dk);
      args.softcap = softcap;
      const TensorView shape = tensor(heads * kGroup, tokens, dv);
      return cache->attend(rows, args,
                           {out.data(), DType::f32, shape.shape, {heads * kGroup * tokens * dv, tokens * dv, dv, 1}});
    };
    const auto partial = [&](const std::vector<RowCount>& rows, const std::vector<std::int64_t>& upto) {
      const auto tokens = static_cast<std::int64_t>(rows.size());
      AttendArgs args;
      args.q = tensor(heads * kGroup, tokens, dk);
      State state(heads * kGroup, tokens, dv);
      return cache->attend_partial(rows, args, upto, state.view());
    };
    std::vector<std::pair<std::unique_ptr<Cache>, std::string>> others;
    for (const auto& [change, name] : std::vector<std::pair<std::function<void(CacheConfig&)>, std::string>>{
             {[](CacheConfig& x) { x.kv_heads += 1; }, "kv_heads: expected "},
             {[](CacheConfig& x) { x.sliding_window += 1; }, "sliding_window: expected "},
             {[](CacheConfig& x) { x.backend = "probe"; }, "backend: expected cpu; got probe"}}) {
      CacheConfig other = c.config;
      change(other);
      others.emplace_back(create(other), name);
      ASSERT_TRUE(others.back().first->add(1).ok());
    }
    for (const std::vector<RowCount>& good : {std::vector<RowCount>{{0, 90}, {2, 30}},
                                              {{2, 1}, {1, 5}},
                                              {{0, 64}, {1, 130}, {2, 3}},
                                              {{0, 1}, {1, 1}, {2, 1}}}) {
      std::int64_t total = 0;
      for (const RowCount& each : good) total += each.tokens;
      ASSERT_TRUE(append(good, total).ok());
      ASSERT_TRUE(attend(good, total).ok());
      const Bytes before = save(*cache);
      const std::uint64_t version = cache->version();
      const auto expect = [&](const Status& status, StatusCode code, const std::string& begins) {
        EXPECT_EQ(status.code(), code) << status.message();
        EXPECT_EQ(status.message().rfind(begins, 0), 0u) << status.message();
        EXPECT_EQ(cache->version(), version);
        EXPECT_EQ(save(*cache), before) << status.message();
      };
      constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
      for (const std::int64_t row : {std::int64_t{-1}, std::int64_t{3}, kMost}) {
        expect(append({{0, 1}, {row, 1}}, 2), StatusCode::out_of_range, "rows: expected indices from 0 to 2; got ");
        expect(attend({{0, 1}, {row, 1}}, 2), StatusCode::out_of_range, "rows: expected indices from 0 to 2; got ");
        expect(cache->remove(std::vector<std::int64_t>{0, row}), StatusCode::out_of_range,
               "rows: expected indices from 0 to 2; got ");
      }
      for (const std::int64_t row : {-1, 3}) {
        expect(cache->crop(static_cast<int>(row), 1), StatusCode::out_of_range, "row");
        expect(cache->erase(static_cast<int>(row), 0, 0), StatusCode::out_of_range, "row");
      }
      expect(append({{1, 1}, {0, 1}, {1, 1}}, 3), StatusCode::invalid_argument,
             "rows: expected each sequence once; got 1 twice");
      expect(attend({{1, 1}, {1, 1}}, 2), StatusCode::invalid_argument,
             "rows: expected each sequence once; got 1 twice");
      expect(cache->remove(std::vector<std::int64_t>{2, 2}), StatusCode::invalid_argument,
             "rows: expected each sequence once; got 2 twice");
      expect(append({{0, 2}, {1, 2}}, 3), StatusCode::invalid_argument,
             "rows: expected as many tokens in all as k, 3; got 4");
      expect(attend({{0, 1}}, 2), StatusCode::invalid_argument, "rows: expected as many tokens in all as q, 2; got 1");
      expect(append({{0, -1}, {1, 2}}, 1), StatusCode::out_of_range, "rows: ");
      expect(append({{0, kMost}, {1, 2}}, 1), StatusCode::out_of_range, "rows: ");
      expect(append({{0, (std::int64_t{1} << 36) - 3}}, (std::int64_t{1} << 36) - 3), StatusCode::out_of_range,
             "rows: ");
      expect(attend({{0, 0}, {1, 1}}, 1), StatusCode::out_of_range, "rows: ");
      if (cache->length(2) < 200)
        expect(attend({{2, cache->length(2) + 1}}, cache->length(2) + 1), StatusCode::out_of_range, "rows: ");
      expect(attend({{0, 1}}, 1, -1), StatusCode::invalid_argument, "softcap: ");
      expect(partial({{0, 1}, {2, 1}}, {0}), StatusCode::invalid_argument,
             "upto: expected 2 positions, one for each of rows; got 1");
      expect(partial({{0, 1}}, {cache->length(0) + 1}), StatusCode::out_of_range,
             "upto: expected 0 to " + std::to_string(cache->length(0)) + "; got ");
      expect(partial({{0, 1}}, {-1}), StatusCode::out_of_range, "upto: ");
      expect(partial({{3, 1}}, {0}), StatusCode::out_of_range, "rows: ");
      if (cache->sealed_tokens(0) > 0 && cache->config().recipe.seal == SealMode::page && cache->first() == 0)
        expect(partial({{0, 1}}, {10}), StatusCode::out_of_range, "upto: expected at least ");
      for (const auto& [other, name] : others) expect(cache->extend(*other), StatusCode::invalid_argument, name);
      TensorView bad = tensor(heads, 1, dk);
      bad.shape[0] = 2;
      expect(cache->append(std::vector<RowCount>{{0, 1}}, bad, tensor(heads, 1, dv)), StatusCode::invalid_argument,
             "k: ");
      expect(cache->append(std::vector<RowCount>{{0, 1}}, tensor(heads, 1, dk), tensor(heads, 2, dv)),
             StatusCode::invalid_argument, "v: ");
      expect(cache->crop(0, -1), StatusCode::out_of_range, "length: ");
      expect(cache->crop(2, cache->length(2) + 1), StatusCode::out_of_range, "length: ");
      expect(cache->erase(0, -1, 1), StatusCode::out_of_range, "first, count: ");
      expect(cache->erase(0, 1, cache->length(0)), StatusCode::out_of_range, "first, count: ");
      if (cache->sealed_tokens(0) > 0) expect(cache->erase(0, 0, 5), StatusCode::out_of_range, "first: ");
      expect(cache->add(-1), StatusCode::invalid_argument, "count: ");
      expect(cache->add(std::numeric_limits<int>::max()), StatusCode::out_of_range, "count: ");
      // A query that cannot be answered, beside others that can.
      std::vector<float> nan(static_cast<std::size_t>(heads * kGroup * 2 * dk), 0.1f);
      nan[static_cast<std::size_t>(dk)] = std::numeric_limits<float>::quiet_NaN();
      AttendArgs args;
      args.q = {nan.data(), DType::f32, {1, heads * kGroup, 2, dk}, {0, 2 * dk, dk, 1}};
      expect(cache->attend(std::vector<RowCount>{{1, 1}, {2, 1}}, args,
                           {out.data(), DType::f32, {1, heads * kGroup, 2, dv}, {0, 2 * dv, dv, 1}}),
             cache->length(1) > 0 ? StatusCode::non_finite : StatusCode::out_of_range,
             cache->length(1) > 0 ? "q: " : "rows: ");
      if (HasFailure()) return;
    }
  }
}

// Failures at every place of a ragged call or an edit of one sequence: no partial effect.
TEST(Ragged, ACallThatTheBackendFailsLeavesNoTrace) {
  for (Case c : ragged_cases()) {
    SCOPED_TRACE(c.name);
    c.config.backend = "probe";
    probe::fail_at(0);
    const std::unique_ptr<Cache> cache = create(c.config), untouched = create(c.config);
    const std::int64_t heads = c.config.kv_heads, dk = c.config.head_dim_k, dv = c.config.head_dim_v;
    const std::vector<float> x = cases::normal_rows(heads * kGroup * 400, 64, 7, 0.5);
    const auto tensor = [&](std::int64_t h, std::int64_t tokens, std::int64_t dim) {
      return TensorView{x.data(), DType::f32, {1, h, tokens, dim}, {0, tokens * dim, dim, 1}};
    };
    std::vector<std::function<Status(Cache&)>> calls;
    calls.push_back([](Cache& to) { return to.add(3); });
    const auto step = [&](const std::vector<RowCount>& rows) {
      std::int64_t total = 0;
      for (const RowCount& each : rows) total += each.tokens;
      calls.push_back([=](Cache& to) { return to.append(rows, tensor(heads, total, dk), tensor(heads, total, dv)); });
      calls.push_back([=](Cache& to) {
        std::vector<float> out(static_cast<std::size_t>(heads * kGroup * total * dv));
        AttendArgs args;
        args.q = tensor(heads * kGroup, total, dk);
        return to.attend(
            rows, args,
            {out.data(), DType::f32, {1, heads * kGroup, total, dv}, {heads * kGroup * total * dv, total * dv, dv, 1}});
      });
      calls.push_back([=](Cache& to) {
        State state(heads * kGroup, total, dv);
        std::vector<std::int64_t> upto;
        for (const RowCount& each : rows) upto.push_back(to.length(static_cast<int>(each.row)));
        AttendArgs args;
        args.q = tensor(heads * kGroup, total, dk);
        return to.attend_partial(rows, args, upto, state.view());
      });
    };
    step({{0, 60}, {2, 130}});
    step({{0, 64}, {1, 1}});
    step({{0, 64}, {2, 64}, {1, 1}});
    const std::unique_ptr<Cache> other = create(c.config);
    ASSERT_TRUE(other->append(tensor(heads, 150, dk), tensor(heads, 150, dv)).ok());
    ASSERT_TRUE(other->seal().ok());
    calls.push_back([](Cache& to) { return to.erase(0, to.length(0) - 3, 2); });
    calls.push_back([](Cache& to) { return to.crop(2, to.length(2) - 20); });
    step({{2, 1}, {0, 1}});
    calls.push_back([](Cache& to) { return to.select(std::vector<std::int64_t>{0, 0, 2}); });
    step({{2, 3}, {0, 1}, {1, 2}});
    calls.push_back([](Cache& to) { return to.remove(std::vector<std::int64_t>{1}); });
    calls.push_back([&](Cache& to) { return to.extend(*other); });
    step({{0, 1}});
    for (std::size_t i = 0; i < calls.size(); ++i) {
      const Bytes before = save(*untouched);
      for (long n = 1;; ++n) {
        probe::fail_at(n);
        const Status status = calls[i](*cache);
        const bool failed = probe::failed();
        probe::fail_at(0);
        if (status.ok()) break;
        const bool refused = !failed;  // both refuse it: a position this layer cannot erase
        if (refused) {
          ASSERT_EQ(calls[i](*untouched).message(), status.message());
          break;
        }
        ASSERT_EQ(cache->version(), untouched->version()) << "call " << i << ", place " << n;
        ASSERT_EQ(save(*cache), before) << "call " << i << ", place " << n;
      }
      if (cache->version() != untouched->version() || save(*cache) != before) {
        ASSERT_TRUE(calls[i](*untouched).ok());
      }
      ASSERT_EQ(save(*cache), save(*untouched)) << "call " << i;
    }
  }
  EXPECT_EQ(probe::held(), 0u);
}

}  // namespace
}  // namespace kv4
