// Refused calls: a cache that gets every kind of invalid call between any two calls of a script equals one that does
// not, in its saved bytes and in every later output.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "script_case.h"

namespace kv4 {
namespace {

using namespace saved;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max(),
                       kLeast = std::numeric_limits<std::int64_t>::min();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

class Refusals {
 public:
  Refusals(const Case& c, Cache& cache) : case_(c), cache_(cache), before_(save(cache)), version_(cache.version()) {}

  void all() {
    appends();
    queries();
    outputs();
    partials();
    edits();
    reads();
    files();
  }

 private:
  void expect(const Status& status, StatusCode code, const std::string& begins) {
    SCOPED_TRACE(status.message());
    EXPECT_EQ(status.code(), code) << "instead of " << begins;
    EXPECT_EQ(status.message().rfind(begins, 0), 0u) << "instead of " << begins;
    EXPECT_NE(status.message().find("expected"), std::string::npos);
    EXPECT_NE(status.message().find("got"), std::string::npos);
    EXPECT_EQ(cache_.version(), version_);
    ASSERT_EQ(save(cache_), before_) << "length " << cache_.length();
  }

  std::int64_t batch() const { return cache_.batch() == 0 ? 1 : cache_.batch(); }
  // Zeros, enough for any shape used here.
  TensorView view(DType dtype, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
    zeros_.resize(std::max(zeros_.size(), static_cast<std::size_t>(4 * std::max<std::int64_t>(1, b * h * t * d))));
    return {zeros_.data(), dtype, {b, h, t, d}, {h * t * d, t * d, d, 1}};
  }
  MutableTensorView into(DType dtype, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
    out_.resize(std::max(out_.size(), static_cast<std::size_t>(4 * std::max<std::int64_t>(1, b * h * t * d))));
    return {out_.data(), dtype, {b, h, t, d}, {h * t * d, t * d, d, 1}};
  }
  TensorView k(std::int64_t tokens = 2) {
    return view(case_.config.dtype, batch(), case_.config.kv_heads, tokens, case_.config.head_dim_k);
  }
  TensorView v(std::int64_t tokens = 2) {
    return view(case_.config.dtype, batch(), case_.config.kv_heads, tokens, case_.config.head_dim_v);
  }

  void appends() {
    const auto side = [&](bool key, TensorView bad, StatusCode code) {
      expect(key ? cache_.append(bad, v()) : cache_.append(k(), bad), code, key ? "k: " : "v: ");
    };
    for (const bool key : {true, false}) {
      const TensorView good = key ? k() : v();
      TensorView bad = good;
      bad.dtype = good.dtype == DType::f16 ? DType::f32 : DType::f16;
      side(key, bad, StatusCode::invalid_argument);
      for (std::size_t axis = 0; axis < 4; ++axis) {
        for (const std::int64_t by : {-1, 1}) {
          bad = good;
          bad.shape[axis] += by;
          if (axis == 2 && key) continue;  // then it is v that does not fit
          if (axis == 0 && cache_.batch() == 0 && key) continue;
          side(key, bad, StatusCode::invalid_argument);
        }
      }
      bad = good;
      bad.stride[3] = 2;
      side(key, bad, StatusCode::invalid_argument);
      bad = good;
      bad.data = nullptr;
      side(key, bad, StatusCode::invalid_argument);
      for (const std::int64_t tokens : {std::int64_t{-1}, kLeast}) {
        bad = good;
        bad.shape[2] = tokens;
        side(key, bad, StatusCode::invalid_argument);
      }
    }
    for (const std::int64_t tokens : {kMost, (std::int64_t{1} << 36) - cache_.length() + 1}) {
      TensorView bad_k = k(), bad_v = v();
      bad_k.shape[2] = bad_v.shape[2] = tokens;
      expect(cache_.append(bad_k, bad_v), StatusCode::out_of_range, "k: ");
    }
  }

  AttendArgs asking(std::int64_t tokens = 1) {
    AttendArgs args;
    args.q = view(DType::f32, batch(), heads(), tokens, case_.config.head_dim_k);
    return args;
  }
  std::int64_t heads() const { return std::int64_t{case_.config.kv_heads} * case_.group; }
  MutableTensorView answer(std::int64_t tokens = 1) {
    return into(DType::f32, batch(), heads(), tokens, case_.config.head_dim_v);
  }

