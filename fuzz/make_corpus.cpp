// Writes the seed corpus: make_corpus FOLDER. Valid saved caches and calibrations, and random bytes for call programs,
// all from fixed seeds. Inputs found by fuzzing are kept beside them.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "input.h"
#include "kv4/cache.h"
#include "saved_configs.h"

namespace kv4::fuzz {
namespace {

void write(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  KV4_EXPECT(file.good(), path.c_str());
}

// Appends `tokens` to each sequence and attends with the last one.
void step(Cache& cache, std::int64_t tokens, cases::Random& random) {
  const CacheConfig& c = cache.config();
  const std::int64_t b = cache.batch(), h = c.kv_heads, dk = c.head_dim_k, dv = c.head_dim_v;
  const auto rows = [&](std::int64_t d) {
    std::vector<std::uint16_t> x(static_cast<std::size_t>(b * h * tokens * d) * size_of(c.dtype) / 2);
    for (std::uint16_t& each : x) each = static_cast<std::uint16_t>(0x3c00 + random.below(512));  // finite in any dtype
    return x;
  };
  const auto k = rows(dk), v = rows(dv);
  const auto view = [&](const std::vector<std::uint16_t>& x, std::int64_t d) {
    return TensorView{x.data(), c.dtype, {b, h, tokens, d}, {h * tokens * d, tokens * d, d, 1}};
  };
  KV4_EXPECT(cache.append(view(k, dk), view(v, dv)).ok(), "tokens");
  const std::vector<float> q(static_cast<std::size_t>(b * h * tokens * dk), 0.25f);
  std::vector<float> out(static_cast<std::size_t>(b * h * tokens * dv));
  AttendArgs args;
  args.q = {q.data(), DType::f32, {b, h, tokens, dk}, {h * tokens * dk, tokens * dk, dk, 1}};
  const Status status =
      cache.attend(args, {out.data(), DType::f32, {b, h, tokens, dv}, {h * tokens * dv, tokens * dv, dv, 1}});
  KV4_EXPECT(status.ok(), status.message().c_str());
}

void saved_caches(const std::filesystem::path& folder) {
  const std::vector<CacheConfig> configs = saved_configs();
  cases::Random random(1);
  for (std::size_t i = 0; i < configs.size(); ++i)
    for (const int kind : {0, 1, 2}) {
      if (kind == 2 && i == 7) continue;  // large, and has no block kind that smaller ones lack
      std::unique_ptr<Cache> cache;
      KV4_EXPECT(Cache::create(configs[i], &cache).ok(), "a configuration");
      KV4_EXPECT(cache->add(1 + kind / 2).ok(), "sequences");
      step(*cache, kind == 0 ? 3 : 66, random);
      for (int n = 0; n < (kind == 2 ? 3 : 0); ++n) step(*cache, 30, random);
      if (kind == 2) KV4_EXPECT(cache->crop(0, cache->length(0) - 2).ok(), "lengths that differ");
      std::vector<std::byte> bytes{static_cast<std::byte>(i), std::byte{1}};
      const Status status = cache->save([&](std::span<const std::byte> x) {
        bytes.insert(bytes.end(), x.begin(), x.end());
        return Status();
      });
      KV4_EXPECT(status.ok(), status.message().c_str());
      write(folder / ("config" + std::to_string(i) + "-" + std::to_string(kind)), bytes);
    }
}

void any_bytes(const std::filesystem::path& folder, std::uint64_t seed) {
  cases::Random random(seed);
  for (int i = 0; i < 12; ++i) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(40 + 30 * i));
    for (std::byte& x : bytes) x = static_cast<std::byte>(random.bits());
    write(folder / ("any" + std::to_string(i)), bytes);
  }
}

void calibrations(const std::filesystem::path& folder) {
  const std::string meta = R"({"__metadata__":{"format":"kv4-calibration","version":"1"})";
  const std::string key = R"(,"layer.0.key.lambda":{"dtype":"F32","shape":[1,4],"data_offsets":[0,16]})",
                    value = R"(,"layer.0.value.lambda":{"dtype":"F32","shape":[1,4],"data_offsets":[16,32]})",
                    moments = R"(,"layer.1.query.moments":{"dtype":"F32","shape":[1,2,2],"data_offsets":[0,16]})";
  int n = 0;
  for (const std::string& header :
       {meta + key + "}", meta + key + value + moments + "}", meta + "}", std::string(R"({"a":[1]})")}) {
    const std::uint64_t size = header.size();
    const float numbers[] = {1, 2, 3, 4, 0.5f, 0.25f, 8, 16};
    std::vector<std::byte> bytes;
    const auto put = [&](const void* from, std::size_t count) {
      const auto* x = static_cast<const std::byte*>(from);
      bytes.insert(bytes.end(), x, x + count);
    };
    put(&size, sizeof size);
    put(header.data(), header.size());
    put(numbers, sizeof numbers);
    write(folder / ("file" + std::to_string(n++)), bytes);
  }
}

}  // namespace
}  // namespace kv4::fuzz

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "folder: expected one; got %d arguments\n", argc - 1);
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  kv4::fuzz::saved_caches(folder / "saved_cache");
  kv4::fuzz::any_bytes(folder / "c_program", 2);
  kv4::fuzz::any_bytes(folder / "paged", 3);
  kv4::fuzz::calibrations(folder / "calibration");
  return 0;
}
