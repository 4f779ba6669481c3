// The CPU backend: host memory, sealing over jobs in parallel, attention.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "cpu/attention.h"
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

  Status supports(const PageSpec& spec) const override {
    KV4_RETURN_IF_ERROR(supports_side(spec.key, "k"));
    return supports_side(spec.value, "v");
  }

  void* alloc(std::size_t bytes) override { return alloc_pages(bytes); }
  void free(void* p, std::size_t bytes) override { free_pages(p, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void clear(void* p, std::size_t bytes) override { std::memset(p, 0, bytes); }

  Status seal(const PageSpec& spec, std::span<const SealJob> jobs) override {
    thread_local std::vector<Buffer> scratch;
    const Kernels& kernels = active();
    const std::size_t bytes = kernels.seal_scratch(spec);
    const int threads = jobs.size() < kParallelSeals ? 1 : num_threads();
    if (scratch.size() < static_cast<std::size_t>(threads)) scratch.resize(static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i)
      if (!scratch[static_cast<std::size_t>(i)].reserve(bytes))
        return error(StatusCode::out_of_memory, "workspace", std::to_string(bytes) + " free bytes", "none");
    std::vector<Buffer>& buffers = scratch;  // the calling thread's, for all workers
    parallel_for(static_cast<std::int64_t>(jobs.size()), threads, [&](std::int64_t i, int thread) {
      kernels.seal(spec, jobs[static_cast<std::size_t>(i)], buffers[static_cast<std::size_t>(thread)].data());
    });
    return {};
  }

  Status attend(const AttendJob& job) override { return cpu::attend(job); }

  void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k,
                          std::uint8_t* v) const override {
    cpu::codes_to_canonical(spec, slice, k, v);
  }
  void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v,
                            std::uint8_t* slice) const override {
    cpu::codes_from_canonical(spec, k, v, slice);
  }

  void dequantise(const PageSpec& spec, const std::uint8_t* slice, const float* lambda_k, const float* lambda_v,
                  int first, int count, float* k, float* v) const override {
    thread_local Buffer scratch;
    const Kernels& kernels = active();
    if (!scratch.reserve(kernels.dequantise_scratch(spec))) return;
    kernels.dequantise(spec, slice, lambda_k, lambda_v, first, count, k, v, scratch.data());
  }
};

}  // namespace

Backend* backend() {
  static CpuBackend backend;
  return &backend;
}

}  // namespace kv4::cpu
