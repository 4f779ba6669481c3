// An emulated Apple GPU: each .metal file is a module of the emulator (emulator/host/module.h). Any report of the
// emulator fails the test.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "emulator/host/module.h"
#include "metal/arguments.h"
#include "metal/tables.h"

namespace kv4::tests {

enum class Build { fast, check };  // check: races, bounds, uninitialised reads, alignment
inline const char* name_of(Build b) { return b == Build::check ? "check" : "fast"; }

// One .metal file.
class Module {
 public:
  static Module& get(const std::string& name, Build build) {
    static std::map<std::string, std::unique_ptr<Module>> loaded;
    const std::string path = std::string(KV4_METAL_MODULES) + "/" + name + "." + name_of(build) + ".so";
    std::unique_ptr<Module>& m = loaded[path];
    if (m == nullptr) m = std::make_unique<Module>(path);
    return *m;
  }
  explicit Module(const std::string& path) : module_(path) {}

  // threads: of the grid.
  EmuStats run(const std::string& kernel, EmuSize threads, EmuSize group, const std::vector<void*>& buffers,
               std::uint64_t seed) const {
    const emu::Run run = module_.run(kernel, {threads, group, seed, 0, {}}, buffers);
    EXPECT_TRUE(run.clean()) << kernel << ": result " << run.result << "; " << run.reports;
    return run.stats;
  }

 private:
  friend class Buffer;
  emu::Module module_;
};

// A buffer that kernels of `module` may touch; at least 16 bytes.
class Buffer {
 public:
  Buffer(const Module& module, const char* name, const void* from, std::size_t bytes, EmuBuffer kind = EMU_INPUT)
      : bytes_(bytes), memory_(module.module_.buffer<std::uint8_t>(std::max<std::size_t>(bytes, 16), name, kind)) {
    if (from != nullptr && bytes > 0) std::memcpy(memory_.data(), from, bytes);
  }
  template <class T>
  Buffer(const Module& module, const char* name, const std::vector<T>& from, EmuBuffer kind = EMU_INPUT)
      : Buffer(module, name, from.data(), from.size() * sizeof(T), kind) {}

  void* data() const { return memory_.data(); }
  template <class T = std::uint8_t>
  std::vector<T> read() const {
    std::vector<T> out(bytes_ / sizeof(T));
    std::memcpy(out.data(), memory_.data(), out.size() * sizeof(T));
    return out;
  }

 private:
  std::size_t bytes_;
  emu::Buffer<std::uint8_t> memory_;
};

// A page in the Metal kernels' layout.
inline PageSpec on_metal(PageSpec spec) {
  spec.layout = apple::page_layout(spec);
  return spec;
}

}  // namespace kv4::tests
