// The one list of backends.
#include "backend/backend.h"

namespace kv4 {

namespace cpu {
Backend* backend();
}

namespace {

struct Entry {
  const char* name;
  Backend* (*get)();
};
constexpr Entry kBackends[] = {
    {"cpu", cpu::backend},
};

}  // namespace

Backend* find_backend(const std::string& name) {
  for (const Entry& e : kBackends)
    if (name == e.name) return e.get();
  return nullptr;
}

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const Entry& e : kBackends) names.emplace_back(e.name);
  return names;
}

}  // namespace kv4
