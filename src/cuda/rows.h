// Exact rows on a CUDA device: storing, moving and converting them, and the moments from which lambda is computed.
// Rows are 16-bit floats unless stated otherwise.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/batch.h"

namespace kv4::cuda {

// Rows of every sequence and head behind those of exact[1] (StoreJob).
struct StoreParams {
  SequenceView* sequences = nullptr;  // [batch] in device memory
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t k_stride[3] = {}, v_stride[3] = {};  // elements: axis 0, head, row
  int batch = 0, heads = 0, dim = 0;
  int most = 0;           // rows of one sequence
  std::int64_t rows = 0;  // of axis 2
  bool bf16 = false;
  std::uint8_t* skip = nullptr;  // [inputs, rows], or null. If set, nothing is stored: 1 for rows with NaN or infinity
  // Adds the new rows to the sequences' counts and query positions, so that a replayed launch continues from the last.
  bool count = false;
  bool in_order = false;  // StoreJob's
  bool early = false;     // queue_early's argument
};
// With `count`, one CTA per sequence: meant for few tokens.
cudaError_t launch_store(const StoreParams& p, cudaStream_t stream);

// launch_step gives every sequence a share of the grid for the most rows of one: meant for few.
constexpr std::int64_t kMostStepRows = 16;
// First launch of a step of a host's batch (Backend::begin_step): CTAs store the rows of a sequence, and one of them
// writes its view and jobs.
struct StepParams {
  StoreParams store;  // all but `sequences`, `skip` and `count`
  PagedBatch batch;
  PageRange range;
  DType dtype = DType::f16;
  SequenceView* views = nullptr;  // [batch]
  SealJob* jobs = nullptr;        // [batch * range.most]
};
cudaError_t launch_step(const StepParams& p, cudaStream_t stream);

// Copies `bytes` <= kPutBytes of host memory to `to`, as arguments of a launch.
constexpr std::size_t kPutBytes = 3840;
cudaError_t launch_put(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

// Moves blocks of bytes downwards; source and destination may overlap.
cudaError_t launch_move_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t bytes, int lines, cudaStream_t stream);

cudaError_t launch_convert(const ConvertJob& job, cudaStream_t stream);

// A PagedBatch's views and jobs (batch.h).
cudaError_t launch_views(const PagedBatch& batch, bool stored, SequenceView* out, bool early, cudaStream_t stream);
template <class Job>  // SealJob, DequantiseJob
cudaError_t launch_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, Job* out, bool early,
                        cudaStream_t stream);

struct EnergyParams {
  static constexpr int kJobs = 96;
  const void* q = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride[3] = {};
  int kv_heads = 0, group = 0, dim = 0, jobs = 0;
  EnergyJob job[kJobs];
};
cudaError_t launch_energies(const EnergyParams& p, cudaStream_t stream);

struct LambdaParams {
  const void* k = nullptr;
  bool bf16 = false;
  std::int64_t k_head_stride = 0, k_stride = 0;
  int kv_heads = 0, dim = 0, blocks = 0;
  const std::uint8_t* skip = nullptr;      // device memory, as in LambdaJob
  const float* const* energies = nullptr;  // [queries], device memory too
  int queries = 0;
  float* lambda = nullptr;
};
cudaError_t launch_lambda(const LambdaParams& p, cudaStream_t stream);

}  // namespace kv4::cuda
