#include "cuda/attend_launch.cuh"
#include "cuda/attend_tuning.h"

namespace kv4::cuda {

template <>
cudaError_t launch_dim<64>(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  using T = Tuning<64>;
  return launch_rows<64, T::kWarps[0], T::kDepth[0], T::kWarps[1], T::kDepth[1]>(p, plan, stream);
}

}  // namespace kv4::cuda
