// Queues kernels. The error is the launch's own: cudaGetLastError after <<<>>> would also give what somebody else's call left behind.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

namespace kv4::cuda {

// `attributes`: [count], may be null where that is 0.
template <class... Parameters>
cudaError_t queue_with(cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Parameters...), dim3 ctas, int threads, std::size_t shared,
                       cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
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
cudaError_t queue(void (*kernel)(Parameters...), dim3 ctas, int threads, std::size_t shared, cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  return queue_with(nullptr, 0, kernel, ctas, threads, shared, stream, arguments...);
}

}  // namespace kv4::cuda
