// Checks every access of a kernel to device and threadgroup memory: bounds, alignment, races, uninitialised bytes. Two
// accesses to one byte, one of them a write, race unless both are by the same thread, or a threadgroup_barrier that
// orders this memory lies between them, or they are within one SIMD-group and a simdgroup_barrier does; across
// threadgroups of a launch nothing orders them. Atomic accesses do not race with one another.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "runtime.h"
#include "shadow.h"

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
}

namespace emu {
namespace {

EmuStats* stats;
Shadow* group_shadow;

// "file.metal:12" of a code address, by addr2line where it is installed. addr2line lists
// the innermost frame first; the answer is the first one in a kernel's source rather than in the stand-in library.
std::string source_line(void* pc) {
  static std::map<void*, std::string> known;
  const auto found = known.find(pc);
  if (found != known.end()) return found->second;
  std::string place = "?";
  Dl_info info;
  if (dladdr(pc, &info) && info.dli_fname) {
    char command[1200];
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                  static_cast<size_t>(static_cast<char*>(pc) - 1 - static_cast<char*>(info.dli_fbase)));
    if (FILE* pipe = popen(command, "r")) {
      char line[1000];
      bool found_kernel = false;
      while (std::fgets(line, sizeof line, pipe)) {
        line[std::strcspn(line, "\n")] = 0;
        if (char* note = std::strstr(line, " (discriminator")) *note = 0;
        const char* base = std::strrchr(line, '/');
        if (!found_kernel) place = base ? base + 1 : line;
        found_kernel = found_kernel || std::strstr(line, "/shim/") == nullptr;
      }
      pclose(pipe);
    }
  }
  return known[pc] = place;
}

struct Place {
  const char* space;
  const char* name;
  size_t offset;
  Space kind;
};

std::string thread_name(uint16_t thread) {
  if (thread == kSeveral) return "several threads";
  if (thread == kAtomic) return "an atomic";
  return "thread " + std::to_string(thread);
}

// Whether no barrier orders an earlier access by `other` at `stamp` before one by `me` now.
bool unordered(Space space, uint32_t stamp, uint32_t simd_stamp, uint16_t other, uint16_t me, uint32_t simdgroup,
               bool* other_group) {
  *other_group = false;
  if (stamp == 0 || stamp < clock_.launch) return false;
  if (stamp < clock_.group) return *other_group = space == kDevice;
  if (stamp != clock_.barrier[space] || other == me) return false;
  if (other != kSeveral && other != kAtomic && other / kLanes == simdgroup)
    return simd_stamp == clock_.simd_barrier[space][simdgroup];
  return true;
}

void check_byte(Shadow& s, Access access, const Place& at, void* pc) {
  const Thread& t = self();
  const bool write = access == kWrite || access == kAtomicWrite;
  const bool atomic = access == kAtomicRead || access == kAtomicWrite;
  const uint16_t me = atomic ? kAtomic : static_cast<uint16_t>(t.index);
  const uint32_t stamp = clock_.barrier[at.kind], simd_stamp = clock_.simd_barrier[at.kind][t.simdgroup];
  bool other_group;
  if (unordered(at.kind, s.written, s.written_simd, s.writer, me, t.simdgroup, &other_group))
    if (!(atomic && s.writer == kAtomic))
      report("race", "%s %s[byte %zu]: thread %u %s what %s wrote, %s (%s)", at.space, at.name, at.offset, t.index,
             write ? "writes" : "reads", thread_name(s.writer).c_str(),
             other_group ? "in another threadgroup" : "no barrier between", source_line(pc).c_str());
  if (write && unordered(at.kind, s.read, s.read_simd, s.reader, me, t.simdgroup, &other_group))
    if (!(atomic && s.reader == kAtomic))
      report("race", "%s %s[byte %zu]: thread %u writes what %s read, %s (%s)", at.space, at.name, at.offset, t.index,
             thread_name(s.reader).c_str(), other_group ? "in another threadgroup" : "no barrier between",
             source_line(pc).c_str());
  if (write) {
    s.written = stamp;
    s.written_simd = simd_stamp;
    s.writer = me;
    return;
  }
  if (s.read == stamp && s.reader != me)
    s.reader = s.reader != kSeveral && s.reader != kAtomic && s.reader / kLanes == t.simdgroup ? me : kSeveral;
  else s.reader = me;
  s.read = stamp;
  s.read_simd = simd_stamp;
}

void group_access(uintptr_t address, unsigned bytes, Access access, bool aligned, void* pc) {
  const bool write = access == kWrite || access == kAtomicWrite;
  (write ? stats->group_written : stats->group_read) += bytes;
  const Range* array = find_group_range(address, bytes);
  if (!array) {
    report("out-of-bounds", "%s of %u bytes of threadgroup memory outside every array by thread %u (%s)",
           write ? "write" : "read", bytes, self().index, source_line(pc).c_str());
    stop_launch();
  }
  Place at{"threadgroup", array->name, address - array->begin, kGroup};
  if (aligned && address % bytes)
    report("misaligned", "%u bytes of %s at byte %zu (%s)", bytes, at.name, at.offset, source_line(pc).c_str());
  for (unsigned i = 0; i < bytes; ++i, ++at.offset) {
    Shadow& s = group_shadow[group_memory_offset(address + i)];
    if (!write && s.written < clock_.group) {
      report("uninitialised", "threadgroup %s[byte %zu] read by thread %u before any write (%s)", at.name, at.offset,
             self().index, source_line(pc).c_str());
      s.written = clock_.group;  // reported once
    }
    check_byte(s, access, at, pc);
  }
}

void device_access(Buffer& b, uintptr_t address, unsigned bytes, Access access, bool aligned, void* pc) {
  const bool write = access == kWrite || access == kAtomicWrite;
  (write ? stats->device_written : stats->device_read) += bytes;
  Place at{"device", b.name, address - b.begin, kDevice};
  if (aligned && address % bytes)
    report("misaligned", "%u bytes of %s at byte %zu (%s)", bytes, b.name, at.offset, source_line(pc).c_str());
  if (write && b.kind == EMU_INPUT) {
    report("read-only", "%s written at byte %zu by thread %u (%s)", b.name, at.offset, self().index,
           source_line(pc).c_str());
    return;
  }
  if (b.seen) {
    for (unsigned i = 0; i < bytes; ++i) {
      if (b.seen[at.offset + i] < clock_.group) ++stats->device_read_unique;
      b.seen[at.offset + i] = clock_.group;
    }
    return;
  }
  for (unsigned i = 0; i < bytes; ++i, ++at.offset) {
    Shadow& s = b.shadow[at.offset];
    if (!write && b.kind == EMU_OUTPUT && s.written == 0) {
      report("uninitialised", "device %s[byte %zu] read by thread %u before any write (%s)", b.name, at.offset,
             self().index, source_line(pc).c_str());
      s.written = 1;
    }
    if (write && s.written < clock_.group) ++stats->device_written_unique;
    if (!write && s.written < clock_.group && s.read < clock_.group) ++stats->device_read_unique;
    check_byte(s, access, at, pc);
  }
}

}  // namespace

