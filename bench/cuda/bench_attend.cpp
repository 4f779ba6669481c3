// Attention and sealing on a CUDA device, by events on a stream of its own. Names: what / geometry / batch x tokens.
//   decode  one query token over a cache of the default recipe: 4 sinks, pages, 64 to 127 exact tokens; a captured graph
//   seal    all pages of a prefill, keys and values, from fp16 rows; seal_lambda with channel weights for keys. kernel_us and
//           kernel_of_copy are without the upload of the jobs
// of_copy: bytes of the cache, read once (seal: rows read and pages written), over time, as a fraction of the speed of a
// 1 GiB copy measured first, whose bytes count twice. Where the cache would stay in the L2 cache it is flushed before each
// repeat.
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attend_scene.h"
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
    if (cudaStreamSynchronize(stream) != cudaSuccess || cudaEventElapsedTime(&ms, begin_, end_) != cudaSuccess) return 0;
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
      all.push_back(timer.seconds([&] { cudaMemcpyAsync(to.as(), from.as(), bytes, cudaMemcpyDeviceToDevice, timer.stream); }));
    std::nth_element(all.begin(), all.begin() + 6, all.end());
    return 2.0 * static_cast<double>(bytes) / all[6];
  }();
  return speed;
}

struct Case {
  cases::Geometry geometry;
  int batch, tokens;
};

Shape shape_of(const cases::Geometry& g) {
  Shape shape;
  shape.kv_heads = g.kv_heads;
  shape.group = g.q_heads / g.kv_heads;
  shape.dim_k = shape.dim_v = g.head_dim;
  return shape;
}

