// Cache::load on any bytes. An input is a configuration's number, flags, then a file; flag 1 recomputes the block
// checksums first, so that mutations get past them.
//
// Properties: a refused file leaves the cache empty with an error (expected, got); after an accepted one every later
// call stays within its memory, and saving gives bytes that load to the same cache.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "blob/checksum.h"
#include "input.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"
#include "saved_configs.h"

namespace kv4::fuzz {
namespace {

using Bytes = std::vector<std::byte>;

std::unique_ptr<Cache> create(const CacheConfig& config) {
  std::unique_ptr<Cache> cache;
  KV4_EXPECT(Cache::create(config, &cache).ok(), "a configuration of the list");
  return cache;
}

Status load(Cache& cache, std::span<const std::byte> bytes) {
  std::size_t at = 0;
  return cache.load([&](std::span<std::byte> to) {
    if (to.size() > bytes.size() - at)
      return Status(StatusCode::out_of_range, "file: expected more bytes; got its end");
    std::memcpy(to.data(), bytes.data() + at, to.size());
    at += to.size();
    return Status();
  });
}

Bytes save(const Cache& cache) {
  Bytes bytes;
  const Status status = cache.save([&](std::span<const std::byte> x) {
    bytes.insert(bytes.end(), x.begin(), x.end());
    return Status();
  });
  KV4_EXPECT(status.ok(), status.message().c_str());
  return bytes;
}

// 12 bytes of magic and version, then blocks: u32 kind, u64 bytes, payload, u32 CRC-32C.
void repair_checksums(Bytes& file) {
  for (std::size_t at = 12; at + 16 <= file.size();) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, &file[at + 4], sizeof bytes);
    if (bytes > file.size() - at - 16) return;
    const std::uint32_t crc = crc32c(std::span(file).subspan(at, 12 + bytes));
    std::memcpy(&file[at + 12 + bytes], &crc, sizeof crc);
    at += 16 + bytes;
  }
}

constexpr std::int64_t kMostRows = 4, kMostTokens = 4096;

void attend(Cache& cache, std::int64_t tokens) {
  const CacheConfig& c = cache.config();
  const std::int64_t b = cache.batch(), h = c.kv_heads, dk = c.head_dim_k, dv = c.head_dim_v;
  if (tokens > cache.length() || tokens == 0) return;
  const std::vector<float> q(static_cast<std::size_t>(b * h * tokens * dk), 0.25f);
  std::vector<float> out(static_cast<std::size_t>(b * h * tokens * dv));
  AttendArgs args;
  args.q = {q.data(), DType::f32, {b, h, tokens, dk}, {h * tokens * dk, tokens * dk, dk, 1}};
  static_cast<void>(
      cache.attend(args, {out.data(), DType::f32, {b, h, tokens, dv}, {h * tokens * dv, tokens * dv, dv, 1}}));
}

void append(Cache& cache, std::int64_t tokens) {
  const CacheConfig& c = cache.config();
  const std::int64_t b = cache.batch(), h = c.kv_heads;
  const std::vector<float> rows(static_cast<std::size_t>(b * h * tokens * std::max(c.head_dim_k, c.head_dim_v)), 1.0f);
  const auto view = [&](std::int64_t d) {
    return TensorView{rows.data(), c.dtype, {b, h, tokens, d}, {h * tokens * d, tokens * d, d, 1}};
  };
  static_cast<void>(cache.append(view(c.head_dim_k), view(c.head_dim_v)));
}

void read_dense(Cache& cache, std::int64_t first, std::int64_t count) {
  const CacheConfig& c = cache.config();
  const std::int64_t b = cache.batch(), h = c.kv_heads;
  std::vector<float> out(static_cast<std::size_t>(b * h * count * std::max(c.head_dim_k, c.head_dim_v)));
  const auto into = [&](std::int64_t d) {
    return MutableTensorView{out.data(), DType::f32, {b, h, count, d}, {h * count * d, count * d, d, 1}};
  };
  static_cast<void>(cache.dense_keys(first, count, into(c.head_dim_k)));
  static_cast<void>(cache.dense_values(first, count, into(c.head_dim_v)));
}

// Uses a loaded cache. Results do not matter here; memory accesses do.
void go_on(const Cache& loaded) {
  if (loaded.batch() == 0 || loaded.batch() > kMostRows || loaded.length() > kMostTokens) return;
  const auto each = [&](auto calls) {
    std::unique_ptr<Cache> copy;
    KV4_EXPECT(loaded.clone(&copy).ok(), "a clone");
    calls(*copy);
  };
  each([](Cache& c) {
    for (const std::int64_t tokens : {1, 70, 1}) {
      append(c, tokens);
      attend(c, std::min<std::int64_t>(tokens, c.length()));
    }
    read_dense(c, c.first(), std::min<std::int64_t>(c.length() - c.first(), 130));
  });
  for (const std::int64_t n : {loaded.length() - 1, loaded.length() - 66, loaded.first() + 1, std::int64_t{2}})
    each([n](Cache& c) {
      if (!c.crop(n).ok()) return;
      attend(c, 1);
      append(c, 65);
      attend(c, std::min<std::int64_t>(65, c.length()));
      static_cast<void>(c.seal());
    });
  each([](Cache& c) {
    const std::vector<std::int64_t> rows{c.batch() - 1, 0, 0};
    static_cast<void>(c.select(rows));
    append(c, 3);
    attend(c, 3);
    static_cast<void>(c.erase(0, c.length(0) - 2, 1));
    static_cast<void>(c.remove(std::vector<std::int64_t>{0}));
    attend(c, 1);
  });
}

}  // namespace
}  // namespace kv4::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  KV4_EXPECT(kv4::cpu::set_num_threads(1).ok(), "one thread");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kv4::fuzz;
  static const std::vector<kv4::CacheConfig> configs = saved_configs();
  Input in(data, size);
  const kv4::CacheConfig& config = configs[static_cast<std::size_t>(in.below(static_cast<int>(configs.size())))];
  const bool repair = (in.byte() & 1) != 0;
  const auto given = std::as_bytes(in.rest());
  Bytes file(given.begin(), given.end());
  if (repair) repair_checksums(file);
  const auto cache = create(config);
  const kv4::Status status = load(*cache, file);
  if (!status.ok()) {
    KV4_EXPECT(cache->batch() == 0 && cache->length() == 0 && cache->version() == 0, "a refused file leaves no trace");
    KV4_EXPECT(status.message().find(": expected ") != std::string::npos, status.message().c_str());
    KV4_EXPECT(status.message().find("; got ") != std::string::npos, status.message().c_str());
    return 0;
  }
  const Bytes bytes = save(*cache);
  const auto again = create(config);
  const kv4::Status loaded = load(*again, bytes);
  KV4_EXPECT(loaded.ok(), loaded.message().c_str());
  KV4_EXPECT(save(*again) == bytes, "what is saved loads to the same");
  go_on(*cache);
  KV4_EXPECT(save(*cache) == bytes, "clones that go on leave the cache as it is");
  return 0;
}
