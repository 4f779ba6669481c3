// Backend::attend and attend_workspace of the CPU: plans tasks, runs them on threads and joins their partial states.
#pragma once

#include "backend/backend.h"

namespace kv4::cpu {

Status attend(const AttendJob& job);
std::size_t attend_workspace(const AttendJob& job);

}  // namespace kv4::cpu