void decode(benchmark::State& state, const Case& c) {
  if (cuda::backend() == nullptr) return state.SkipWithError("no CUDA device of compute capability 8.0 or later");
  const Shape shape = shape_of(c.geometry);
  // Pages are copies of a few; every sequence has its own.
  const Held held = Held::of(c.tokens);
  const Scene few(shape, {Held{held.sinks, 64 * kPageTokens, held.window, 0}}, false);
  const DeviceScene scene(few);
  SequenceView view = scene.views(1)[0];
  const int pages = held.page_tokens / kPageTokens;
  const std::size_t page_bytes = static_cast<std::size_t>(scene.spec().layout.head_bytes) * shape.kv_heads;
  const std::size_t count = static_cast<std::size_t>(pages) * c.batch, pool_bytes = page_bytes * count;
  const DeviceBytes pool(pool_bytes);
  std::vector<const std::uint8_t*> table;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint8_t* page = pool.as<std::uint8_t>() + i * page_bytes;
    cudaMemcpy(page, view.pages[i % 64], page_bytes, cudaMemcpyDeviceToDevice);
    table.push_back(page);
  }
  cases::Random random(5);
  for (std::size_t i = count; i-- > 1;) std::swap(table[i], table[random.bits() % (i + 1)]);
  const DeviceBytes device_table(table);
  // Exact rows as a cache holds them: each head's in one block.
  const int exact = held.sinks + held.window, d0 = c.geometry.head_dim;
  const std::size_t row_count = static_cast<std::size_t>(c.batch) * shape.kv_heads * exact;
  const std::vector<float> row = cases::normal_rows(257, d0, 11);
  std::vector<std::uint16_t> rows16(row_count * static_cast<std::size_t>(d0));
  for (std::size_t i = 0; i < rows16.size(); ++i) rows16[i] = f32_to_f16(row[i % row.size()]);
  const DeviceBytes exact_k(rows16), exact_v(rows16);
  std::vector<SequenceView> views(static_cast<std::size_t>(c.batch), view);
  for (int b = 0; b < c.batch; ++b) {
    SequenceView& v = views[static_cast<std::size_t>(b)];
    for (int set = 0; set < 2; ++set) {
      ExactRows& x = v.exact[set];
      const std::size_t first = (static_cast<std::size_t>(b) * shape.kv_heads * exact + (set == 0 ? 0 : held.sinks)) * static_cast<std::size_t>(d0);
      x.k = exact_k.as<std::uint16_t>() + first;
      x.v = exact_v.as<std::uint16_t>() + first;
      x.k_head_stride = x.v_head_stride = static_cast<std::int64_t>(exact) * d0;
      x.k_stride = x.v_stride = d0;
    }
    v.pages = device_table.as<const std::uint8_t*>() + static_cast<std::size_t>(b) * pages;
    v.page_count = pages;
    v.query_position = c.tokens - 1;
    v.exact[1].position = c.tokens - held.window;
  }
  const DeviceBytes device_views(views);

  const std::int64_t heads = c.geometry.q_heads, d = c.geometry.head_dim;
  const std::vector<float> q = cases::normal_rows(heads * c.batch, c.geometry.head_dim, 3);
  std::vector<std::uint16_t> q16;
  for (float x : q) q16.push_back(f32_to_f16(x));
  const DeviceBytes device_q(q16), out(q16.size() * 2);
  AttendArgs args;
  args.q = {device_q.as(), DType::f16, {c.batch, heads, 1, d}, {heads * d, d, d, 1}};
  AttendJob job = few.job(args, views);
  job.spec = &scene.spec();
  job.out = {out.as(), DType::f16, args.q.shape, args.q.stride};
  cuda::AttendParams p;
  if (const Status s = cuda::attend_params(job, &p); !s.ok()) return state.SkipWithError(s.message().c_str());
  p.sequences = device_views.as<SequenceView>();
  const cuda::AttendPlan plan = cuda::plan_attend(p, cuda::chip_of(0), cuda::load_of(views));
  const DeviceBytes scratch(plan.scratch, 0), flush(kFlushBytes);

  Timer timer;
  cudaGraph_t graph;
  cudaGraphExec_t captured;
  cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeGlobal);
  const cudaError_t launched = cuda::launch_attend(p, plan, scratch.as(), timer.stream);
  cudaStreamEndCapture(timer.stream, &graph);
  if (launched != cudaSuccess || cudaGraphInstantiate(&captured, graph, 0) != cudaSuccess)
    return state.SkipWithError(cudaGetErrorString(cudaGetLastError()));
  for (auto _ : state) {
    if (pool_bytes < kFlushBytes / 2) cudaMemsetAsync(flush.as(), 0, kFlushBytes, timer.stream);
    state.SetIterationTime(timer.seconds([&] { cudaGraphLaunch(captured, timer.stream); }));
  }
  cudaGraphExecDestroy(captured);
  cudaGraphDestroy(graph);
  const double bytes = static_cast<double>(pool_bytes) +
                       static_cast<double>(c.batch) * shape.kv_heads * (held.sinks + held.window) * static_cast<double>(d) * 4;
  state.counters["of_copy"] = benchmark::Counter(bytes / copy_speed(), benchmark::Counter::kIsIterationInvariantRate);
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

// Median seconds of a captured call without its copies: of its kernels alone, on what the last whole call uploaded.
double kernels_alone(cudaGraph_t graph, Timer& timer) {
  std::size_t count = 0;
  cudaGraphGetNodes(graph, nullptr, &count);
  std::vector<cudaGraphNode_t> nodes(count);
  cudaGraphGetNodes(graph, nodes.data(), &count);
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    if (cudaGraphNodeGetType(node, &type) == cudaSuccess && type == cudaGraphNodeTypeMemcpy) cudaGraphDestroyNode(node);
  }
  cudaGraphExec_t kernels;
  if (cudaGraphInstantiate(&kernels, graph, 0) != cudaSuccess) return 0;
  std::vector<double> all;
  for (int i = 0; i < 31; ++i) all.push_back(timer.seconds([&] { cudaGraphLaunch(kernels, timer.stream); }));
  cudaGraphExecDestroy(kernels);
  std::nth_element(all.begin(), all.begin() + 15, all.end());
  return all[15];
}

