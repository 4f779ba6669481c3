#include "probe.h"

#include <atomic>

namespace kv4::probe {
namespace {

std::atomic<long> g_calls{0}, g_fail_at{0};
std::atomic<bool> g_after{false}, g_failed{false};
std::atomic<std::size_t> g_held{0};

bool fails() {
  const long n = ++g_calls, at = g_fail_at;
  const bool fault = at > 0 && (n == at || (g_after && n > at));
  if (fault) g_failed = true;
  return fault;
}
Status fault() { return fails() ? Status(StatusCode::failed_precondition, kFault) : Status(); }

class ProbeBackend final : public Backend {
 public:
  const char* name() const override { return "probe"; }
  int code_channels(int dim) const override { return cpu_.code_channels(dim); }
  Status supports(const PageSpec& spec) const override { return cpu_.supports(spec); }
  Status supports_rows(int k, int v, DType dtype, SealMode seal) const override {
    return cpu_.supports_rows(k, v, dtype, seal);
  }

  void* alloc(std::size_t bytes) override {
    if (fails()) return nullptr;
    g_held += bytes;
    return cpu_.alloc(bytes);
  }
  void free(void* p, std::size_t bytes) override {
    g_held -= bytes;
    cpu_.free(p, bytes);
  }
  Status copy(void* to, const void* from, std::size_t bytes) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.copy(to, from, bytes);
  }
  Status clear(void* p, std::size_t bytes) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.clear(p, bytes);
  }
  Status copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes,
                    int lines) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.copy_lines(to, to_pitch, from, from_pitch, bytes, lines);
  }
  Status store(const StoreJob& job) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.store(job);
  }
  Status convert(const ConvertJob& job) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.convert(job);
  }
  Status query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.query_energies(q, kv_heads, jobs);
  }
  Status fix_lambda(const LambdaJob& job) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.fix_lambda(job);
  }
  Status seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs,
              bool resident) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.seal(spec, pages, kv_heads, jobs, resident);
  }
  Status dequantise(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const DequantiseJob> jobs,
                    bool resident) const override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.dequantise(spec, pages, kv_heads, jobs, resident);
  }
  std::size_t attend_workspace(const AttendJob& job) const override { return cpu_.attend_workspace(job); }
  Status attend(const AttendJob& job) override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.attend(job);
  }
  Status codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k,
                            std::uint8_t* v) const override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.codes_to_canonical(spec, slice, k, v);
  }
  Status codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v,
                              std::uint8_t* slice) const override {
    KV4_RETURN_IF_ERROR(fault());
    return cpu_.codes_from_canonical(spec, k, v, slice);
  }

 private:
  Backend& cpu_ = *find_backend("cpu");
};

}  // namespace

Backend* backend(int device) {
  static ProbeBackend only;
  return device == 0 ? &only : nullptr;
}

void fail_at(long n, bool after) {
  g_calls = 0;
  g_failed = false;
  g_after = after;
  g_fail_at = n;
}
long calls() { return g_calls; }
bool failed() { return g_failed; }
std::size_t held() { return g_held; }

}  // namespace kv4::probe
