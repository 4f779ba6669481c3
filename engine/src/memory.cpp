#include "kv4_engine/memory.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>

namespace kv4::engine {

std::uint64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (std::uint64_t kib = 0; file >> key >> kib; std::getline(file, unit))
    if (key == "MemAvailable:") return kib << 10;
  return 0;
}

std::uint64_t resident_memory() {
  std::ifstream file("/proc/self/statm");
  std::uint64_t total = 0, resident = 0;
  if (!(file >> total >> resident)) return 0;
  return resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

Status check_memory(const std::string& what, std::uint64_t bytes) {
  const std::uint64_t free = available_memory();
  if (free == 0 || bytes <= free) return {};
  return error(StatusCode::out_of_memory, what, std::to_string(bytes >> 20) + " MiB of free memory", std::to_string(free >> 20) + " MiB");
}

}  // namespace kv4::engine
