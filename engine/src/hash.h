// 64-bit FNV-1a (Fowler, Noll, Vo; draft-eastlake-fnv): tells damage and other files apart, no protection against forgery.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kv4::engine {

struct Fnv {
  std::uint64_t value = 0xcbf29ce484222325u;
  void add(const void* data, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) value = (value ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  }
};

}  // namespace kv4::engine
