// Steps of decoding through kv4::Cache on a CUDA device: 32 layers of 32 query and 8 KV heads, d = 128, bfloat16, after
// a prompt of 1,030 tokens, which leaves the window room. Names: what / batch. us per layer:
//   append    the captured append alone, by events over a replayed graph
//   graph     append and attention of a captured step, advance() included, by the wall clock over 128 steps (two seals)
//   host      the same steps called one by one; `queued` is the host's part, until the last call has returned
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "kv4/cache.h"

namespace kv4 {
namespace {

using tests::DeviceBytes;
using Clock = std::chrono::steady_clock;

constexpr int kLayers = 32, kHeads = 8, kQueryHeads = 32, kDim = 128, kPrompt = 1030, kSteps = 128;

class Model {
 public:
  explicit Model(int batch)
      : batch_(batch), rows_(static_cast<std::size_t>(batch) * kHeads * kPrompt * kDim * 2, 0x3c),
        q_(static_cast<std::size_t>(batch) * kQueryHeads * kDim * 2, 0x3c),
        out_(static_cast<std::size_t>(batch) * kQueryHeads * kDim * 2) {
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  }
  ~Model() {
    layers_.clear();
    cudaStreamDestroy(stream);
  }
  Status prefill() {
    for (int i = 0; i < kLayers; ++i) {
      CacheConfig config;
      config.dtype = DType::bf16;
      config.kv_heads = kHeads;
      config.head_dim_k = config.head_dim_v = kDim;
      config.backend = "cuda";
      std::unique_ptr<Cache> cache;
      KV4_RETURN_IF_ERROR(Cache::create(config, &cache));
      cache->set_stream(stream);
      layers_.push_back(std::move(cache));
      KV4_RETURN_IF_ERROR(layers_.back()->append(rows(kPrompt), rows(kPrompt)));
      KV4_RETURN_IF_ERROR(attend(*layers_.back()));
    }
    KV4_RETURN_IF_ERROR(step());
    for (const auto& cache : layers_) KV4_RETURN_IF_ERROR(cache->reserve(8 * kSteps));
    return {};
  }
  Status append() {
    for (const auto& cache : layers_) KV4_RETURN_IF_ERROR(cache->append(rows(1), rows(1)));
    return {};
  }
  Status step() {
    for (const auto& cache : layers_) {
      KV4_RETURN_IF_ERROR(cache->append(rows(1), rows(1)));
      KV4_RETURN_IF_ERROR(attend(*cache));
    }
    return {};
  }
  Status advance() {
    for (const auto& cache : layers_) KV4_RETURN_IF_ERROR(cache->advance());
    return {};
  }
  // What f queues, as a graph.
  template <class F>
  Status capture(F f, cudaGraphExec_t* out) {
    cudaGraph_t graph = nullptr;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    const Status status = f();
    cudaStreamEndCapture(stream, &graph);
    if (status.ok()) cudaGraphInstantiate(out, graph, 0);
    cudaGraphDestroy(graph);
    return status;
  }
  cudaStream_t stream = nullptr;

 private:
  TensorView rows(std::int64_t tokens) const {
    return {rows_.as<void>(),
            DType::bf16,
            {batch_, kHeads, tokens, kDim},
            {kHeads * tokens * kDim, tokens * kDim, kDim, 1}};
  }
  Status attend(Cache& cache) {
    AttendArgs args;
    args.q = {q_.as<void>(), DType::bf16, {batch_, kQueryHeads, 1, kDim}, {kQueryHeads * kDim, kDim, kDim, 1}};
    return cache.attend(args, {out_.as<void>(), DType::bf16, args.q.shape, args.q.stride});
  }
  int batch_;
  DeviceBytes rows_, q_, out_;
  std::vector<std::unique_ptr<Cache>> layers_;
};

double microseconds(Clock::time_point from) {
  return std::chrono::duration<double, std::micro>(Clock::now() - from).count();
}

void append(benchmark::State& state, int batch) {
  Model model(batch);
  cudaGraphExec_t graph = nullptr;
  Status status = model.prefill();
  if (status.ok()) status = model.advance();
  if (status.ok()) status = model.capture([&] { return model.append(); }, &graph);
  if (!status.ok()) return state.SkipWithError(status.message().c_str());
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  // advance() was called once: the other rows go behind the one it counted, within the window's room.
  for (auto _ : state) {
    cudaEventRecord(begin, model.stream);
    cudaGraphLaunch(graph, model.stream);
    cudaEventRecord(end, model.stream);
    cudaStreamSynchronize(model.stream);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    state.SetIterationTime(ms * 1e-3 / kLayers);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(graph);
}

void steps(benchmark::State& state, int batch, bool captured) {
  Model model(batch);
  cudaGraphExec_t graph = nullptr;
  Status status = model.prefill();
  if (status.ok() && captured) status = model.capture([&] { return model.step(); }, &graph);
  if (!status.ok()) return state.SkipWithError(status.message().c_str());
  cudaStreamSynchronize(model.stream);
  double queued = 0;
  for (auto _ : state) {
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < kSteps && status.ok(); ++i) {
      status = captured ? model.advance() : model.step();
      if (captured) cudaGraphLaunch(graph, model.stream);
    }
    queued += microseconds(begin) / kSteps / kLayers;
    if (cudaStreamSynchronize(model.stream) != cudaSuccess || !status.ok()) {
      state.SkipWithError(status.ok() ? "the device failed" : status.message().c_str());
      break;
    }
    state.SetIterationTime(microseconds(begin) * 1e-6 / kSteps / kLayers);
  }
  state.counters["queued_us"] = benchmark::Counter(queued, benchmark::Counter::kAvgIterations);
  if (graph != nullptr) cudaGraphExecDestroy(graph);
}

const bool registered = [] {
  for (const int batch : {1, 16}) {
    const std::string name = "/" + std::to_string(batch);
    benchmark::RegisterBenchmark(("append" + name).c_str(), append, batch)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->Iterations(20);
    benchmark::RegisterBenchmark(("graph" + name).c_str(), steps, batch, true)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->Iterations(3);
    benchmark::RegisterBenchmark(("host" + name).c_str(), steps, batch, false)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->Iterations(3);
  }
  return true;
}();

}  // namespace
}  // namespace kv4
