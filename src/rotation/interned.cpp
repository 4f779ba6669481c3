#include "rotation/interned.h"

#include <algorithm>
#include <functional>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace kv4 {
namespace {

// Entries are removed before their rotation is destroyed: under the lock a pointer is valid even if the last reference
// has been dropped.
struct Entry {
  const Rotation* rotation;
  std::weak_ptr<const Rotation> held;
};
struct Table {
  std::mutex mutex;
  std::unordered_multimap<std::size_t, Entry> entries;
};
Table& table() {
  static auto* const table = new Table();  // never destroyed: static objects may hold rotations until exit
  return *table;
}

std::string_view bytes_of(std::span<const float> x) {
  return {reinterpret_cast<const char*>(x.data()), x.size_bytes()};
}

std::size_t hash_of(const Interned::Definition& x) {
  std::size_t hash = std::hash<std::string_view>()(bytes_of(x.matrix));
  for (const std::uint64_t field : {static_cast<std::uint64_t>(x.kind), static_cast<std::uint64_t>(x.d),
                                    static_cast<std::uint64_t>(x.reflectors), x.seed})
    hash = hash * 0x9e3779b97f4a7c15u + std::hash<std::uint64_t>()(field);
  return hash;
}

bool equal(const Interned::Definition& a, const Interned::Definition& b) {
  return a.kind == b.kind && a.d == b.d && a.reflectors == b.reflectors && a.seed == b.seed &&
         bytes_of(a.matrix) == bytes_of(b.matrix);
}

// Also null for a rotation whose last reference is just being dropped.
std::shared_ptr<const Rotation> find_locked(const Interned::Definition& definition, std::size_t hash,
                                            Interned::Definition (*definition_of)(const Rotation&)) {
  const auto [first, last] = table().entries.equal_range(hash);
  for (auto it = first; it != last; ++it)
    if (equal(definition_of(*it->second.rotation), definition))
      if (std::shared_ptr<const Rotation> found = it->second.held.lock(); found != nullptr) return found;
  return nullptr;
}

}  // namespace

Interned::Definition Interned::definition_of(const Rotation& r) {
  return {r.kind_, r.dim_, r.reflectors_, r.seed_, r.matrix_};
}

std::shared_ptr<const Rotation> Interned::find(const Definition& definition) {
  const std::size_t hash = hash_of(definition);
  const std::lock_guard<std::mutex> lock(table().mutex);
  return find_locked(definition, hash, &definition_of);
}

std::shared_ptr<const Rotation> Interned::add(std::unique_ptr<Rotation> made) {
  const Definition definition = definition_of(*made);
  const std::size_t hash = hash_of(definition);
  const auto forget = [hash](const Rotation* r) {
    {
      const std::lock_guard<std::mutex> lock(table().mutex);
      const auto [first, last] = table().entries.equal_range(hash);
      const auto it = std::find_if(first, last, [r](const auto& entry) { return entry.second.rotation == r; });
      if (it != last) table().entries.erase(it);
    }
    delete r;  // with its device tables, which may be slow
  };
  // Declared before the lock: if another thread was first, ours is destroyed after the lock is released.
  std::shared_ptr<const Rotation> fresh(static_cast<const Rotation*>(made.release()), forget);
  const std::lock_guard<std::mutex> lock(table().mutex);
  if (std::shared_ptr<const Rotation> found = find_locked(definition, hash, &definition_of); found != nullptr)
    return found;
  table().entries.emplace(hash, Entry{fresh.get(), fresh});
  return fresh;
}

std::size_t Interned::count() {
  const std::lock_guard<std::mutex> lock(table().mutex);
  return table().entries.size();
}

}  // namespace kv4
