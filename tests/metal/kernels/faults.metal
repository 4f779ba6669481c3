// One mistake per kernel, each of a kind that the checker names; run with 64 threads in threadgroups of 64, n = 64.
#include <metal_stdlib>
using namespace metal;

kernel void good(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                 uint i [[thread_position_in_grid]]) {
  if (long(i) < n) out[i] = in[i];
}
kernel void read_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                          uint i [[thread_position_in_grid]]) {
  out[i] = in[i + 1];
}
kernel void write_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                           uint i [[thread_position_in_grid]]) {
  out[i + uint(n) / 64] = in[i];
}
kernel void far_away(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                     uint i [[thread_position_in_grid]]) {
  out[i] = in[i + n * 1000000000];
}
kernel void no_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                       uint i [[thread_position_in_grid]]) {
  threadgroup float tile[64];
  tile[i] = in[i];
  out[i] = tile[63 - i];
}
kernel void barrier_of_nothing(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                               uint i [[thread_position_in_grid]]) {
  threadgroup float tile[64];
  tile[i] = in[i];
  threadgroup_barrier(mem_flags::mem_none);
  out[i] = tile[63 - i];
}
kernel void barrier_of_other_memory(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                    uint i [[thread_position_in_grid]]) {
  out[i] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (out[63 - i] > 1.0e6f) out[i] = 0.0f;
}
kernel void no_simdgroup_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                 uint i [[thread_position_in_grid]]) {
  threadgroup float tile[64];
  tile[i] = in[i];
  out[i] = tile[i ^ 1];
}
kernel void same_word(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                      uint i [[thread_position_in_grid]]) {
  out[i / 2] = 1.0f;
}
kernel void between_groups(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                           uint i [[thread_index_in_threadgroup]]) {
  out[i] = in[i];
}
kernel void uninitialised_group(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                uint i [[thread_position_in_grid]]) {
  threadgroup float tile[64];
  if (i < 32) tile[i] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = tile[i];
}
kernel void uninitialised_output(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                 uint i [[thread_position_in_grid]]) {
  out[i] += in[i];
}
kernel void group_overrun(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                          uint i [[thread_position_in_grid]]) {
  threadgroup float tile[64];
  threadgroup float* p = tile;
  p[i + 1] = in[i];
  out[i] = 0.0f;
}
kernel void misaligned(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                       uint i [[thread_position_in_grid]]) {
  if (i < 8) *(device float4*)(out + i * 4) = *(device const float4*)(in + i * 4 + n / 64);
}
kernel void write_input(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                        uint i [[thread_position_in_grid]]) {
  *((device float*)in + i) = 0.0f;
}
kernel void lost_lanes(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                       uint i [[thread_position_in_grid]]) {
  if (i % 2 == 1) return;
  out[i] = simd_sum(in[i]);
}
kernel void branch_around_simd(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                               uint i [[thread_position_in_grid]]) {
  if (i % 2 == 0)
    out[i] = simd_sum(in[i]);
  else
    out[i] = simd_max(in[i]);
}
kernel void branch_around_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                  uint i [[thread_position_in_grid]]) {
  if (i < 32)
    threadgroup_barrier(mem_flags::mem_device);
  else
    threadgroup_barrier(mem_flags::mem_device);
  out[i] = in[i];
}
kernel void early_return(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                         uint i [[thread_position_in_grid]]) {
  if (i >= 60) return;
  threadgroup_barrier(mem_flags::mem_device);
  out[i] = in[i];
}
kernel void shuffle_from_nowhere(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                 uint i [[thread_position_in_grid]]) {
  out[i] = simd_shuffle_xor(in[i], ushort(32));
}
kernel void too_much_group_memory(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                                  uint i [[thread_position_in_grid]]) {
  threadgroup float tile[8193];
  tile[i] = in[i];
  out[i] = tile[i];
}
kernel void wide_shift(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                       uint i [[thread_position_in_grid]]) {
  out[i] = float(1u << (i + uint(n) / 2));
}
kernel void wild_conversion(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                            uint i [[thread_position_in_grid]]) {
  out[i] = float(char((in[i] + 1.0f) * 1000.0f));
}
kernel void private_overrun(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant long& n [[buffer(2)]],
                            uint i [[thread_position_in_grid]]) {
  float local[4];
  for (uint k = 0; k < 4; ++k) local[k] = in[k];
  thread float* p = local;
  out[i] = p[i % 8];
}
