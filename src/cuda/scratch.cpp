#include "cuda/scratch.h"

#include <algorithm>

namespace kv4::cuda {
namespace {

struct Capture {
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
};

Status capture_of(cudaStream_t stream, Capture* out) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
#if CUDART_VERSION >= 13000
  KV4_RETURN_IF_CUDA("capture", cudaStreamGetCaptureInfo(stream, &status, &out->id, &out->graph));
#else
  KV4_RETURN_IF_CUDA("capture", cudaStreamGetCaptureInfo_v2(stream, &status, &out->id, &out->graph));
#endif
  return status == cudaStreamCaptureStatusActive ? Status() : failed("capture", cudaErrorStreamCaptureInvalidated);
}

template <class Blocks>
void forget_dead(Blocks* blocks) {
  std::erase_if(*blocks, [](const auto& entry) { return entry.second.expired(); });
}

}  // namespace

Scratch::~Scratch() { free_returned(); }

Status Scratch::share(std::size_t bytes, Held* held) {
  unsigned long long stream = 0;
  KV4_RETURN_IF_CUDA("stream", cudaStreamGetId(current_stream(), &stream));
  const std::lock_guard<std::mutex> lock(mutex_);
  free_returned();
  const auto known = shared_.find(stream);
  Held block = known != shared_.end() ? known->second.lock() : nullptr;
  if (!block || block->bytes < bytes) {
    const auto grown = std::make_shared<Block>();
    grown->bytes = std::max(bytes, block ? 2 * block->bytes : bytes);
    KV4_RETURN_IF_ERROR(memory_.alloc("scratch", grown->bytes, &grown->data));
    if (const cudaError_t e = cudaMemsetAsync(grown->data, 0, zeros_, current_stream()); e != cudaSuccess) {
      memory_.free(grown->data);
      return failed("scratch", e);
    }
    block = grown;
    forget_dead(&shared_);
    shared_[stream] = block;
  }
  if (*held == block) return {};
  leave_locked(held);
  *held = std::move(block);
  return {};
}

void Scratch::leave(Held* held) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_returned();
  leave_locked(held);
}

// Whoever is last frees it in the order of a stream that may know nothing of those who left before, but for the event.
void Scratch::leave_locked(Held* held) {
  if (!*held) return;
  Block& block = **held;
  const cudaStream_t stream = current_stream();
  const bool last = held->use_count() == 1;
  cudaError_t e = block.left != nullptr ? cudaStreamWaitEvent(stream, block.left, 0) : cudaSuccess;
  if (e == cudaSuccess && !last) {
    if (block.left == nullptr) e = cudaEventCreateWithFlags(&block.left, cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaEventRecord(block.left, stream);
  }
  if (e != cudaSuccess) {
    forget(e);
    forget(cudaDeviceSynchronize());
  }
  if (last) {
    if (block.left != nullptr) forget(cudaEventDestroy(block.left));
    memory_.free(block.data);
  }
  held->reset();
}

Status Scratch::capture(std::size_t bytes, Held* out) {
  Capture capture;
  KV4_RETURN_IF_ERROR(capture_of(current_stream(), &capture));
  const std::lock_guard<std::mutex> lock(mutex_);
  const CapturedOn key{capture.id, current_stream(), std::this_thread::get_id()};
  if (const auto known = captured_.find(key); known != captured_.end()) {
    *out = known->second.lock();
    if (*out && (*out)->bytes >= bytes) return {};
  }
  Held block = take_returned(bytes);
  if (!block) {
    block = std::make_shared<Block>();
    block->bytes = bytes;
    KV4_RETURN_IF_ERROR(memory_.alloc_aside("scratch", bytes, zeros_, &block->data));
  }
  auto of_graph = std::make_unique<OfGraph>(OfGraph{returned_, block});
  cudaUserObject_t object = nullptr;
  if (const cudaError_t e =
          cudaUserObjectCreate(&object, of_graph.get(), graph_is_gone, 1, cudaUserObjectNoDestructorSync);
      e != cudaSuccess) {
    graph_is_gone(of_graph.release());
    return failed("scratch", e);
  }
  of_graph.release();  // the object's now
  if (const cudaError_t e = cudaGraphRetainUserObject(capture.graph, object, 1, cudaGraphUserObjectMove);
      e != cudaSuccess) {
    forget(cudaUserObjectRelease(object, 1));
    return failed("scratch", e);
  }
  forget_dead(&captured_);
  captured_[key] = block;
  *out = std::move(block);
  return {};
}

// On a thread of CUDA's, which may call nothing of CUDA's: who calls next frees it.
void Scratch::graph_is_gone(void* of_graph) {
  const std::unique_ptr<OfGraph> its(static_cast<OfGraph*>(of_graph));
  const std::lock_guard<std::mutex> lock(its->to->mutex);
  its->to->blocks.push_back(std::move(its->block));
}

// Nothing that uses them runs any more.
void Scratch::free_returned() {
  std::vector<Held> blocks;
  {
    const std::lock_guard<std::mutex> lock(returned_->mutex);
    blocks.swap(returned_->blocks);
  }
  for (const Held& block : blocks) memory_.free(block->data);
}

Scratch::Held Scratch::take_returned(std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(returned_->mutex);
  const auto it = std::find_if(returned_->blocks.begin(), returned_->blocks.end(),
                               [bytes](const Held& block) { return block->bytes >= bytes; });
  if (it == returned_->blocks.end()) return nullptr;
  const auto block = std::make_shared<Block>();  // another one: the capture that had it is not this one
  block->data = (*it)->data;
  block->bytes = (*it)->bytes;
  returned_->blocks.erase(it);
  return block;
}

}  // namespace kv4::cuda
