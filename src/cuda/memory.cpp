#include "cuda/memory.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cuda/backend.h"
#include "cuda/rows.h"

namespace kv4::cuda {
namespace {

thread_local cudaStream_t stream_of_thread = nullptr;

constexpr std::size_t kSlotBytes = 1 << 20;
constexpr std::size_t kStagedBytes = 64 << 20;
// Free memory that the pool keeps for what comes next.
constexpr std::uint64_t kKeptBytes = 256ull << 20;

}  // namespace

Status failed(const char* what, cudaError_t e) {
  cudaGetLastError();  // not left for others to find
  return error(e == cudaErrorMemoryAllocation ? StatusCode::out_of_memory : StatusCode::failed_precondition, what,
               "success", cudaGetErrorString(e));
}

cudaStream_t current_stream() { return stream_of_thread; }
void set_stream(cudaStream_t stream) { stream_of_thread = stream; }

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();
  return false;
}

Staging::~Staging() {
  for (const auto& slot : slots_) {
    forget(cudaEventDestroy(slot->done));
    forget(cudaFreeHost(slot->memory));
  }
}

cudaError_t Staging::take(std::size_t bytes, Slot** out) {
  std::size_t held = 0;
  for (const auto& slot : slots_) {
    held += slot->bytes;
    if (slot->bytes < bytes) continue;
    const cudaError_t e = cudaEventQuery(slot->done);
    if (e == cudaSuccess) *out = slot.get();
    if (e != cudaErrorNotReady) return e;
    forget(e);
  }
  if (held >= kStagedBytes) {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      Slot* slot = slots_[next_++ % slots_.size()].get();
      if (slot->bytes < bytes) continue;
      *out = slot;
      return cudaEventSynchronize(slot->done);
    }
  }
  auto slot = std::make_unique<Slot>();
  slot->bytes = std::max(bytes, kSlotBytes);
  if (const cudaError_t e = cudaHostAlloc(&slot->memory, slot->bytes, cudaHostAllocPortable); e != cudaSuccess)
    return e;
  if (const cudaError_t e = cudaEventCreateWithFlags(&slot->done, cudaEventDisableTiming); e != cudaSuccess) {
    forget(cudaFreeHost(slot->memory));
    return e;
  }
  slots_.push_back(std::move(slot));
  *out = slots_.back().get();
  return cudaSuccess;
}

cudaError_t Staging::upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Slot* slot = nullptr;
  {
    const AsideOfCaptures aside;
    if (aside.error() != cudaSuccess) return aside.error();
    if (const cudaError_t e = take(bytes, &slot); e != cudaSuccess) return e;
  }
  std::memcpy(slot->memory, from, bytes);
  if (const cudaError_t e = cudaMemcpyAsync(to, slot->memory, bytes, cudaMemcpyHostToDevice, stream); e != cudaSuccess)
    return e;
  return cudaEventRecord(slot->done, stream);
}

Notes::~Notes() {
  for (const Free& x : free_)
    if (x.until != nullptr) forget(cudaEventDestroy(x.until));
  for (cudaEvent_t event : events_) forget(cudaEventDestroy(event));
  for (void* block : blocks_) forget(cudaFreeHost(block));
}

cudaError_t Notes::alloc(LateNote** out) {
  constexpr std::size_t kBlockBytes = 4096;
  const AsideOfCaptures aside;
  if (aside.error() != cudaSuccess) return aside.error();
  const std::lock_guard<std::mutex> lock(mutex_);
  auto unused = std::find_if(free_.begin(), free_.end(), [](const Free& x) {
    const cudaError_t e = x.until == nullptr ? cudaSuccess : cudaEventQuery(x.until);
    forget(e);
    return e == cudaSuccess;
  });
  if (unused == free_.end()) {
    void* block = nullptr;
    if (const cudaError_t e = cudaHostAlloc(&block, kBlockBytes, cudaHostAllocPortable | cudaHostAllocMapped);
        e != cudaSuccess)
      return e;
    blocks_.push_back(block);
    for (std::size_t i = 0; i < kBlockBytes / sizeof(LateNote); ++i)
      free_.push_back({static_cast<LateNote*>(block) + i, nullptr});
    unused = free_.end() - 1;
  }
  if (unused->until != nullptr) events_.push_back(unused->until);
  *out = unused->note;
  free_.erase(unused);
  (*out)->key = 0;
  (*out)->value = 0;
  return cudaSuccess;
}

