// Allocates threadgroup memory and device buffers, with guard zones around them.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <list>
#include <string>
#include <vector>

#include "runtime.h"
#include "shadow.h"

#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace emu {
namespace {

constexpr size_t kArena = 4 * EMU_GROUP_MEMORY;  // more than the limit: exceeding it is reported, not a crash
constexpr size_t kGap = 256;                     // guard zone between arrays

struct Array : Range {
  const void* key = nullptr;
};
alignas(256) char arena[kArena];
std::vector<Array> arrays;
std::vector<Array> arguments;
size_t top, used;
std::list<Buffer> buffers;
std::list<std::string> names;

Array place(const void* key, size_t bytes, size_t alignment, const char* name) {
  Array a;
  a.key = key;
  size_t at = (top + kGap + alignment - 1) / alignment * alignment;
  used += bytes;
  if (used > EMU_GROUP_MEMORY) {
    report("group-memory", "%zu bytes of threadgroup memory with %s; at most %d", used, name, EMU_GROUP_MEMORY);
    if (at + bytes + kGap > kArena) stop_launch();
  }
  a.begin = reinterpret_cast<uintptr_t>(arena) + at;
  a.bytes = bytes;
  a.name = name;
  top = at + bytes;
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(arena + at, bytes);
#endif
  std::memset(arena + at, 0xff, bytes);
  return a;
}

}  // namespace

void group_memory_start(const EmuLaunch& launch) {
  arrays.clear();
  arguments.clear();
  top = used = 0;
#ifdef EMU_ASAN
  __asan_poison_memory_region(arena, kArena);
#endif
  for (uint32_t bytes : launch.group_bytes)
    arguments.push_back(bytes ? place(nullptr, bytes, 16, "[[threadgroup]] argument") : Array());
}

// All-ones bytes are NaN in every floating-point type: no value of the previous threadgroup can be used.
void group_memory_poison() {
  for (const Array& a : arrays) std::memset(reinterpret_cast<void*>(a.begin), 0xff, a.bytes);
  for (const Array& a : arguments) std::memset(reinterpret_cast<void*>(a.begin), 0xff, a.bytes);
}

uint64_t group_memory_used() { return used; }

bool in_group_memory(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(arena) < kArena; }

size_t group_memory_offset(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(arena); }
size_t group_memory_bytes() { return kArena; }

const Range* find_group_range(uintptr_t address, unsigned bytes) {
  for (const Array& a : arrays)
    if (a.holds(address, bytes)) return &a;
  for (const Array& a : arguments)
    if (a.holds(address, bytes)) return &a;
  return nullptr;
}

void* group_array(const void* key, size_t bytes, size_t alignment, const char* name) {
  for (const Array& a : arrays)
    if (a.key == key && a.bytes == bytes) return reinterpret_cast<void*>(a.begin);
  arrays.push_back(place(key, bytes, alignment < 16 ? 16 : alignment, name));
  return reinterpret_cast<void*>(arrays.back().begin);
}

void* group_argument(int index) {
  const Array& a = arguments[static_cast<size_t>(index)];
  if (!a.bytes) {
    report("launch", "[[threadgroup(%d)]] has no length", index);
    stop_launch();
  }
  return reinterpret_cast<void*>(a.begin);
}

Buffer* find_buffer(uintptr_t address, unsigned bytes) {
  for (Buffer& b : buffers)
    if (b.holds(address, bytes)) return &b;
  return nullptr;
}

Buffer* nearest_buffer(uintptr_t address) {
  for (Buffer& b : buffers) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(b.mapping);
    if (address >= from && address < from + b.mapped) return &b;
  }
  return nullptr;
}

}  // namespace emu

namespace {
void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
}  // namespace

void* emu_alloc(size_t bytes, const char* name, uint32_t kind, uint32_t offset) {
  emu::Buffer b;
  b.bytes = bytes;
  emu::names.push_back(name);
  b.name = emu::names.back().c_str();
  b.kind = kind;
#ifdef EMU_ASAN
  // ASan adds its own redzones; the tail up to its granularity is poisoned too.
  const size_t room = (bytes + offset + 63) / 64 * 64;
  char* memory = static_cast<char*>(std::aligned_alloc(256, (room + 255) / 256 * 256));
  b.mapped = (room + 255) / 256 * 256;
  if (!memory) return nullptr;
  __asan_poison_memory_region(memory + offset + bytes, b.mapped - offset - bytes);
  b.mapping = memory;
  char* data = memory + offset;
#else
  // Guard zones of kGuard bytes lie before and behind the buffer; an access beyond them faults.
  b.mapped = (bytes + offset + 4095) / 4096 * 4096 + 2 * emu::kGuard;
  b.mapping = map(b.mapped);
  if (!b.mapping) return nullptr;
  char* data = static_cast<char*>(b.mapping) + emu::kGuard + offset;
#endif
  if (kind == EMU_OUTPUT) std::memset(data, 0xff, bytes);
  b.begin = reinterpret_cast<uintptr_t>(data);
  if (emu::checking) {
    if (kind == EMU_INPUT) b.seen = static_cast<uint32_t*>(map(bytes * sizeof(uint32_t) + 1));
    else b.shadow = static_cast<emu::Shadow*>(map(bytes * sizeof(emu::Shadow) + 1));
  }
  emu::buffers.push_back(b);
  return data;
}

void emu_free(void* buffer) {
  for (auto b = emu::buffers.begin(); b != emu::buffers.end(); ++b) {
    if (b->begin != reinterpret_cast<uintptr_t>(buffer)) continue;
    if (b->seen) munmap(b->seen, b->bytes * sizeof(uint32_t) + 1);
    if (b->shadow) munmap(b->shadow, b->bytes * sizeof(emu::Shadow) + 1);
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(b->mapping, b->mapped);
    std::free(b->mapping);
#else
    munmap(b->mapping, b->mapped);
#endif
    emu::names.remove_if([&](const std::string& name) { return name.c_str() == b->name; });
    emu::buffers.erase(b);
    return;
  }
}