  void queries() {
    if (cache_.length() == 0) {
      expect(cache_.attend(asking(), answer()),
             cache_.batch() == 0 ? StatusCode::failed_precondition : StatusCode::invalid_argument, "q: ");
      return;
    }
    const auto ask = [&](const AttendArgs& args, const char* begins, StatusCode code = StatusCode::invalid_argument) {
      expect(cache_.attend(
                 args, into(DType::f32, args.q.shape[0], args.q.shape[1], args.q.shape[2], case_.config.head_dim_v)),
             code, begins);
      std::vector<float> o(1 << 16), m(1 << 12), l(1 << 12);
      expect(cache_.attend_partial(args, cache_.length(), {o.data(), m.data(), l.data()}), code, begins);
    };
    for (const auto& [axis, size] : {std::pair{0, batch() + 1},
                                     {0, std::int64_t{0}},
                                     {1, heads() - 1},
                                     {1, std::int64_t{0}},
                                     {2, std::int64_t{0}},
                                     {2, cache_.length() + 1},
                                     {3, std::int64_t{case_.config.head_dim_k} + 1}}) {
      if (axis == 1 && size % case_.config.kv_heads == 0 && size > 0) continue;
      AttendArgs bad = asking();
      bad.q.shape[static_cast<std::size_t>(axis)] = size;
      AttendArgs shaped = bad;
      for (std::int64_t& n : shaped.q.shape) n = std::max<std::int64_t>(n, 1);
      expect(cache_.attend(bad, into(DType::f32, shaped.q.shape[0], shaped.q.shape[1], shaped.q.shape[2],
                                     case_.config.head_dim_v)),
             StatusCode::invalid_argument, "q: ");
    }
    AttendArgs bad = asking();
    bad.q.stride[3] = 2;
    ask(bad, "q: ");
    bad = asking();
    bad.q.data = nullptr;
    ask(bad, "q: ");
    bad = asking();
    bad.q.dtype = static_cast<DType>(7);
    ask(bad, "q: ");
    for (const float cap : {-1.0f, kNaN, kInfinity}) {
      bad = asking();
      bad.softcap = cap;
      ask(bad, "softcap: ");
    }
    for (const float scale : {kNaN, kInfinity}) {
      bad = asking();
      bad.scale = scale;
      ask(bad, "scale: ");
    }
    const std::vector<std::uint8_t> mask(static_cast<std::size_t>(cache_.length()), 1);
    const auto masked = [&] {
      AttendArgs args = asking();
      args.mask.kind = Mask::General::boolean;
      args.mask.general = mask.data();
      args.mask.general_stride = {0, 0, 0, 1};
      args.mask.columns = cache_.length();
      return args;
    };
    bad = masked();
    bad.mask.general = nullptr;
    ask(bad, "mask: ");
    for (const std::int64_t columns : {std::int64_t{-1}, kMost, kLeast}) {
      bad = masked();
      bad.mask.columns = columns;
      ask(bad, "mask: ");
    }
    for (const std::int64_t offset : {kMost, kLeast}) {
      bad = masked();
      bad.mask.offset = offset;
      ask(bad, "mask.offset: ");
    }
    bad = masked();
    bad.mask.kind = Mask::General::additive;
    bad.mask.general_dtype = static_cast<DType>(7);
    ask(bad, "mask: ");
    non_finite();
  }

  // NaN in a query that sees its own token: single tokens, short calls and prefills.
  void non_finite() {
    if (cache_.length() <= 8) return;  // all padding
    for (const std::int64_t tokens : {1, 2, 9, 64, 65, 200}) {
      if (tokens > cache_.length()) break;
      std::vector<float> q(static_cast<std::size_t>(batch() * heads() * tokens * case_.config.head_dim_k), 0.25f);
      for (const float x : {kNaN, -kInfinity}) {
        q[q.size() - 1] = x;
        AttendArgs args = asking(tokens);
        args.q.data = q.data();
        // Padding stays hidden; otherwise its own NaN would be refused.
        const std::vector<std::int32_t> start(
            static_cast<std::size_t>(batch()),
            static_cast<std::int32_t>(std::min<std::int64_t>(7, cache_.length() - 1)));
        args.mask.start = start.data();
        expect(cache_.attend(args, answer(tokens)), StatusCode::non_finite, "q: ");
      }
    }
    // Of padding, until it is dropped.
    const AttendArgs all = asking(cache_.length());
    if (sessions::fork_of(cache_)->attend(all, answer(cache_.length())).ok()) return;
    expect(cache_.attend(all, answer(cache_.length())), StatusCode::non_finite, "k: ");
  }

