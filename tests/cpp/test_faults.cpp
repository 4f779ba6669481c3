// Failure injection: the backend fails, or host memory runs out, at each call in turn; the cache reports an error and
// keeps its state.
#include <gtest/gtest.h>

#include <string>

#include "allocations.h"
#include "kv4/paged.h"
#include "probe.h"
#include "script_case.h"

namespace kv4 {
namespace {

using namespace saved;

Case on_probe(Case c) {
  c.config.backend = "probe";
  return c;
}

// Sinks, sealed pages, a window and lambda; and before the first page, query energies.
TEST(Faults, SaveAndLoadPassOnEveryFaultOfTheBackend) {
  for (const std::int64_t tokens : {40, 300}) {
    Twins t(on_probe({"two sequences", config_of(Recipe(), 2, 64, 80), 2, {0, 7}}), 1);
    t.append(tokens);
    t.attend(true);
    t.append(1);
    const Cache& cache = t.cache(0);
    ASSERT_EQ(cache.page_count(0) > 0, tokens == 300);
    const Bytes bytes = save(cache);
    probe::fail_at(0);
    ASSERT_EQ(save(cache), bytes);
    const long saving = probe::calls();
    ASSERT_GT(saving, 4);
    for (long n = 1; n <= saving; ++n) {
      probe::fail_at(n, n % 2 == 0);
      const Status status = cache.save([](std::span<const std::byte>) { return Status(); });
      EXPECT_EQ(status.message(), probe::kFault) << n;
    }
    probe::fail_at(0);
    EXPECT_TRUE(load(*create(cache.config()), bytes).ok());
    const long loading = probe::calls();
    ASSERT_GT(loading, saving);  // memory too
    for (long n = 1; n <= loading; ++n) {
      probe::fail_at(0);
      const std::unique_ptr<Cache> fresh = create(cache.config());
      const std::size_t held = probe::held();
      probe::fail_at(n, n % 2 == 0);
      const Status status = load(*fresh, bytes);
      EXPECT_TRUE(!probe::failed() || status.message() == probe::kFault || status.code() == StatusCode::out_of_memory)
          << n << ": " << status.message();
      probe::fail_at(0);
      if (status.ok()) continue;
      EXPECT_EQ(fresh->length(), 0);
      EXPECT_EQ(probe::held(), held);
      EXPECT_TRUE(load(*fresh, bytes).ok());
      EXPECT_EQ(save(*fresh), bytes);
    }
  }
}

// Repeats every call of a script, failing one place later each time, until it succeeds; from then on the cache must
// equal one without failures. arm(n): place n fails; disarm(): whether one failed.
template <class Arm, class Disarm>
void fail_everywhere(const Case& c, Arm arm, Disarm disarm, StatusCode code) {
  SCOPED_TRACE(c.name);
  const std::unique_ptr<Cache> cache = create(c.config), untouched = create(c.config);
  long failures = 0;
  for (const scripts::Call& call : scripts::script(c)) {
    const Bytes before = save(*untouched);
    scripts::Output out(call.outputs), want(call.outputs);
    for (long n = 1;; ++n) {
      arm(n);
      const Status status = call.run(*cache, &out);
      const bool failed = disarm();
      if (status.ok()) break;
      ++failures;
      ASSERT_TRUE(failed) << call.name << ": " << status.message();
      ASSERT_TRUE(status.code() == code || status.code() == StatusCode::out_of_memory)
          << call.name << ", place " << n << ": " << status.message();
      ASSERT_EQ(cache->version(), untouched->version()) << call.name << ", place " << n;
      ASSERT_EQ(save(*cache), before) << call.name << ", place " << n;
    }
    const Status status = call.run(*untouched, &want);
    ASSERT_TRUE(status.ok()) << call.name << ": " << status.message();
    ASSERT_EQ(out, want) << call.name;
    ASSERT_EQ(save(*cache), save(*untouched)) << call.name;
  }
  EXPECT_GT(failures, 50);
}

TEST(Faults, ACallThatTheBackendFailsLeavesNoTrace) {
  for (const Case& c : scripts::script_cases("probe")) {
    fail_everywhere(
        c, [](long n) { probe::fail_at(n); },
        [] {
          const bool failed = probe::failed();
          probe::fail_at(0);
          return failed;
        },
        StatusCode::failed_precondition);
    if (HasFatalFailure()) return;
  }
  EXPECT_EQ(probe::held(), 0u);
}

TEST(Faults, ACallThatFindsNoHostMemoryLeavesNoTrace) {
  for (const Case& c : scripts::script_cases("cpu")) {
    fail_everywhere(c, allocations::fail_at, allocations::failed, StatusCode::out_of_memory);
    if (HasFatalFailure()) return;
  }
}

// Repeats `call` with its first allocation failing, then its second, ..., until it succeeds. Each failure must return
// out_of_memory and keep `unchanged` true. Adds their number to `failures`: a call may need no memory.
template <class Call, class Unchanged>
void fail_every_allocation(const char* name, long* failures, Call call, Unchanged unchanged) {
  SCOPED_TRACE(name);
  for (long n = 1;; ++n) {
    allocations::fail_at(n);
    const Status status = call();
    const bool failed = allocations::failed();
    if (status.ok()) break;
    ++*failures;
    ASSERT_TRUE(failed) << status.message();
    ASSERT_EQ(status.code(), StatusCode::out_of_memory) << "allocation " << n << ": " << status.message();
    ASSERT_TRUE(unchanged()) << "allocation " << n;
  }
}

// Calls that scripts lack: create, save and load; adding, removing and ragged sequences.
TEST(Faults, MakingAndLoadingFindNoHostMemory) {
  long failures = 0;
  CacheConfig config = config_of(Recipe(), 2, 64, 64);
  config.recipe.value.rotation = RotationKind::householder;
  config.recipe.value.seed = 77;  // unique to this cache, so that its tables are built
  std::unique_ptr<Cache> cache;
  fail_every_allocation(
      "create", &failures, [&] { return Cache::create(config, &cache); }, [&] { return cache == nullptr; });
  std::unique_ptr<PageFormat> format;
  fail_every_allocation(
      "page format", &failures, [&] { return PageFormat::create(config, &format); }, [&] { return format == nullptr; });

  Twins t({"two sequences", config_of(Recipe(), 2, 64, 80), 2, {0, 7}}, 1);
  t.append(300);
  t.attend(true);
  t.append(1);
  const Bytes bytes = save(t.cache(0));
  std::size_t sunk = 0;
  fail_every_allocation(
      "save", &failures, [&, sink = Sink([&](std::span<const std::byte> x) {
                               sunk += x.size();
                               return Status();
                             })] { return t.cache(0).save(sink); },
      [] { return true; });
  EXPECT_GE(sunk, bytes.size());
  const std::unique_ptr<Cache> fresh = create(t.cache(0).config());
  const std::size_t held = fresh->nbytes();
  std::size_t at = 0;
  const Source source = [&](std::span<std::byte> to) {
    if (to.size() > bytes.size() - at) return Status(StatusCode::out_of_range, kEnd);
    std::memcpy(to.data(), bytes.data() + at, to.size());
    at += to.size();
    return Status();
  };
  fail_every_allocation(
      "load", &failures,
      [&] {
        at = 0;
        return fresh->load(source);
      },
      [&] { return fresh->batch() == 0 && fresh->nbytes() == held; });
  EXPECT_EQ(save(*fresh), bytes);
  EXPECT_GT(failures, 40);
}

TEST(Faults, SequencesOfTheirOwnLengthFindNoHostMemory) {
  for (const Case& c : {Case{"default", config_of(Recipe(), 2, 64, 64), 2, {0}},
                        Case{"exact", config_of(Recipe::exact(), 2, 64, 64), 2, {0}},
                        Case{"arrival", config_of(Recipe::paper(), 2, 64, 64), 2, {0}}}) {
    SCOPED_TRACE(c.name);
    long failures = 0;
    const std::unique_ptr<Cache> cache = create(c.config), other = create(c.config);
    const std::vector<float> x = cases::normal_rows(4 * 300, 64, 3, 0.5);
    const auto rows = [&](std::int64_t n, std::int64_t heads = 2) {
      return TensorView{x.data(), DType::f32, {1, heads, n, 64}, {0, 0, 64, 1}};
    };
    Bytes before;
    const auto unchanged = [&] { return save(*cache) == before; };
    const auto expect_clean = [&](const char* name, auto call) {
      before = save(*cache);
      fail_every_allocation(name, &failures, call, unchanged);
    };
    ASSERT_TRUE(other->add(1).ok());
    ASSERT_TRUE(other->append(rows(200), rows(200)).ok());
    expect_clean("add", [&] { return cache->add(3); });
    const std::vector<RowCount> counts{{2, 90}, {0, 140}, {1, 5}}, ones{{0, 1}, {2, 1}};
    expect_clean("append to some", [&] { return cache->append(counts, rows(235), rows(235)); });
    const TensorView q = rows(2, 4);
    std::vector<float> out(4 * 2 * 64), m(8), l(8);
    const MutableTensorView to{out.data(), DType::f32, {1, 4, 2, 64}, {512, 128, 64, 1}};
    AttendArgs args;
    args.q = q;
    expect_clean("attend to some", [&] { return cache->attend(ones, args, to); });
    const std::vector<std::int64_t> upto{140, 90};
    expect_clean("attend to a part",
                 [&] { return cache->attend_partial(ones, args, upto, {out.data(), m.data(), l.data()}); });
    expect_clean("crop one", [&] { return cache->crop(0, 75); });
    if (c.config.recipe.seal != SealMode::arrival) expect_clean("erase", [&] { return cache->erase(0, 70, 2); });
    expect_clean("extend by another's", [&] { return cache->extend(*other); });
    expect_clean("extend by its own", [&] { return cache->extend(*cache); });
    const std::vector<std::int64_t> gone{0, 3};
    expect_clean("remove", [&] { return cache->remove(gone); });
    expect_clean("repeat", [&] { return cache->repeat(2); });
    std::unique_ptr<Cache> copy;
    expect_clean("clone", [&] { return cache->clone(&copy); });
    EXPECT_EQ(save(*copy), save(*cache));
    EXPECT_GT(failures, 30);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace kv4
