// Runs a kernel: every thread of a threadgroup is a fiber, threadgroups come one after another. A fiber runs until it
// has to wait: at a SIMD operation for its SIMD-group, at a threadgroup_barrier for all. The seed decides which ready
// fiber runs next.
#include <sys/mman.h>
#include <xmmintrin.h>
#include <csetjmp>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime.h"

#ifndef __x86_64__
#error "the emulator switches stacks by x86-64 code; other machines need their own in this file"
#endif

#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer to *save, resumes the context saved as `to`.
extern "C" void emu_switch(void** save, void* to);
asm(".text\n.hidden emu_switch\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

namespace emu {
Clock clock_;
namespace {

constexpr size_t kStack = 64 * 1024;

enum class State : uint8_t { kReady, kWaiting, kDone };
enum class Wait : uint8_t { kNothing, kSimd, kSimdBarrier, kGroupBarrier };
struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::kDone;
  Wait wait = Wait::kNothing;
  Site site{};
  const char* operation = "";
  void* argument = nullptr;
  unsigned flags = 0;
  Thread thread{};
};
struct SimdGroup {
  unsigned size, done, arrived;
  unsigned members[kLanes];
  Collective function;
  void* extra;
};

Fiber fibers[EMU_MAX_THREADS];
SimdGroup simdgroups[kLanes];
unsigned fiber_count, live, at_group_barrier;
int current = -1;
char* stacks;
void* main_stack_pointer;
std::vector<unsigned> ready;
size_t ready_head;
uint64_t random_state;
bool random_order, stopped;
void (*kernel_body)(void* const*);
void* const* kernel_arguments;
EmuStats* stats;
sigjmp_buf crash;
#ifdef EMU_ASAN
const void* main_stack;
size_t main_stack_bytes;
#endif

char* stack_of(int fiber) { return stacks + static_cast<size_t>(fiber) * kStack; }

uint64_t random_bits() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

// The next fiber to run; -1, the launch loop, if none can.
int next_ready() {
  if (ready_head == ready.size()) return -1;
  if (random_order) std::swap(ready[ready_head], ready[ready_head + random_bits() % (ready.size() - ready_head)]);
  const unsigned fiber = ready[ready_head++];
  if (ready_head == ready.size()) ready.clear(), ready_head = 0;
  return static_cast<int>(fiber);
}

// `leaving`: the calling fiber is finished.
void switch_to(int fiber, bool leaving = false) {
  void* unused;
  void** save = leaving ? &unused : current < 0 ? &main_stack_pointer : &fibers[current].stack_pointer;
  current = fiber;
#ifdef EMU_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(leaving ? nullptr : &fake, fiber < 0 ? main_stack : stack_of(fiber),
                                 fiber < 0 ? main_stack_bytes : kStack);
#endif
  emu_switch(save, fiber < 0 ? main_stack_pointer : fibers[fiber].stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void switch_to_next() {
  const int me = current, next = next_ready();
  if (next != me) switch_to(next);
}

void make_ready(unsigned fiber) {
  fibers[fiber].state = State::kReady;
  fibers[fiber].wait = Wait::kNothing;
  ready.push_back(fiber);
}

bool same(const Fiber& a, const Fiber& b) {
  return a.site.line == b.site.line && a.site.column == b.site.column && a.operation == b.operation &&
         a.flags == b.flags;
}

const char* base_name(const char* path) {
  const char* slash = path ? std::strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

bool waits_for_simdgroup(const Fiber& f) { return f.state == State::kWaiting && f.wait != Wait::kGroupBarrier; }

// Runs the operation that a SIMD-group waits for, once every lane that has not returned has arrived.
void release_simdgroup(unsigned index) {
  SimdGroup& g = simdgroups[index];
  if (!g.arrived || g.arrived + g.done < g.size) return;
  void* arguments[kLanes] = {};
  uint32_t active = 0;
  const Fiber* first = nullptr;
  for (unsigned lane = 0; lane < g.size; ++lane) {
    const Fiber& f = fibers[g.members[lane]];
    if (!waits_for_simdgroup(f)) continue;
    if (!first) first = &f;
    if (!same(*first, f)) {
      report("divergence", "SIMD-group %u: lane %u is at %s (%s:%d), lane %u at %s (%s:%d)", index, first->thread.lane,
             first->operation, base_name(first->site.file), first->site.line, lane, f.operation, base_name(f.site.file),
             f.site.line);
      stop_launch();
    }
    arguments[f.thread.lane] = f.argument;
    active |= 1u << f.thread.lane;
  }
  if (g.done)
    report("inactive-lanes", "%s (%s:%d) with %u of %u lanes returned", first->operation, base_name(first->site.file),
           first->site.line, g.done, g.size);
  if (first->wait == Wait::kSimdBarrier) {
    if (first->flags & 1) clock_.simd_barrier[kDevice][index] = ++clock_.now;
    if (first->flags & 2) clock_.simd_barrier[kGroup][index] = ++clock_.now;
  } else {
    g.function(arguments, active, g.extra);
    ++stats->simd_operations;
  }
  g.arrived = 0;
  for (unsigned lane = 0; lane < g.size; ++lane)
    if (waits_for_simdgroup(fibers[g.members[lane]])) make_ready(g.members[lane]);
}

Fiber& wait(Wait what, const char* operation, Site site, void* argument, unsigned flags) {
  Fiber& f = fibers[current];
  f.state = State::kWaiting;
  f.wait = what;
  f.operation = operation;
  f.site = site;
  f.argument = argument;
  f.flags = flags;
  return f;
}

[[noreturn]] void fiber_main() {
#ifdef EMU_ASAN
  const void* from;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
  if (!main_stack) main_stack = from, main_stack_bytes = bytes;
#endif
  kernel_body(kernel_arguments);
  Fiber& f = fibers[current];
  f.state = State::kDone;
  --live;
  ++simdgroups[f.thread.simdgroup].done;
  release_simdgroup(f.thread.simdgroup);
  switch_to(next_ready(), true);
  __builtin_unreachable();
}

void start_fiber(unsigned index, const Thread& thread) {
  Fiber& f = fibers[index];
  f = Fiber();
  f.state = State::kReady;
  f.thread = thread;
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(stack_of(static_cast<int>(index)), kStack);  // frames that never returned
#endif
  // Stacks start staggered: 64 KiB apart, all would share one set of the L1 cache.
  void** sp = reinterpret_cast<void**>(stack_of(static_cast<int>(index)) + kStack - (index * 17 & 63) * 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.stack_pointer = sp;
  SimdGroup& g = simdgroups[thread.simdgroup];
  g.members[g.size++] = index;
  ready.push_back(index);
}

void report_deadlock(EmuSize group) {
  unsigned barrier = 0, simd = 0, done = 0;
  const Fiber *at_barrier = nullptr, *at_simd = nullptr;
  for (unsigned i = 0; i < fiber_count; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == State::kDone) ++done;
    else if (f.wait == Wait::kGroupBarrier) ++barrier, at_barrier = &f;
    else ++simd, at_simd = &f;
  }
  report("deadlock",
         "threadgroup %u,%u,%u: %u threads wait at threadgroup_barrier (line %d), %u at %s (line %d), %u returned",
         group.x, group.y, group.z, barrier, at_barrier ? at_barrier->site.line : 0, simd,
         at_simd ? at_simd->operation : "nothing", at_simd ? at_simd->site.line : 0, done);
}

bool run_group(EmuSize group, EmuSize groups, const EmuLaunch& launch) {
  const EmuSize origin{group.x * launch.group.x, group.y * launch.group.y, group.z * launch.group.z};
  const auto within = [](uint32_t size, uint32_t grid, uint32_t from) {
    return grid - from < size ? grid - from : size;
  };
  const EmuSize size{within(launch.group.x, launch.grid.x, origin.x), within(launch.group.y, launch.grid.y, origin.y),
                     within(launch.group.z, launch.grid.z, origin.z)};
  fiber_count = live = size.x * size.y * size.z;
  const unsigned simd_count = (fiber_count + kLanes - 1) / kLanes;
  clock_.group = ++clock_.now;
  for (int space = 0; space < kSpaces; ++space) {
    clock_.barrier[space] = clock_.group;
    for (unsigned s = 0; s < simd_count; ++s) clock_.simd_barrier[space][s] = clock_.group;
  }
  group_memory_poison();
  ready.clear();
  ready_head = at_group_barrier = 0;
  for (unsigned s = 0; s < simd_count; ++s) simdgroups[s] = SimdGroup{};
  for (unsigned i = 0; i < fiber_count; ++i) {
    Thread t;
    t.group = group;
    t.groups = groups;
    t.group_size = size;
    t.full_group_size = launch.group;
    t.grid = launch.grid;
    t.index = i;
    t.lane = i % kLanes;
    t.simdgroup = i / kLanes;
    t.simdgroups = simd_count;
    t.in_group = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.in_grid = {origin.x + t.in_group.x, origin.y + t.in_group.y, origin.z + t.in_group.z};
    start_fiber(i, t);
  }
  stats->threads += fiber_count;
  ++stats->groups;
  switch_to(next_ready());
  current = -1;
  if (live && !stopped) {
    report_deadlock(group);
    stopped = true;
  }
  return !stopped;
}

void crashed(int signal) {
  report("crash", "%s in thread %u of threadgroup %u,%u,%u",
         signal == SIGFPE ? "integer division by zero" : "invalid address", current < 0 ? 0 : self().index,
         current < 0 ? 0 : self().group.x, current < 0 ? 0 : self().group.y, current < 0 ? 0 : self().group.z);
  siglongjmp(crash, 1);
}

void run_groups(const EmuLaunch& launch) {
  const EmuSize groups{(launch.grid.x + launch.group.x - 1) / launch.group.x,
                       (launch.grid.y + launch.group.y - 1) / launch.group.y,
                       (launch.grid.z + launch.group.z - 1) / launch.group.z};
  const uint64_t count = static_cast<uint64_t>(groups.x) * groups.y * groups.z;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t n = launch.seed & 1 ? count - 1 - i : i;
    const EmuSize group{static_cast<uint32_t>(n % groups.x), static_cast<uint32_t>(n / groups.x % groups.y),
                        static_cast<uint32_t>(n / groups.x / groups.y)};
    if (!run_group(group, groups, launch)) return;
  }
}

}  // namespace

bool running() { return current >= 0; }
bool on_a_stack(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(stacks) < kStack * EMU_MAX_THREADS; }
Thread& self() { return fibers[current].thread; }

void stop_launch() {
  stopped = true;
  switch_to(-1, true);
  __builtin_unreachable();
}

void collective(const char* name, Site site, void* argument, Collective function, void* extra) {
  const unsigned index = wait(Wait::kSimd, name, site, argument, 0).thread.simdgroup;
  SimdGroup& g = simdgroups[index];
  g.function = function;
  g.extra = extra;
  ++g.arrived;
  release_simdgroup(index);
  switch_to_next();
}

void simdgroup_barrier(Site site, unsigned flags) {
  const unsigned index = wait(Wait::kSimdBarrier, "simdgroup_barrier", site, nullptr, flags).thread.simdgroup;
  ++simdgroups[index].arrived;
  release_simdgroup(index);
  switch_to_next();
}

void threadgroup_barrier(Site site, unsigned flags) {
  wait(Wait::kGroupBarrier, "threadgroup_barrier", site, nullptr, flags);
  if (++at_group_barrier == fiber_count) {
    for (unsigned i = 1; i < fiber_count; ++i)
      if (!same(fibers[i], fibers[0])) {
        report("divergence", "thread 0 is at the threadgroup_barrier of line %d, thread %u at that of line %d",
               fibers[0].site.line, i, fibers[i].site.line);
        stop_launch();
      }
    if (flags & 1) clock_.barrier[kDevice] = ++clock_.now;
    if (flags & 2) clock_.barrier[kGroup] = ++clock_.now;
    ++stats->group_barriers;
    at_group_barrier = 0;
    for (unsigned i = 0; i < fiber_count; ++i) make_ready(i);
  }
  switch_to_next();
}

// Called by emu_run, which has checked the launch.
bool run_launch(const EmuLaunch& launch, void (*body)(void* const*), void* const* arguments, EmuStats* to) {
  if (!stacks) {
    void* memory = mmap(nullptr, kStack * EMU_MAX_THREADS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      report("launch", "no memory for %d stacks", EMU_MAX_THREADS);
      return false;
    }
    stacks = static_cast<char*>(memory);
  }
  stats = to;
  kernel_body = body;
  kernel_arguments = arguments;
  stopped = false;
  random_order = launch.seed != 0;
  random_state = launch.seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull;
  clock_.launch = ++clock_.now;
  if (checking) checker_start(to);
  group_memory_start(launch);
  const unsigned csr = _mm_getcsr();
  if (launch.flags & EMU_FLUSH_DENORMALS) _mm_setcsr(csr | 0x8040);  // flush to zero, denormals are zero
#ifdef EMU_ASAN
  run_groups(launch);
#else
  // A kernel's fault becomes a finding. The handler needs a stack of its own: a fiber's may have overflowed.
  static char signal_stack[64 * 1024];
  stack_t alternate{}, previous_stack;
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &previous_stack);
  struct sigaction action{}, previous[3];
  action.sa_handler = crashed;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  const int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &previous[i]);
  if (sigsetjmp(crash, 1) == 0) run_groups(launch);
  else current = -1, stopped = true;
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
#endif
  _mm_setcsr(csr);
  to->group_bytes = group_memory_used();
  return !stopped;
}

}  // namespace emu
