#include "cpu/measure.h"

#include <chrono>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "kv4/cpu.h"

namespace kv4::cpu {
namespace {

struct Freed {
  Backend* backend;
  std::size_t bytes;
  void operator()(std::uint8_t* p) const { backend->free(p, bytes); }
};

Status make_rotation(int dim, RotationKind kind, std::shared_ptr<const Rotation>* out) {
  constexpr std::uint64_t kSeed = 1;
  switch (kind) {
    case RotationKind::identity: return Rotation::identity(dim, out);
    case RotationKind::srft: return Rotation::srft(dim, kSeed, out);
    case RotationKind::srht: return Rotation::srht(dim, kSeed, out);
    case RotationKind::householder: return Rotation::householder(dim, dim / 2, kSeed, out);
    case RotationKind::dense: break;
  }
  return invalid_argument("rotation", "srft, srht, householder or identity", "dense");
}

}  // namespace

Status measure_seal(int dim, RotationKind rotation, std::int64_t vectors, int repeats,
                    std::vector<double>* ns_per_vector) {
  if (vectors < 1) return invalid_argument("vectors", "at least 1", std::to_string(vectors));
  if (repeats < 1) return invalid_argument("repeats", "at least 1", std::to_string(repeats));
  Backend* cpu = find_backend("cpu");
  PageSpec spec;
  spec.key.dim = spec.key.group = dim;
  spec.key.groups = 1;
  spec.key.levels = levels(LevelKind::uniform);
  spec.key.scale = ScaleRule::abs_max;
  KV4_RETURN_IF_ERROR(make_rotation(dim, rotation, &spec.key.rotation));
  spec.value = spec.key;
  const auto channels = static_cast<std::uint32_t>(cpu->code_channels(dim));
  const auto size = static_cast<std::uint32_t>(dim);
  spec.layout = kv4_make_page_layout(size, size, 1, 1, false, channels, channels);
  KV4_RETURN_IF_ERROR(cpu->supports(spec));

  const std::int64_t pages = (vectors + 2 * kPageTokens - 1) / (2 * kPageTokens);
  std::vector<float> rows(static_cast<std::size_t>(pages) * 2 * kPageTokens * size), lambda(size);
  std::uint32_t state = 1;  // any numbers serve: the kernels do the same work for all of them
  const auto next = [&state] {
    return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f;
  };
  for (float& x : rows) x = next();
  for (float& x : lambda) x = 1.5f + 0.5f * next();
  const std::size_t bytes = static_cast<std::size_t>(pages) * spec.layout.head_bytes;
  const std::unique_ptr<std::uint8_t, Freed> slices(static_cast<std::uint8_t*>(cpu->alloc(bytes)), Freed{cpu, bytes});
  if (!slices) return error(StatusCode::out_of_memory, "vectors", std::to_string(bytes) + " free bytes", "none");
  std::vector<SealJob> jobs(static_cast<std::size_t>(pages));
  for (std::size_t p = 0; p < jobs.size(); ++p) {
    SealJob& job = jobs[p];
    job.k = rows.data() + p * 2 * kPageTokens * size;
    job.v = rows.data() + (p * 2 + 1) * kPageTokens * size;
    job.k_stride = job.v_stride = dim;
    job.lambda_k = job.lambda_v = lambda.data();
    job.page = static_cast<std::int32_t>(p);
  }
  ns_per_vector->clear();
  for (int r = 0; r <= repeats; ++r) {
    const auto begin = std::chrono::steady_clock::now();
    KV4_RETURN_IF_ERROR(cpu->seal(
        spec, {.data = slices.get(), .page_stride = spec.layout.head_bytes, .head_stride = spec.layout.head_bytes}, 1,
        jobs, false));
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    if (r > 0) ns_per_vector->push_back(took.count() / static_cast<double>(pages * 2 * kPageTokens));
  }
  return {};
}

Status measure_read(std::size_t bytes, int repeats, std::vector<double>* bytes_per_second) {
  if (bytes < 1) return invalid_argument("bytes", "at least 1", "0");
  if (repeats < 1) return invalid_argument("repeats", "at least 1", std::to_string(repeats));
  KV4_RETURN_IF_ERROR(check_isa());
  constexpr std::size_t kChunk = 1024;
  const int threads = num_threads();
  const std::size_t count = static_cast<std::size_t>(threads);
  if (bytes > std::numeric_limits<std::size_t>::max() - count * kChunk)
    return error(StatusCode::out_of_memory, "bytes", std::to_string(bytes) + " free bytes", "none");
  const std::size_t share = (bytes + count * kChunk - 1) / (count * kChunk) * kChunk;  // bytes of one thread
  Backend* cpu = find_backend("cpu");
  const std::unique_ptr<std::uint8_t, Freed> memory(static_cast<std::uint8_t*>(cpu->alloc(share * count)),
                                                    Freed{cpu, share * count});
  if (!memory) return error(StatusCode::out_of_memory, "bytes", std::to_string(share * count) + " free bytes", "none");
  const RowKernels& rows = row_kernels(active());
  std::vector<float> sums(count * 16);  // a cache line each
  // Each thread touches its own share first: systems of several nodes place memory by it.
  parallel_for(threads, threads,
               [&](std::int64_t i, int) { std::memset(memory.get() + static_cast<std::size_t>(i) * share, 0, share); });
  bytes_per_second->clear();
  for (int r = 0; r <= repeats; ++r) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](std::int64_t i, int) {
      const std::size_t at = static_cast<std::size_t>(i);
      sums[at * 16] += rows.sum(reinterpret_cast<const float*>(memory.get() + at * share),
                                static_cast<std::int64_t>(share / sizeof(float)));
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (r > 0) bytes_per_second->push_back(static_cast<double>(share * count) / took.count());
  }
  volatile float kept = 0;  // so that the reads are kept
  for (float x : sums) kept = kept + x;
  return {};
}

}  // namespace kv4::cpu
