// The tables of numbers and matrices that the Metal kernels read (arguments.h), from the library's own structs. Host
// code, independent of any device.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "metal/arguments.h"

namespace kv4::apple {

inline constexpr int kHeadDims[] = {64, 80, 96, 128, 256};  // that there are kernels for
// ok, or unsupported with the reason why no kernel serves exact rows of these head dims; and why none serves this page.
Status supports_dims(int head_dim_k, int head_dim_v);
Status supports(const PageSpec& spec);
// Of spec's head dims and mean: one scale a vector, no padded channels.
kv4_page_layout page_layout(const PageSpec& spec);

// How kernels rotate rows of queries and outputs: KV4_ROTATED_NONE, _MATRIX or, the default rotation, _BUTTERFLY.
int rotated(const Rotation& rotation);
// Matrices for the kernels, [dim, dim] floats by rows, or a butterfly's table [3 dim]; empty for the identity.
std::vector<float> query_matrix(const Rotation& rotation);    // R^-1
std::vector<float> output_matrix(const Rotation& rotation);   // (R^-1)^T
std::vector<float> sealing_matrix(const Rotation& rotation);  // [2, dim, dim]: R^T, and its rounding errors

constexpr std::int64_t kNowhere = KV4_NONE;

// How kernels find a page (kv4_pages) from the buffer that a launch binds: one array from there, or chunks by their
// distances from it.
std::vector<std::int64_t> page_table(const PageMemory& pages, std::span<const std::int64_t> chunks = {});

// One side of sealing or dequantising: int64 (kv4_side), with its pages, and float [kv4_level_fields].
std::vector<std::int64_t> side_table(const PageSpec& spec, bool values, std::span<const std::int64_t> pages);
std::vector<float> level_table(const SideSpec& side);

// A job's fields (kv4_job) of keys or of values; the places are elements from what a launch binds. Job: SealJob or
// DequantiseJob.
struct JobPlace {
  std::int64_t rows = 0, skip = -1, lambda = kNowhere;
};
template <class Job>
void add_job(std::vector<std::int64_t>* jobs, const Job& job, bool values, const JobPlace& place);

// What a call of attention binds: rows and lambda are given as distances from there.
struct Bases {
  const void* exact_k = nullptr;  // a multiple of 16 bytes
  const void* exact_v = nullptr;
  const float* lambda_k = nullptr;
  const float* lambda_v = nullptr;
};
// The first of each kind among the sequences of a call.
Bases bases_of(std::span<const SequenceView> sequences);

struct AttendTables {
  std::vector<std::int64_t> call, sequences;
  std::vector<float> factors;
  std::vector<std::int32_t> ids;    // of pages and blocks, all sequences'
  std::vector<std::int8_t> levels;  // [2, 16]
  int dim = 0, block_rows = 0;      // D and R of the kernel
  int rows = 0;                     // T * group of the sequence with the most
  int blocks = 0, splits = 0;
  std::string kernel;                                      // of attention itself
  std::array<std::uint32_t, 3> attend_grid{}, row_grid{};  // threads of it, and of kv4_prepare and kv4_merge
  std::size_t prepared_floats = 0;                         // of kv4_prepare's output
  std::size_t state_floats = 0;                            // of kv4_attend's
};

// Offsets of q, mask and out are those of the whole tensors; a partial state's rows are dim + 2 numbers, o, m and l, in
// place of the job's three arrays. pages: page_table's. Splits are chosen for a device of `cores`.
AttendTables attend_tables(const AttendJob& job, const Bases& bases, std::span<const std::int64_t> pages, int cores);

}  // namespace kv4::apple