  void outputs() {
    if (cache_.length() == 0) return;
    const auto ask = [&](const MutableTensorView& out) {
      expect(cache_.attend(asking(), out), StatusCode::invalid_argument, "out: ");
    };
    for (std::size_t axis = 0; axis < 4; ++axis) {
      MutableTensorView bad = answer();
      ++bad.shape[axis];
      ask(bad);
    }
    MutableTensorView bad = answer();
    bad.stride[3] = 2;
    ask(bad);
    bad = answer();
    bad.data = nullptr;
    ask(bad);
    bad = answer();
    bad.dtype = static_cast<DType>(7);
    ask(bad);
  }

  void partials() {
    if (cache_.length() == 0) return;
    std::vector<float> o(1 << 16), m(1 << 12), l(1 << 12);
    const auto ask = [&](std::int64_t upto, std::int64_t tokens, StatusCode code, const char* begins) {
      expect(cache_.attend_partial(asking(tokens), upto, {o.data(), m.data(), l.data()}), code, begins);
    };
    for (const std::int64_t upto : {std::int64_t{-1}, cache_.length() + 1, kMost, kLeast})
      ask(upto, 1, StatusCode::out_of_range, "upto: ");
    expect(cache_.attend_partial(asking(), cache_.length(), {nullptr, m.data(), l.data()}),
           StatusCode::invalid_argument, "state: ");
    expect(cache_.attend_partial(asking(), cache_.length(), {o.data(), nullptr, l.data()}),
           StatusCode::invalid_argument, "state: ");
    expect(cache_.attend_partial(asking(), cache_.length(), {o.data(), m.data(), nullptr}),
           StatusCode::invalid_argument, "state: ");
    // Into pages: those that are held, and those that the call itself would seal.
    const std::vector<std::int32_t> start(static_cast<std::size_t>(batch()),
                                          static_cast<std::int32_t>(std::min<std::int64_t>(7, cache_.length() - 1)));
    AttendArgs args = asking();
    args.mask.start = start.data();
    if (cache_.page_count(0) > 0) {
      const std::int64_t sealed = cache_.length() - cache_.exact_tokens(0);
      if (sealed - 1 > cache_.first() + 8) {
        expect(cache_.attend_partial(args, cache_.first() + 8, {o.data(), m.data(), l.data()}),
               StatusCode::out_of_range, "upto: ");
      }
    }
  }

  void edits() {
    for (const std::int64_t n : {std::int64_t{-1}, cache_.length() + 1, kMost, kLeast})
      expect(cache_.crop(n), StatusCode::out_of_range, "length: ");
    if (cache_.first() > 0) expect(cache_.crop(1), StatusCode::out_of_range, "length: ");
    for (const std::int64_t row : {std::int64_t{-1}, std::int64_t{cache_.batch()}, kMost, kLeast})
      expect(cache_.select(std::vector<std::int64_t>{0, row}), StatusCode::out_of_range, "rows: ");
    for (const int times : {0, -1, std::numeric_limits<int>::min()})
      expect(cache_.repeat(times), StatusCode::invalid_argument, "times: ");
    if (cache_.batch() > 1) expect(cache_.repeat(std::numeric_limits<int>::max()), StatusCode::out_of_range, "times: ");
    expect(cache_.reserve(-1), StatusCode::invalid_argument, "tokens: ");
    if (cache_.batch() == 0) {
      expect(cache_.reserve(1), StatusCode::failed_precondition, "tokens: ");
    } else {
      for (const std::int64_t tokens : {kMost, (std::int64_t{1} << 36) - cache_.length() + 1})
        expect(cache_.reserve(tokens), StatusCode::out_of_range, "tokens: ");
    }
    const Status status = cache_.advance();
    EXPECT_FALSE(status.ok());
    expect(status, status.code(), "");
  }

