// The CPU backend: host memory, sealing over jobs in parallel, attention.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "cpu/attention.h"
#include "cpu/exact_rows.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "cpu/memory.h"
#include "cpu/order.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"
#include "kv4/cpu.h"

namespace kv4::cpu {
namespace {

// Sealing a page of one head takes some microseconds: fewer are not worth waking threads for.
constexpr std::size_t kParallelSeals = 4;

Status supports_side(const SideSpec& side, const char* name) {
  if (side.dim < kMinHeadDim || side.dim > kMaxHeadDim || side.dim % 2 != 0)
    return error(StatusCode::unsupported, std::string("head_dim_") + name,
                 "an even number from " + std::to_string(kMinHeadDim) + " to " + std::to_string(kMaxHeadDim) +
                     " (others are served by Recipe::exact())",
                 std::to_string(side.dim));
  // Groups begin on blocks of 16 channels (layout.h).
  if (side.groups > 1 && side.group % 16 != 0)
    return error(StatusCode::unsupported, std::string("group of ") + name, "a multiple of 16 channels",
                 std::to_string(side.group));
  return {};
}

class CpuBackend final : public Backend {
 public:
  const char* name() const override { return "cpu"; }
  int code_channels(int dim) const override { return pad_channels(dim); }
  Status supports_codes(const Recipe&) const override { return {}; }

  Status supports(const PageSpec& spec) const override {
    KV4_RETURN_IF_ERROR(supports_side(spec.key, "k"));
    return supports_side(spec.value, "v");
  }
  Status supports_rows(int, int, DType, SealMode) const override { return check_isa(); }

  void* alloc(std::size_t bytes) override { return alloc_pages(bytes); }
  void free(void* p, std::size_t bytes) override { free_pages(p, bytes); }
  Status copy(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
    return {};
  }
  Status clear(void* p, std::size_t bytes) override {
    std::memset(p, 0, bytes);
    return {};
  }
  Status copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes,
                    int lines) override {
    cpu::copy_lines(to, to_pitch, from, from_pitch, bytes, lines);
    return {};
  }

  Status store(const StoreJob& job) override {
    cpu::store(job);
    return {};
  }
  Status convert(const ConvertJob& job) override {
    cpu::convert(job);
    return {};
  }
  Status query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) override {
    cpu::query_energies(q, kv_heads, jobs);
    return {};
  }
  Status fix_lambda(const LambdaJob& job) override {
    cpu::fix_lambda(job);
    return {};
  }

  Status seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs,
              bool) override {
    thread_local std::vector<Buffer> scratch;
    KV4_RETURN_IF_ERROR(check_isa());
    const Kernels& kernels = active();
    const std::size_t bytes = kernels.seal_scratch(spec), slices = jobs.size() * static_cast<std::size_t>(kv_heads);
    const int threads = slices < kParallelSeals ? 1 : num_threads();
    if (scratch.size() < static_cast<std::size_t>(threads)) scratch.resize(static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i)
      if (!scratch[static_cast<std::size_t>(i)].reserve(bytes))
        return error(StatusCode::out_of_memory, "workspace", std::to_string(bytes) + " free bytes", "none");
    std::vector<Buffer>& buffers = scratch;  // the calling thread's, for all workers
    parallel_for(static_cast<std::int64_t>(slices), threads, [&](std::int64_t i, int thread) {
      const SealJob& job = jobs[static_cast<std::size_t>(i / kv_heads)];
      const int head = static_cast<int>(i % kv_heads);
      if (job.page >= 0)
        kernels.seal(spec, job, head, slice_at(pages, job.page, head),
                     buffers[static_cast<std::size_t>(thread)].data());
    });
    return {};
  }

  Status attend(const AttendJob& job) override { return cpu::attend(job); }
  std::size_t attend_workspace(const AttendJob& job) const override { return cpu::attend_workspace(job); }

  Status codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k,
                            std::uint8_t* v) const override {
    cpu::codes_to_canonical(spec, slice, k, v);
    return {};
  }
  Status codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v,
                              std::uint8_t* slice) const override {
    cpu::codes_from_canonical(spec, k, v, slice);
    return {};
  }

  Status dequantise(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const DequantiseJob> jobs,
                    bool) const override {
    if (jobs.empty()) return {};
    thread_local Buffer buffer;
    KV4_RETURN_IF_ERROR(check_isa());
    const Kernels& kernels = active();
    float* rows[2];
    std::byte* scratch = nullptr;
    const auto carve = [&](std::byte* base) {
      Carver carver(base);
      rows[0] = carver.take<float>(static_cast<std::size_t>(kPageTokens) * spec.key.dim);
      rows[1] = carver.take<float>(static_cast<std::size_t>(kPageTokens) * spec.value.dim);
      scratch = carver.take<std::byte>(kernels.dequantise_scratch(spec));
      return carver.bytes();
    };
    const std::size_t bytes = carve(nullptr);
    if (!buffer.reserve(bytes))
      return error(StatusCode::out_of_memory, "workspace", std::to_string(bytes) + " free bytes", "none");
    carve(buffer.data());
    for (const DequantiseJob& job : jobs) {
      if (job.page < 0) continue;
      for (int h = 0; h < kv_heads; ++h) {
        const auto lambda_at = [h](const float* lambda, int dim) {
          return lambda == nullptr ? nullptr : lambda + h * dim;
        };
        kernels.dequantise(spec, slice_at(pages, job.page, h), lambda_at(job.lambda_k, spec.key.dim),
                           lambda_at(job.lambda_v, spec.value.dim), job.first, static_cast<int>(job.count),
                           job.k == nullptr ? nullptr : rows[0], job.v == nullptr ? nullptr : rows[1], scratch);
        const auto give = [&](const float* from, void* to, std::int64_t head_stride, std::int64_t stride, int dim) {
          if (to == nullptr) return;
          cpu::convert(
              {.from = from,
               .from_stride = dim,
               .to = static_cast<std::byte*>(to) + h * head_stride * static_cast<std::int64_t>(size_of(job.dtype)),
               .to_dtype = job.dtype,
               .to_stride = stride,
               .heads = 1,
               .dim = dim,
               .rows = job.count});
        };
        give(rows[0], job.k, job.k_head_stride, job.k_stride, spec.key.dim);
        give(rows[1], job.v, job.v_head_stride, job.v_stride, spec.value.dim);
      }
    }
    return {};
  }
};

}  // namespace

Backend* backend() {
  static CpuBackend backend;
  return &backend;
}

}  // namespace kv4::cpu
