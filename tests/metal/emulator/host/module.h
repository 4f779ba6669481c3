// Runs kernels of a compiled module from C++ tests. The module is built by `python -m emulator build`; in CMake,
// kv4_metal_module() does it.
//
//   emu::Module module(path);
//   auto q = module.buffer<float>(heads * dim, "q", EMU_INPUT);
//   std::fill(q.begin(), q.end(), 1.0f);
//   emu::Run run = module.run("attend", {.grid = {256, 4, 1}, .group = {32, 1, 1}}, q, codes, out, int64_t{5});
//   EXPECT_EQ(run.reports, "");
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../runtime/abi.h"

namespace emu {

struct Launch {
  EmuSize grid{1, 1, 1};   // threads, not threadgroups
  EmuSize group{1, 1, 1};  // threads per threadgroup
  std::uint64_t seed = 0;
  std::uint32_t flags = 0;
  std::vector<std::uint32_t> group_bytes{};  // of each [[threadgroup(n)]]
};

struct Run {
  EmuResult result = EMU_RAN;
  EmuStats stats{};
  std::string reports;         // "kind: text" lines
  std::uint64_t findings = 0;  // number of reports before duplicates are dropped
  bool clean() const { return result == EMU_RAN && findings == 0; }
};

class Module;

// Device memory, freed with the object. The module has to outlive it.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer();
  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  operator std::span<T>() const { return {data_, size_}; }

 private:
  friend class Module;
  void swap(Buffer& other) {
    std::swap(module_, other.module_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  const Module* module_ = nullptr;
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

class Module {
 public:
  explicit Module(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) throw std::runtime_error(std::string("module: ") + dlerror());
    get(alloc_, "emu_alloc"), get(free_, "emu_free"), get(run_, "emu_run"), get(reports_, "emu_reports");
    get(count_, "emu_report_count"), get(clear_, "emu_clear"), get(kernels_, "emu_kernels");
    get(constant_, "emu_set_constant");
  }
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  ~Module() { dlclose(handle_); }

  // `count` values, zero unless kind is EMU_OUTPUT; they start `offset` bytes past a multiple of 256.
  template <class T>
  Buffer<T> buffer(std::size_t count, const char* name, EmuBuffer kind = EMU_INOUT, std::uint32_t offset = 0) const {
    Buffer<T> b;
    b.module_ = this;
    b.size_ = count;
    b.data_ = static_cast<T*>(alloc_(count ? count * sizeof(T) : 1, name, kind, offset));
    if (!b.data_) throw std::bad_alloc();
    if (kind != EMU_OUTPUT) std::memset(static_cast<void*>(b.data_), 0, count * sizeof(T));
    return b;
  }
  template <class T>
  Buffer<T> copy(std::span<const T> from, const char* name, EmuBuffer kind = EMU_INPUT,
                 std::uint32_t offset = 0) const {
    Buffer<T> b = buffer<T>(from.size(), name, kind, offset);
    if (!from.empty()) std::memcpy(static_cast<void*>(b.data()), from.data(), from.size_bytes());
    return b;
  }

  // Arguments in the order of [[buffer(n)]]: Buffers; scalars and plain structs, which the kernel takes by
  // `constant T&`; nullptr for a buffer that it does not access.
  template <class... A>
  Run run(const std::string& kernel, const Launch& launch, const A&... arguments) const {
    std::vector<Buffer<unsigned char>> scalars;
    const std::vector<void*> pointers{address(arguments, scalars)...};
    return run(kernel, launch, pointers);
  }
  Run run(const std::string& kernel, const Launch& launch, const std::vector<void*>& arguments) const {
    EmuLaunch l{launch.grid, launch.group, launch.seed, launch.flags, {}};
    for (std::size_t i = 0; i < launch.group_bytes.size() && i < 8; ++i) l.group_bytes[i] = launch.group_bytes[i];
    Run r;
    clear_();
    r.result = static_cast<EmuResult>(
        run_(kernel.c_str(), &l, arguments.data(), static_cast<std::uint32_t>(arguments.size()), &r.stats));
    r.reports = reports_();
    r.findings = count_();
    return r;
  }
  template <class T>
  bool set_constant(const char* name, T value) const {
    return constant_(name, &value, sizeof value) != 0;
  }
  std::string kernels() const { return kernels_(); }  // name, tab, buffers; one a line
  void release(void* memory) const { free_(memory); }

 private:
  template <class F>
  void get(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(handle_, name));
    if (!function) throw std::runtime_error(std::string("module: expected ") + name + "; got none");
  }
  template <class T>
  static void* address(const Buffer<T>& b, std::vector<Buffer<unsigned char>>&) {
    return b.data();
  }
  static void* address(std::nullptr_t, std::vector<Buffer<unsigned char>>&) { return nullptr; }
  template <class T>
  void* address(const T& value, std::vector<Buffer<unsigned char>>& scalars) const {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>);
    scalars.push_back(buffer<unsigned char>(sizeof value, "scalar", EMU_INPUT));
    std::memcpy(scalars.back().data(), &value, sizeof value);
    return scalars.back().data();
  }

  void* handle_;
  decltype(&emu_alloc) alloc_;
  decltype(&emu_free) free_;
  decltype(&emu_run) run_;
  decltype(&emu_reports) reports_;
  decltype(&emu_report_count) count_;
  decltype(&emu_clear) clear_;
  decltype(&emu_kernels) kernels_;
  decltype(&emu_set_constant) constant_;
};

template <class T>
Buffer<T>::~Buffer() {
  if (data_) module_->release(data_);
}

}  // namespace emu
