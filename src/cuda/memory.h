// Memory of one device: a pool in stream order, scratch that captured graphs may keep using, and ways to bring small and
// large tables over without waiting.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/backend.h"

namespace kv4::cuda {

Status failed(const char* what, cudaError_t e);

#define KV4_RETURN_IF_CUDA(what, expr) \
  do {                                 \
    if (const cudaError_t kv4_cuda_ = (expr); kv4_cuda_ != cudaSuccess) return failed(what, kv4_cuda_); \
  } while (false)

// The stream of this thread's calls (set_stream).
cudaStream_t current_stream();
bool is_capturing(cudaStream_t stream);

// Makes a device current and gives the calling thread its own back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    changed_ = before_ != device;
    if (changed_) cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Plain device memory of a fixed size.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& o) noexcept : data_(o.data_), size_(o.size_) {
    o.data_ = nullptr;
    o.size_ = 0;
  }
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }
  cudaError_t make(std::size_t bytes) {
    const cudaError_t e = cudaMalloc(&data_, bytes);
    if (e == cudaSuccess) size_ = bytes;
    return e;
  }
  void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Scratch of the calls on one device, whose first `zeros` bytes are 0 to begin with: a block for each stream, since its calls
// follow one another, and one for all that is captured, which no eager call uses any more. Who has captured keeps it.
class Scratch {
 public:
  using Block = std::shared_ptr<DeviceBuffer>;
  explicit Scratch(std::size_t zeros) : zeros_(zeros) {}
  // Errors: out_of_memory; failed_precondition where a capture finds no block as large.
  Status reserve(cudaStream_t stream, std::size_t bytes, bool capturing, Block* out);

 private:
  const std::size_t zeros_;
  std::mutex mutex_;
  std::map<cudaStream_t, Block> blocks_;
  Block captured_;
  std::vector<Block> retired_;  // until the next call that is not captured
};

// Host memory that copies to the device read after the call that asked for them has returned.
class Staging {
 public:
  ~Staging();
  cudaError_t upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    void* memory = nullptr;
    std::size_t bytes = 0;
    cudaEvent_t done = nullptr;
  };
  cudaError_t take(std::size_t bytes, Slot** out);

  std::mutex mutex_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::size_t turn_ = 0;
};

// Notes of NaN and infinity, in host memory that kernels write.
class Notes {
 public:
  ~Notes();
  cudaError_t alloc(LateNote** out);
  void free(LateNote* note);

 private:
  std::mutex mutex_;
  std::vector<void*> blocks_;
  std::vector<LateNote*> free_;
};

class Memory {
 public:
  explicit Memory(int device) : device_(device) {}
  ~Memory();
  void* alloc(std::size_t bytes);  // null where there is none
  void free(void* p);
  // `from` may be reused as soon as this returns; nothing waits for the device but where 64 MiB are on their way.
  Status upload(void* to, const void* from, std::size_t bytes);
  Notes notes;

 private:
  cudaMemPool_t pool();

  const int device_;
  std::once_flag once_;
  cudaMemPool_t pool_ = nullptr;
  Staging staging_;
};

// Memory of the pool until the end of the scope; its uses must have been queued on the current stream by then.
class Temporary {
 public:
  explicit Temporary(Memory& memory) : memory_(memory) {}
  ~Temporary() { memory_.free(data_); }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  Status upload(const char* what, const void* from, std::size_t bytes);
  template <class T>
  const T* as() const { return static_cast<const T*>(data_); }

 private:
  Memory& memory_;
  void* data_ = nullptr;
};

}  // namespace kv4::cuda
