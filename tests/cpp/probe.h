// The backend "probe": the CPU's, one of whose calls fails when a test says so.
#pragma once

#include "backend/backend.h"

namespace kv4::probe {

inline constexpr const char* kFault = "probe: expected success; got a fault";

// From now on call number `n` (1: the next) of those that may fail does: alloc finds no memory, everything else answers
// kFault; with `after`, all that follow it fail too, as on a device that is lost. 0: none does.
void fail_at(long n, bool after = false);
// Calls that may fail since fail_at, and whether one did.
long calls();
bool failed();
// Bytes that alloc gave out and free has not taken back.
std::size_t held();

}  // namespace kv4::probe
