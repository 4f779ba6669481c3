// Sequences of their own length in one cache, against caches of one sequence each.
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
#include "save_case.h"

namespace kv4 {
namespace {

using namespace saved;

constexpr int kGroup = 2;  // query heads per KV head

// Tensors are [1, heads, tokens, dim]; parts of several sequences follow each other on the axis of tokens.
struct Rows {
  std::vector<std::vector<float>> parts;  // [heads, tokens, dim] of each
  int heads, dim;
  std::vector<std::int64_t> tokens;
  std::vector<float> joined;

  std::int64_t total() const {
    std::int64_t sum = 0;
    for (const std::int64_t n : tokens) sum += n;
    return sum;
  }
  void add(std::int64_t n, std::uint64_t seed) {
    tokens.push_back(n);
    parts.push_back(cases::normal_rows(heads * n, dim, seed, 0.5));
  }
  TensorView view(std::size_t i) const { return view_of(parts[i].data(), tokens[i]); }
  TensorView view() {
    joined.clear();
    for (int h = 0; h < heads; ++h)
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const auto row = static_cast<std::size_t>(tokens[i] * dim);
        joined.insert(joined.end(), parts[i].begin() + static_cast<std::ptrdiff_t>(h * row),
                      parts[i].begin() + static_cast<std::ptrdiff_t>((h + 1) * row));
      }
    return view_of(joined.data(), total());
  }
  TensorView view_of(const float* data, std::int64_t n) const {
    return {data, DType::f32, {1, heads, n, dim}, {heads * n * dim, n * dim, dim, 1}};
  }
};

MutableTensorView into(std::vector<float>& out, std::int64_t heads, std::int64_t n, std::int64_t dim) {
  out.assign(static_cast<std::size_t>(heads * n * dim), -7.0f);
  return {out.data(), DType::f32, {1, heads, n, dim}, {heads * n * dim, n * dim, dim, 1}};
}

// A partial state of one batch, its rows one after another.
struct State {
  State(std::int64_t heads, std::int64_t n, std::int64_t dim)
      : o(static_cast<std::size_t>(heads * n * dim), -7.0f), m(static_cast<std::size_t>(heads * n)), l(m) {}
  PartialState view() { return {o.data(), m.data(), l.data()}; }
  std::vector<float> o, m, l;
};

// One cache of many sequences, and for each a cache that holds it alone.
class Ragged {
 public:
  Ragged(const CacheConfig& config, std::uint64_t seed) : config_(config), random_(seed), cache_(create(config)) {}

  cases::Random& random() { return random_; }
  Cache& cache() { return *cache_; }
  std::int64_t batch() const { return static_cast<std::int64_t>(alone_.size()); }
  std::int64_t length(std::int64_t row) const { return alone_[static_cast<std::size_t>(row)]->length(); }