bool checking = false;

void checker_start(EmuStats* to) {
  stats = to;
  if (!group_shadow) group_shadow = static_cast<Shadow*>(std::calloc(group_memory_bytes(), sizeof(Shadow)));
}

void memory_access(uintptr_t address, unsigned bytes, Access access, bool aligned, void* pc) {
  if (!running() || on_a_stack(address)) return;
  if (in_group_memory(address)) return group_access(address, bytes, access, aligned, pc);
  if (Buffer* b = find_buffer(address, bytes)) return device_access(*b, address, bytes, access, aligned, pc);
  // Constants of the module itself.
  if (address >= reinterpret_cast<uintptr_t>(&__ehdr_start) && address < reinterpret_cast<uintptr_t>(&_end)) return;
  const char* what = access == kWrite || access == kAtomicWrite ? "write" : "read";
  if (const Buffer* b = nearest_buffer(address))
    report("out-of-bounds", "%s of %u bytes of %s at byte %ld of %zu by thread %u of threadgroup %u,%u,%u (%s)", what,
           bytes, b->name, static_cast<long>(address - b->begin), b->bytes, self().index, self().group.x,
           self().group.y, self().group.z, source_line(pc).c_str());
  else
    report("out-of-bounds", "%s of %u bytes far from every buffer by thread %u (%s)", what, bytes, self().index,
           source_line(pc).c_str());
  stop_launch();
}

void atomic_access(const volatile void* address, unsigned bytes, bool write, Site) {
  if (checking)
    memory_access(reinterpret_cast<uintptr_t>(address), bytes, write ? kAtomicWrite : kAtomicRead, true,
                  __builtin_return_address(0));
}

}  // namespace emu
