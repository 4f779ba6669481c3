// Sealing on a CUDA device: rotate, scale, quantise and pack whole pages or parts of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/backend.h"
#include "cuda/layout.h"
#include "recipe/levels.h"

namespace kv4::cuda {

// One side of a page, for the kernels.
struct SideParams {
  int dim = 0, group = 0, groups = 0;
  bool mean = false, abs_max = false;
  std::int8_t bits = 4;  // of a code: 2, 3 or 4
  StepRule step;
  // Levels as those of 4 bits: of narrow codes the magnitudes that there are, from code 8 up and from 7 down.
  int negative_base = 7;
  float thresholds[7] = {};  // between magnitudes i and i + 1, in levels; infinite where there is none
  std::int8_t levels[16] = {};
  const float* rotation_transpose = nullptr;       // [dim, dim] R^T by rows; null for the identity
  const double* rotation_transpose_f64 = nullptr;  // the same, for means: a bias may be 10^5 times the spread around it
  const std::uint16_t* rotation_digits = nullptr;  // the matrix in 12-bit digits, seal_digits.h
  float digit_unit = 0;                            // of the first
  std::uint32_t codes = 0, scales = 0, mean_at = 0;  // in a head slice
};

// Whether a side has codes of fewer than 4 bits.
inline bool has_narrow(const SideParams& key, const SideParams& value) {
  return is_narrow(key.bits) || is_narrow(value.bits);
}

struct SealParams {
  SideParams key, value;
  PageMemory pages;
  const SealJob* jobs = nullptr;  // in device memory, every pointer in them too; the first with page < 0 ends them
  int heads = 1;                  // of a job: slice i is head i % heads of job i / heads
  int count = 0;                  // slices
  bool halves = false;            // every job's rows are 16-bit floats
  // The kernel before is attention, and the jobs were there before it: whether there are any is found beside it.
  bool beside = false;
};
cudaError_t launch_seal(const SealParams& p, cudaStream_t stream);

// seal_wgmma.cu, for compute capability 9.0. Whether it takes these pages.
bool wgmma_takes(const SealParams& p, int device);
cudaError_t launch_seal_wgmma(const SealParams& p, int device, cudaStream_t stream);

}  // namespace kv4::cuda
