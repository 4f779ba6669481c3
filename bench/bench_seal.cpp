// Sealing and dequantising one head slice (64 tokens of keys and values) on one thread, for every
// instruction set of this machine. per_vector is the time for one key or value vector; bytes are those of
// the rows plus those of the slice.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "format/convert.h"
#include "kv4/cpu.h"

namespace kv4 {
namespace {

struct Aligned {
  explicit Aligned(std::size_t bytes) : p(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64}))) {}
  ~Aligned() { ::operator delete(p, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  std::uint8_t* p;
};

SideSpec make_side(const SideRecipe& recipe, int dim) {
  SideSpec side;
  side.dim = dim;
  side.group = recipe.group == 0 ? dim : recipe.group;
  side.groups = dim / side.group;
  const Status s = recipe.rotation == RotationKind::srht ? Rotation::srht(dim, recipe.seed, &side.rotation)
                                                         : Rotation::srft(dim, recipe.seed, &side.rotation);
  if (!s.ok()) side.rotation = nullptr;
  side.levels = levels(recipe.levels);
  side.scale = recipe.scale;
  side.mean = recipe.mean;
  return side;
}

struct Slice {
  PageSpec spec;
  std::vector<float> lambda, k32, v32;
  std::vector<std::uint16_t> k16, v16;
  std::unique_ptr<Aligned> bytes;
  DType dtype;

  Slice(const Recipe& recipe, int dim, DType type) : dtype(type) {
    spec.key = make_side(recipe.key, dim);
    spec.value = make_side(recipe.value, dim);
    spec.layout = kv4_make_page_layout(dim, dim, spec.key.groups, spec.value.groups, spec.key.mean,
                                       cpu::pad_channels(dim), cpu::pad_channels(dim));
    lambda.assign(dim, 1.25f);
    k32 = cases::key_rows(kPageTokens, dim, 1);
    v32 = cases::normal_rows(kPageTokens, dim, 2);
    for (float x : k32) k16.push_back(dtype == DType::bf16 ? f32_to_bf16(x) : f32_to_f16(x));
    for (float x : v32) v16.push_back(dtype == DType::bf16 ? f32_to_bf16(x) : f32_to_f16(x));
    bytes = std::make_unique<Aligned>(spec.layout.head_bytes);
    std::fill_n(bytes->p, spec.layout.head_bytes, std::uint8_t{0});
  }
  SealJob job() const {
    SealJob j;
    j.k = dtype == DType::f32 ? static_cast<const void*>(k32.data()) : k16.data();
    j.v = dtype == DType::f32 ? static_cast<const void*>(v32.data()) : v16.data();
    j.dtype = dtype;
    j.k_stride = spec.key.dim;
    j.v_stride = spec.value.dim;
    j.lambda_k = lambda.data();
    return j;
  }
};

void report(benchmark::State& state, const Slice& slice, int tokens, std::size_t element) {
  const double vectors = 2.0 * tokens;
  state.counters["per_vector"] = benchmark::Counter(static_cast<double>(state.iterations()) * vectors,
                                                    benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.SetBytesProcessed(
      state.iterations() *
      static_cast<std::int64_t>((2.0 * slice.spec.key.dim * element * kPageTokens + slice.spec.layout.head_bytes) *
                                tokens / kPageTokens));
}

void seal(benchmark::State& state, const cpu::Kernels* kernels, const Recipe& recipe, int dim, DType dtype) {
  const Slice slice(recipe, dim, dtype);
  const Aligned scratch(kernels->seal_scratch(slice.spec));
  SealJob job = slice.job();
  // Arrival sealing is one token a call in decoding.
  if (recipe.seal == SealMode::arrival) job.count = 1;
  for (auto _ : state) {
    kernels->seal(slice.spec, job, 0, slice.bytes->p, scratch.p);
    benchmark::ClobberMemory();
  }
  report(state, slice, static_cast<int>(job.count), size_of(dtype));
}

void dequantise(benchmark::State& state, const cpu::Kernels* kernels, const Recipe& recipe, int dim) {
  const Slice slice(recipe, dim, DType::f32);
  const Aligned scratch(std::max(kernels->seal_scratch(slice.spec), kernels->dequantise_scratch(slice.spec)));
  kernels->seal(slice.spec, slice.job(), 0, slice.bytes->p, scratch.p);
  std::vector<float> k(static_cast<std::size_t>(kPageTokens) * dim), v(k.size());
  for (auto _ : state) {
    kernels->dequantise(slice.spec, slice.bytes->p, slice.lambda.data(), nullptr, 0, kPageTokens, k.data(), v.data(),
                        scratch.p);
    benchmark::ClobberMemory();
  }
  report(state, slice, kPageTokens, sizeof(float));
}

const bool registered = [] {
  Recipe groups = Recipe::kv4();
  groups.key.group = groups.value.group = 32;
  Recipe srht = Recipe::kv4();
  srht.key.rotation = srht.value.rotation = RotationKind::srht;
  const std::pair<const char*, Recipe> recipes[] = {
      {"kv4", Recipe::kv4()}, {"kv4_srht", srht}, {"paper_one_token", Recipe::paper()}};
  for (const std::string& isa : cpu::compiled_isas()) {
    if (!cpu::supported(isa)) continue;
    const cpu::Kernels* kernels = cpu::find(isa.c_str());
    for (int dim : cases::kHeadDims) {
      const auto name = [&](const char* what, const char* recipe, const char* dtype) {
        return std::string(what) + "/" + isa + "/" + recipe + "/d:" + std::to_string(dim) + "/" + dtype;
      };
      for (const auto& [recipe_name, recipe] : recipes)
        for (DType dtype : {DType::f32, DType::f16, DType::bf16})
          benchmark::RegisterBenchmark(name("seal", recipe_name, name_of(dtype)).c_str(), seal, kernels, recipe, dim,
                                       dtype);
      if (dim % 32 == 0)
        benchmark::RegisterBenchmark(name("seal", "kv4_groups_of_32", "float16").c_str(), seal, kernels, groups, dim,
                                     DType::f16);
      benchmark::RegisterBenchmark(name("dequantise", "kv4", "float32").c_str(), dequantise, kernels, Recipe::kv4(),
                                   dim);
    }
  }
  return true;
}();

}  // namespace
}  // namespace kv4
