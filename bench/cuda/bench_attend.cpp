// Attention and sealing on a CUDA device, by events on a stream of its own. Names: what / geometry / batch x tokens.
//   decode  one query token over a cache of the default recipe: 4 sinks, pages, 64 to 127 exact tokens; a captured
//   graph. 16x100-32768:
//           lengths from 100 to 32,768 in one batch, beside as many sequences of one length with as many tokens in all
//   queries so many queries of one sequence: verification of a draft, a chunk of a prefill, with all its own tokens
//   cached paged   the same tokens in a host's tables, exact rows in blocks; what makes views of the tables included
//   seal    all pages of a prefill, keys and values, from fp16 rows; seal_lambda with channel weights for keys
//   unpack  the same pages back to fp16 rows
//   decode-K4V2, seal-K4V2, ...: keys and values of so many bits a code
// of_copy: bytes of the cache, read once (seal, unpack: rows and pages), over time, as a fraction of the speed of
// a 1 GiB copy measured first, whose bytes count twice. Where the cache would stay in the L2 cache it is flushed before
// each repeat.
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "attend_scene.h"
#include "backend/batch.h"
#include "cases.h"
#include "cuda/device.h"

namespace kv4 {
namespace {

using scene::Held;
using scene::Scene;
using scene::Shape;
using tests::DeviceBytes;
using tests::DeviceScene;

constexpr std::size_t kFlushBytes = std::size_t{256} << 20;

class Timer {
 public:
  Timer() {
    cudaStreamCreate(&stream);
    cudaEventCreate(&begin_);
    cudaEventCreate(&end_);
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream);
  }
  template <class F>
  double seconds(F f) {
    cudaEventRecord(begin_, stream);
    f();
    cudaEventRecord(end_, stream);
    float ms = 0;
    if (cudaStreamSynchronize(stream) != cudaSuccess || cudaEventElapsedTime(&ms, begin_, end_) != cudaSuccess)
      return 0;
    return ms * 1e-3;
  }
  cudaStream_t stream = nullptr;

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

double copy_speed() {
  static const double speed = [] {
    const std::size_t bytes = std::size_t{1} << 30;
    const DeviceBytes from(bytes, 0x5a), to(bytes);
    Timer timer;
    std::vector<double> all;
    for (int i = 0; i < 12; ++i)
      all.push_back(
          timer.seconds([&] { cudaMemcpyAsync(to.as(), from.as(), bytes, cudaMemcpyDeviceToDevice, timer.stream); }));
    std::nth_element(all.begin(), all.begin() + 6, all.end());
    return 2.0 * static_cast<double>(bytes) / all[6];
  }();
  return speed;
}

struct Case {
  cases::Geometry geometry;
  std::vector<int> tokens;  // of each sequence
  bool paged = false;
  int queries = 1;  // the newest tokens of every sequence ask, causally
  scene::Widths bits = {};
};

Shape shape_of(const Case& c) {
  const cases::Geometry& g = c.geometry;
  Shape shape;
  shape.bits = c.bits;
  shape.kv_heads = g.kv_heads;
  shape.group = g.q_heads / g.kv_heads;
  shape.dim_k = shape.dim_v = g.head_dim;
  return shape;
}

// So many 16-bit floats, `rows` over and over: converted once, since a benchmark makes its scene several times.
std::vector<std::uint16_t> repeated(std::size_t count, const std::vector<float>& rows) {
  std::vector<std::uint16_t> x(std::min(count, rows.size()));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = f32_to_f16(rows[i]);
  x.reserve(count);
  while (x.size() < count) {
    const auto more = static_cast<std::ptrdiff_t>(std::min(x.size(), count - x.size()));
    x.insert(x.end(), x.begin(), x.begin() + more);
  }
  return x;
}

DeviceBytes halves(std::size_t count, int dim, std::uint64_t seed) {
  return DeviceBytes(repeated(count, cases::normal_rows(257, dim, seed)));
}

// Pages of all sequences, copies of a few, in chunks as a cache has them, and their ids in any order.
struct Pool {
  static constexpr int kShift = 6;
  DeviceBytes memory, chunks;
  PageMemory pages;
  std::vector<std::int32_t> ids;

