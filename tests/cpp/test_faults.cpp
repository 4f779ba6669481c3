// What a cache says and keeps when its backend fails, or the host's memory runs out, at each of the calls that it
// makes.
#include <gtest/gtest.h>

#include <string>

#include "allocations.h"
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

// Every call of a script is made again and again, and fails one place later each time, until it succeeds: then, and
// with what follows, the cache is the one that nothing ever failed for. arm(n): place n fails; disarm() says whether
// one did.
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

}  // namespace
}  // namespace kv4
