// What attention's plan depends on of a device: see Chip in attend.h.
#include <cuda_runtime.h>

#include "cuda/attend.h"
#include "cuda/launch.cuh"

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
  chip.wgmma = has_wgmma(device);
#endif
  return chip;
}

}  // namespace kv4::cuda
