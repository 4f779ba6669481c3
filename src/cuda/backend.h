// The backend of NVIDIA GPUs of compute capability 8.0 and later, one object per device. Every pointer it is given is
// one of its device's memory, but for the arrays that a job itself consists of (jobs, sequences, page tables) and what
// is said to be host memory. Work is queued on the calling thread's stream; attend reports no non-finite queries, since
// it does not wait: NaN comes out of the rows that saw it.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/backend.h"
#include "cuda/attend.h"

namespace kv4::cuda {

// Null where there is no such GPU or driver.
Backend* backend(int device = 0);
// A call on the first device as launch_attend takes it, for callers that keep sequences and page tables in device
// memory themselves (params-> sequences is left to them), which a captured call must. Errors: unsupported, with the
// reason; out_of_memory.
Status attend_params(const AttendJob& job, AttendParams* params);
// The stream of this thread's calls from now on; null is the default stream. Scratch follows the stream (scratch.h).
void set_stream(cudaStream_t stream);
// Bytes of a device that caches, graphs and calls hold, but for rotations; what was freed counts until its stream has
// come to that.
Status memory_in_use(int device, std::size_t* bytes);
// For tests: memory of a device is taken so many times more, then there is none left; below 0: as much as it has.
Status limit_memory(int device, long long times);

}  // namespace kv4::cuda
