// Queues the kernels of one head dim. Each is compiled in a file of its own, attend_<head dim>.cu.
#pragma once

#include "cuda/attend.h"
#include "cuda/attend_main.cuh"
#include "cuda/attend_merge.cuh"
#include "cuda/attend_prepare.cuh"
#include "cuda/attend_tuning.h"

namespace kv4::cuda {

template <int D, Rows kRows, int kWarps, int kDepth>
cudaError_t launch(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  constexpr int kBlocks = blocks_of(kRows);
  const int shared = main_shared(kWarps, Queue<kDepth, Shape<D>::kSlotBytes, Shape<D>::kExactPitch>::kBytes, kBlocks * Shape<D>::kMeanOperands * 16) +
                     (p.batch + 1) * static_cast<int>(sizeof(int));
  const auto main = attend_main<D, kRows, kWarps, kDepth>;
  if (const cudaError_t e = cudaFuncSetAttribute(main, cudaFuncAttributeMaxDynamicSharedMemorySize, shared); e != cudaSuccess) return e;
  const auto merge = attend_merge<D, kBlocks>;
  if (const cudaError_t e = cudaFuncSetAttribute(merge, cudaFuncAttributeMaxDynamicSharedMemorySize, MergeShape<D, kBlocks>::kShared);
      e != cudaSuccess)
    return e;
  const auto queue = [&](auto kernel, dim3 ctas, int threads, int bytes) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = ctas;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = plan.early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, p);
  };
  // Few CTAs are chains of latency, which more threads shorten; many share their multiprocessors.
  const auto threads = [&](unsigned ctas) { return ctas <= 2 * static_cast<unsigned>(plan.ctas) ? kTurnThreads : kTurnThreads / 2; };
  const unsigned blocks = static_cast<unsigned>(p.batch * p.kv_heads * p.blocks);
  if (const cudaError_t e = queue(attend_prepare<D>, dim3(blocks), threads(blocks), 0); e != cudaSuccess) return e;
  if (const cudaError_t e = queue(main, dim3(static_cast<unsigned>(plan.ctas)), (kWarps + 1) * kLanes, shared); e != cudaSuccess) return e;
  const unsigned segments = static_cast<unsigned>(p.batch * p.kv_heads * (p.blocks / kBlocks)), rows = static_cast<unsigned>(kBlocks * kBlockRows);
  const unsigned parts = (rows + static_cast<unsigned>(p.merge_rows) - 1) / static_cast<unsigned>(p.merge_rows);
  return queue(merge, dim3(segments, parts), threads(segments * parts), MergeShape<D, kBlocks>::kShared);
}

template <int D>
cudaError_t launch_rows(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream) {
  using T = Tuning<D>;
  if (p.segment_blocks == 2) return launch<D, Rows::sixteen, T::kWarps[1], T::kDepth[1]>(p, plan, stream);
  if (p.group * p.queries <= 4) return launch<D, Rows::four, T::kWarps[0], T::kDepth[0]>(p, plan, stream);
  return launch<D, Rows::eight, T::kWarps[0], T::kDepth[0]>(p, plan, stream);
}

}  // namespace kv4::cuda
