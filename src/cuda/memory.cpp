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
  return error(e == cudaErrorMemoryAllocation ? StatusCode::out_of_memory : StatusCode::failed_precondition, what, "success",
               cudaGetErrorString(e));
}

cudaStream_t current_stream() { return stream_of_thread; }
void set_stream(cudaStream_t stream) { stream_of_thread = stream; }

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();
  return false;
}

Status Scratch::reserve(cudaStream_t stream, std::size_t bytes, bool capturing, Block* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto fits = [bytes](const Block& block) { return block && block->size() >= bytes; };
  if (capturing) {
    if (!fits(captured_)) {
      // Nothing can be allocated here; streams that are captured are often not those of the calls before.
      const auto size = [](const auto& entry) { return entry.second ? entry.second->size() : 0; };
      const auto largest = std::max_element(blocks_.begin(), blocks_.end(), [&](const auto& a, const auto& b) { return size(a) < size(b); });
      if (largest == blocks_.end() || !fits(largest->second))
        return error(StatusCode::failed_precondition, "q", "a call of the same shape before capture", "a need for " + std::to_string(bytes) + " bytes more");
      // The block before it may be nobody else's by now, and to free it would end the capture.
      if (captured_) retired_.push_back(std::move(captured_));
      captured_ = std::move(largest->second);
      blocks_.erase(largest);
    }
    *out = captured_;
    return {};
  }
  retired_.clear();
  Block& block = blocks_[stream];
  if (!fits(block)) {
    const auto grown = std::make_shared<DeviceBuffer>();
    KV4_RETURN_IF_CUDA("scratch", grown->make(std::max(bytes, block ? 2 * block->size() : bytes)));
    KV4_RETURN_IF_CUDA("scratch", cudaMemsetAsync(grown->data(), 0, zeros_, stream));
    block = grown;
  }
  *out = block;
  return {};
}

Staging::~Staging() {
  for (const auto& slot : slots_) {
    cudaEventDestroy(slot->done);
    cudaFreeHost(slot->memory);
  }
}

cudaError_t Staging::take(std::size_t bytes, Slot** out) {
  std::size_t held = 0;
  for (const auto& slot : slots_) {
    held += slot->bytes;
    if (slot->bytes < bytes || cudaEventQuery(slot->done) != cudaSuccess) continue;
    *out = slot.get();
    return cudaSuccess;
  }
  cudaGetLastError();  // "not ready" is no failure
  if (held >= kStagedBytes) {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      Slot* slot = slots_[turn_++ % slots_.size()].get();
      if (slot->bytes < bytes) continue;
      *out = slot;
      return cudaEventSynchronize(slot->done);
    }
  }
  auto slot = std::make_unique<Slot>();
  slot->bytes = std::max(bytes, kSlotBytes);
  if (const cudaError_t e = cudaHostAlloc(&slot->memory, slot->bytes, cudaHostAllocPortable); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaEventCreateWithFlags(&slot->done, cudaEventDisableTiming); e != cudaSuccess) {
    cudaFreeHost(slot->memory);
    return e;
  }
  slots_.push_back(std::move(slot));
  *out = slots_.back().get();
  return cudaSuccess;
}

cudaError_t Staging::upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Slot* slot = nullptr;
  if (const cudaError_t e = take(bytes, &slot); e != cudaSuccess) return e;
  std::memcpy(slot->memory, from, bytes);
  if (const cudaError_t e = cudaMemcpyAsync(to, slot->memory, bytes, cudaMemcpyHostToDevice, stream); e != cudaSuccess) return e;
  return cudaEventRecord(slot->done, stream);
}

Notes::~Notes() {
  for (void* block : blocks_) cudaFreeHost(block);
}

cudaError_t Notes::alloc(LateNote** out) {
  constexpr std::size_t kBlockBytes = 4096;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    void* block = nullptr;
    if (const cudaError_t e = cudaHostAlloc(&block, kBlockBytes, cudaHostAllocPortable | cudaHostAllocMapped); e != cudaSuccess) return e;
    blocks_.push_back(block);
    for (std::size_t i = kBlockBytes / sizeof(LateNote); i-- > 0;) free_.push_back(static_cast<LateNote*>(block) + i);
  }
  LateNote* note = free_.front();  // the one that has been free longest: what still runs may write to a young one
  free_.erase(free_.begin());
  note->key = 0;
  note->value = 0;
  *out = note;
  return cudaSuccess;
}

void Notes::free(LateNote* note) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(note);
}

Memory::~Memory() {
  if (pool_ != nullptr) cudaMemPoolDestroy(pool_);
}

cudaMemPool_t Memory::pool() {
  std::call_once(once_, [this] {
    cudaMemPoolProps props = {};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device_;
    if (cudaMemPoolCreate(&pool_, &props) != cudaSuccess) {
      cudaGetLastError();
      pool_ = nullptr;
      return;
    }
    std::uint64_t kept = kKeptBytes;
    cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &kept);
  });
  return pool_;
}

void* Memory::alloc(std::size_t bytes) {
  void* p = nullptr;
  if (pool() == nullptr || cudaMallocFromPoolAsync(&p, bytes, pool_, current_stream()) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return p;
}

void Memory::free(void* p) {
  if (p != nullptr && cudaFreeAsync(p, current_stream()) != cudaSuccess) cudaGetLastError();
}

Status Memory::upload(void* to, const void* from, std::size_t bytes) {
  // A few kilobytes travel with kernel launches, which need no memory that lasts.
  constexpr std::size_t kByLaunches = 2 * kPutBytes;
  if (bytes > kByLaunches) {
    KV4_RETURN_IF_CUDA("upload", staging_.upload(to, from, bytes, current_stream()));
    return {};
  }
  for (std::size_t at = 0; at < bytes; at += kPutBytes)
    KV4_RETURN_IF_CUDA("upload", launch_put(static_cast<std::byte*>(to) + at, static_cast<const std::byte*>(from) + at,
                                            std::min(kPutBytes, bytes - at), current_stream()));
  return {};
}

Status Temporary::upload(const char* what, const void* from, std::size_t bytes) {
  if (bytes == 0) return {};
  data_ = memory_.alloc(bytes);
  if (data_ == nullptr) return error(StatusCode::out_of_memory, what, std::to_string(bytes) + " free bytes", "none");
  return memory_.upload(data_, from, bytes);
}

}  // namespace kv4::cuda
