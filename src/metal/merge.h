// Merges the partial states of one query row, rotates the part over pages back into the model's basis and writes the
// output or the row's own partial state. One threadgroup a row; nothing where the sequence has fewer queries.
#ifndef KV4_METAL_MERGE_H
#define KV4_METAL_MERGE_H

#include "metal/attend.h"
#include "metal/rotate.h"

namespace kv4 {
namespace apple {

// matrix: (R^-1)^T of the values' rotation. lambda [kv_heads, dim] of each sequence, sinks [kv_heads * group].
// Threadgroup memory: x and y [kMaxDim], partial [KV4_ROW_THREADS].
inline void merge_row(device const float* states, device const float* matrix, device const float* lambda,
                      device const float* sinks, device const long* sequences, device const long* call,
                      device uchar* out, uint g, uint t, uint head_of_batch, threadgroup float4* x4,
                      threadgroup float4* y4, threadgroup float4* partial, uint tid, uint lane) {
  threadgroup float* x = (threadgroup float*)x4;
  threadgroup float* y = (threadgroup float*)y4;
  const uint dim = uint(call[kv4_call_dim]), heads = uint(call[kv4_call_kv_heads]);
  const uint b = head_of_batch < heads ? 0u : head_of_batch / heads, head = head_of_batch - b * heads;
  device const long* sequence = sequences + b * kv4_sequence_fields;
  if (long(t) >= sequence[kv4_sequence_queries]) return;  // the whole threadgroup
  const uint exact_splits = uint(call[kv4_call_exact_splits]), splits = exact_splits + uint(call[kv4_call_page_splits]);
  // Exact rows and pages are merged separately: they are in different bases.
  float top = kHidden, exact = 0.0f, l = 0.0f;
  if (tid - lane < dim) {  // SIMD-groups with channels
    const uint group = uint(call[kv4_call_group]), block_rows = uint(call[kv4_call_block_rows]);
    const uint row = t * group + g, block = row < block_rows ? 0u : row / block_rows, step = block_rows * (dim + 2);
    device const float* from = states +
                               long(head_of_batch * uint(call[kv4_call_blocks]) + block) * long(splits) * long(step) +
                               long((row - block * block_rows) * (dim + 2));
    for (uint s = lane; s < splits; s += kLanes) top = max(top, from[s * step + dim]);
    top = simd_max(top);
    if (tid < dim) {
      float packed = 0.0f;
      for (uint s = 0; s < splits; ++s) {
        device const float* state = from + s * step;
        const float m = state[dim];
        const float weight = m <= kHiddenBelow ? 0.0f : exp2(m - top);
        l = fma(weight, state[dim + 1], l);
        const float value = weight * state[tid];
        if (s < exact_splits) exact += value;
        else packed += value;
      }
      x[tid] = packed;
      y[tid] = packed;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  rotate_row(int(call[kv4_call_value_rotated]), matrix, dim, x4, y4, partial, true, tid);
  if (tid >= dim) return;

  const uint q_head = head * uint(call[kv4_call_group]) + g;
  const long lambda_at = sequence[kv4_sequence_lambda_v];
  float o = y[tid];
  if (lambda_at != KV4_NONE) o /= lambda[lambda_at + long(head * dim + tid)];
  o += exact;
  const int dtype = int(call[kv4_call_out_dtype]);
  const long at = sequence[kv4_sequence_input] * call[kv4_call_out_stride_batch] +
                  long(q_head) * call[kv4_call_out_stride_head] +
                  (sequence[kv4_sequence_input_row] + long(t)) * call[kv4_call_out_stride_query];
  if (dtype == KV4_OUT_PARTIAL) {
    device float* row_out = (device float*)out + at;
    row_out[tid] = o;
    if (tid == 0) {
      row_out[dim] = l > 0.0f ? top * 0.69314718055994531f : -INFINITY;
      row_out[dim + 1] = l;
    }
    return;
  }
  const float denominator = call[kv4_call_has_sinks] != 0 ? l + exp2(sinks[q_head] * kLog2e - top) : l;
  store_element(out, dtype, at + long(tid), l > 0.0f ? o / denominator : 0.0f);
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_MERGE_H
