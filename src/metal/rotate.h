// A row times a rotation's matrix, by one threadgroup; queries and outputs of attention, and dequantised rows, are rotated
// one by one. Matrices come as data, [dim, dim] floats by rows, so that y[c] = sum over i of matrix[i][c] x[i] and
// neighbouring threads read neighbouring numbers:
//
//   queries  q' = R^-T x   matrix = R^-1       outputs, dequantised rows   x = R^-1 y   matrix = (R^-1)^T
//
// Count at d = 128 for a row: 16,384 multiply-adds over 256 threads, 64 each, and 64 KB of a matrix that all layers of
// one recipe share and that stays in the cache.
#ifndef KV4_METAL_ROTATE_H
#define KV4_METAL_ROTATE_H

#include "metal/device.h"

namespace kv4 {
namespace apple {

// y from x, both [dim] of threadgroup memory; partial [KV4_ROW_THREADS]. All KV4_ROW_THREADS threads, dim <= kMaxDim.
// `parts` threads share a channel. x is complete before the call; y is after it.
inline void multiply_row(device const float* matrix, uint dim, threadgroup const float* x, threadgroup float* y,
                         threadgroup float* partial, uint tid) {
  const uint parts = KV4_ROW_THREADS / dim, part = tid / dim, c = tid % dim;
  if (part < parts) {
    float sum = 0.0f;
    for (uint i = part; i < dim; i += parts) sum = fma(matrix[i * dim + c], x[i], sum);
    partial[tid] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < dim) {
    float sum = 0.0f;
    for (uint k = 0; k < parts; ++k) sum += partial[k * dim + tid];
    y[tid] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// One query row: raw times the factor of q.k, and R^-T (q / lambda) times it, to planes 0 and 1 of
// out [2, batch, kv_heads, T * group, dim]. Row t * group + g is query t of head g of the group.
inline void prepare_row(device const uchar* q, device const float* matrix, device const float* lambda,
                        device const long* sequences, device const long* call, device const float* factors,
                        device float* out, uint row, uint head, uint b, threadgroup float* x, threadgroup float* y,
                        threadgroup float* partial, uint tid) {
  const uint dim = uint(call[kv4_call_dim]), group = uint(call[kv4_call_group]);
  const uint rows = group * uint(call[kv4_call_queries]), heads = uint(call[kv4_call_kv_heads]);
  const long from = long(b) * call[kv4_call_q_stride_batch] + long(head * group + row % group) * call[kv4_call_q_stride_head] +
                    long(row / group) * call[kv4_call_q_stride_query];
  const long lambda_row = sequences[b * kv4_sequence_fields + kv4_sequence_lambda];
  const float factor = factors[kv4_factor_scale];
  const long at = (long(b * heads + head) * long(rows) + long(row)) * long(dim);
  const long plane = call[kv4_call_batch] * long(heads) * long(rows) * long(dim);
  const bool rotated = call[kv4_call_key_rotated] != 0;
  if (tid < dim) {
    const float value = load_element(q, int(call[kv4_call_q_dtype]), from + long(tid));
    out[at + long(tid)] = value * factor;
    const float weighted = lambda_row < 0 ? value : value / lambda[(lambda_row * long(heads) + long(head)) * long(dim) + long(tid)];
    x[tid] = weighted;
    y[tid] = weighted;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (rotated) multiply_row(matrix, dim, x, y, partial, tid);
  if (tid < dim) out[plane + at + long(tid)] = y[tid] * factor;
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_ROTATE_H
