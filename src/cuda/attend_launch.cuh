// Queues the kernels of one head dim. Each is compiled in a file of its own, attend_<head dim>.cu.
#pragma once

#include "cuda/attend.h"
#include "cuda/attend_fused.cuh"
#include "cuda/attend_main.cuh"
#include "cuda/attend_merge.cuh"
#include "cuda/attend_prepare.cuh"
#include "cuda/attend_tuning.h"
#include "cuda/attend_wide.h"
#include "cuda/launch.cuh"

namespace kv4::cuda {

template <class Kernel>
cudaError_t queue_kernel(Kernel kernel, const AttendParams& p, const AttendPlan& plan, dim3 ctas, int threads,
                         int bytes, cudaStream_t stream, unsigned cluster_y = 1) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (plan.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster_y > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {1, cluster_y, 1};
    ++count;
  }
  return queue_with(attributes, count, kernel, ctas, threads, static_cast<std::size_t>(bytes), stream, p);
}

template <int D, Rows kRows, Readers kReaders, Codes kCodes>
cudaError_t launch_fused(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  constexpr int kBlocks = blocks_of(kRows);
  constexpr Fit kFit = fused_fit<D>(kReaders, kBlocks);
  static_assert(kFit.readers > 0, "no queues fit");
  constexpr int kShared = fused_shared<D>(kReaders, kFit.readers, kFit.depth, kBlocks);
  const auto kernel = attend_fused<D, kRows, kReaders, kCodes>;
  static SharedMost most;
  if (const cudaError_t e = most.allow(kernel, kShared); e != cudaSuccess) return e;
  const dim3 ctas(static_cast<unsigned>(plan.fused_ctas), static_cast<unsigned>(p.kv_heads * (p.blocks / kBlocks)),
                  static_cast<unsigned>(p.batch));
  return queue_kernel(kernel, p, plan, ctas, fused_warps(kReaders, kFit.readers) * kLanes, kShared, stream);
}

template <int D, Rows kRows, Room kRoom, Readers kKind, Codes kCodes>
cudaError_t launch(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  constexpr int kBlocks = blocks_of(kRows);
  constexpr Fit kFit = fit<D>(kRoom, kBlocks, kKind);
  static_assert(kFit.readers > 0 && kFit.depth >= 2, "no queues fit");
  constexpr int kQueues = main_shared<D>(kKind, kFit.readers, kFit.depth, kBlocks);
  static_assert(kQueues + kOffsetsBytes <= room_bytes(kRoom), "more shared memory than the room has");
  constexpr int kMerge = MergeShape<D, kBlocks>::kShared;
  static_assert(kMerge + 4096 <= room_bytes(kRoom), "attend_merge: more shared memory than the room has");
  const int shared = kQueues + (p.batch + 1) * static_cast<int>(sizeof(int));
  const auto main = attend_main<D, kRows, kRoom, kKind, kCodes>;
  const auto merge = attend_merge<D, kBlocks>;
  static SharedMost of_main, of_merge;
  if (const cudaError_t e = of_main.allow(main, room_bytes(kRoom)); e != cudaSuccess) return e;  // whatever the batch
  if (const cudaError_t e = of_merge.allow(merge, kMerge); e != cudaSuccess) return e;
  const auto queue = [&](auto kernel, dim3 ctas, int threads, int bytes) {
    return queue_kernel(kernel, p, plan, ctas, threads, bytes, stream);
  };
  // A few CTAs are bound by latency, which more threads shorten; many share the multiprocessors.
  const auto crowded = [&](unsigned ctas) { return ctas > 2 * static_cast<unsigned>(plan.ctas); };
  const auto threads = [&](unsigned ctas, int together) {
    return together > 1 || crowded(ctas) ? kRotateThreads / 2 : kRotateThreads;
  };
  const auto in_groups = [](unsigned n, int of) {
    return (n + static_cast<unsigned>(of) - 1) / static_cast<unsigned>(of);
  };
  const unsigned blocks = in_groups(static_cast<unsigned>(p.batch * p.kv_heads * p.blocks), p.prepare_blocks);
  // Each CTA reads a part of a large matrix. They occupy at most half of the multiprocessors, so that attend_main can
  // begin at once on the others.
  unsigned rotation_parts = D >= kLargeDim && kRoom == Room::large ? kMostParts : 1;
  while (rotation_parts > 1 && blocks * rotation_parts * 2 > static_cast<unsigned>(plan.ctas)) rotation_parts /= 2;
  if (const cudaError_t e = queue_kernel(attend_prepare<D>, p, plan, dim3(blocks, rotation_parts),
                                         threads(blocks, p.prepare_blocks), 0, stream, rotation_parts);
      e != cudaSuccess)
    return e;
  if (const cudaError_t e =
          queue(main, dim3(static_cast<unsigned>(plan.ctas)), main_warps<D>(kRoom, kBlocks, kKind) * kLanes, shared);
      e != cudaSuccess)
    return e;
#ifdef KV4_CUDA_WGMMA
  if constexpr (D < kLargeDim && kRoom == Room::large)
    if (plan.wide_splits > 0)
      if (const cudaError_t e = launch_wide(p, stream); e != cudaSuccess) return e;
#endif
  const unsigned segments =
      in_groups(static_cast<unsigned>(p.batch * p.kv_heads * (p.blocks / kBlocks)), p.merge_segments);
  const unsigned parts = (p.merge_segments > 1 ? 1 : in_groups(kBlocks * kBlockRows, p.merge_rows)) *
                         static_cast<unsigned>(merge_columns(D));
  const bool alone = p.merge_segments == 1 && crowded(segments * parts);
  return queue(merge, dim3(segments, parts), alone ? kRotateThreads / 4 : threads(segments * parts, p.merge_segments),
               kMerge);
}

template <int D, Rows kRows, Codes kCodes>
cudaError_t launch_room(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  if constexpr (D >= kLargeDim) {
    if (plan.fused_ctas > 0) return launch_fused<D, kRows, Readers::twos, kCodes>(p, plan, stream);
    if (main_has_teams(D, plan.room) && plan.teams)
      return launch<D, kRows, Room::large, Readers::twos, kCodes>(p, plan, stream);
  } else if (plan.fused_ctas > 0) {
    return plan.teams ? launch_fused<D, kRows, Readers::fours, kCodes>(p, plan, stream)
                      : launch_fused<D, kRows, Readers::warps, kCodes>(p, plan, stream);
  }
  switch (plan.room) {
    case Room::large: return launch<D, kRows, Room::large, Readers::warps, kCodes>(p, plan, stream);
    case Room::middle: return launch<D, kRows, Room::middle, Readers::warps, kCodes>(p, plan, stream);
    case Room::small: return launch<D, kRows, Room::small, Readers::warps, kCodes>(p, plan, stream);
    case Room::none: break;
  }
  return cudaErrorNoKernelImageForDevice;
}

template <int D, Codes kCodes>
cudaError_t launch_codes(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  if constexpr (most_segment_blocks(D) == 2)
    if (p.segment_blocks == 2) return launch_room<D, Rows::sixteen, kCodes>(p, plan, stream);
  if (p.group * p.queries <= 4) return launch_room<D, Rows::four, kCodes>(p, plan, stream);
  return launch_room<D, Rows::eight, kCodes>(p, plan, stream);
}

template <int D>
cudaError_t launch_rows(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  return has_narrow(p) ? launch_codes<D, Codes::any>(p, plan, stream) : launch_codes<D, Codes::fours>(p, plan, stream);
}

}  // namespace kv4::cuda