  Pool(const DeviceScene& few, int kv_heads, std::size_t count)
      : memory(static_cast<std::size_t>(few.pages().head_stride * kv_heads) * count) {
    pages = few.pages();
    pages.page_stride = pages.head_stride * kv_heads;
    const auto stride = static_cast<std::size_t>(pages.page_stride);
    std::vector<void*> table;
    for (std::size_t i = 0; i < count; ++i) {
      std::uint8_t* const page = memory.as<std::uint8_t>() + i * stride;
      cudaMemcpy(page, page_at(few.pages(), static_cast<std::int32_t>(i % 64)), stride, cudaMemcpyDeviceToDevice);
      if (i >> kShift << kShift == i) table.push_back(page);
      ids.push_back(static_cast<std::int32_t>(i));
    }
    chunks = DeviceBytes(table);
    pages.chunks = chunks.as<std::uint8_t* const>();
    pages.chunk_shift = kShift;
    cases::Random random(5);
    for (std::size_t i = count; i-- > 1;) std::swap(ids[i], ids[random.bits() % (i + 1)]);
  }
};

// Sequences with all that they point to.
struct Sequenced {
  std::vector<SequenceView> views;
  DeviceBytes ids, k, v;
};

// As a cache holds them: each head's exact rows in one piece.
void cached(const Case& c, const SequenceView& like, const Pool& pool, Sequenced* out) {
  const std::int64_t d = c.geometry.head_dim, heads = c.geometry.kv_heads;
  std::int64_t rows = 0;
  for (const int tokens : c.tokens) rows += heads * (Held::of(tokens).sinks + Held::of(tokens).window);
  out->ids = DeviceBytes(pool.ids);
  out->k = halves(static_cast<std::size_t>(rows * d), c.geometry.head_dim, 11);
  out->v = halves(static_cast<std::size_t>(rows * d), c.geometry.head_dim, 12);
  std::int64_t row = 0, page = 0;
  for (const int tokens : c.tokens) {
    const Held held = Held::of(tokens);
    SequenceView view = like;
    view.input = static_cast<std::int32_t>(out->views.size());
    view.query_position = tokens - c.queries;
    view.query_count = c.queries;
    view.pages = out->ids.as<std::int32_t>() + page;
    view.page_count = held.page_tokens / kPageTokens;
    view.pages_position = held.sinks;
    for (int set = 0; set < 2; ++set) {
      ExactRows& x = view.exact[set];
      x.count = set == 0 ? held.sinks : held.window;
      x.position = set == 0 ? 0 : tokens - held.window;
      x.k = out->k.as<std::uint16_t>() + (row + (set == 0 ? 0 : held.sinks)) * d;
      x.v = out->v.as<std::uint16_t>() + (row + (set == 0 ? 0 : held.sinks)) * d;
      x.k_head_stride = x.v_head_stride = (held.sinks + held.window) * d;
      x.k_stride = x.v_stride = d;
    }
    page += view.page_count;
    row += heads * (held.sinks + held.window);
    out->views.push_back(view);
  }
}

// The same tokens in a host's tables: 4 of page 0 exact, the newest in blocks.
struct Paged {
  DeviceBytes queries, lengths, sealed, pages, blocks, sinks, k, v;
  PagedBatch batch;