  void add(int count) {
    ASSERT_TRUE(cache_->add(count).ok());
    for (int i = 0; i < count; ++i) {
      alone_.push_back(create(config_));
      starts_.push_back(random_.below(3) == 0 ? random_.below(20) : 0);
    }
  }
  void remove(const std::vector<std::int64_t>& rows) {
    ASSERT_TRUE(cache_->remove(rows).ok());
    std::vector<std::int64_t> sorted = rows;
    std::sort(sorted.rbegin(), sorted.rend());
    for (const std::int64_t row : sorted) {
      alone_.erase(alone_.begin() + row);
      starts_.erase(starts_.begin() + row);
    }
  }
  // Some rows in any order, each with the tokens that count() says.
  template <class Count>
  std::vector<RowCount> some(Count count) {
    std::vector<RowCount> rows;
    for (std::int64_t b = 0; b < batch(); ++b)
      if (random_.below(4) > 0) rows.push_back({b, count(b)});
    for (std::size_t i = rows.size(); i > 1; --i)
      std::swap(rows[i - 1], rows[static_cast<std::size_t>(random_.below(static_cast<int>(i)))]);
    return rows;
  }
  void append(const std::vector<RowCount>& rows) {
    Rows k{{}, config_.kv_heads, config_.head_dim_k, {}, {}}, v{{}, config_.kv_heads, config_.head_dim_v, {}, {}};
    for (const RowCount& each : rows) {
      k.add(each.tokens, random_.bits());
      v.add(each.tokens, random_.bits());
    }
    const Status status = cache_->append(rows, k.view(), v.view());
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::size_t i = 0; i < rows.size(); ++i) ASSERT_TRUE(alone(rows[i]).append(k.view(i), v.view(i)).ok());
    expect_equal();
  }
  // general: also a mask of random holes, the query's own token left.
  void attend(const std::vector<RowCount>& rows, bool general = false) {
    if (rows.empty()) return;
    const int heads = config_.kv_heads * kGroup;
    Rows q{{}, heads, config_.head_dim_k, {}, {}};
    std::vector<std::int32_t> starts;
    std::int64_t columns = 0;
    for (const RowCount& each : rows) {
      q.add(each.tokens, random_.bits());
      starts.push_back(static_cast<std::int32_t>(
          std::min<std::int64_t>(starts_[static_cast<std::size_t>(each.row)], length(each.row) - each.tokens)));
      columns = std::max(columns, length(each.row));
    }
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(q.total() * columns));
    for (std::uint8_t& x : mask) x = random_.below(9) > 0;
    std::vector<float> out, want;
    AttendArgs args;
    args.q = q.view();
    args.mask.start = starts.data();
    if (general) {
      args.mask.kind = Mask::General::boolean;
      args.mask.general = mask.data();
      args.mask.general_stride = {0, 0, columns, 1};
      args.mask.columns = columns;
    }
    const Status status = cache_->attend(rows, args, into(out, heads, q.total(), config_.head_dim_v));
    ASSERT_TRUE(status.ok()) << status.message();
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      AttendArgs own = args;
      own.q = q.view(i);
      own.mask.start = &starts[i];
      own.mask.general = mask.data() + begin * columns;
      ASSERT_TRUE(alone(rows[i]).attend(own, into(want, heads, rows[i].tokens, config_.head_dim_v)).ok());
      const std::int64_t dim = config_.head_dim_v;
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t j = 0; j < rows[i].tokens * dim; ++j)
          ASSERT_EQ(out[static_cast<std::size_t>((h * q.total() + begin) * dim + j)],
                    want[static_cast<std::size_t>(h * rows[i].tokens * dim + j)])
              << "row " << rows[i].row << ", head " << h << ", query " << j / dim << " of " << rows[i].tokens
              << ", length " << length(rows[i].row);
      begin += rows[i].tokens;
    }
    attend_partial(rows, args, q, starts, mask, columns);
  }
  // The state over a part of what each holds: below any position that does not cut into sealed tokens.
  void attend_partial(const std::vector<RowCount>& rows, const AttendArgs& args, Rows& q,
                      const std::vector<std::int32_t>& starts, const std::vector<std::uint8_t>& mask,
                      std::int64_t columns) {
    const int heads = config_.kv_heads * kGroup;
    const std::int64_t dim = config_.head_dim_v, total = q.total();
    std::vector<std::int64_t> upto;
    std::vector<State> want;
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < rows.size(); begin += rows[i++].tokens) {
      AttendArgs own = args;
      own.q = q.view(i);
      own.mask.start = &starts[i];
      own.mask.general = mask.data() + begin * columns;
      State& state = want.emplace_back(heads, rows[i].tokens, dim);
      upto.push_back(random_.below(static_cast<int>(length(rows[i].row)) + 1));
      if (alone(rows[i]).attend_partial(own, upto[i], state.view()).ok()) continue;
      upto[i] = length(rows[i].row);
      ASSERT_TRUE(alone(rows[i]).attend_partial(own, upto[i], state.view()).ok());
    }
    State got(heads, total, dim);
    const Status status = cache_->attend_partial(rows, args, upto, got.view());
    ASSERT_TRUE(status.ok()) << status.message();
    begin = 0;
    for (std::size_t i = 0; i < rows.size(); begin += rows[i++].tokens)
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t n = rows[i].tokens, at = h * total + begin, own = h * n;
        SCOPED_TRACE("row " + std::to_string(rows[i].row) + ", head " + std::to_string(h) + ", upto " +
                     std::to_string(upto[i]));
        ASSERT_TRUE(std::equal(got.m.begin() + at, got.m.begin() + at + n, want[i].m.begin() + own));
        ASSERT_TRUE(std::equal(got.l.begin() + at, got.l.begin() + at + n, want[i].l.begin() + own));
        ASSERT_TRUE(
            std::equal(got.o.begin() + at * dim, got.o.begin() + (at + n) * dim, want[i].o.begin() + own * dim));
      }
  }
  void crop(std::int64_t row, std::int64_t n) {
    const Status own = alone_[static_cast<std::size_t>(row)]->crop(n), status = cache_->crop(static_cast<int>(row), n);
    ASSERT_EQ(status.message(), own.message());
    expect_equal();
  }
  void erase(std::int64_t row, std::int64_t first, std::int64_t count) {
    const Status own = alone_[static_cast<std::size_t>(row)]->erase(0, first, count),
                 status = cache_->erase(static_cast<int>(row), first, count);
    ASSERT_EQ(status.message(), own.message());
    expect_equal();
  }
  void seal() {
    ASSERT_TRUE(cache_->seal().ok());
    for (auto& each : alone_) ASSERT_TRUE(each->seal().ok());
  }
  void reload() { cache_ = reloaded(*cache_); }
  // Sequences of a cache with pages of its own, or with the same.
  void extend(std::int64_t row) {
    if (batch() == 0 || length(row) == 0) return;
    ASSERT_TRUE(cache_->extend(*alone_[static_cast<std::size_t>(row)]).ok());
    alone_.push_back(sessions::fork_of(*alone_[static_cast<std::size_t>(row)]));
    starts_.push_back(starts_[static_cast<std::size_t>(row)]);
    expect_equal();
  }
  void extend_by_itself() {
    if (batch() > 2) return;
    ASSERT_TRUE(cache_->extend(random_.below(2) == 0 ? *cache_ : *sessions::fork_of(*cache_)).ok());
    for (std::size_t b = 0, batch = alone_.size(); b < batch; ++b) {
      alone_.push_back(sessions::fork_of(*alone_[b]));
      starts_.push_back(starts_[b]);
    }
    expect_equal();
  }
  void go_on_as_clone() {
    std::unique_ptr<Cache> copy;
    ASSERT_TRUE(cache_->clone(&copy).ok());
    if (random_.below(2) == 0) std::swap(copy, cache_);
    kept_ = std::move(copy);  // shares what the other goes on from
  }

 private:
  Cache& alone(const RowCount& each) { return *alone_[static_cast<std::size_t>(each.row)]; }
  void expect_equal() {
    ASSERT_EQ(cache_->batch(), static_cast<int>(alone_.size()));
    std::int64_t longest = 0;
    for (int b = 0; b < cache_->batch(); ++b) {
      const Cache& own = *alone_[static_cast<std::size_t>(b)];
      ASSERT_EQ(cache_->length(b), own.length());
      ASSERT_EQ(cache_->sealed_tokens(b), own.batch() == 0 ? 0 : own.sealed_tokens(0));
      if (own.batch() > 0) {
        ASSERT_EQ(cache_->exact_tokens(b), own.exact_tokens(0));
      }
      longest = std::max(longest, own.length());
    }
    ASSERT_EQ(cache_->length(), longest);
  }

  CacheConfig config_;
  cases::Random random_;
  std::unique_ptr<Cache> cache_, kept_;
  std::vector<std::unique_ptr<Cache>> alone_;
  std::vector<std::int32_t> starts_;
};