void Notes::free(LateNote* note) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Free x{note, nullptr};
  cudaError_t e = cudaSuccess;
  if (events_.empty()) {
    e = cudaEventCreateWithFlags(&x.until, cudaEventDisableTiming);
  } else {
    x.until = events_.back();
    events_.pop_back();
  }
  if (e == cudaSuccess) e = cudaEventRecord(x.until, current_stream());
  if (e == cudaSuccess) return free_.push_back(x);
  forget(e);  // nobody knows when it may be used again: not at all
  if (x.until != nullptr) events_.push_back(x.until);
}

Memory::~Memory() {
  if (aside_ != nullptr) forget(cudaStreamDestroy(aside_));
  if (pool_ != nullptr) forget(cudaMemPoolDestroy(pool_));
}

Status Memory::pool(cudaMemPool_t* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pool_ == nullptr) {
    const AsideOfCaptures aside;
    cudaMemPoolProps props = {};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device_;
    cudaMemPool_t made = nullptr;
    KV4_RETURN_IF_CUDA("memory", cudaMemPoolCreate(&made, &props));
    std::uint64_t kept = kKeptBytes;
    if (const cudaError_t e = cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &kept); e != cudaSuccess) {
      forget(cudaMemPoolDestroy(made));
      return failed("memory", e);
    }
    pool_ = made;
  }
  *out = pool_;
  return {};
}

Status Memory::alloc_on(cudaStream_t stream, const char* what, std::size_t bytes, void** out) {
  cudaMemPool_t from = nullptr;
  KV4_RETURN_IF_ERROR(pool(&from));
  const AsideOfCaptures aside;
  const bool limited = left_ == 0;
  if (left_ > 0) --left_;
  const cudaError_t e = limited                        ? cudaErrorMemoryAllocation
                        : aside.error() == cudaSuccess ? cudaMallocFromPoolAsync(out, bytes, from, stream)
                                                       : aside.error();
  if (e == cudaSuccess) return {};
  *out = nullptr;
  if (e != cudaErrorMemoryAllocation) return failed(what, e);
  forget(e);
  return error(StatusCode::out_of_memory, what, std::to_string(bytes) + " free bytes", "none");
}

Status Memory::alloc_aside(const char* what, std::size_t bytes, std::size_t zeros, void** out) {
  const AsideOfCaptures aside;
  KV4_RETURN_IF_CUDA(what, aside.error());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aside_ == nullptr) KV4_RETURN_IF_CUDA(what, cudaStreamCreateWithFlags(&aside_, cudaStreamNonBlocking));
  }
  void* made = nullptr;
  KV4_RETURN_IF_ERROR(alloc_on(aside_, what, bytes, &made));
  cudaError_t e = cudaMemsetAsync(made, 0, zeros, aside_);
  if (e == cudaSuccess) e = cudaStreamSynchronize(aside_);
  if (e != cudaSuccess) {
    forget(cudaFreeAsync(made, aside_));
    return failed(what, e);
  }
  *out = made;
  return {};
}

void Memory::free(void* p) {
  if (p == nullptr) return;
  const AsideOfCaptures aside;
  forget(cudaFreeAsync(p, current_stream()));
}

Status Memory::upload(void* to, const void* from, std::size_t bytes) {
  // A few kilobytes travel with kernel launches, which need no memory that lasts; so does all that is captured: a graph
  // would read the staging memory at every replay, long after others have written to it.
  constexpr std::size_t kByLaunches = 2 * kPutBytes;
  if (bytes > kByLaunches && !is_capturing(current_stream())) {
    KV4_RETURN_IF_CUDA("upload", staging_.upload(to, from, bytes, current_stream()));
    return {};
  }
  for (std::size_t at = 0; at < bytes; at += kPutBytes)
    KV4_RETURN_IF_CUDA("upload", launch_put(static_cast<std::byte*>(to) + at, static_cast<const std::byte*>(from) + at,
                                            std::min(kPutBytes, bytes - at), current_stream()));
  return {};
}

Status Memory::in_use(std::size_t* bytes) {
  cudaMemPool_t from = nullptr;
  KV4_RETURN_IF_ERROR(pool(&from));
  std::uint64_t used = 0;
  KV4_RETURN_IF_CUDA("memory", cudaMemPoolGetAttribute(from, cudaMemPoolAttrUsedMemCurrent, &used));
  *bytes = used;
  return {};
}

Status Temporary::upload(const char* what, const void* from, std::size_t bytes) {
  if (bytes == 0) return {};
  KV4_RETURN_IF_ERROR(memory_.alloc(what, bytes, &data_));
  return memory_.upload(data_, from, bytes);
}

Status Temporary::make(const char* what, std::size_t bytes, std::size_t zeros) {
  KV4_RETURN_IF_ERROR(memory_.alloc(what, bytes, &data_));
  KV4_RETURN_IF_CUDA(what, cudaMemsetAsync(data_, 0, zeros, current_stream()));
  return {};
}

}  // namespace kv4::cuda
