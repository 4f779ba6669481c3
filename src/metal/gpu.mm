// gpu.h implemented with Apple's Metal. Untested: no Apple machine was at hand, and Apple's compilers have not seen
// this file. Everything that needs no device is in backend.cpp and tables.cpp, which run in the emulator.
#import <Metal/Metal.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "metal/arguments.h"
#include "metal/gpu.h"

namespace kv4::apple {
namespace {

// All kernels as one text, written by cmake/Metal.cmake.
constexpr const char* kKernels =
#include "kv4_metal_kernels.inl"
    ;
constexpr NSUInteger kThreadgroupBytes = 32768;
constexpr int kCores = 16;  // an assumption: Metal has no query for it

std::string text_of(NSError* error) { return error == nil ? "no reason given" : error.localizedDescription.UTF8String; }

class MetalGpu final : public Gpu {
 public:
  MetalGpu(id<MTLDevice> device, id<MTLCommandQueue> queue) : device_(device), queue_(queue) {}

  void* alloc(std::size_t bytes) override {
    id<MTLBuffer> buffer = [device_ newBufferWithLength:bytes options:MTLResourceStorageModeShared];
    if (buffer == nil) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    buffers_[static_cast<const std::byte*>(buffer.contents)] = buffer;
    return buffer.contents;
  }
  void free(void* p) override {
    if (p == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    buffers_.erase(static_cast<const std::byte*>(p));
  }
  bool holds(const void* p) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    NSUInteger offset = 0;
    return find(p, &offset) != nil;
  }
  std::uint64_t address(const void* p) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    NSUInteger offset = 0;
    return find(p, &offset).gpuAddress + offset;
  }
  int cores() const override { return kCores; }

  Status run(std::span<const Launch> launches) override {
    @autoreleasepool {
      const std::lock_guard<std::mutex> lock(mutex_);
      id<MTLCommandBuffer> commands = [queue_ commandBuffer];
      id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];  // serial: one launch after another
      std::vector<id<MTLResource>> all;
      for (const auto& [memory, buffer] : buffers_) all.push_back(buffer);
      // Pages and rows are reached by their distance from a buffer that is bound.
      [encoder useResources:all.data() count:all.size() usage:MTLResourceUsageRead | MTLResourceUsageWrite];
      Status status;
      for (const Launch& launch : launches) {
        id<MTLComputePipelineState> pipeline = nil;
        if (status = pipeline_of(launch, &pipeline); !status.ok()) break;
        [encoder setComputePipelineState:pipeline];
        for (std::size_t i = 0; i < launch.buffers.size(); ++i) {
          NSUInteger offset = 0;
          id<MTLBuffer> buffer = find(launch.buffers[i], &offset);
          [encoder setBuffer:buffer offset:offset atIndex:i];
        }
        [encoder dispatchThreads:MTLSizeMake(launch.threads[0], launch.threads[1], launch.threads[2])
            threadsPerThreadgroup:MTLSizeMake(launch.group, 1, 1)];
      }
      [encoder endEncoding];
      if (!status.ok()) return status;  // never committed
      [commands commit];
      [commands waitUntilCompleted];
      if (commands.status == MTLCommandBufferStatusError)
        return error(StatusCode::failed_precondition, "device", "a launch that completes", text_of(commands.error));
      return {};
    }
  }

 private:
  id<MTLBuffer> find(const void* p, NSUInteger* offset) const {
    const auto* byte = static_cast<const std::byte*>(p);
    auto it = buffers_.upper_bound(byte);
    if (it == buffers_.begin()) return nil;
    --it;
    *offset = static_cast<NSUInteger>(byte - it->first);
    return *offset < it->second.length ? it->second : nil;
  }

  Status pipeline_of(const Launch& launch, id<MTLComputePipelineState>* out) {
    const auto key = std::pair{launch.dim, launch.kernel};
    if (const auto it = pipelines_.find(key); it != pipelines_.end()) {
      *out = it->second;
      return {};
    }
    NSError* failed = nil;
    id<MTLLibrary> library = libraries_[launch.dim];
    if (library == nil) {
      MTLCompileOptions* options = [MTLCompileOptions new];
      options.languageVersion = MTLLanguageVersion3_1;
      options.fastMathEnabled = NO;  // sealing needs arithmetic as written
      NSString* text = [NSString stringWithUTF8String:library_text(kKernels, launch.dim).c_str()];
      library = [device_ newLibraryWithSource:text options:options error:&failed];
      if (library == nil)
        return error(StatusCode::unsupported, "device", "a compiler that takes the kernels", text_of(failed));
      libraries_[launch.dim] = library;
    }
    id<MTLFunction> function = [library newFunctionWithName:[NSString stringWithUTF8String:launch.kernel.c_str()]];
    id<MTLComputePipelineState> pipeline =
        function == nil ? nil : [device_ newComputePipelineStateWithFunction:function error:&failed];
    if (pipeline == nil)
      return error(StatusCode::unsupported, "device", "one that runs " + launch.kernel, text_of(failed));
    if (pipeline.maxTotalThreadsPerThreadgroup < launch.group)
      return error(StatusCode::unsupported, "device",
                   std::to_string(launch.group) + " threads per threadgroup for " + launch.kernel,
                   std::to_string(pipeline.maxTotalThreadsPerThreadgroup));
    if (const NSUInteger most = std::min(device_.maxThreadgroupMemoryLength, kThreadgroupBytes);
        pipeline.staticThreadgroupMemoryLength > most)
      return error(StatusCode::unsupported, "device",
                   "at most " + std::to_string(most) + " bytes of threadgroup memory for " + launch.kernel,
                   std::to_string(pipeline.staticThreadgroupMemoryLength));
    *out = pipelines_[key] = pipeline;
    return {};
  }

  id<MTLDevice> device_;
  id<MTLCommandQueue> queue_;
  mutable std::mutex mutex_;
  std::map<const std::byte*, id<MTLBuffer>> buffers_;
  std::map<int, id<MTLLibrary>> libraries_;
  std::map<std::pair<int, std::string>, id<MTLComputePipelineState>> pipelines_;
};

struct Found {
  std::unique_ptr<Backend> backend;
  std::string reason;
};

const Found& found() {
  // Never destroyed: caches of other statics may outlive it.
  static const Found* const only = [] {
    auto* f = new Found;
    if (@available(macOS 14.0, *)) {
      id<MTLDevice> device = MTLCreateSystemDefaultDevice();
      id<MTLCommandQueue> queue = [device newCommandQueue];
      if (queue == nil) f->reason = error(StatusCode::unsupported, "device", "a Metal device", "none").message();
      else if (![device supportsFamily:MTLGPUFamilyApple7] || !device.hasUnifiedMemory)
        f->reason =
            error(StatusCode::unsupported, "device", "an Apple GPU of M1 or later", device.name.UTF8String).message();
      else f->backend = make_backend(std::make_unique<MetalGpu>(device, queue));
    } else {
      f->reason = error(StatusCode::unsupported, "device", "macOS 14.0 or newer (Metal 3.1)", "an older one").message();
    }
    return f;
  }();
  return *only;
}

}  // namespace

Backend* backend(int device) { return device == 0 ? found().backend.get() : nullptr; }
std::string why_not() { return found().reason; }

}  // namespace kv4::apple
