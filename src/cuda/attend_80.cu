#include "cuda/attend_launch.cuh"

namespace kv4::cuda {

template <>
cudaError_t launch_dim<80>(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  return launch_rows<80>(p, plan, stream);
}

}  // namespace kv4::cuda
