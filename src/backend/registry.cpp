// The one list of backends.
#include "backend/backend.h"
#include "kv4/cache.h"

namespace kv4 {

namespace cpu {
Backend* backend();
}
#if KV4_HAS_CUDA
namespace cuda {
Backend* backend(int device);
}
#endif
#if KV4_HAS_METAL
namespace apple {
Backend* backend(int device);
std::string why_not();
}  // namespace apple
#endif
#if KV4_HAS_PROBE  // the tests' own backend
namespace probe {
Backend* backend(int device);
}
#endif

namespace {

struct Entry {
  const char* name;
  Backend* (*get)(int device);  // null where there is no such device
  std::string (*why_not)();     // why get returned null
};
std::string no_device() { return "no device that it serves"; }
constexpr Entry kBackends[] = {
    {"cpu", [](int device) { return device == 0 ? cpu::backend() : nullptr; }, no_device},
#if KV4_HAS_CUDA
    {"cuda", cuda::backend, no_device},
#endif
#if KV4_HAS_METAL
    {"metal", apple::backend, apple::why_not},
#endif
#if KV4_HAS_PROBE
    {"probe", probe::backend, no_device},
#endif
};

// The device number after the colon; -1 if malformed.
int device_number(const std::string& text) {
  if (text.empty() || text.size() > 4) return -1;
  int n = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return -1;
    n = n * 10 + (c - '0');
  }
  return n;
}

const Entry* entry_of(const std::string& backend) {
  const std::string name = backend.substr(0, backend.find(':'));
  for (const Entry& e : kBackends)
    if (name == e.name) return &e;
  return nullptr;
}

}  // namespace

Backend* find_backend(const std::string& name) {
  const std::size_t colon = name.find(':');
  const int device = colon == std::string::npos ? 0 : device_number(name.substr(colon + 1));
  const Entry* entry = entry_of(name);
  return entry != nullptr && device >= 0 ? entry->get(device) : nullptr;
}

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (const Entry& e : kBackends)
    if (e.get(0) != nullptr) names.emplace_back(e.name);
  return names;
}

std::string why_not(const std::string& backend) {
  if (find_backend(backend) != nullptr) return "";
  const Entry* entry = entry_of(backend);
  return entry != nullptr ? entry->why_not() : "built without it";
}

}  // namespace kv4