  void reads() {
    if (cache_.batch() == 0) return;
    const std::int64_t n = cache_.length(), first = cache_.first();
    const auto ask = [&](std::int64_t from, std::int64_t count, MutableTensorView out, StatusCode code,
                         const char* begins) {
      expect(cache_.dense_keys(from, count, out), code, begins);
      out.shape[3] = case_.config.head_dim_v;
      expect(cache_.dense_values(from, count, out), code, begins);
    };
    const MutableTensorView good = into(DType::f32, batch(), case_.config.kv_heads, n - first, case_.config.head_dim_k);
    for (const auto& [from, count] : {std::pair{std::int64_t{-1}, std::int64_t{1}},
                                      {first, n - first + 1},
                                      {n, std::int64_t{1}},
                                      {n + 1, std::int64_t{0}},
                                      {first, std::int64_t{-1}},
                                      {std::int64_t{1}, kMost},
                                      {kMost, kMost},
                                      {kMost, std::int64_t{1}},
                                      {kLeast, kLeast}})
      ask(from, count, good, StatusCode::out_of_range, "first, count: ");
    if (first > 0) ask(first - 1, n - first + 1, good, StatusCode::out_of_range, "first: ");
    MutableTensorView bad = good;
    ++bad.shape[1];
    ask(first, n - first, bad, StatusCode::invalid_argument, "out: ");
    bad = good;
    bad.stride[3] = 2;
    ask(first, n - first, bad, StatusCode::invalid_argument, "out: ");
    if (n == first) return;
    bad = good;
    bad.data = nullptr;
    ask(first, n - first, bad, StatusCode::invalid_argument, "out: ");
    bad = good;
    bad.dtype = static_cast<DType>(7);
    ask(first, n - first, bad, StatusCode::invalid_argument, "out: ");
  }

  void files() {
    expect(cache_.save({}), StatusCode::invalid_argument, "sink: ");
    expect(cache_.save(
               [](std::span<const std::byte>) { return error(StatusCode::data_loss, "disk", "room", "none; got"); }),
           StatusCode::data_loss, "disk: ");
    expect(cache_.load({}), StatusCode::invalid_argument, "source: ");
    if (cache_.batch() > 0) expect(load(cache_, before_), StatusCode::failed_precondition, "cache: ");
  }

  const Case& case_;
  Cache& cache_;
  const Bytes before_;
  const std::uint64_t version_;
  std::vector<std::byte> zeros_, out_;
};

class RefusedCalls : public ::testing::TestWithParam<int> {};

TEST_P(RefusedCalls, LeaveNoTrace) {
  const Case c = scripts::script_cases("cpu")[static_cast<std::size_t>(GetParam())];
  SCOPED_TRACE(c.name);
  const std::unique_ptr<Cache> cache = create(c.config), untouched = create(c.config);
  for (const scripts::Call& call : scripts::script(c)) {
    SCOPED_TRACE("before " + call.name);
    Refusals(c, *cache).all();
    if (HasFailure()) return;
    scripts::Output out(call.outputs), want(call.outputs);
    ASSERT_TRUE(call.run(*untouched, &want).ok());
    ASSERT_TRUE(call.run(*cache, &out).ok());
    ASSERT_EQ(out, want);
    ASSERT_EQ(save(*cache), save(*untouched));
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, RefusedCalls,
                         ::testing::Range(0, static_cast<int>(scripts::script_cases("cpu").size())));

// 300 tokens one by one, of which a query's first try was NaN: lambda is that of the queries that were answered.
TEST(Cache, ARefusedQueryTeachesNothing) {
  const Case c{"default", config_of(Recipe(), 2, 64, 64), 2, {0}};
  const std::unique_ptr<Cache> cache = create(c.config), untouched = create(c.config);
  scripts::Writer w(c, 3);
  for (int i = 0; i < 300; ++i) {
    w.append(1);
    w.attend(1);
  }
  const std::vector<scripts::Call> calls = w.take();
  for (std::size_t i = 0; i < calls.size(); ++i) {
    scripts::Output out(calls[i].outputs), want(calls[i].outputs);
    if (i % 2 == 1) {
      const std::vector<float> q(4 * 64, i / 2 % 8 == 7 ? kNaN : kInfinity);
      std::vector<float> answer(q.size());
      AttendArgs args;
      args.q = {q.data(), DType::f32, {1, 4, 1, 64}, {4 * 64, 64, 64, 1}};
      ASSERT_EQ(cache->attend(args, {answer.data(), DType::f32, args.q.shape, args.q.stride}).code(),
                StatusCode::non_finite);
    }
    ASSERT_TRUE(calls[i].run(*untouched, &want).ok());
    ASSERT_TRUE(calls[i].run(*cache, &out).ok());
    ASSERT_EQ(out, want) << calls[i].name;
  }
  const std::vector<float> lambda = sessions::lambda_of(*cache, 0);
  ASSERT_EQ(lambda, sessions::lambda_of(*untouched, 0));
  EXPECT_NE(lambda, std::vector<float>(lambda.size(), 1.0f));
}

}  // namespace
}  // namespace kv4
