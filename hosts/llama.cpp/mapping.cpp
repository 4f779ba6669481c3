#include "mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>

namespace kv4::llama {
namespace {

std::size_t system_page() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

bool Mapping::reserve(std::size_t bytes) {
  reset();
  const std::size_t rounded = (bytes + system_page() - 1) / system_page() * system_page();
  void* p = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
#ifdef MADV_NOHUGEPAGE
  // A huge page would hold memory for cells that nothing has written.
  madvise(p, rounded, MADV_NOHUGEPAGE);
#endif
  data_ = static_cast<std::byte*>(p);
  bytes_ = rounded;
  return true;
}

void Mapping::reset() {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

void Mapping::release(std::byte* p, std::size_t bytes) {
  const std::uintptr_t page = system_page(), at = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (end > begin) madvise(p + (begin - at), end - begin, MADV_DONTNEED);
}

void machine_memory(std::size_t* free, std::size_t* total) {
  *total = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * system_page();
  *free = *total;
#ifdef _SC_AVPHYS_PAGES
  *free = static_cast<std::size_t>(sysconf(_SC_AVPHYS_PAGES)) * system_page();
#endif
  // What the system's file cache would give back counts as free.
  if (std::FILE* file = std::fopen("/proc/meminfo", "r"); file != nullptr) {
    char line[128];
    unsigned long long kibibytes = 0;
    while (std::fgets(line, sizeof line, file) != nullptr)
      if (std::sscanf(line, "MemAvailable: %llu kB", &kibibytes) == 1)
        *free = static_cast<std::size_t>(kibibytes) * 1024;
    std::fclose(file);
  }
}

}  // namespace kv4::llama
