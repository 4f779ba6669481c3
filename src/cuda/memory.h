// Memory of one device: a stream-ordered pool, and asynchronous uploads of small and large tables.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/backend.h"

namespace kv4::cuda {

Status failed(const char* what, cudaError_t e);

#define KV4_RETURN_IF_CUDA(what, expr)                                                                  \
  do {                                                                                                  \
    if (const cudaError_t kv4_cuda_ = (expr); kv4_cuda_ != cudaSuccess) return failed(what, kv4_cuda_); \
  } while (false)

// The stream of this thread's calls (set_stream).
cudaStream_t current_stream();
bool is_capturing(cudaStream_t stream);

// For errors that cannot be returned, as in a destructor: clears CUDA's last error, so that an unrelated later check
// does not pick it up. A device that has failed reports that again at the next call.
inline void forget(cudaError_t e) {
  if (e != cudaSuccess) cudaGetLastError();
}

// Makes a device current for a scope and restores the calling thread's own.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) forget(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }  // cudaSuccess: the device is current

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// The rest of a function that returns a Status, on `device`.
#define KV4_ON_DEVICE(device)      \
  const DeviceGuard guard(device); \
  KV4_RETURN_IF_CUDA("device", guard.error())

// While it lives, this thread may take memory and ask events although some thread captures a stream, whose capture
// neither becomes part of nor ends. For streams that are not captured.
class AsideOfCaptures {
 public:
  AsideOfCaptures() : error_(cudaThreadExchangeStreamCaptureMode(&mode_)) {}
  ~AsideOfCaptures() {
    if (error_ == cudaSuccess) forget(cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  AsideOfCaptures(const AsideOfCaptures&) = delete;
  AsideOfCaptures& operator=(const AsideOfCaptures&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  const cudaError_t error_;
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
  ~DeviceBuffer() { forget(cudaFree(data_)); }
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
  std::size_t next_ = 0;
};

// Notes of NaN and infinity, in host memory that kernels write. One is given out again once what was queued on the
// current stream when it was freed has run: it may have been about to write.
class Notes {
 public:
  ~Notes();
  cudaError_t alloc(LateNote** out);
  void free(LateNote* note);

 private:
  struct Free {
    LateNote* note;
    cudaEvent_t until;  // null: never used
  };
  std::mutex mutex_;
  std::vector<void*> blocks_;
  std::vector<Free> free_;
  std::vector<cudaEvent_t> events_;  // of notes that are in use
};

class Memory {
 public:
  explicit Memory(int device) : device_(device) {}
  ~Memory();
  // In the order of the current stream; or of a stream of its own, aside of captures, which has got it by the time this
  // returns, the first `zeros` bytes 0. Errors: out_of_memory naming `what`; what the device says.
  Status alloc(const char* what, std::size_t bytes, void** out) { return alloc_on(current_stream(), what, bytes, out); }
  Status alloc_aside(const char* what, std::size_t bytes, std::size_t zeros, void** out);
  void free(void* p);  // in the order of the current stream
  // `from` may be reused as soon as this returns; nothing waits for the device but where 64 MiB are on their way.
  Status upload(void* to, const void* from, std::size_t bytes);
  Status in_use(std::size_t* bytes);  // taken and not yet given back, in the order of all streams
  // Memory is taken so many times more, then there is none left; below 0, as at first: as much as the device has.
  void limit(long long times) { left_ = times; }
  Notes notes;

 private:
  Status alloc_on(cudaStream_t stream, const char* what, std::size_t bytes, void** out);
  Status pool(cudaMemPool_t* out);

  const int device_;
  std::atomic<long long> left_ = -1;
  std::mutex mutex_;  // of the two below, made once
  cudaMemPool_t pool_ = nullptr;
  cudaStream_t aside_ = nullptr;
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
  Status make(const char* what, std::size_t bytes, std::size_t zeros);  // of which the first are 0
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Memory& memory_;
  void* data_ = nullptr;
};

}  // namespace kv4::cuda
