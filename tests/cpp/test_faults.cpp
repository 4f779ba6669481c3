// What a cache says and keeps when its backend fails, at each of the calls that it makes (probe.h).
#include <gtest/gtest.h>

#include <string>

#include "probe.h"
#include "save_case.h"

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
      EXPECT_TRUE(status.message() == probe::kFault || status.code() == StatusCode::out_of_memory) << n << ": " << status.message();
      EXPECT_EQ(fresh->length(), 0);
      EXPECT_EQ(probe::held(), held);
      probe::fail_at(0);
      EXPECT_TRUE(load(*fresh, bytes).ok());
      EXPECT_EQ(save(*fresh), bytes);
    }
  }
}

}  // namespace
}  // namespace kv4
