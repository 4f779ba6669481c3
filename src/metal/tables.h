// The tables of numbers and matrices that the Metal kernels read (arguments.h), from the library's own structs. Host code;
// nothing here knows a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace kv4::apple {

// ok, or unsupported with the reason why no kernel serves exact rows of these head dims; and why none serves this page.
Status supports_dims(int head_dim_k, int head_dim_v);
Status supports(const PageSpec& spec);
// Of spec's head dims and mean: one scale a vector, no padded channels.
kv4_page_layout page_layout(const PageSpec& spec);

// How kernels rotate rows of queries and outputs: KV4_ROTATED_NONE, _MATRIX or, the default rotation, _BUTTERFLY.
int rotated(const Rotation& rotation);
// Matrices as the kernels want them, [dim, dim] floats by rows, or a butterfly's table [3 dim]; empty for the identity.
std::vector<float> query_matrix(const Rotation& rotation);       // R^-1
std::vector<float> output_matrix(const Rotation& rotation);      // (R^-1)^T
std::vector<float> sealing_matrix(const Rotation& rotation);     // [2, dim, dim]: R^T, and what the floats lack to it

// One side of sealing or dequantising: int64 [kv4_side_fields] and float [kv4_level_fields]. stride: elements between rows.
std::vector<std::int64_t> side_table(const PageSpec& spec, bool values, DType dtype, std::int64_t stride);
std::vector<float> level_table(const SideSpec& side);

// Where the buffers begin that a call of attention binds: a page or row is told by its distance from there.
struct Bases {
  const std::uint8_t* pages = nullptr;  // pages lie at multiples of KV4_PAGE_UNIT from it
  const void* exact_k = nullptr;
  const void* exact_v = nullptr;
};

struct AttendTables {
  std::vector<std::int64_t> call, sequences;
  std::vector<float> factors;
  std::vector<std::int32_t> pages;
  std::vector<std::int8_t> levels;  // [2, 16]
  int dim = 0, block_rows = 0;      // D and R of the kernel
  int rows = 0;                     // T * group
  int blocks = 0, splits = 0;
  std::size_t prepared_floats = 0;  // of kv4_prepare's output
  std::size_t state_floats = 0;     // of kv4_attend's
};

// Lambda tables hold one row per sequence, [batch, kv_heads, dim]; sequences without any read none, and those with one side alone ones for the other. Offsets of q, mask
// and out are those of the whole tensors, so job.query_begin must be 0. Splits are chosen for a device of `cores`.
AttendTables attend_tables(const AttendJob& job, const Bases& bases, int cores);

}  // namespace kv4::apple
