// Whether what is about to be allocated fits, where the system says how much is free.
#pragma once

#include <cstdint>
#include <string>

#include "kv4/status.h"

namespace kv4::engine {

// Bytes that the system can hand out without swapping; 0 where it does not say.
std::uint64_t available_memory();
// Bytes of this process that lie in memory; 0 where the system does not say.
std::uint64_t resident_memory();
// Errors: out_of_memory naming `what` and both numbers.
Status check_memory(const std::string& what, std::uint64_t bytes);

}  // namespace kv4::engine