void seal(benchmark::State& state, const Case& c, bool lambda) {
  if (cuda::backend() == nullptr) return state.SkipWithError("no CUDA device of compute capability 8.0 or later");
  const Shape shape = shape_of(c.geometry);
  const Scene few(shape, {Held{0, kPageTokens, 0, 0}}, false);
  const PageSpec spec = tests::on_device(few.spec());
  const int heads = shape.kv_heads, d = c.geometry.head_dim;
  const std::size_t slices = static_cast<std::size_t>(c.batch) * (c.tokens / kPageTokens) * heads;
  const std::vector<float> rows = cases::key_rows(1024, d, 3);
  std::vector<std::uint16_t> rows16;
  for (std::size_t i = 0; i < slices * kPageTokens * static_cast<std::size_t>(d); ++i) rows16.push_back(f32_to_f16(rows[i % rows.size()]));
  const DeviceBytes k(rows16), v(rows16), pages(slices * spec.layout.head_bytes);
  std::vector<float> lambdas = cases::normal_rows(heads, d, 5, 0.2);
  for (float& x : lambdas) x += 1;
  const DeviceBytes weights(lambdas);
  std::vector<SealJob> jobs(slices);
  for (std::size_t i = 0; i < slices; ++i) {
    jobs[i].k = k.as<std::uint16_t>() + i * kPageTokens * static_cast<std::size_t>(d);
    jobs[i].v = v.as<std::uint16_t>() + i * kPageTokens * static_cast<std::size_t>(d);
    jobs[i].dtype = DType::f16;
    jobs[i].k_stride = jobs[i].v_stride = d;
    if (lambda) jobs[i].lambda_k = weights.as<float>() + i % static_cast<std::size_t>(heads) * static_cast<std::size_t>(d);
    jobs[i].slice = pages.as<std::uint8_t>() + i * spec.layout.head_bytes;
  }
  Timer timer;
  cuda::set_stream(timer.stream);
  Status status = cuda::backend()->seal(spec, jobs);
  if (!status.ok()) return state.SkipWithError(status.message().c_str());
  // As a graph: the kernel and the upload of its jobs, without the host.
  cudaGraph_t graph;
  cudaGraphExec_t captured;
  cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeRelaxed);
  status = cuda::backend()->seal(spec, jobs);
  cudaStreamEndCapture(timer.stream, &graph);
  if (!status.ok()) return state.SkipWithError(status.message().c_str());
  if (cudaGraphInstantiate(&captured, graph, 0) != cudaSuccess) return state.SkipWithError(cudaGetErrorString(cudaGetLastError()));
  for (auto _ : state) state.SetIterationTime(timer.seconds([&] { cudaGraphLaunch(captured, timer.stream); }));
  cudaGraphExecDestroy(captured);
  const double kernel = kernels_alone(graph, timer);
  cudaGraphDestroy(graph);
  cuda::set_stream(nullptr);
  const double bytes = static_cast<double>(rows16.size()) * 4 + static_cast<double>(slices * spec.layout.head_bytes);
  state.counters["of_copy"] = benchmark::Counter(bytes / copy_speed(), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["kernel_us"] = kernel * 1e6;
  state.counters["kernel_of_copy"] = bytes / kernel / copy_speed();
  state.counters["per_vector"] = benchmark::Counter(static_cast<double>(slices) * 2 * kPageTokens, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

const bool registered = [] {
  for (const cases::Geometry& g : cases::kGeometries) {
    for (const auto& [batch, tokens] : {std::pair(16, 32768), std::pair(64, 8192), std::pair(1, 131072), std::pair(1, 4096)}) {
      if (g.kv_heads > 16 && batch * tokens > 131072) continue;  // the scene would not fit
      const std::string name = std::string("/") + g.name + "/" + std::to_string(batch) + "x" + std::to_string(tokens);
      benchmark::RegisterBenchmark(("decode" + name).c_str(), decode, Case{g, batch, tokens})->UseManualTime();
    }
    const Case prefill{g, 1, g.kv_heads > 16 ? 16384 : g.kv_heads < 4 ? 131072 : 65536};
    benchmark::RegisterBenchmark((std::string("seal/") + g.name).c_str(), seal, prefill, false)->UseManualTime();
    benchmark::RegisterBenchmark((std::string("seal_lambda/") + g.name).c_str(), seal, prefill, true)->UseManualTime();
  }
  return true;
}();

}  // namespace
}  // namespace kv4
