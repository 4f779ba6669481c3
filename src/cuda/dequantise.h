// Sealed tokens as rows in the model's own basis, many slices in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/seal.h"
#include "cuda/seal_digits.h"

namespace kv4::cuda {

struct DequantiseJobs {
  SideParams key, value;
  PageMemory pages;
  const DequantiseJob* jobs = nullptr;  // in device memory, every pointer in them too
  int heads = 1, count = 0;             // as in SealParams
  DigitFragments inverse_k, inverse_v;
};
cudaError_t launch_dequantise_jobs(const DequantiseJobs& p, int device, cudaStream_t stream);

}  // namespace kv4::cuda
