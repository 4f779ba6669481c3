// Queues kernels. The error is the launch's own: cudaGetLastError after <<<>>> would also give what somebody else's
// call left behind.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <type_traits>

namespace kv4::cuda {

// `attributes`: [count], may be null where that is 0.
template <class... Parameters>
cudaError_t queue_with(cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Parameters...), dim3 ctas,
                       int threads, std::size_t shared, cudaStream_t stream,
                       std::type_identity_t<Parameters>... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters>
cudaError_t queue(void (*kernel)(Parameters...), dim3 ctas, int threads, std::size_t shared, cudaStream_t stream,
                  std::type_identity_t<Parameters>... arguments) {
  return queue_with(nullptr, 0, kernel, ctas, threads, shared, stream, arguments...);
}

// A kernel that calls wait_for_previous and, after it, let_next_begin. `early`: its code is for 9.0 or later, and may
// be there before the kernels before it have ended.
template <class... Parameters>
cudaError_t queue_early(bool early, void (*kernel)(Parameters...), dim3 ctas, int threads, std::size_t shared,
                        cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return queue_with(&attribute, early ? 1 : 0, kernel, ctas, threads, shared, stream, arguments...);
}

// Whether a device runs code for 9.0a, which alone has wgmma.
inline bool has_wgmma(int device) {
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

// How much dynamic shared memory a kernel's CTAs may have is one number for all that launch it on a device, on any
// thread and stream, replayed launches included. So it is set once, to the most that any call takes, and never lowered;
// what a call takes, its launch says. One object for each kernel, static.
class SharedMost {
 public:
  // Of the current device.
  template <class... Parameters>
  cudaError_t allow(void (*kernel)(Parameters...), int bytes) {
    int device = 0;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
    const bool noted = device < kNoted;
    if (noted && done_[device].load(std::memory_order_acquire)) return cudaSuccess;
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e == cudaSuccess && noted) done_[device].store(true, std::memory_order_release);
    return e;
  }

 private:
  static constexpr int kNoted = 64;  // devices; on others the same number is set by every call
  std::atomic<bool> done_[kNoted] = {};
};

// What a launch of persistent CTAs needs to know: their shared memory allowed, and how many multiprocessors `device`,
// the current one, has.
template <class... Parameters>
cudaError_t prepare_persistent(SharedMost& most, void (*kernel)(Parameters...), int bytes, int device,
                               int* multiprocessors) {
  if (const cudaError_t e = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
      e != cudaSuccess)
    return e;
  return most.allow(kernel, bytes);
}

}  // namespace kv4::cuda
