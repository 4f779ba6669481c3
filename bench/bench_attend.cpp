// Attention of one call on the CPU, for every instruction set of this machine and all threads (or
// KV4_BENCH_THREADS). Names: what / isa / geometry / tokens.
//   decode  one query token over a cache of the default recipe: 4 sinks, pages, 64 to 127 exact tokens; also of
//           other widths, K and V bits of keys and of values, with a refined key a page, and of a trellis
//   exact   one query token over as many exact fp16 tokens
//   chunk   64 query tokens over pages
//   prefill causal attention of as many queries as exact fp16 tokens
// per_token is time per cached token and KV head (chunk, prefill: also per query token and head of its
// group); bytes are those of the tokens, read once. To compare cases, by turns:
//   --benchmark_filter=... --benchmark_repetitions=25 --benchmark_enable_random_interleaving --benchmark_min_time=0.02
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "attend_scene.h"
#include "backend/backend.h"
#include "cases.h"
#include "kv4/cpu.h"

namespace kv4 {
namespace {

using scene::Held;
using scene::Scene;
using scene::Shape;

struct Case {
  const char* what;
  cases::Geometry geometry;
  int tokens, queries;
  bool sealed;
  scene::Widths bits = {};
};

// Long scenes take seconds to make: kept for the next repetition and the next instruction set, up to a gigabyte.
std::shared_ptr<const Scene> scene_of(const Shape& s, const Held& held) {
  static std::map<std::string, std::shared_ptr<const Scene>> kept;
  static std::size_t bytes = 0;
  std::string key;
  for (std::int64_t x : {s.kv_heads, s.group, s.dim_k, s.bits.k, s.bits.v, s.bits.refined, s.bits.trellis ? 1 : 0,
                         held.sinks, held.page_tokens, held.window})
    key += std::to_string(x) + " ";
  if (const auto found = kept.find(key); found != kept.end()) return found->second;
  const auto made = std::make_shared<const Scene>(s, std::vector<Held>{held}, false);
  if (bytes + made->pages_bytes() > std::size_t{1} << 30) kept.clear(), bytes = 0;
  if (held.page_tokens > 0) kept[key] = made, bytes += made->pages_bytes();
  return made;
}

void attend(benchmark::State& state, const std::string& isa, const Case& c) {
  if (!cpu::force_isa(isa).ok()) return state.SkipWithError("this machine does not run it");
  Shape shape;
  shape.kv_heads = c.geometry.kv_heads;
  shape.group = c.geometry.q_heads / c.geometry.kv_heads;
  shape.dim_k = shape.dim_v = c.geometry.head_dim;
  shape.bits = c.bits;
  const Held held = c.sealed ? Held::of(c.tokens) : Held{0, 0, c.tokens, 0};
  const std::shared_ptr<const Scene> kept = scene_of(shape, held);
  const Scene& s = *kept;
  const std::int64_t heads = c.geometry.q_heads, d = c.geometry.head_dim, T = c.queries;
  const std::vector<float> q = cases::normal_rows(heads * T, c.geometry.head_dim, 3);
  std::vector<std::uint16_t> q16, out(q.size());
  for (float x : q) q16.push_back(f32_to_f16(x));
  AttendArgs args;
  args.q = {q16.data(), DType::f16, {1, heads, T, d}, {heads * T * d, d, heads * d, 1}};
  const std::vector<SequenceView> views = s.views(T);
  AttendJob job = s.job(args, views);
  job.out = {out.data(), DType::f16, args.q.shape, args.q.stride};
  Backend* backend = find_backend("cpu");
  for (auto _ : state) {
    const Status status = backend->attend(job);
    if (!status.ok()) return state.SkipWithError(status.message().c_str());
    benchmark::ClobberMemory();
  }
  const double exact = held.sinks + held.window, pages = static_cast<double>(held.page_tokens) / kPageTokens;
  const double bytes = exact * shape.kv_heads * 2.0 * static_cast<double>(d) * 2 +
                       pages * static_cast<double>(s.page_bytes());
  double pairs = static_cast<double>(c.tokens) * shape.kv_heads;
  if (T > 1) pairs *= static_cast<double>(T) * shape.group;
  if (T == c.tokens) pairs /= 2;
  state.counters["per_token"] =
      benchmark::Counter(pairs, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

void add(const std::string& isa, const Case& c) {
  const std::string name = std::string(c.what) + "/" + isa + "/" + c.geometry.name + "/" + std::to_string(c.tokens);
  benchmark::RegisterBenchmark(name.c_str(), attend, isa, c)->UseRealTime();
}

const bool registered = [] {
  if (const char* threads = std::getenv("KV4_BENCH_THREADS")) {
    char* end = nullptr;
    const long count = std::strtol(threads, &end, 10);
    const bool number = end != threads && *end == '\0' && count >= 1 && count <= 1 << 20;
    if (!number || !cpu::set_num_threads(static_cast<int>(count)).ok()) {
      std::fprintf(stderr, "KV4_BENCH_THREADS: expected a number of at least 1; got %s\n", threads);
      std::exit(2);
    }
  }
  for (const std::string& isa : cpu::compiled_isas()) {
    if (!cpu::supported(isa)) continue;
    for (const cases::Geometry& g : cases::kGeometries) {
      for (int tokens : {64, 300, 1000, 4096, 32768}) {
        add(isa, {"decode", g, tokens, 1, true});
        add(isa, {"exact", g, tokens, 1, false});
      }
      add(isa, {"decode-K2V2", g, 32768, 1, true, {2, 2}});
      add(isa, {"decode-K3V3", g, 32768, 1, true, {3, 3}});
      add(isa, {"decode-K4V2", g, 32768, 1, true, {4, 2}});
      add(isa, {"decode-K6V6", g, 32768, 1, true, {6, 6}});
      add(isa, {"decode-K8V8", g, 32768, 1, true, {8, 8}});
      add(isa, {"decode-refined", g, 32768, 1, true, {4, 4, 1}});
      for (int tokens : {4096, 32768}) add(isa, {"decode-trellis", g, tokens, 1, true, {4, 4, 0, true}});
      add(isa, {"chunk", g, 4096, 64, true});
      add(isa, {"prefill", g, 1024, 1024, false});
    }
  }
  return true;
}();

}  // namespace
}  // namespace kv4
