// A stand-in for an Apple GPU: kernels run in the emulator, each .metal file a shared library of it (emulator/runtime/abi.h).
// Memory of a call, its launches, and what the emulator had to say.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/runtime/abi.h"
#include "metal/arguments.h"

namespace kv4::tests {

enum class Build { fast, check };  // check: races, bounds, uninitialised reads, alignment
inline const char* name_of(Build b) { return b == Build::check ? "check" : "fast"; }

// One .metal file.
class Module {
 public:
  static Module& get(const std::string& name, Build build) {
    static std::map<std::string, std::unique_ptr<Module>> loaded;
    std::unique_ptr<Module>& m = loaded[name + name_of(build)];
    if (m == nullptr) m.reset(new Module(std::string(KV4_METAL_MODULES) + "/" + name + "." + name_of(build) + ".so"));
    return *m;
  }

  void* alloc(std::size_t bytes, const char* name, std::uint32_t kind) const { return alloc_(bytes, name, kind, 0); }
  void free(void* p) const { free_(p); }

  // threads: of the grid. A report of the emulator fails the test.
  EmuStats run(const std::string& kernel, EmuSize threads, EmuSize group, const std::vector<void*>& buffers, std::uint64_t seed) const {
    EmuLaunch launch = {};
    launch.grid = threads;
    launch.group = group;
    launch.seed = seed;
    EmuStats stats = {};
    clear_();
    EXPECT_EQ(run_(kernel.c_str(), &launch, buffers.data(), static_cast<std::uint32_t>(buffers.size()), &stats), EMU_RAN) << kernel;
    EXPECT_EQ(report_count_(), 0u) << kernel << ": " << reports_();
    return stats;
  }

 private:
  explicit Module(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      ADD_FAILURE() << dlerror();
      std::abort();
    }
    const auto find = [library](const char* name, auto* to) {
      *reinterpret_cast<void**>(to) = dlsym(library, name);
      EXPECT_NE(*reinterpret_cast<void**>(to), nullptr) << name;
    };
    find("emu_alloc", &alloc_);
    find("emu_free", &free_);
    find("emu_run", &run_);
    find("emu_reports", &reports_);
    find("emu_report_count", &report_count_);
    find("emu_clear", &clear_);
  }

  decltype(&emu_alloc) alloc_ = nullptr;
  decltype(&emu_free) free_ = nullptr;
  decltype(&emu_run) run_ = nullptr;
  decltype(&emu_reports) reports_ = nullptr;
  decltype(&emu_report_count) report_count_ = nullptr;
  decltype(&emu_clear) clear_ = nullptr;
};

// A buffer that a kernel of `module` may touch.
class Buffer {
 public:
  Buffer(const Module& module, const char* name, const void* from, std::size_t bytes, std::uint32_t kind = EMU_INPUT)
      : module_(&module), bytes_(bytes), data_(module.alloc(std::max<std::size_t>(bytes, 16), name, kind)) {
    if (from != nullptr && bytes > 0) std::memcpy(data_, from, bytes);
  }
  template <class T>
  Buffer(const Module& module, const char* name, const std::vector<T>& from, std::uint32_t kind = EMU_INPUT)
      : Buffer(module, name, from.data(), from.size() * sizeof(T), kind) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { module_->free(data_); }

  void* data() const { return data_; }
  template <class T = std::uint8_t>
  std::vector<T> read() const {
    std::vector<T> out(bytes_ / sizeof(T));
    std::memcpy(out.data(), data_, out.size() * sizeof(T));
    return out;
  }

 private:
  const Module* module_;
  std::size_t bytes_;
  void* data_;
};

}  // namespace kv4::tests
