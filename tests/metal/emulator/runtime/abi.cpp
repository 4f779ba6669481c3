// The C interface: looks kernels up by name and checks the arguments of a launch.
#include "abi.h"

#include <cstring>
#include <string>

#include "runtime.h"

namespace emu {
bool run_launch(const EmuLaunch& launch, void (*body)(void* const*), void* const* arguments, EmuStats* stats);
void record(const char* kernel, const EmuLaunch& launch, void* const* arguments, uint32_t count);

namespace {
Kernel* kernels;
Constant* constants;
}  // namespace

Kernel::Kernel(const char* n, int b, void (*f)(void* const*)) : name(n), buffers(b), body(f), next(kernels) {
  kernels = this;
}
Constant::Constant(const char* n, void* v, size_t b) : name(n), value(v), bytes(b), next(constants) {
  constants = this;
}
}  // namespace emu

int emu_run(const char* name, const EmuLaunch* launch, void* const* arguments, uint32_t count, EmuStats* stats) {
  *stats = EmuStats{};
  const emu::Kernel* kernel = emu::kernels;
  while (kernel && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
  if (!kernel) {
    emu::report("launch", "kernel: expected one of this module; got %s", name);
    return EMU_NO_KERNEL;
  }
  if (count != static_cast<uint32_t>(kernel->buffers)) {
    emu::report("launch", "arguments: expected %d of %s; got %u", kernel->buffers, name, count);
    return EMU_BAD_ARGUMENTS;
  }
  const EmuSize g = launch->group, n = launch->grid;
  const uint64_t threads = static_cast<uint64_t>(g.x) * g.y * g.z;
  if (threads < 1 || threads > EMU_MAX_THREADS || !n.x || !n.y || !n.z) {
    emu::report("launch",
                "threadgroup: expected 1 to %d threads in a grid that is not empty; got %u x %u x %u of %u x %u x %u",
                EMU_MAX_THREADS, g.x, g.y, g.z, n.x, n.y, n.z);
    return EMU_BAD_LAUNCH;
  }
  emu::record(name, *launch, arguments, count);
  return emu::run_launch(*launch, kernel->body, arguments, stats) ? EMU_RAN : EMU_STOPPED;
}

const char* emu_kernels(void) {
  static std::string list;
  list.clear();
  for (const emu::Kernel* k = emu::kernels; k; k = k->next)
    list += std::string(k->name) + "\t" + std::to_string(k->buffers) + "\n";
  return list.c_str();
}

int emu_set_constant(const char* name, const void* value, size_t bytes) {
  for (const emu::Constant* c = emu::constants; c; c = c->next)
    if (std::strcmp(c->name, name) == 0 && c->bytes == bytes) {
      std::memcpy(c->value, value, bytes);
      return 1;
    }
  return 0;
}
