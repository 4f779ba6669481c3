// Bytes that save did not write: each flipped bit and each missing end is reported; files that lie under right
// checksums are refused, or hold what some cache might, and then no later call reads out of bounds (`make asan` runs
// these tests too).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "blob/checksum.h"
#include "save_case.h"

namespace kv4 {
namespace {

using namespace saved;

// Small caches with every kind of block between them.
std::vector<Case> small_cases() {
  using sessions::with;
  Recipe arrival = Recipe::paper(), widths = with(1, 0);
  widths.key.bits = 3;
  widths.value.bits = 6;
  Recipe refined = with(1, 0);
  refined.refined = 2;
  return {{"before the first page", config_of(with(1, 0), 1, 32, 32, DType::bf16), 1, {0, 2}},
          {"pages", config_of(with(1, 0), 1, 32, 32, DType::bf16), 1, {2, 0}},
          {"exact", config_of(Recipe::exact(), 1, 2, 3), 1, {0, 1}},
          {"arrival", config_of(arrival, 1, 32, 32), 1, {0, 2}},
          {"sliding window", config_of(with(1, 0), 1, 32, 32, DType::bf16, 70), 1, {0, 2}},
          {"sliding window, arrival", config_of(arrival, 1, 32, 32, DType::bf16, 70), 1, {0}},
          {"widths", config_of(widths, 1, 32, 32, DType::bf16), 1, {2, 0}},
          {"refined", config_of(refined, 1, 32, 32, DType::bf16), 1, {2, 0}},
          {"sliding window, exact", config_of(Recipe::exact(), 1, 2, 3, DType::f32, 40), 1, {0}}};
}

Bytes saved_small(const Case& c) {
  Twins t(c, 8);
  const std::string name = c.name;
  t.append(name == "before the first page" ? 3 : name == "exact" ? 5 : 66);
  t.attend();
  if (name.rfind("sliding", 0) == 0) {
    for (int i = 0; i < 3; ++i) {
      t.append(33);
      t.attend();
    }
  } else if (name != "before the first page" && name != "exact") {
    t.select({1, 0, 1});
    t.append(3);
    t.attend(false);
  }
  return save(t.cache(0));
}

void expect_refused(Cache& cache, std::span<const std::byte> bytes, StatusCode code) {
  const Status status = load(cache, bytes);
  ASSERT_EQ(status.code(), code) << status.message();
  ASSERT_NE(status.message().find("expected"), std::string::npos);
  ASSERT_NE(status.message().find("got"), std::string::npos);
  ASSERT_EQ(cache.batch(), 0);
  ASSERT_EQ(cache.length(), 0);
  ASSERT_EQ(cache.version(), 0u);
}

TEST(SaveDamage, EveryFlippedByteIsReported) {
  for (const Case& c : small_cases()) {
    SCOPED_TRACE(c.name);
    const Bytes good = saved_small(c);
    auto cache = create(c.config);
    Bytes bytes = good;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      for (const int flip : {0xff, 1 << i % 8}) {
        bytes[i] = good[i] ^ static_cast<std::byte>(flip);
        expect_refused(*cache, bytes, StatusCode::data_loss);
        if (HasFatalFailure()) FAIL() << "byte " << i;
      }
      bytes[i] = good[i];
    }
    ASSERT_TRUE(load(*cache, good).ok());
    EXPECT_EQ(save(*cache), good);
  }
}

TEST(SaveDamage, EveryMissingEndIsReported) {
  for (const Case& c : small_cases()) {
    SCOPED_TRACE(c.name);
    const Bytes good = saved_small(c);
    auto cache = create(c.config);
    for (std::size_t n = 0; n < good.size(); ++n) {
      expect_refused(*cache, std::span(good).first(n), StatusCode::out_of_range);
      if (HasFatalFailure()) FAIL() << "of " << n << " bytes";
    }
    ASSERT_TRUE(load(*cache, good).ok());
  }
}

TEST(SaveDamage, MagicAndVersionAreNamed) {
  const Case c = small_cases()[0];
  const Bytes good = saved_small(c);
  auto cache = create(c.config);
  Bytes bytes = good;
  bytes[0] = std::byte{'K'};
  EXPECT_EQ(load(*cache, bytes).message(), "saved magic: expected kv4cache; got other bytes: this is no saved cache");
  bytes = good;
  for (const int version : {0, 6}) {
    bytes[8] = static_cast<std::byte>(version);
    EXPECT_EQ(load(*cache, bytes).message(), "saved version: expected 1 to 5; got " + std::to_string(version));
  }
}

struct Block {
  std::uint32_t kind;
  std::size_t payload, bytes;
};
constexpr std::uint32_t kConfig = 1, kState = 2, kSequence = 3, kTable = 4, kRows = 5, kEnergies = 9, kPage = 10;

std::vector<Block> blocks_of(const Bytes& file) {
  std::vector<Block> list;
  for (std::size_t at = 12; at < file.size();) {
    Block b{};
    std::uint64_t bytes = 0;
    std::memcpy(&b.kind, &file[at], 4);
    std::memcpy(&bytes, &file[at + 4], 8);
    b.payload = at + 12;
    b.bytes = static_cast<std::size_t>(bytes);
    list.push_back(b);
    at = b.payload + b.bytes + 4;
  }
  return list;
}

void seal_block(Bytes& file, const Block& b) {
  const std::uint32_t crc = crc32c(std::span(file).subspan(b.payload - 12, b.bytes + 12));
  std::memcpy(&file[b.payload + b.bytes], &crc, 4);
}

// Every call that a cache has, on one loaded from a damaged file. Statuses do not matter here, memory does.
void exercise(const Case& c, const Bytes& file, Cache& loaded) {
  const std::int64_t batch = loaded.batch(), h = c.config.kv_heads, dk = c.config.head_dim_k, dv = c.config.head_dim_v;
  ASSERT_LE(batch, 4);
  ASSERT_TRUE(load(loaded, file).code() == StatusCode::failed_precondition || batch == 0);
  if (batch == 0) return;
  const auto ask = [&](Cache& cache) {
    const std::int64_t b = cache.batch(), tokens = std::min<std::int64_t>(70, cache.length());
    if (b == 0 || tokens == 0) return;
    const std::vector<float> q(static_cast<std::size_t>(b * h * tokens * dk), 0.25f);
    std::vector<float> out(static_cast<std::size_t>(b * h * tokens * std::max(dk, dv)));
    for (const std::int64_t n : {std::int64_t{1}, tokens}) {
      AttendArgs args;
      args.q = {q.data(), DType::f32, {b, h, n, dk}, {h * n * dk, n * dk, dk, 1}};
      static_cast<void>(cache.attend(args, {out.data(), DType::f32, {b, h, n, dv}, {h * n * dv, n * dv, dv, 1}}));
    }
    for (const std::int64_t first : {std::int64_t{0}, cache.length() - tokens}) {
      static_cast<void>(cache.dense_keys(
          first, tokens, {out.data(), DType::f32, {b, h, tokens, dk}, {h * tokens * dk, tokens * dk, dk, 1}}));
      static_cast<void>(cache.dense_values(
          first, tokens, {out.data(), DType::f32, {b, h, tokens, dv}, {h * tokens * dv, tokens * dv, dv, 1}}));
    }
    EXPECT_GT(cache.nbytes(), 0u);
  };
  const auto append = [&](Cache& cache, std::int64_t tokens) {
    const std::vector<float> rows(static_cast<std::size_t>(cache.batch() * h * tokens * std::max(dk, dv)), 1.0f);
    const auto view = [&](std::int64_t d) {
      return TensorView{rows.data(), c.config.dtype, {cache.batch(), h, tokens, d}, {h * tokens * d, tokens * d, d, 1}};
    };
    return cache.append(view(dk), view(dv));
  };
  EXPECT_FALSE(save(loaded).empty());
  auto going_on = sessions::fork_of(loaded);
  ask(*going_on);
  for (const std::int64_t tokens : {1, 70, 1, 140}) {
    static_cast<void>(append(*going_on, tokens));
    ask(*going_on);
  }
  const std::int64_t length = loaded.length();
  for (const std::int64_t n : {length - 1, length - 3, length - 64, length - 67, loaded.first() + 1, std::int64_t{66},
                               std::int64_t{3}, std::int64_t{2}, std::int64_t{1}, std::int64_t{0}}) {
    auto cropped = sessions::fork_of(loaded);
    if (!cropped->crop(n).ok()) continue;
    ask(*cropped);
    static_cast<void>(append(*cropped, 100));
    ask(*cropped);
    static_cast<void>(cropped->seal());
  }
}

// A test for each case, so that they run beside each other: half a minute together, ten times that under sanitizers.
class DamagedFile : public testing::TestWithParam<int> {};

TEST_P(DamagedFile, LiesUnderRightChecksumsAreBounded) {
  const Case c = small_cases()[static_cast<std::size_t>(GetParam())];
  SCOPED_TRACE(c.name);
  long accepted = 0, refused = 0;
  const Bytes good = saved_small(c);
  const auto load_and_use = [&](const Bytes& file) {
    auto cache = create(c.config);
    if (load(*cache, file).ok()) {
      ++accepted;
      exercise(c, file, *cache);
    } else {
      ++refused;
      ASSERT_EQ(cache->batch(), 0);
    }
  };
  Bytes file = good;
  for (const Block& b : blocks_of(good)) {
    const bool data = b.kind == kRows || b.kind == kEnergies || b.kind == kPage;  // any bytes are values there
    for (std::size_t i = 0; i < b.bytes; i += data ? 499 : 1) {
      for (const int flip : {1, 0x80, 0xff}) {
        file[b.payload + i] ^= static_cast<std::byte>(flip);
        seal_block(file, b);
        load_and_use(file);
        if (HasFatalFailure()) FAIL() << "block of kind " << b.kind << ", byte " << i << ", flip " << flip;
        file[b.payload + i] = good[b.payload + i];
      }
    }
    if (b.kind == kConfig || data || b.bytes % 8 != 0) {
      seal_block(file, b);
      continue;
    }
    for (std::size_t i = 0; i + 8 <= b.bytes; i += 8) {
      std::int64_t held = 0;
      std::memcpy(&held, &good[b.payload + i], 8);
      for (const std::int64_t x :
           {std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, std::int64_t{64}, held - 64, held + 64,
            held - 1, held + 1, std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 36,
            std::numeric_limits<std::int64_t>::max(), std::numeric_limits<std::int64_t>::min()}) {
        std::memcpy(&file[b.payload + i], &x, 8);
        seal_block(file, b);
        load_and_use(file);
        if (HasFatalFailure()) FAIL() << "block of kind " << b.kind << ", number " << i / 8 << ", value " << x;
      }
      std::memcpy(&file[b.payload + i], &good[b.payload + i], 8);
    }
    seal_block(file, b);
  }
  ASSERT_EQ(file, good);
  EXPECT_GT(accepted, 0);
  EXPECT_GT(refused, accepted);
}
INSTANTIATE_TEST_SUITE_P(Cases, DamagedFile, testing::Range(0, static_cast<int>(small_cases().size())));

// Values that no cache has, under right checksums: NaN and infinity in exact rows, energies, lambda, scales and means;
// energies and scales below 0, lambda of 0.
TEST(SaveDamage, ValuesThatAreNotFiniteAreRefused) {
  struct Wrong {
    std::uint32_t kind;
    std::size_t at;  // byte of the payload
    std::uint32_t bits;
    int bytes;
    const char* name;
  };
  const kv4_page_layout slice = kv4_make_page_layout(32, 32, 1, 1, true, 32, 32);
  for (const Case& c : small_cases()) {
    if (std::string(c.name) != "pages" && std::string(c.name) != "before the first page") continue;
    SCOPED_TRACE(c.name);
    Twins t(c, 8);
    for (int i = 0; i < 30; ++i) {
      t.append(1);
      t.attend();
    }
    if (std::string(c.name) == "pages") {
      for (int i = 0; i < 5; ++i) {
        t.append(10);
        t.attend();
      }
    }
    const Bytes good = save(t.cache(0));
    int refused = 0;
    for (const Wrong& wrong : {Wrong{kRows, 2, 0x7f80, 2, "saved exact rows: "},
                               {kRows, 62, 0xffc0, 2, "saved exact rows: "},
                               {7, 0, 0, 4, "saved lambda: "},
                               {7, 4, 0x7f800000, 4, "saved lambda: "},
                               {7, 8, 0xbf800000, 4, "saved lambda: "},
                               {7, 8, 0x7fc00000, 4, "saved lambda: "},
                               {kEnergies, 4, 0x7f800000, 4, "saved query energies: "},
                               {kEnergies, 0, 0x7fc00000, 4, "saved query energies: "},
                               {kEnergies, 8, 0xbf800000, 4, "saved query energies: "},
                               {kPage, slice.k_scales + 6, 0x7c00, 2, "saved page: "},
                               {kPage, slice.k_mean + 2, 0x7e00, 2, "saved page: "},
                               {kPage, slice.v_scales, 0xfc00, 2, "saved page: "},
                               {kPage, slice.k_scales + 2, 0x8001, 2, "saved page: expected scales of 0 or more"},
                               {kPage, slice.v_scales + 126, 0xbc00, 2, "saved page: expected scales of 0 or more"}}) {
      Bytes file = good;
      for (const Block& b : blocks_of(good)) {
        if (b.kind != wrong.kind) continue;
        std::memcpy(&file[b.payload + wrong.at], &wrong.bits, static_cast<std::size_t>(wrong.bytes));
        seal_block(file, b);
        auto cache = create(c.config);
        const Status status = load(*cache, file);
        EXPECT_EQ(status.code(), StatusCode::data_loss);
        EXPECT_EQ(status.message().rfind(wrong.name, 0), 0u) << status.message();
        EXPECT_EQ(cache->batch(), 0);
        ++refused;
        break;
      }
    }
    EXPECT_GE(refused, 5);
  }
}

// Kernels index the tokens of a page by the places of its second rows.
TEST(SaveDamage, PlacesAndScalesOfSecondRowsAreChecked) {
  const kv4_page_layout slice = kv4_make_page_layout(32, 32, 1, 1, true, 32, 32, 4, 4, 2);
  const kv4_second_layout second = kv4_make_second_layout(slice, 32, 2);
  const std::vector<Case> all = small_cases();
  const Case& c = *std::find_if(all.begin(), all.end(), [](const Case& x) { return std::string(x.name) == "refined"; });
  const Bytes good = saved_small(c);
  const auto load_with = [&](std::size_t at, std::uint32_t bits, std::size_t bytes) {
    Bytes file = good;
    for (const Block& b : blocks_of(good)) {
      if (b.kind != kPage) continue;
      std::memcpy(&file[b.payload + at], &bits, bytes);
      seal_block(file, b);
      break;
    }
    auto cache = create(c.config);
    const Status status = load(*cache, file);
    EXPECT_EQ(status.ok(), cache->batch() > 0);
    return status.message();
  };
  EXPECT_EQ(load_with(second.places, 64, 1), "saved place of a second row: expected 0 to 63; got 64");
  EXPECT_EQ(load_with(second.places + 1, 255, 1), "saved place of a second row: expected 0 to 63; got 255");
  EXPECT_EQ(load_with(second.scales + 2, 0x7e00, 2), "saved page: expected finite second scales; got NaN or infinity");
  EXPECT_EQ(load_with(second.scales, 0xbc00, 2), "saved page: expected scales of 0 or more; got one below 0");
  EXPECT_EQ(load_with(second.places, 63, 1), "");
}

// Files of version 1 have a record of every query before the first page is due. What is read of them is what counts.
TEST(SaveDamage, FilesOfVersionOneAreRead) {
  for (const Case& c :
       {Case{"default", config_of(Recipe(), 2, 64, 64, DType::f16), 2, {0, 7}}, small_cases()[1], small_cases()[2]}) {
    SCOPED_TRACE(c.name);
    Twins t(c, 8);
    for (int i = 0; i < 40; ++i) {
      t.append(1);
      t.attend();
    }
    const Bytes good = save(t.cache(0));
    const std::size_t queries = static_cast<std::size_t>(c.config.recipe.sinks + c.config.recipe.window + kPageTokens);
    const std::size_t channels = static_cast<std::size_t>(c.config.kv_heads * c.config.head_dim_k) * 4;
    Bytes old(good.begin(), good.begin() + 12);
    old[8] = std::byte{1};
    const auto put = [&](std::uint32_t kind, const Bytes& payload) {
      const std::uint64_t bytes = payload.size();
      const std::size_t at = old.size();
      old.resize(at + 12 + payload.size() + 4);
      std::memcpy(&old[at], &kind, 4);
      std::memcpy(&old[at + 4], &bytes, 8);
      std::copy(payload.begin(), payload.end(), old.begin() + static_cast<std::ptrdiff_t>(at) + 12);
      seal_block(old, {kind, at + 12, payload.size()});
    };
    std::vector<Bytes> rows;  // of the records, as version 1 orders them
    const std::vector<Block> blocks = blocks_of(good);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const Bytes payload(good.begin() + static_cast<std::ptrdiff_t>(blocks[i].payload),
                          good.begin() + static_cast<std::ptrdiff_t>(blocks[i].payload + blocks[i].bytes));
      if (blocks[i].kind == kEnergies) continue;
      if (blocks[i].kind != 8) {
        put(blocks[i].kind, payload);
        continue;
      }
      ASSERT_EQ(payload.size(), queries / 8);
      Bytes filled(queries, std::byte{1});
      for (std::size_t n = 0; n < payload.size(); ++n) filled[8 * n + 7] = payload[n];
      put(8, filled);
      std::size_t next = i + 1;
      for (std::size_t n = 0; n < queries; ++n) {
        if (filled[n] == std::byte{0}) continue;
        const bool counts = n % 8 == 7;
        const Bytes other(channels, std::byte{0x3f});  // of a query that counts no more
        put(kEnergies,
            counts ? Bytes(good.begin() + static_cast<std::ptrdiff_t>(blocks[next].payload),
                           good.begin() + static_cast<std::ptrdiff_t>(blocks[next].payload + blocks[next].bytes))
                   : other);
        if (counts) ++next;
      }
    }
    auto cache = create(c.config);
    std::size_t used = 0;
    const Status status = load(*cache, old, &used);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(used, old.size());
    EXPECT_EQ(save(*cache), good);
  }
}

