// What the emulator's own tests run: one kernel per feature of the language or of a launch.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define LANES 32

constant float kTable[4] = {1.0f, 2.0f, 4.0f, 8.0f};

template <typename T>
inline float sum_of(device const T* x, uint n) {
  float sum = 0.0f;
  for (uint i = 0; i < n; ++i) sum += float(x[i]);
  return sum;
}

// Every way to write a vector; results one per line of `out`.
kernel void vectors(device float* out [[buffer(0)]], constant float4& v [[buffer(1)]]) {
  float4 a = v;
  a.xy = v.zw;
  a.b += 1.0f;
  const float3 b = float3(a.x, v.yz);
  const half4 h = half4(v) * 2.0h;
  const ushort4 u = (ushort4(0x4321) >> ushort4(0, 4, 8, 12)) & ushort4(15);
  const bool4 less = v < float4(2.5f);
  const int4 rounded = int4(rint(v * 1.5f));
  const vec<float, 2> c = vec<float, 2>(b.yz);
  out[0] = dot(a, v);
  out[1] = b.x + b.y * 10.0f + b.z * 100.0f;
  out[2] = float(h.x + h.w);
  out[3] = dot(float4(u), float4(1.0f, 10.0f, 100.0f, 1000.0f));
  out[4] = dot(select(float4(0.0f), float4(1.0f), less), v);
  out[5] = float(rounded.x + rounded.y * 10 + rounded.z * 100);
  out[6] = c.x - c.y;
  out[7] = any(less) && !all(less) ? kTable[2] : 0.0f;
  out[8] = as_type<float>(as_type<uint>(v.y) + 1u);
  out[9] = clamp(v, 1.5f, 2.5f).x + max(v, float4(3.5f)).y + fma(v.x, v.y, v.z);
}

kernel void packed(device const packed_float3* in [[buffer(0)]], device packed_half4* halves [[buffer(1)]],
                   device float* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const float3 v = in[i];
  halves[i] = half4(half3(v), 1.0h);
  out[i] = v.x + v.y + v.z;
}

kernel void bfloats(device const bfloat* in [[buffer(0)]], device bfloat* out [[buffer(1)]],
                    uint i [[thread_position_in_grid]]) {
  out[i] = bfloat(float(in[i]) * 1.01f) + in[i];
}

kernel void matrices(constant float4x4& m [[buffer(0)]], device float4* out [[buffer(1)]]) {
  const float4x4 t = transpose(m);
  out[0] = m * float4(1.0f, 2.0f, 3.0f, 4.0f);
  out[1] = t[1];
}

kernel void tiles(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]], device float* out [[buffer(2)]],
                  threadgroup half* stage [[threadgroup(0)]], ushort lane [[thread_index_in_simdgroup]]) {
  for (ushort i = lane; i < 64; i += LANES) stage[i] = b[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_half8x8 left, right;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_load(left, a, 8);
  simdgroup_load(right, stage, 8, ulong2(0, 0), true);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, out, 8);
}

kernel void lanes(device float* out [[buffer(0)]], ushort lane [[thread_index_in_simdgroup]]) {
  const float x = float(lane);
  out[lane] = simd_sum(x);
  out[32 + lane] = simd_prefix_exclusive_sum(x);
  out[64 + lane] = simd_shuffle_xor(x, ushort(5));
  out[96 + lane] = simd_shuffle_down(x, ushort(4));
  out[128 + lane] = quad_broadcast(x, ushort(2));
  out[160 + lane] = simd_max(fmod(x * 7.0f, 32.0f));
  out[192 + lane] = simd_all(x < 32.0f) && !simd_any(x > 31.5f) ? 1.0f : 0.0f;
}

kernel void histogram(device const uint* in [[buffer(0)]], device atomic_uint* bins [[buffer(1)]], constant long& n [[buffer(2)]],
                      uint i [[thread_position_in_grid]], uint tid [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint local[8];
  if (tid < 8) atomic_store_explicit(&local[tid], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (long(i) < n) atomic_fetch_add_explicit(&local[in[i] & 7u], 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < 8)
    atomic_fetch_add_explicit(&bins[tid], atomic_load_explicit(&local[tid], memory_order_relaxed), memory_order_relaxed);
}

// Partial threadgroups: position, sizes, lanes.
kernel void positions(device uint* out [[buffer(0)]], uint2 at [[thread_position_in_grid]], uint2 size [[threads_per_grid]],
                      uint2 group [[threads_per_threadgroup]], uint2 full [[dispatch_threads_per_threadgroup]],
                      uint2 where [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]],
                      uint simds [[simdgroups_per_threadgroup]]) {
  device uint* row = out + (at.y * size.x + at.x) * 8;
  row[0] = group.x;
  row[1] = group.y;
  row[2] = full.x;
  row[3] = where.x + 10 * where.y;
  row[4] = index;
  row[5] = lane;
  row[6] = simd;
  row[7] = simds;
}

kernel void denormals(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  out[i] = in[i] * 0.5f;
}

template <typename T, int N>
kernel void totals(device const T* in [[buffer(0)]], device float* out [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  out[i] = sum_of(in + i * N, N);
}
#define INSTANCE(name, T, N) \
  template [[host_name(name)]] kernel void totals<T, N>(device const T*, device float*, uint);
INSTANCE("totals_f16_3", half, 3)
INSTANCE("totals_f32_4", float, 4)
typedef decltype(totals<uchar, 5>) totals_t;
template [[host_name("totals_u8_5")]] kernel totals_t totals<uchar, 5>;

constant float kFactor [[function_constant(0)]];
kernel void scaled(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  x[i] *= kFactor;
}

// All arrays of threads pass one value along: the order of lanes must not matter.
[[max_total_threads_per_threadgroup(256)]] kernel void relay(device const uint* in [[buffer(0)]], device uint* out [[buffer(1)]],
                                                             uint i [[thread_position_in_grid]], uint tid [[thread_index_in_threadgroup]],
                                                             uint n [[threads_per_threadgroup]]) {
  threadgroup uint a[256];
  threadgroup uint b[2][128];
  a[tid] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint next = a[(tid + 1) % n];
  b[tid / 128][tid % 128] = next + simd_shuffle_xor(next, ushort(1));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint other = n - 1 - tid;
  out[i] = b[other / 128][other % 128];
}
