// Exact rows in host memory: taking them in, moving and converting them, and the moments that lambda is made of.
#pragma once

#include "backend/backend.h"

namespace kv4::cpu {

void store(const StoreJob& job);
void convert(const ConvertJob& job);
void copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes, int lines);
void query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs);
void fix_lambda(const LambdaJob& job);

}  // namespace kv4::cpu
