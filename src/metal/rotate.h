// A row times a rotation's matrix, by one threadgroup; queries and outputs of attention, and dequantised rows, are
// rotated one by one. Matrices are [dim, dim] floats by rows, so that y[c] = sum over i of matrix[i][c] x[i] and
// neighbouring threads read neighbouring numbers:
//
//   queries  q' = R^-T x   matrix = R^-1       outputs, dequantised rows   x = R^-1 y   matrix = (R^-1)^T
//
// Counted at d = 128 for a row, the rotation alone (tests/metal/measure.py): 33,500 lane-instructions for 16,384
// multiply-adds. A thread owns four channels, so that five 16-byte loads serve 16 multiply-adds, and D is a constant;
// without that 45,200; one channel a thread, with an index per load, 185,700. Each row has its own threadgroup, so that
// the few rows of a step spread over the cores. The default rotation uses butterfly.h instead.
#ifndef KV4_METAL_ROTATE_H
#define KV4_METAL_ROTATE_H

#include "metal/butterfly.h"

namespace kv4 {
namespace apple {

// Of D channels: a thread owns four of them, and every kParts-th four rows of the matrix.
template <uint D>
inline void multiply_row_of(device const float* matrix, threadgroup const float4* x, threadgroup float* y,
                            threadgroup float4* partial, uint tid) {
  constexpr uint kQuads = D / 4, kParts = KV4_ROW_THREADS / kQuads, kSteps = (kQuads + kParts - 1) / kParts;
  const uint part = tid / kQuads, c = tid % kQuads;
  if (part < kParts) {
    device const float4* from = (device const float4*)matrix + part * D + c;
    float4 sum = float4(0.0f);
#pragma unroll
    for (uint n = 0; n < kSteps; ++n) {
      if (kQuads % kParts != 0 && n + 1 == kSteps && part + n * kParts >= kQuads) break;
      const float4 four = x[part + n * kParts];
      sum = fma(float4(four.x), from[n * kParts * D], sum);
      sum = fma(float4(four.y), from[n * kParts * D + kQuads], sum);
      sum = fma(float4(four.z), from[n * kParts * D + 2 * kQuads], sum);
      sum = fma(float4(four.w), from[n * kParts * D + 3 * kQuads], sum);
    }
    partial[tid] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < D) {
    threadgroup const float* parts = (threadgroup const float*)partial + tid;
    float sum = 0.0f;
#pragma unroll
    for (uint k = 0; k < kParts; ++k) sum += parts[k * D];
    y[tid] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// y from x, both [dim] of threadgroup memory; partial [KV4_ROW_THREADS]. All KV4_ROW_THREADS threads. x is complete
// before the call; y is after it.
inline void multiply_row(device const float* matrix, uint dim, threadgroup const float4* x, threadgroup float* y,
                         threadgroup float4* partial, uint tid) {
  if (dim == 128) multiply_row_of<128>(matrix, x, y, partial, tid);
  else if (dim == 64) multiply_row_of<64>(matrix, x, y, partial, tid);
  else if (dim == 256) multiply_row_of<256>(matrix, x, y, partial, tid);
  else if (dim == 80) multiply_row_of<80>(matrix, x, y, partial, tid);
  else multiply_row_of<96>(matrix, x, y, partial, tid);
}

// y = R x (with R^-T = R where this is a butterfly) or R^-1 x, which may overwrite x.
inline void rotate_row(int how, device const float* matrix, uint dim, threadgroup float4* x, threadgroup float4* y,
                       threadgroup float4* partial, bool inverse, uint tid) {
  if (how == KV4_ROTATED_BUTTERFLY) srft_row(matrix, dim, x, y, inverse, tid);
  else if (how == KV4_ROTATED_MATRIX) multiply_row(matrix, dim, x, (threadgroup float*)y, partial, tid);
}

// One query row: raw times the factor of q.k, and R^-T (q / lambda) times it, to planes 0 and 1 of
// out [2, batch, kv_heads, T * group, dim]. Row t * group + g is query t of head g of the group; nothing where the
// sequence has fewer queries.
inline void prepare_row(device const uchar* q, device const float* matrix, device const float* lambda,
                        device const long* sequences, device const long* call, device const float* factors,
                        device float* out, uint g, uint t, uint head_of_batch, threadgroup float4* x4,
                        threadgroup float4* y4, threadgroup float4* partial, uint tid) {
  threadgroup float* x = (threadgroup float*)x4;
  threadgroup float* y = (threadgroup float*)y4;
  const uint dim = uint(call[kv4_call_dim]);
  const uint heads = uint(call[kv4_call_kv_heads]), b = head_of_batch < heads ? 0u : head_of_batch / heads;
  device const long* s = sequences + b * kv4_sequence_fields;
  if (long(t) >= s[kv4_sequence_queries]) return;  // the whole threadgroup
  device float* to = out;
  long plane = 0;
  float factor = 0.0f;
  if (tid < dim) {
    const uint group = uint(call[kv4_call_group]), head = head_of_batch - b * heads;
    const uint rows = group * uint(call[kv4_call_queries]);
    plane = call[kv4_call_batch] * long(heads) * long(rows) * long(dim);
    to += (long(head_of_batch) * long(rows) + long(t * group + g)) * long(dim) + long(tid);
    factor = factors[kv4_factor_scale];
    const long from = s[kv4_sequence_input] * call[kv4_call_q_stride_batch] +
                      long(head * group + g) * call[kv4_call_q_stride_head] +
                      (s[kv4_sequence_input_row] + long(t)) * call[kv4_call_q_stride_query];
    const long lambda_at = s[kv4_sequence_lambda_k];
    const float value = load_element(q, int(call[kv4_call_q_dtype]), from + long(tid));
    *to = value * factor;
    const float weighted = lambda_at == KV4_NONE ? value : value / lambda[lambda_at + long(head * dim + tid)];
    x[tid] = weighted;
    y[tid] = weighted;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  rotate_row(int(call[kv4_call_key_rotated]), matrix, dim, x4, y4, partial, false, tid);
  if (tid < dim) to[plane] = y[tid] * factor;
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_ROTATE_H
