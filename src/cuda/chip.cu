// What attention's plan depends on of a device: see Chip in attend.h.
#include <cuda_runtime.h>

#include "cuda/attend.h"

namespace kv4::cuda {
namespace {

__global__ void nothing() {}  // compiled for what all kernels are

}  // namespace

Chip chip_of(int device) {
  Chip chip;
  int shared = 0, multiprocessors = 1;
  cudaFuncAttributes code;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
      cudaFuncGetAttributes(&code, nothing) != cudaSuccess) {
    cudaGetLastError();
    return chip;
  }
  chip.multiprocessors = multiprocessors;
  chip.shared = shared;
  chip.code = code.ptxVersion;
#ifdef KV4_CUDA_WGMMA
  int major = 0, minor = 0;
  chip.wgmma = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
               cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
               minor == 0;
#endif
  return chip;
}

}  // namespace kv4::cuda
