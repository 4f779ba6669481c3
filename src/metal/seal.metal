// Sealing and its inverse: one side of the pages that the jobs name.
//
//   kv4_seal        threads (KV4_ROW_THREADS * jobs, kv_heads)
//   kv4_dequantise  threads (KV4_ROW_THREADS * jobs, the largest count, kv_heads)
#include "metal/seal.h"

kernel void kv4_seal(device const uchar* rows [[buffer(0)]],     // float32, float16 or bfloat16 by the jobs' strides
                     device const uchar* skip [[buffer(1)]],
                     device const float* lambda [[buffer(2)]],   // [kv_heads, dim], one after another
                     device const float* matrix [[buffer(3)]],   // [2, dim, dim]: R^T, and its rounding errors
                     device const long* jobs [[buffer(4)]],
                     device const long* side [[buffer(5)]],
                     device const float* levels [[buffer(6)]],
                     device uchar* pages [[buffer(7)]],
                     uint3 place [[threadgroup_position_in_grid]],
                     uint tid [[thread_index_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]],
                     uint group [[simdgroup_index_in_threadgroup]]) {
  threadgroup float x[kv4::apple::kTile * kv4::apple::kPitch];
  threadgroup uchar codes[kv4::apple::kTile * kv4::apple::kMaxDim];
  threadgroup float high[256];
  threadgroup float low[256];
  threadgroup float weighted_high[256];
  threadgroup float weighted_low[256];
  threadgroup float offset[256];
  kv4::apple::SealArguments a;
  a.rows = rows;
  a.skip = skip;
  a.lambda = lambda;
  a.matrix = matrix;
  a.pages = pages;
  a.jobs = jobs;
  a.side = side;
  a.levels = levels;
  kv4::apple::seal_job(a, place.x, place.y, x, codes, high, low, weighted_high, weighted_low, offset, tid, lane, group);
}

kernel void kv4_dequantise(device const uchar* pages [[buffer(0)]],
                           device const float* lambda [[buffer(1)]],
                           device const float* matrix [[buffer(2)]],  // [dim, dim]: (R^-1)^T
                           device const long* jobs [[buffer(3)]],
                           device const long* side [[buffer(4)]],
                           device const float* levels [[buffer(5)]],
                           device float* out [[buffer(6)]],
                           uint3 place [[threadgroup_position_in_grid]],
                           uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float4 x[kv4::apple::kMaxDim / 4];
  threadgroup float4 y[kv4::apple::kMaxDim / 4];
  threadgroup float4 partial[KV4_ROW_THREADS];
  kv4::apple::dequantise_row(pages, lambda, matrix, jobs, side, levels, out, place.x, place.y, place.z, x, y, partial,
                             tid);
}
