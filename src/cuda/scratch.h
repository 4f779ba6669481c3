// Scratch of attention. The kernels of a call write what those behind them read, and count who has arrived, so that
// scratch may be shared only by calls that the device runs one after another:
//
//   eager calls      of one stream share a block. cudaStreamGetId tells streams apart, which handles do not:
//   cudaStreamPerThread is
//                    one handle for a stream of every thread, and a destroyed stream's handle is given out again. The
//                    block belongs to the caches that call on that stream and goes with the last of them.
//   captured calls   of one stream within one capture share a block. It belongs to the graph, whatever stream replays
//   it beside
//                    whatever else, and goes once the graph and what was instantiated from it are destroyed and have
//                    run.
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
    cudaEvent_t left = nullptr;  // behind all that those who left had queued
    std::mutex queueing;         // threads may share a stream: a call's kernels are queued with no other's between them
  };
  using Held = std::shared_ptr<Block>;

  // The first `zeros` bytes of a block are 0 to begin with; calls leave them so.
  Scratch(Memory& memory, std::size_t zeros) : memory_(memory), zeros_(zeros) {}
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` for a call on the current stream, which is not being captured. *held is left where it is of
  // another stream or too small.
  Status share(std::size_t bytes, Held* held);
  // What the caller has queued that uses it is ordered before the current stream.
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
  // A stream that is being captured does not tell its number; until the capture ends its handle is nobody else's, but
  // for cudaStreamPerThread.
  using CapturedOn = std::tuple<unsigned long long, cudaStream_t, std::thread::id>;  // the capture's number first
  static void graph_is_gone(void* of_graph);
  void free_returned();
  Held take_returned(std::size_t bytes);
  void leave_locked(Held* held);

  Memory& memory_;
  const std::size_t zeros_;
  std::mutex mutex_;
  std::map<unsigned long long, std::weak_ptr<Block>> shared_;  // by stream
  std::map<CapturedOn, std::weak_ptr<Block>> captured_;
  const std::shared_ptr<Returned> returned_ = std::make_shared<Returned>();
};

}  // namespace kv4::cuda
