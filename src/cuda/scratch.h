// Scratch memory of attention. Each kernel of a call reads what the previous one wrote, and counters in it record which
// CTAs have finished. Only calls that the device runs one after another may therefore share scratch:
//
// - Eager calls on one stream share a block. Streams are identified by cudaStreamGetId, since a handle is ambiguous:
//   cudaStreamPerThread is one handle for a different stream in every thread, and the handle of a destroyed stream is
//   reused. The block is owned by the caches that call on that stream and freed with the last of them.
// - Captured calls of one stream within one capture share a block. The graph owns it, whichever stream replays the
//   graph, and it is freed once the graph and its instances are destroyed and have finished.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

#include "cuda/memory.h"

namespace kv4::cuda {

class Scratch {
 public:
  struct Block {
    void* data = nullptr;
    std::size_t bytes = 0;
    cudaEvent_t left = nullptr;  // recorded after all work of the users that have left
    std::mutex queueing;         // threads may share a stream: held while a call queues its kernels
  };
  using Held = std::shared_ptr<Block>;

  // The first `zeros` bytes of a new block are 0, and every call leaves them 0.
  Scratch(Memory& memory, std::size_t zeros) : memory_(memory), zeros_(zeros) {}
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` for a call on the current stream, which is not being captured. A *held of another stream, or one
  // that is too small, is released (leave).
  Status share(std::size_t bytes, Held* held);
  // The caller's work that uses the block is already ordered before the current stream.
  void leave(Held* held);
  // The same for a call that the current stream captures.
  Status capture(std::size_t bytes, Held* out);

 private:
  // Blocks of graphs that are gone. A graph may outlive the Scratch.
  struct Returned {
    std::mutex mutex;
    std::vector<Held> blocks;
  };
  struct OfGraph {
    std::shared_ptr<Returned> to;
    Held block;
  };
  // cudaStreamGetId fails while a stream is being captured. Its handle is unique until the capture ends, except for
  // cudaStreamPerThread, hence the thread.
  using CapturedOn = std::tuple<unsigned long long, cudaStream_t, std::thread::id>;  // capture id, stream, thread
  static void graph_is_gone(void* of_graph);
  void free_returned();
  Held take_returned(std::size_t bytes);
  void leave_locked(Held* held);

  Memory& memory_;
  const std::size_t zeros_;
  std::mutex mutex_;
  std::map<unsigned long long, std::weak_ptr<Block>> shared_;  // by stream id
  std::map<CapturedOn, std::weak_ptr<Block>> captured_;
  const std::shared_ptr<Returned> returned_ = std::make_shared<Returned>();
};

}  // namespace kv4::cuda
