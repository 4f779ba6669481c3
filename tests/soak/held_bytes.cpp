#include "held_bytes.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

std::atomic<long> g_held{0};

// The size lies before the memory, as far before it as the alignment asks for.
void* take(std::size_t bytes, std::size_t alignment) {
  const std::size_t before = alignment < alignof(std::max_align_t) ? alignof(std::max_align_t) : alignment;
  const std::size_t all = (bytes + before + before - 1) / before * before;
  auto* const p = static_cast<std::byte*>(std::aligned_alloc(before, all));
  if (p == nullptr) return nullptr;
  *reinterpret_cast<std::size_t*>(p + before - sizeof(std::size_t)) = bytes;
  g_held.fetch_add(static_cast<long>(bytes), std::memory_order_relaxed);
  return p + before;
}
void give_back(void* p, std::size_t alignment) {
  if (p == nullptr) return;
  const std::size_t before = alignment < alignof(std::max_align_t) ? alignof(std::max_align_t) : alignment;
  auto* const at = static_cast<std::byte*>(p);
  const std::size_t bytes = *reinterpret_cast<const std::size_t*>(at - sizeof(std::size_t));
  g_held.fetch_sub(static_cast<long>(bytes), std::memory_order_relaxed);
  std::free(at - before);
}
void* or_throw(void* p) {
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
std::size_t of(std::align_val_t a) { return static_cast<std::size_t>(a); }

}  // namespace

long held_bytes() { return g_held.load(); }

void* operator new(std::size_t n) { return or_throw(take(n, 0)); }
void* operator new[](std::size_t n) { return or_throw(take(n, 0)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return take(n, 0); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return take(n, 0); }
void* operator new(std::size_t n, std::align_val_t a) { return or_throw(take(n, of(a))); }
void* operator new[](std::size_t n, std::align_val_t a) { return or_throw(take(n, of(a))); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept { return take(n, of(a)); }
void* operator new[](std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept { return take(n, of(a)); }
void operator delete(void* p) noexcept { give_back(p, 0); }
void operator delete[](void* p) noexcept { give_back(p, 0); }
void operator delete(void* p, std::size_t) noexcept { give_back(p, 0); }
void operator delete[](void* p, std::size_t) noexcept { give_back(p, 0); }
void operator delete(void* p, std::align_val_t a) noexcept { give_back(p, of(a)); }
void operator delete[](void* p, std::align_val_t a) noexcept { give_back(p, of(a)); }
void operator delete(void* p, std::size_t, std::align_val_t a) noexcept { give_back(p, of(a)); }
void operator delete[](void* p, std::size_t, std::align_val_t a) noexcept { give_back(p, of(a)); }
