// The numeric definition of attention, in float64 loops over dense rows. Kernels are tested against
// it; production code never links it.
//
//   s_j = scale q.k_j; softcap: s_j = c tanh(s_j / c); additive mask: s_j += mask_j
//   p_j = exp(s_j) / (sum over visible j of exp(s_j) + exp(sink));  out = sum p_j v_j
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace kv4::reference {

// The tokens that one sequence holds, in any order.
struct DenseTokens {
  std::vector<std::int64_t> position;  // [count]
  std::vector<std::vector<double>> k;  // [kv_heads][count * head_dim_k]
  std::vector<std::vector<double>> v;  // [kv_heads][count * head_dim_v]
};

// Appends tokens [0, count) of a page's head slice as keys and values of `head`, dequantised.
// Codes are canonical (format/page.h); scales, mean and second rows are read from the slice. Positions are left alone.
void append_page(const PageSpec& spec, const std::uint8_t* slice, const std::uint8_t* k_codes,
                 const std::uint8_t* v_codes, int count, const float* lambda_k, const float* lambda_v, int head,
                 DenseTokens* to);

struct Attention {
  std::vector<double> out;      // [batch, q_heads, T, head_dim_v]; 0 over no tokens
  std::vector<double> m, l;     // [batch, q_heads, T] over the visible tokens, without sinks; natural log
  std::vector<double> weights;  // [batch, q_heads, T, count of the sequence]: p_j, one sequence after another
};

// Whether a query at `query_position`, row t of the call and head h, sees `position`, and what an
// additive mask adds.
bool visible(const Mask& mask, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t query_position,
             std::int64_t position, double* added);

// Query row 0 of sequence b stands at query_position[b].
Attention attend(const AttendArgs& args, int kv_heads, int head_dim_v, std::span<const DenseTokens> sequences,
                 std::span<const std::int64_t> query_position);

}  // namespace kv4::reference
