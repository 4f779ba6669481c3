#include "cpu/memory.h"

#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kv4::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

#if defined(__linux__)
std::size_t rounded(std::size_t bytes) { return (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes; }

// Maps one huge page more than needed and gives back what lies outside the aligned part.
void* map_aligned(std::size_t bytes) {
  const std::size_t size = rounded(bytes), mapped = size + kHugePageBytes;
  if (mapped < bytes) return nullptr;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* first = static_cast<std::byte*>(base);
  const std::size_t before = (kHugePageBytes - reinterpret_cast<std::uintptr_t>(first) % kHugePageBytes) %
                             kHugePageBytes;
  if (before > 0) munmap(first, before);
  munmap(first + before + size, kHugePageBytes - before);
  // A hint: its failure changes speed only. The last, partly used huge page is left out, so that the block takes no
  // more memory than was asked for.
  madvise(first + before, bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
  return first + before;
}
#endif

}  // namespace

void* alloc_pages(std::size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHugePageBytes) return map_aligned(bytes);
#endif
  return ::operator new(bytes, kAlignment, std::nothrow);
}

void free_pages(void* p, std::size_t bytes) {
  if (p == nullptr) return;
#if defined(__linux__)
  if (bytes >= kHugePageBytes) {
    munmap(p, rounded(bytes));
    return;
  }
#else
  static_cast<void>(bytes);
#endif
  ::operator delete(p, kAlignment);
}

}  // namespace kv4::cpu
