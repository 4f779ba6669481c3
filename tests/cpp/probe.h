// The backend "probe": the CPU's, with failure injection.
#pragma once

#include "backend/backend.h"

namespace kv4::probe {

inline constexpr const char* kFault = "probe: expected success; got a fault";

// Makes the n-th fallible call from now on fail (1: the next): alloc returns null, others return kFault; with `after`,
// all later ones fail too, as on a lost device. 0: none.
void fail_at(long n, bool after = false);
// Fallible calls since fail_at, and whether one failed.
long calls();
bool failed();
// Bytes allocated and not yet freed.
std::size_t held();

}  // namespace kv4::probe
