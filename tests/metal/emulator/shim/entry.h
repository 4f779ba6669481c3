// Conversions that the launch table uses.
#pragma once

namespace emu {

// A buffer argument, as whatever pointer or reference the kernel declares.
struct Argument {
  void* memory;
  template <class T>
  operator T*() const {
    return static_cast<T*>(memory);
  }
  template <class T>
  operator T&() const {
    return *static_cast<T*>(memory);
  }
};
// A position or size as the declared scalar or vector type: components that the type lacks are dropped.
struct Extent {
  EmuSize size;
  template <class T>
  operator T() const {
    if constexpr (traits<T>::vector) {
      const uint all[3] = {size.x, size.y, size.z};
      T r{};
      for (int i = 0; i < traits<T>::n; ++i) r[i] = static_cast<typename traits<T>::element>(all[i]);
      return r;
    } else {
      return static_cast<T>(size.x);
    }
  }
};

}  // namespace emu

// Functions of the launch table read the host's argument list, which is not kernel memory.
#define EMU_LAUNCHER __attribute__((no_sanitize("thread", "undefined", "address")))