struct OneThread {
  OneThread() { EXPECT_TRUE(cpu::set_num_threads(1).ok()); }
  ~OneThread() { EXPECT_TRUE(cpu::set_num_threads(before).ok()); }
  int before = cpu::num_threads();
};

std::vector<Case> ragged_cases() {
  using sessions::with;
  return {{"default", config_of(Recipe(), 2, 64, 64), 2, {0}},
          {"no sinks, no window", config_of(with(0, 0), 1, 32, 32), 2, {0}},
          {"two head dims", config_of(with(1, 100), 1, 64, 32), 2, {0}},
          {"exact", config_of(Recipe::exact(), 2, 32, 32), 2, {0}},
          {"arrival", config_of(Recipe::paper(), 2, 32, 32), 2, {0}},
          {"sliding window", config_of(with(4, 64), 2, 32, 32, DType::f32, 170), 2, {0}},
          {"sliding window, exact", config_of(Recipe::exact(), 2, 32, 32, DType::f32, 40), 2, {0}}};
}

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

TEST(Ragged, RandomProgramsAnswerAsCachesOfOneSequenceEach) {
  const OneThread one;  // how work is cut among threads depends on all of a call
  for (const Case& c : ragged_cases())
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
      random_program(c, seed);
      if (HasFatalFailure()) return;
    }
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

// Equal lengths are saved as ever; others are a version of their own, which names each of them.
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

// Everything that a ragged call may have wrong, between the calls of a program.
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

// Every place where a ragged call, or an edit of one sequence, may fail: then nothing of it shows.
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
        const bool refused = !failed;  // alike by both: what a layer of this kind cannot erase
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
