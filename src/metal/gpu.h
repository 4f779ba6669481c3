// The interface to an Apple GPU that the Metal backend needs: shared memory and launches. Implemented by gpu.mm with
// Metal and, in tests, by the emulator.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"

namespace kv4::apple {

struct Launch {
  std::string kernel;
  std::vector<const void*> buffers;  // in the order of the kernel's declaration; any byte of memory from alloc
  std::array<std::uint32_t, 3> threads{1, 1, 1};  // of the grid
  std::uint32_t group = 1;                        // threads of a threadgroup, along the first axis
  int dim = 0;                                    // head dim whose library has the kernel
};

class Gpu {
 public:
  virtual ~Gpu() = default;
  // Memory that the CPU and the GPU share, 64-byte aligned for both; null when there is none left.
  virtual void* alloc(std::size_t bytes) = 0;
  virtual void free(void* p) = 0;
  // Whether a byte belongs to memory from alloc.
  virtual bool holds(const void* p) const = 0;
  // The GPU address of a byte of memory from alloc. A kernel may reach any such memory by its distance from a buffer.
  virtual std::uint64_t address(const void* p) const = 0;
  virtual int cores() const = 0;
  // Runs the launches in order and waits for them. Errors: unsupported where the device cannot run
  // a kernel, failed_precondition with the device's reason where it failed.
  virtual Status run(std::span<const Launch> launches) = 0;
};

std::unique_ptr<Backend> make_backend(std::unique_ptr<Gpu> gpu);

// The part of the kernels' source that one head dim needs.
std::string library_text(std::string_view kernels, int dim);

// This machine's device; null, with the reason, where no device can run the kernels. Built on macOS only.
Backend* backend(int device = 0);
std::string why_not();

}  // namespace kv4::apple
