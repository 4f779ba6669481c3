// Rotating queries and outputs, and streaming from memory, on one thread, for every instruction set of this machine.
// per_row is the time for one row; bytes of `read` are what it reads, from memory and not from a cache.
#include <benchmark/benchmark.h>

#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"
#include "kv4/cpu.h"
#include "rotation/rotation.h"

namespace kv4 {
namespace {

constexpr int kRows = 12;  // query heads of a decode step

using Map = void (*)(const Rotation&, const float*, float*, std::int64_t, void*);

void rotate(benchmark::State& state, const cpu::Kernels* kernels, Map map, std::shared_ptr<const Rotation> rotation) {
  const int dim = rotation->dim();
  std::vector<float> x = cases::normal_rows(kRows, dim, 1), y(x.size());
  cpu::Buffer scratch;
  if (!scratch.reserve(kernels->rotate_scratch(dim))) return state.SkipWithError("no memory");
  for (auto _ : state) {
    map(*rotation, x.data(), y.data(), kRows, scratch.data());
    benchmark::ClobberMemory();
  }
  state.counters["per_row"] = benchmark::Counter(static_cast<double>(state.iterations()) * kRows,
                                                 benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

void read(benchmark::State& state, const cpu::Kernels* kernels) {
  const std::vector<float> x(std::size_t{64} << 20, 1.0f);
  const cpu::RowKernels& rows = cpu::row_kernels(*kernels);
  for (auto _ : state) benchmark::DoNotOptimize(rows.sum(x.data(), static_cast<std::int64_t>(x.size())));
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(x.size() * sizeof(float)));
}

const bool registered = [] {
  for (const std::string& isa : cpu::compiled_isas()) {
    if (!cpu::supported(isa)) continue;
    const cpu::Kernels* kernels = cpu::find(isa.c_str());
    benchmark::RegisterBenchmark(("read/" + isa).c_str(), read, kernels);
    for (int dim : cases::kHeadDims) {
      std::shared_ptr<const Rotation> srft, srht, householder;
      if (!Rotation::srft(dim, 1, &srft).ok() || !Rotation::srht(dim, 1, &srht).ok() ||
          !Rotation::householder(dim, dim / 2, 1, &householder).ok())
        return false;
      for (const auto& [name, rotation] :
           {std::pair{"srft", srft}, std::pair{"srht", srht}, std::pair{"householder", householder}}) {
        const std::string where = std::string("/") + isa + "/" + name + "/d:" + std::to_string(dim);
        benchmark::RegisterBenchmark(("rotate" + where).c_str(), rotate, kernels, kernels->rotate_dual, rotation);
        benchmark::RegisterBenchmark(("unrotate" + where).c_str(), rotate, kernels, kernels->unrotate, rotation);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace kv4
