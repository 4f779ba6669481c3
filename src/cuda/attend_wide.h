// Attention of many query rows a KV head over sealed pages, by tiles of 128 rows: attend_wide.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attend.h"

namespace kv4::cuda {

constexpr int kWideRows = 128;  // of a tile
// Tiles are faster from so many query rows of a KV head on; where all KV heads and sequences have so many, and a
// sequence so many pages (docs/notes/cuda.md). Sequences with fewer rows are read by warps in the same call.
constexpr int kWideFrom = 64, kWideAll = 256, kWideItems = 16;

// Whether the pages of such a call are read in tiles.
bool takes_wide(const AttendParams& p, const Chip& chip);
// Parts of a tile's pages, each a CTA: as many as the device has multiprocessors for.
int wide_splits(const AttendParams& p, const Chip& chip);
// Queues the kernel: behind attend_prepare, whose operands it reads, and before attend_merge. Every part of a segment
// leaves a state.
cudaError_t launch_wide(const AttendParams& p, cudaStream_t stream);

}  // namespace kv4::cuda
