#include "cuda/attend_launch.cuh"

namespace kv4::cuda {

template <>
cudaError_t launch_dim<64>(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  return launch_rows<64>(p, plan, stream);
}

}  // namespace kv4::cuda
