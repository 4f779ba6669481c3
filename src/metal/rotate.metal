// Query rows for attention: as they are and rotated, times the factor of q.k. A threadgroup of KV4_ROW_THREADS threads
// per row: threads (KV4_ROW_THREADS * group, T, batch * kv_heads).
#include "metal/rotate.h"

kernel void kv4_prepare(device const uchar* q [[buffer(0)]],        // [inputs, kv_heads * group, rows, dim] by strides
                        device const float* matrix [[buffer(1)]],   // [dim, dim]: R^-1 of the keys' rotation
                        device const float* lambda [[buffer(2)]],   // [kv_heads, dim] of the keys, one after another
                        device const long* sequences [[buffer(3)]],
                        device const long* call [[buffer(4)]],
                        device const float* factors [[buffer(5)]],
                        device float* out [[buffer(6)]],            // [2, batch, kv_heads, T * group, dim]
                        uint3 place [[threadgroup_position_in_grid]],
                        uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float4 x[kv4::apple::kMaxDim / 4];
  threadgroup float4 y[kv4::apple::kMaxDim / 4];
  threadgroup float4 partial[KV4_ROW_THREADS];
  kv4::apple::prepare_row(q, matrix, lambda, sequences, call, factors, out, place.x, place.y, place.z, x, y, partial,
                          tid);
}
