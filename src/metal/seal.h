// Sealing: tokens of one side of one head slice are centred, weighted, rotated, quantised and packed by one
// threadgroup, 16 tokens at a time. src/reference/seal.h is the definition.
//
// The mean a page stores is R (lambda * mean) in fp16, and rows are relative to it as stored. A bias may be 10^5 times
// the spread around it, so the mean and its rotation are sums in pairs of floats, and the matrix has two floats per
// entry. This needs exact floating-point semantics: compile without fast math.
//
// Counted for d = 128 and one vector: 256 bytes read, 68 written; 58,000 lane-instructions for a key and 49,000 for a
// value, of them 16,384 multiply-adds of the rotation: 41 ns on a GPU of 2.6 TFLOPS. One channel a thread with indices
// computed took 109,300 and 100,300; constant distances alone 66,600 and 57,600. A prompt's sealing is below 1 % of its
// matrix products: Qwen2.5-1.5B seals 112 vectors a token, 6.0 million lane-instructions beside 1.5 * 10^9.
#ifndef KV4_METAL_SEAL_H
#define KV4_METAL_SEAL_H

#include "metal/layout.h"
#include "metal/rotate.h"

namespace kv4 {
namespace apple {

constant constexpr uint kTile = 16;            // tokens at once
constant constexpr uint kPitch = kMaxDim + 1;  // of a row in threadgroup memory, at most: dim + 1 is used

struct SealArguments {
  device const uchar* rows;
  device const uchar* skip;  // a byte per token: not 0 where masked
  device const float* lambda;
  device const float* matrix;  // [2, dim, dim]: R^T row by row, then the rounding errors of those floats
  device uchar* pages;
  device const long* jobs;
  device const long* side;
  device const float* levels;
};

// One side of one head of a job.
struct SealPart {
  device uchar* slice;
  long rows, stride;  // element of its first token, elements between tokens
  int dtype;
  long lambda;  // element of its first channel; KV4_NONE: lambda is 1
  long skip, hidden;
  uint first, count;
};
inline bool masked(thread const SealArguments& a, thread const SealPart& part, uint row) {
  return long(row) < part.hidden || (part.skip >= 0 && a.skip[part.skip + long(row)] != 0);
}
inline SealPart part_of(thread const SealArguments& a, uint index, uint head) {
  device const long* job = a.jobs + index * kv4_job_fields;
  SealPart out;
  out.slice = a.pages + slice_offset(a.side + kv4_side_pages, job[kv4_job_page], head);
  out.rows = job[kv4_job_rows] + long(head) * job[kv4_job_stride_head];
  out.stride = job[kv4_job_stride];
  out.dtype = int(job[kv4_job_dtype]);
  out.lambda = job[kv4_job_lambda] == KV4_NONE ? KV4_NONE : job[kv4_job_lambda] + long(head) * a.side[kv4_side_dim];
  out.skip = job[kv4_job_skip];
  out.hidden = job[kv4_job_hidden];
  out.first = uint(job[kv4_job_first]);
  out.count = uint(job[kv4_job_count]);
  return out;
}

// x[r][c] for the tile's rows from x R^T, in place. A thread owns four channels of kRows rows, so that a load of the
// matrix and one of each row serve 4 kRows multiply-adds. D is a compile-time constant: with run-time strides, index
// arithmetic was half of the instructions.
template <uint D, uint kRows>
inline void multiply_tile(device const float* matrix, threadgroup float* x, uint tid) {
  constexpr uint kQuads = D / 4, kTilePitch = D + 1;
  const uint part = tid / kQuads, c = tid % kQuads;
  threadgroup float* rows = x + part * kRows * kTilePitch;
  const bool used = part < kTile / kRows;
  float4 sum[kRows];
  for (uint r = 0; r < kRows; ++r) sum[r] = float4(0.0f);
  if (used) {
    threadgroup const float* from = rows;
    device const float4* entry = (device const float4*)matrix + c;
    for (uint i = 0; i < D; ++i, ++from, entry += kQuads) {
      const float4 m = *entry;
#pragma unroll
      for (uint r = 0; r < kRows; ++r) sum[r] = fma(m, float4(from[r * kTilePitch]), sum[r]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (used)
    for (uint r = 0; r < kRows; ++r)
      for (uint e = 0; e < 4; ++e) rows[r * kTilePitch + 4 * c + e] = sum[r][e];
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The page's mean: writes it to the slice; high and low [dim] become the mean of the rows, offset [dim] its difference
// from the stored mean. weighted_high and weighted_low [dim]: scratch.
inline void seal_mean(thread const SealArguments& a, thread const SealPart& part, uint dim, bool rotated,
                      threadgroup float* high, threadgroup float* low, threadgroup float* weighted_high,
                      threadgroup float* weighted_low, threadgroup float* offset, uint tid) {
  if (tid < dim) {
    Precise sum = {0.0f, 0.0f};
    float used = 0.0f;
    for (uint j = 0; j < part.count; ++j) {
      if (masked(a, part, j)) continue;
      sum = add(sum, load_element(a.rows, part.dtype, part.rows + long(j) * part.stride + long(tid)));
      used += 1.0f;
    }
    Precise mean = {0.0f, 0.0f};
    if (used > 0.0f) {
      mean.high = sum.high / used;
      mean = add(mean, (fma(-mean.high, used, sum.high) + sum.low) / used);
    }
    high[tid] = mean.high;
    low[tid] = mean.low;
    const float weight = part.lambda == KV4_NONE ? 1.0f : a.lambda[part.lambda + long(tid)];
    const float product = mean.high * weight;
    weighted_high[tid] = product;
    weighted_low[tid] = fma(mean.high, weight, -product) + mean.low * weight;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < dim) {
    Precise turned = {weighted_high[tid], weighted_low[tid]};
    if (rotated) {
      turned = {0.0f, 0.0f};
      device const float* rest = a.matrix + dim * dim;
      for (uint i = 0; i < dim; ++i) {
        const float m = a.matrix[i * dim + tid];
        turned = add_product(turned, m, weighted_high[i]);
        turned.low += fma(m, weighted_low[i], rest[i * dim + tid] * weighted_high[i]);
      }
    }
    // Beyond the range of fp16 the largest finite number.
    const half stored = half(clamp(turned.high + turned.low, -65504.0f, 65504.0f));
    ((device half*)(part.slice + a.side[kv4_side_mean]))[tid] = stored;
    offset[tid] = (turned.high - float(stored)) + turned.low;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Codes and scale of one row of x, by one SIMD-group.
inline void quantise_row(thread const SealArguments& a, thread const SealPart& part, uint dim, uint row,
                         threadgroup const float* x, threadgroup const float* offset, bool mean,
                         threadgroup uchar* codes, uint lane) {
  const bool empty = masked(a, part, row);
  float squares = 0.0f, largest = 0.0f;
  for (uint c = lane; c < dim; c += kLanes) {
    const float value = empty ? 0.0f : mean ? x[c] + offset[c] : x[c];
    squares = fma(value, value, squares);
    largest = max(largest, fabs(value));
  }
  const bool abs_max = a.side[kv4_side_abs_max] != 0;
  const float of_largest = a.levels[kv4_level_of_largest];
  const float step = of_largest > 0.0f ? of_largest * simd_max(largest)
                                       : a.levels[kv4_level_of_rms] * precise::sqrt(simd_sum(squares) / float(dim));
  float products = 0.0f, level_squares = 0.0f;
  for (uint c = lane; c < dim; c += kLanes) {
    const float value = empty ? 0.0f : mean ? x[c] + offset[c] : x[c];
    const float y = step > 0.0f ? value / step : 0.0f, size = fabs(y);
    int index = 0;
    for (int i = 0; i < 7; ++i) index += size >= a.levels[kv4_level_threshold + i] ? 1 : 0;
    const int code = y < 0.0f ? int(a.side[kv4_side_negative_base]) - index : 8 + index;
    const float level = a.levels[kv4_level_table + code];
    products = fma(value, level, products);
    level_squares = fma(level, level, level_squares);
    codes[c] = uchar(code);
  }
  const float top = simd_sum(products), bottom = simd_sum(level_squares);
  const float scale = !(step > 0.0f) ? 0.0f : abs_max ? step : bottom > 0.0f ? top / bottom : 0.0f;
  if (lane == 0) ((device half*)(part.slice + a.side[kv4_side_scales]))[part.first + row] = half(min(scale, 65504.0f));
}

// Tokens [first, first + count) of codes [kTile][dim] to the slice.
inline void pack_keys(device uchar* to, uint dim, uint first, uint count, threadgroup const uchar* codes, uint tid) {
  const uint words = dim / 8;
  for (uint i = tid; i < count * words; i += KV4_ROW_THREADS) {
    const uint r = i / words, channel = i % words * 8;
    threadgroup const uchar* from = codes + r * dim + channel;
    uint word = 0;
    for (uint n = 0; n < 8; ++n) word |= uint(from[n]) << (4 * n);
    *(device uint*)(to + key_byte(first + r, channel)) = word;
  }
}
inline void pack_values(device uchar* to, uint dim, uint first, uint count, threadgroup const uchar* codes, uint tid) {
  const uint pairs = dim / 2;
  for (uint i = tid; i < pairs * (kTile / 4); i += KV4_ROW_THREADS) {
    const uint pair = i % pairs, r = i / pairs * 4;
    if (r >= count) continue;
    uint word = 0;
    for (uint n = 0; n < 4 && r + n < count; ++n) {
      threadgroup const uchar* from = codes + (r + n) * dim + 2 * pair;
      word |= (uint(from[0]) | uint(from[1]) << 4) << (8 * n);
    }
    if (r + 4 <= count && (first + r) % 4 == 0) {
      *(device uint*)(to + value_byte(first + r, 2 * pair, dim)) = word;
    } else {
      for (uint n = 0; n < 4 && r + n < count; ++n)
        to[value_byte(first + r + n, 2 * pair, dim)] = uchar(word >> (8 * n));
    }
  }
}

// One head of a job. Threadgroup memory: x [kTile * kPitch], codes [kTile * kMaxDim], the others [kMaxDim].
inline void seal_job(thread const SealArguments& a, uint index, uint head, threadgroup float* x,
                     threadgroup uchar* codes, threadgroup float* high, threadgroup float* low,
                     threadgroup float* weighted_high, threadgroup float* weighted_low, threadgroup float* offset,
                     uint tid, uint lane, uint group) {
  const SealPart part = part_of(a, index, head);
  const uint dim = uint(a.side[kv4_side_dim]), pitch = dim + 1, count = part.count;
  const bool mean = a.side[kv4_side_has_mean] != 0, rotated = a.side[kv4_side_rotated] != 0;
  device uchar* slice_codes = part.slice + a.side[kv4_side_codes];
  if (mean) seal_mean(a, part, dim, rotated, high, low, weighted_high, weighted_low, offset, tid);
  for (uint tile = 0; tile < count; tile += kTile) {
    const uint held = min(kTile, count - tile);
    for (uint i = tid; i < kTile * dim; i += KV4_ROW_THREADS) {
      const uint r = i / dim, c = i % dim;
      float value = 0.0f;
      if (r < held && !masked(a, part, tile + r)) {
        value = load_element(a.rows, part.dtype, part.rows + long(tile + r) * part.stride + long(c));
        if (mean) value = (value - high[c]) - low[c];
        if (part.lambda != KV4_NONE) value *= a.lambda[part.lambda + long(c)];
      }
      x[r * pitch + c] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (rotated) {
      if (dim == 128) multiply_tile<128, 2>(a.matrix, x, tid);
      else if (dim == 64) multiply_tile<64, 1>(a.matrix, x, tid);
      else if (dim == 256) multiply_tile<256, 4>(a.matrix, x, tid);
      else if (dim == 80) multiply_tile<80, 2>(a.matrix, x, tid);
      else multiply_tile<96, 2>(a.matrix, x, tid);
    }
    for (uint r = group; r < held; r += KV4_ROW_THREADS / kLanes)
      quantise_row(a, part, dim, tile + r, x + r * pitch, offset, mean, codes + r * dim, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (a.side[kv4_side_values] != 0) pack_values(slice_codes, dim, part.first + tile, held, codes, tid);
    else pack_keys(slice_codes, dim, part.first + tile, held, codes, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Token `token` of one head of the job as a float row: R^-1 (scale level + mean) / lambda. matrix: (R^-1)^T by rows.
inline void dequantise_row(device const uchar* pages, device const float* lambda, device const float* matrix,
                           device const long* jobs, device const long* side, device const float* levels,
                           device float* out, uint index, uint token, uint head, threadgroup float4* x4,
                           threadgroup float4* y4, threadgroup float4* partial, uint tid) {
  threadgroup float* x = (threadgroup float*)x4;
  threadgroup float* y = (threadgroup float*)y4;
  device const long* job = jobs + index * kv4_job_fields;
  const uint dim = uint(side[kv4_side_dim]), j = uint(job[kv4_job_first]) + token;
  if (long(token) >= job[kv4_job_count]) return;  // the whole threadgroup
  device const uchar* slice = pages + slice_offset(side + kv4_side_pages, job[kv4_job_page], head);
  if (tid < dim) {
    const uint byte = side[kv4_side_values] != 0 ? value_byte(j, tid, dim) : key_byte(j, tid);
    const uint code = (uint(slice[side[kv4_side_codes] + long(byte)]) >> (tid % 2 * 4)) & 15u;
    float value = float(((device const half*)(slice + side[kv4_side_scales]))[j]) * levels[kv4_level_table + code];
    if (side[kv4_side_has_mean] != 0) value += float(((device const half*)(slice + side[kv4_side_mean]))[tid]);
    x[tid] = value;
    y[tid] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  rotate_row(int(side[kv4_side_rotated]), matrix, dim, x4, y4, partial, true, tid);
  if (tid < dim) {
    const long lambda_at = job[kv4_job_lambda];
    const float weight = lambda_at == KV4_NONE ? 1.0f : lambda[lambda_at + long(head * dim + tid)];
    out[job[kv4_job_rows] + long(head) * job[kv4_job_stride_head] + long(token) * job[kv4_job_stride] + long(tid)] =
        y[tid] / weight;
  }
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_SEAL_H
