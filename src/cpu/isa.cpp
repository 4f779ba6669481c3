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

const Kernels* usable(const std::string& name) {
  const Kernels* k = find(name.c_str());
  return k != nullptr && k->supported() ? k : nullptr;
}

Status refused(const char* argument, const std::string& name) {
  std::string list;
  for (const Kernels* k : kAll)
    if (k->supported()) list.append(list.empty() ? "" : ", ").append(k->name);
  return error(StatusCode::unsupported, argument, "one of " + list + " on this machine", name);
}

std::string from_environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}
// What the environment asks for, read once; empty where it asks for nothing.
const std::string& asked() {
  static const std::string name = from_environment("KV4_CPU_ISA");
  return name;
}
const std::string& asked_bits() {
  static const std::string bits = from_environment("KV4_CPU_OPERAND_BITS");
  return bits;
}

// Null where the environment asks for what does not run here, until force_isa chooses.
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{asked().empty() ? best() : usable(asked())};
  return kernels;
}

// 0 where the environment asks for another number, until set_operand_bits chooses.
std::atomic<int>& current_bits() {
  static std::atomic<int> bits{asked_bits().empty() || asked_bits() == "8" ? 8 : asked_bits() == "16" ? 16 : 0};
  return bits;
}

}  // namespace

const Kernels& active() {
  const Kernels* k = current().load(std::memory_order_relaxed);
  return k != nullptr ? *k : *best();
}

const Kernels& attending(const PageSpec* spec) {
  const Kernels& k = active();
  const bool trellis = spec != nullptr && (spec->key.levels.is_trellis() || spec->value.levels.is_trellis());
  return trellis && k.trellis != nullptr ? *k.trellis : k;
}

const Kernels* find(const char* name) {
  for (const Kernels* k : kAll)
    if (std::strcmp(k->name, name) == 0) return k;
  return nullptr;
}

// Wider codes and refined keys are there for a precision that bytes would take away.
bool takes_bytes(const Kernels& kernels, const PageSpec& spec) {
  return kernels.bytes && operand_bits() == 8 && spec.key.levels.bits <= 4 && spec.value.levels.bits <= 4 &&
         spec.second.rows == 0;
}

int operand_bits() { return current_bits().load(std::memory_order_relaxed); }

Status set_operand_bits(int bits) {
  if (bits != 8 && bits != 16) return invalid_argument("bits", "8 or 16", std::to_string(bits));
  current_bits().store(bits, std::memory_order_relaxed);
  return {};
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : kAll) names.emplace_back(k->name);
  return names;
}

bool supported(const std::string& isa) { return usable(isa) != nullptr; }

std::string active_isa() {
  const Kernels* k = current().load(std::memory_order_relaxed);
  return k != nullptr ? k->name : "";
}

Status check_isa() {
  if (operand_bits() == 0) return error(StatusCode::unsupported, "KV4_CPU_OPERAND_BITS", "8 or 16", asked_bits());
  return current().load(std::memory_order_relaxed) != nullptr ? Status() : refused("KV4_CPU_ISA", asked());
}

Status force_isa(const std::string& isa) {
  const Kernels* k = isa.empty() ? best() : usable(isa);
  if (k == nullptr) return refused("isa", isa);
  current().store(k, std::memory_order_relaxed);
  return {};
}

}  // namespace kv4::cpu
