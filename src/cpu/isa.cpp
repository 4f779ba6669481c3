#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kv4/cpu.h"

namespace kv4::cpu {
namespace {

#define KV4_ADDRESS(isa) &isa::kernels,
constexpr const Kernels* kAll[] = {KV4_CPU_ISAS(KV4_ADDRESS)};
#undef KV4_ADDRESS

const Kernels* best() {
  for (const Kernels* k : kAll)
    if (k->supported()) return k;
  return kAll[std::size(kAll) - 1];
}

const Kernels* initial() {
  if (const char* name = std::getenv("KV4_CPU_ISA")) {
    const Kernels* k = find(name);
    if (k != nullptr && k->supported()) return k;
  }
  return best();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{initial()};
  return kernels;
}

}  // namespace

const Kernels& active() { return *current().load(std::memory_order_relaxed); }

const Kernels* find(const char* name) {
  for (const Kernels* k : kAll)
    if (std::strcmp(k->name, name) == 0) return k;
  return nullptr;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : kAll) names.emplace_back(k->name);
  return names;
}

bool supported(const std::string& isa) {
  const Kernels* k = find(isa.c_str());
  return k != nullptr && k->supported();
}

std::string active_isa() { return active().name; }

Status force_isa(const std::string& isa) {
  if (isa.empty()) {
    current().store(best(), std::memory_order_relaxed);
    return {};
  }
  const Kernels* k = find(isa.c_str());
  if (k == nullptr || !k->supported()) {
    std::string list;
    for (const Kernels* other : kAll)
      if (other->supported()) list.append(list.empty() ? "" : ", ").append(other->name);
    return error(StatusCode::unsupported, "isa", "one of " + list + " on this machine", isa);
  }
  current().store(k, std::memory_order_relaxed);
  return {};
}

}  // namespace kv4::cpu
