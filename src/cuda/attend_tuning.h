// The one list of head dims: for each the warps of a CTA that read the cache and the slots of each one's queue, for up to 8
// query rows of a KV head and for more. A new head dim is a line here and a file attend_<head dim>.cu.
//
// 7 warps and the one that fills their queues are two to a scheduler, which leaves 255 registers a thread; slots fill what
// shared memory is left.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "cuda/attend.h"

namespace kv4::cuda {

template <int D>
struct Tuning;
template <> struct Tuning<64> { static constexpr int kWarps[2] = {11, 7}, kDepth[2] = {6, 8}; };
template <> struct Tuning<80> { static constexpr int kWarps[2] = {7, 7}, kDepth[2] = {8, 6}; };
template <> struct Tuning<96> { static constexpr int kWarps[2] = {7, 7}, kDepth[2] = {8, 6}; };
template <> struct Tuning<128> { static constexpr int kWarps[2] = {7, 7}, kDepth[2] = {6, 5}; };
template <> struct Tuning<256> { static constexpr int kWarps[2] = {7, 7}, kDepth[2] = {3, 3}; };

template <int D>
cudaError_t launch_dim(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream);
template <> cudaError_t launch_dim<64>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <> cudaError_t launch_dim<80>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <> cudaError_t launch_dim<96>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <> cudaError_t launch_dim<128>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <> cudaError_t launch_dim<256>(const AttendParams&, const AttendPlan&, cudaStream_t);

// Calls f with the head dim as a constant; a default result for one that is not in the list.
template <class F>
auto with_dim(int dim, F f) -> decltype(f(std::integral_constant<int, 64>())) {
  switch (dim) {
    case 64: return f(std::integral_constant<int, 64>());
    case 80: return f(std::integral_constant<int, 80>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    case 256: return f(std::integral_constant<int, 256>());
    default: return {};
  }
}
inline bool has_dim(int dim) {
  return with_dim(dim, [](auto) { return true; });
}

}  // namespace kv4::cuda