  Paged(const Case& c, const SequenceView& like, const Pool& pool) {
    const int size = static_cast<int>(c.tokens.size()), heads = c.geometry.kv_heads, d = c.geometry.head_dim;
    const int width = *std::max_element(c.tokens.begin(), c.tokens.end()) / kPageTokens + 1;
    std::vector<std::int32_t> of_queries(1, 0), of_lengths(c.tokens.begin(), c.tokens.end()), of_sealed, of_sinks;
    std::vector<std::int32_t> of_pages(static_cast<std::size_t>(size * width), 0), of_blocks(of_pages);
    std::int32_t block = 0;
    std::size_t page = 0;
    for (int b = 0; b < size; ++b) {
      const int sealed_pages = Held::of(c.tokens[static_cast<std::size_t>(b)]).page_tokens / kPageTokens;
      of_queries.push_back(b + 1);
      of_sealed.push_back(sealed_pages * kPageTokens);
      of_sinks.push_back(block++);
      for (int i = 0; i < width; ++i) {
        const std::size_t at = static_cast<std::size_t>(b * width + i);
        if (i < sealed_pages) of_pages[at] = pool.ids[page++];
        else if (i * kPageTokens < c.tokens[static_cast<std::size_t>(b)]) of_blocks[at] = block++;
      }
    }
    queries = DeviceBytes(of_queries);
    lengths = DeviceBytes(of_lengths);
    sealed = DeviceBytes(of_sealed);
    pages = DeviceBytes(of_pages);
    blocks = DeviceBytes(of_blocks);
    sinks = DeviceBytes(of_sinks);
    const std::size_t count = static_cast<std::size_t>(block) * static_cast<std::size_t>(heads * kPageTokens * d);
    k = halves(count, d, 11);
    v = halves(count, d, 12);
    batch.size = size;
    batch.queries = queries.as<std::int32_t>();
    batch.lengths = lengths.as<std::int32_t>();
    batch.sealed = sealed.as<std::int32_t>();
    batch.pages = pages.as<std::int32_t>();
    batch.blocks = blocks.as<std::int32_t>();
    batch.sinks = sinks.as<std::int32_t>();
    batch.pages_stride = batch.blocks_stride = width;
    batch.sink_tokens = 4;
    batch.page_memory = pool.pages;
    batch.row_memory = {
        k.as(), v.as(), heads * kPageTokens * d, heads * kPageTokens * d, kPageTokens * d, kPageTokens * d, d, d};
    batch.lambda_k = like.lambda_k;
    batch.lambda_v = like.lambda_v;
    batch.most_queries = 1;
    batch.longest = *std::max_element(c.tokens.begin(), c.tokens.end());
    for (const int tokens : c.tokens) batch.all += tokens;
  }
};

void decode(benchmark::State& state, const Case& c) {
  if (cuda::backend() == nullptr) return state.SkipWithError("no CUDA device of compute capability 8.0 or later");
  const Shape shape = shape_of(c);
  const Scene few(shape, {Held{4, 64 * kPageTokens, 64, 0}}, false);
  const DeviceScene scene(few);
  const SequenceView like = scene.views(1)[0];
  std::size_t count = 0;
  std::int64_t exact_rows = 0;
  for (const int tokens : c.tokens) {
    count += static_cast<std::size_t>(Held::of(tokens).page_tokens / kPageTokens);
    exact_rows += Held::of(tokens).sinks + Held::of(tokens).window;
  }
  const Pool pool(scene, shape.kv_heads, count);
  const double pool_bytes = static_cast<double>(count) * few.shape().kv_heads * scene.spec().layout.head_bytes;
  const auto batch = static_cast<std::int64_t>(c.tokens.size());
  const std::int64_t heads = c.geometry.q_heads, d = c.geometry.head_dim, queries = c.queries;
  const auto of_q = static_cast<std::size_t>(heads * batch * queries * d);
  const DeviceBytes q = halves(of_q, c.geometry.head_dim, 3), out(of_q * 2);
  AttendArgs args;
  args.q = {q.as(), DType::f16, {batch, heads, queries, d}, {heads * queries * d, queries * d, d, 1}};
  if (c.paged) {
    args.q.shape = {1, heads, batch, d};
    args.q.stride = {0, d, heads * d, 1};
  }
  AttendJob job = few.job(args, {});
  job.spec = &scene.spec();
  job.pages = pool.pages;
  job.out = {out.as(), DType::f16, args.q.shape, args.q.stride};

  Sequenced cache;
  if (!c.paged) cached(c, like, pool, &cache);
  const Paged paged(c, like, pool);
  const DeviceBytes views = c.paged ? DeviceBytes(c.tokens.size() * sizeof(SequenceView)) : DeviceBytes(cache.views);
  if (c.paged)
    job.sequences = {{views.as<SequenceView>(), c.tokens.size()}, true, 1, paged.batch.longest, paged.batch.all};
  else job.sequences.views = cache.views;
  const std::size_t bytes_of_workspace = cuda::backend()->attend_workspace(job);
  const DeviceBytes workspace(bytes_of_workspace, 0), flush(kFlushBytes);
  cuda::AttendParams p;
  if (const Status s = cuda::attend_params(job, &p); !s.ok()) return state.SkipWithError(s.message().c_str());
  p.sequences = views.as<SequenceView>();
  const cuda::AttendPlan plan = cuda::plan_attend(p, cuda::chip_of(0), cuda::load_of(job.sequences, true));
  job.workspace = {workspace.as<std::byte>(), bytes_of_workspace};

  Timer timer;
  cuda::set_stream(timer.stream);
  cudaGraph_t graph;
  cudaGraphExec_t captured;
  cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeGlobal);
  Status status;
  if (c.paged) {
    status = cuda::backend()->make_views(paged.batch, true, views.as<SequenceView>());
    if (status.ok()) status = cuda::backend()->attend(job);
  } else if (cuda::launch_attend(p, plan, workspace.as(), timer.stream) != cudaSuccess) {
    status = error(StatusCode::failed_precondition, "attend", "success", "an error");
  }
  cudaStreamEndCapture(timer.stream, &graph);
  cuda::set_stream(nullptr);
  if (!status.ok() || cudaGraphInstantiate(&captured, graph, 0) != cudaSuccess)
    return state.SkipWithError(status.message().c_str());
  for (auto _ : state) {
    if (pool_bytes < kFlushBytes / 2) cudaMemsetAsync(flush.as(), 0, kFlushBytes, timer.stream);
    state.SetIterationTime(timer.seconds([&] { cudaGraphLaunch(captured, timer.stream); }));
  }
  cudaGraphExecDestroy(captured);
  cudaGraphDestroy(graph);
  const double bytes = pool_bytes + static_cast<double>(shape.kv_heads * exact_rows * d) * 4;
  state.counters["of_copy"] = benchmark::Counter(bytes / copy_speed(), benchmark::Counter::kIsIterationInvariantRate);
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

enum class Sealing { plain, weighted, unpack };

void seal(benchmark::State& state, const Case& c, Sealing what) {
  if (cuda::backend() == nullptr) return state.SkipWithError("no CUDA device of compute capability 8.0 or later");
  const Shape shape = shape_of(c);
  const Scene few(shape, {Held{0, kPageTokens, 0, 0}}, false);
  const PageSpec spec = tests::on_device(few.spec());
  const int heads = shape.kv_heads, d = c.geometry.head_dim;
  const std::size_t count = static_cast<std::size_t>(c.tokens[0] / kPageTokens),
                    slices = count * static_cast<std::size_t>(heads);
  const std::vector<std::uint16_t> rows16 =
      repeated(slices * kPageTokens * static_cast<std::size_t>(d), cases::key_rows(1024, d, 3));
  const DeviceBytes k(rows16), v(rows16), memory(slices * spec.layout.head_bytes);
  PageMemory pages;
  pages.data = memory.as<std::uint8_t>();
  pages.head_stride = spec.layout.head_bytes;
  pages.page_stride = pages.head_stride * heads;
  std::vector<float> lambdas = cases::normal_rows(heads, d, 5, 0.2);
  for (float& x : lambdas) x += 1;
  const DeviceBytes weights(lambdas);
  std::vector<SealJob> jobs(count);
  for (std::size_t i = 0; i < count; ++i) {
    jobs[i].k = k.as<std::uint16_t>() + i * kPageTokens * static_cast<std::size_t>(d * heads);
    jobs[i].v = v.as<std::uint16_t>() + i * kPageTokens * static_cast<std::size_t>(d * heads);
    jobs[i].dtype = DType::f16;
    jobs[i].k_stride = jobs[i].v_stride = d;
    jobs[i].k_head_stride = jobs[i].v_head_stride = kPageTokens * d;
    if (what == Sealing::weighted) jobs[i].lambda_k = weights.as<float>();
    jobs[i].page = static_cast<std::int32_t>(i);
  }
  const DeviceBytes k_back(what == Sealing::unpack ? rows16.size() * 2 : 0),
      v_back(what == Sealing::unpack ? rows16.size() * 2 : 0);
  std::vector<DequantiseJob> back(what == Sealing::unpack ? count : 0);
  for (std::size_t i = 0; i < back.size(); ++i) {
    back[i].page = jobs[i].page;
    back[i].dtype = DType::f16;
    back[i].count = kPageTokens;
    back[i].k = k_back.as<std::uint16_t>() + i * kPageTokens * static_cast<std::size_t>(d * heads);
    back[i].v = v_back.as<std::uint16_t>() + i * kPageTokens * static_cast<std::size_t>(d * heads);
    back[i].k_stride = back[i].v_stride = d;
    back[i].k_head_stride = back[i].v_head_stride = kPageTokens * d;
  }
  // As a host with tables on the device has them, and as a graph: the kernel alone.
  const DeviceBytes resident(jobs), resident_back(back);
  Timer timer;
  cuda::set_stream(timer.stream);
  const std::span<const SealJob> all(resident.as<SealJob>(), jobs.size());
  Status status = cuda::backend()->seal(spec, pages, heads, all, true);  // which makes the rotation's tables
  if (!status.ok()) return state.SkipWithError(status.message().c_str());
  cudaGraph_t graph;
  cudaGraphExec_t captured;
  cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeRelaxed);
  status = what == Sealing::unpack
               ? cuda::backend()->dequantise(spec, pages, heads, {resident_back.as<DequantiseJob>(), count}, true)
               : cuda::backend()->seal(spec, pages, heads, all, true);
  cudaStreamEndCapture(timer.stream, &graph);
  cuda::set_stream(nullptr);
  if (!status.ok()) return state.SkipWithError(status.message().c_str());
  if (cudaGraphInstantiate(&captured, graph, 0) != cudaSuccess)
    return state.SkipWithError(cudaGetErrorString(cudaGetLastError()));
  for (auto _ : state) state.SetIterationTime(timer.seconds([&] { cudaGraphLaunch(captured, timer.stream); }));
  cudaGraphExecDestroy(captured);
  cudaGraphDestroy(graph);
  const double bytes = static_cast<double>(rows16.size()) * 4 + static_cast<double>(slices * spec.layout.head_bytes);
  state.counters["of_copy"] = benchmark::Counter(bytes / copy_speed(), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["per_vector"] =
      benchmark::Counter(static_cast<double>(slices) * 2 * kPageTokens,
                         benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

// So many lengths from `first` to `last`, each as many times the one before.
std::vector<int> ragged_lengths(int batch, int first, int last) {
  std::vector<int> tokens;
  const double most = static_cast<double>(last) / first;
  for (int b = 0; b < batch; ++b) tokens.push_back(static_cast<int>(first * std::pow(most, b / (batch - 1.0))));
  return tokens;
}

// Models that are served in batches.
constexpr cases::Geometry kServed[] = {{"qwen2.5-14b", 40, 8, 128},
                                       {"llama-3-70b", 64, 8, 128},
                                       {"qwen2.5-7b", 28, 4, 128},
                                       {"gpt-oss-120b", 64, 8, 64},
                                       {"olmo-1b", 16, 16, 128}};
// Head dims as the 8 KV heads of one model have them.
constexpr cases::Geometry kSealed[] = {
    {"8x64", 32, 8, 64}, {"8x80", 32, 8, 80}, {"8x96", 32, 8, 96}, {"8x256", 16, 8, 256}};

const bool registered = [] {
  for (const cases::Geometry& g : cases::kGeometries) {
    const auto name = [&g](const char* what, const std::string& tokens) {
      return std::string(what) + "/" + g.name + "/" + tokens;
    };
    for (const auto& [batch, tokens] :
         {std::pair(16, 32768), std::pair(64, 8192), std::pair(1, 131072), std::pair(1, 4096), std::pair(8, 4096)}) {
      if (g.kv_heads > 16 && batch * tokens > 131072) continue;  // the scene would not fit
      for (const bool paged : {false, true})
        benchmark::RegisterBenchmark(
            name(paged ? "paged" : "decode", std::to_string(batch) + "x" + std::to_string(tokens)).c_str(), decode,
            Case{g, std::vector<int>(static_cast<std::size_t>(batch), tokens), paged})
            ->UseManualTime();
    }
    const std::vector<int> ragged = ragged_lengths(16, 100, 32768);
    const int mean = std::accumulate(ragged.begin(), ragged.end(), 0) / 16;
    if (g.kv_heads <= 16) {
      benchmark::RegisterBenchmark(name("decode", "16x100-32768").c_str(), decode, Case{g, ragged})->UseManualTime();
      benchmark::RegisterBenchmark(name("decode", "16x" + std::to_string(mean)).c_str(), decode,
                                   Case{g, std::vector<int>(16, mean)})
          ->UseManualTime();
    }
    if (g.kv_heads <= 16)  // a server's batch, of narrow codes below too
      benchmark::RegisterBenchmark(name("paged", "64x4096").c_str(), decode, Case{g, std::vector<int>(64, 4096), true})
          ->UseManualTime();
    if (g.kv_heads <= 16)  // chats
      benchmark::RegisterBenchmark(name("paged", "208x150-2000").c_str(), decode,
                                   Case{g, ragged_lengths(208, 150, 2000), true})
          ->UseManualTime();
    if (g.kv_heads <= 16) {
      // Verification of a draft, chunks of a prefill.
      for (const int queries : {2, 4, 8, 16, 64, 512, 2048})
        benchmark::RegisterBenchmark(name("queries", std::to_string(queries) + "x32768").c_str(), decode,
                                     Case{g, {32768}, false, queries})
            ->UseManualTime();
      // Drafts of a batch.
      for (const int queries : {2, 4, 8})
        benchmark::RegisterBenchmark(name("queries", std::to_string(queries) + "x16x8192").c_str(), decode,
                                     Case{g, std::vector<int>(16, 8192), false, queries})
            ->UseManualTime();
    }
    const Case prefill{g, {g.kv_heads > 16 ? 16384 : g.kv_heads < 4 ? 131072 : 65536}};
    benchmark::RegisterBenchmark((std::string("seal/") + g.name).c_str(), seal, prefill, Sealing::plain)
        ->UseManualTime();
    benchmark::RegisterBenchmark((std::string("seal_lambda/") + g.name).c_str(), seal, prefill, Sealing::weighted)
        ->UseManualTime();
    benchmark::RegisterBenchmark((std::string("unpack/") + g.name).c_str(), seal, prefill, Sealing::unpack)
        ->UseManualTime();
  }
  for (const cases::Geometry& g : cases::kGeometries) {
    if (g.kv_heads > 16) continue;
    for (const scene::Widths& bits : {scene::Widths{4, 2}, {3, 3}, {3, 2}, {2, 2}}) {
      const std::string widths = "-K" + std::to_string(bits.k) + "V" + std::to_string(bits.v) + "/" + g.name;
      benchmark::RegisterBenchmark(("paged" + widths + "/64x4096").c_str(), decode,
                                   Case{g, std::vector<int>(64, 4096), true, 1, bits})
          ->UseManualTime();
      for (const auto& [batch, tokens] : {std::pair(16, 32768), std::pair(1, 131072), std::pair(1, 4096)})
        benchmark::RegisterBenchmark(
            ("decode" + widths + "/" + std::to_string(batch) + "x" + std::to_string(tokens)).c_str(), decode,
            Case{g, std::vector<int>(static_cast<std::size_t>(batch), tokens), false, 1, bits})
            ->UseManualTime();
      for (const auto& [name, what] : {std::pair("seal", Sealing::plain), std::pair("unpack", Sealing::unpack)})
        benchmark::RegisterBenchmark((name + widths).c_str(), seal, Case{g, {65536}, false, 1, bits}, what)
            ->UseManualTime();
    }
  }
  for (const cases::Geometry& g : kServed)
    benchmark::RegisterBenchmark((std::string("decode/") + g.name + "/32x16384").c_str(), decode,
                                 Case{g, std::vector<int>(32, 16384)})
        ->UseManualTime();
  for (const cases::Geometry& g : kSealed)
    benchmark::RegisterBenchmark((std::string("seal/") + g.name).c_str(), seal, Case{g, {65536}}, Sealing::plain)
        ->UseManualTime();
  return true;
}();

}  // namespace
}  // namespace kv4
