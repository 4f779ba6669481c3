// Records launches to files, which the mutation suite replays on changed kernels (replay.py): with
// KV4_METAL_RECORD=<folder> in the environment, the inputs of each launch as <folder>/<kernel>.<pid>-<n>.launch.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "runtime.h"

namespace emu {
namespace {
constexpr size_t kMostBytes = size_t{4} << 20;  // of one launch: larger ones are not recorded
constexpr int kMost = 64;                       // launches of a kernel
}  // namespace

// File: EmuLaunch; u32 count; per buffer u32 kind, u64 bytes, bytes. Kind ~0: a null pointer. Little-endian.
void record(const char* kernel, const EmuLaunch& launch, void* const* arguments, uint32_t count) {
  static const char* const folder = std::getenv("KV4_METAL_RECORD");
  if (!folder) return;
  static std::map<std::string, int> recorded;
  size_t total = 0;
  for (uint32_t i = 0; i < count; ++i)
    if (const Buffer* b = find_buffer(reinterpret_cast<uintptr_t>(arguments[i]), 1)) total += b->bytes;
  int& n = recorded[kernel];
  if (total > kMostBytes) return;
  // Modules of one process share the names but not the counter: skip numbers that are taken.
  FILE* file = nullptr;
  while (!file && n < kMost) {
    const std::string path = std::string(folder) + "/" + kernel + "." + std::to_string(getpid()) + "-" +
                             std::to_string(n++) + ".launch";
    file = std::fopen(path.c_str(), "wbx");
    if (!file && errno != EEXIST) return;
  }
  if (!file) return;
  std::fwrite(&launch, sizeof launch, 1, file);
  std::fwrite(&count, sizeof count, 1, file);
  for (uint32_t i = 0; i < count; ++i) {
    const Buffer* b = find_buffer(reinterpret_cast<uintptr_t>(arguments[i]), 1);
    const uint32_t kind = b ? b->kind : ~0u;
    const uint64_t bytes = b ? b->bytes : 0;
    std::fwrite(&kind, sizeof kind, 1, file);
    std::fwrite(&bytes, sizeof bytes, 1, file);
    if (b) std::fwrite(reinterpret_cast<const void*>(b->begin), 1, bytes, file);
  }
  std::fclose(file);
}
}  // namespace emu