// Counts that agree with each other, of far more than the file holds: its end comes before the memory is asked for.
TEST(SaveDamage, CountsAloneTakeNoMemory) {
  for (const bool exact : {true, false}) {
    const Case c = exact ? Case{"exact", config_of(Recipe::exact(), 1, 64, 64)}
                         : Case{"arrival", config_of(Recipe::paper(), 1, 64, 64)};
    Twins t(c, 9);
    t.append(64);
    Bytes file = save(t.cache(0));
    constexpr std::int64_t kTokens = std::int64_t{1} << 36;
    for (const Block& b : blocks_of(file)) {
      const auto put = [&](std::size_t number, std::int64_t x) { std::memcpy(&file[b.payload + 8 * number], &x, 8); };
      if (b.kind == kState) put(1, kTokens);
      if (b.kind == kState && !exact) put(2, kTokens / kPageTokens);
      if (b.kind == kSequence) put(exact ? 6 : 3, exact ? kTokens : kTokens / kPageTokens);
      if (b.kind == kSequence || b.kind == kState) seal_block(file, b);
    }
    auto cache = create(c.config);
    const std::size_t before = cache->nbytes();
    EXPECT_EQ(load(*cache, file).code(), StatusCode::data_loss);
    const std::vector<Block> blocks = blocks_of(file);
    const auto last =
        std::find_if(blocks.begin(), blocks.end(), [&](const Block& b) { return b.kind == (exact ? kRows : kTable); });
    ASSERT_NE(last, blocks.end());
    // Where the file goes on as it began, memory follows what has come.
    const Bytes head(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(last->payload - 12));
    const Bytes rows(file.begin() + static_cast<std::ptrdiff_t>(last->payload - 12),
                     file.begin() + static_cast<std::ptrdiff_t>(last->payload + last->bytes + 4));
    file = head;
    for (int i = 0; i < 20 && exact; ++i) file.insert(file.end(), rows.begin(), rows.end());
    EXPECT_EQ(load(*cache, file).message(), kEnd);
    EXPECT_EQ(cache->nbytes(), before);
    EXPECT_EQ(cache->batch(), 0);
  }
}

}  // namespace
}  // namespace kv4
