// Queues kernels. The error is the launch's own: cudaGetLastError after <<<>>> would also give what somebody else's call left behind.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kv4::cuda {

template <class T>
struct Same {
  using Type = T;  // as the kernel has it, whatever is given for it
};

template <class... Parameters>
cudaError_t queue(void (*kernel)(Parameters...), dim3 ctas, int threads, std::size_t shared, cudaStream_t stream, typename Same<Parameters>::Type... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace kv4::cuda
