// Attention over a cache, in two kernels after kv4_prepare. R, the rows of a block, is one of 1, 2, 3, 4, 6 and 8.
//
//   kv4_attend_d<D>_r<R>  threads (KV4_ATTEND_THREADS * splits, kv_heads * blocks, batch), KV4_ATTEND_THREADS a
//                         threadgroup
//   kv4_merge             threads (KV4_ROW_THREADS * group, T, batch * kv_heads), KV4_ROW_THREADS a threadgroup
//
// splits = exact_splits + page_splits. Every instantiation is a line of its own at the end: a host that compiles this
// text for one head dim may leave the others out.
#include "metal/merge.h"

template <int D, int R>
kernel void kv4_attend(device const float* queries [[buffer(0)]],  // kv4_prepare's output
                       device const uchar* pages [[buffer(1)]],
                       device const int* ids [[buffer(2)]],        // of pages and of blocks of exact rows
                       device const uchar* exact_k [[buffer(3)]],
                       device const uchar* exact_v [[buffer(4)]],
                       device const uchar* mask [[buffer(5)]],     // general mask
                       device const char* levels [[buffer(6)]],    // [2, 16]
                       device const long* sequences [[buffer(7)]],
                       device const long* call [[buffer(8)]],
                       device const float* factors [[buffer(9)]],
                       device float* states [[buffer(10)]],        // [batch, kv_heads, blocks, splits, R, D + 2]
                       uint3 place [[threadgroup_position_in_grid]],
                       uint tid [[thread_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]],
                       uint group [[simdgroup_index_in_threadgroup]]) {
  threadgroup float4 share[R * D / 4];
  threadgroup half2 key_table[kv4::apple::kTableSize];
  threadgroup half2 value_table[kv4::apple::kTableSize];
  threadgroup float4 p[kv4::apple::kAttendGroups * R * 16];
  threadgroup float top[kv4::apple::kAttendGroups * R];
  threadgroup float sum[kv4::apple::kAttendGroups * R];
  kv4::apple::AttendArguments a;
  a.queries = queries;
  a.pages = pages;
  a.ids = ids;
  a.exact_k = exact_k;
  a.exact_v = exact_v;
  a.mask = mask;
  a.levels = levels;
  a.sequences = sequences;
  a.call = call;
  a.factors = factors;
  kv4::apple::attend<D, R>(a, states, place.x, place.y, place.z, (threadgroup float*)share, key_table, value_table,
                           (threadgroup float*)p, top, sum, tid, lane, group);
}

template [[host_name("kv4_attend_d64_r1")]] kernel decltype(kv4_attend<64, 1>) kv4_attend<64, 1>;
template [[host_name("kv4_attend_d64_r2")]] kernel decltype(kv4_attend<64, 2>) kv4_attend<64, 2>;
template [[host_name("kv4_attend_d64_r3")]] kernel decltype(kv4_attend<64, 3>) kv4_attend<64, 3>;
template [[host_name("kv4_attend_d64_r4")]] kernel decltype(kv4_attend<64, 4>) kv4_attend<64, 4>;
template [[host_name("kv4_attend_d64_r6")]] kernel decltype(kv4_attend<64, 6>) kv4_attend<64, 6>;
template [[host_name("kv4_attend_d64_r8")]] kernel decltype(kv4_attend<64, 8>) kv4_attend<64, 8>;
template [[host_name("kv4_attend_d80_r1")]] kernel decltype(kv4_attend<80, 1>) kv4_attend<80, 1>;
template [[host_name("kv4_attend_d80_r2")]] kernel decltype(kv4_attend<80, 2>) kv4_attend<80, 2>;
template [[host_name("kv4_attend_d80_r3")]] kernel decltype(kv4_attend<80, 3>) kv4_attend<80, 3>;
template [[host_name("kv4_attend_d80_r4")]] kernel decltype(kv4_attend<80, 4>) kv4_attend<80, 4>;
template [[host_name("kv4_attend_d80_r6")]] kernel decltype(kv4_attend<80, 6>) kv4_attend<80, 6>;
template [[host_name("kv4_attend_d80_r8")]] kernel decltype(kv4_attend<80, 8>) kv4_attend<80, 8>;
template [[host_name("kv4_attend_d96_r1")]] kernel decltype(kv4_attend<96, 1>) kv4_attend<96, 1>;
template [[host_name("kv4_attend_d96_r2")]] kernel decltype(kv4_attend<96, 2>) kv4_attend<96, 2>;
template [[host_name("kv4_attend_d96_r3")]] kernel decltype(kv4_attend<96, 3>) kv4_attend<96, 3>;
template [[host_name("kv4_attend_d96_r4")]] kernel decltype(kv4_attend<96, 4>) kv4_attend<96, 4>;
template [[host_name("kv4_attend_d96_r6")]] kernel decltype(kv4_attend<96, 6>) kv4_attend<96, 6>;
template [[host_name("kv4_attend_d96_r8")]] kernel decltype(kv4_attend<96, 8>) kv4_attend<96, 8>;
template [[host_name("kv4_attend_d128_r1")]] kernel decltype(kv4_attend<128, 1>) kv4_attend<128, 1>;
template [[host_name("kv4_attend_d128_r2")]] kernel decltype(kv4_attend<128, 2>) kv4_attend<128, 2>;
template [[host_name("kv4_attend_d128_r3")]] kernel decltype(kv4_attend<128, 3>) kv4_attend<128, 3>;
template [[host_name("kv4_attend_d128_r4")]] kernel decltype(kv4_attend<128, 4>) kv4_attend<128, 4>;
template [[host_name("kv4_attend_d128_r6")]] kernel decltype(kv4_attend<128, 6>) kv4_attend<128, 6>;
template [[host_name("kv4_attend_d128_r8")]] kernel decltype(kv4_attend<128, 8>) kv4_attend<128, 8>;
template [[host_name("kv4_attend_d256_r1")]] kernel decltype(kv4_attend<256, 1>) kv4_attend<256, 1>;
template [[host_name("kv4_attend_d256_r2")]] kernel decltype(kv4_attend<256, 2>) kv4_attend<256, 2>;
template [[host_name("kv4_attend_d256_r3")]] kernel decltype(kv4_attend<256, 3>) kv4_attend<256, 3>;
template [[host_name("kv4_attend_d256_r4")]] kernel decltype(kv4_attend<256, 4>) kv4_attend<256, 4>;
template [[host_name("kv4_attend_d256_r6")]] kernel decltype(kv4_attend<256, 6>) kv4_attend<256, 6>;
template [[host_name("kv4_attend_d256_r8")]] kernel decltype(kv4_attend<256, 8>) kv4_attend<256, 8>;

kernel void kv4_merge(device const float* states [[buffer(0)]],   // kv4_attend's output
                      device const float* matrix [[buffer(1)]],   // [dim, dim]: (R^-1)^T of the values' rotation
                      device const float* lambda [[buffer(2)]],   // [kv_heads, dim] of the values, one after another
                      device const float* sinks [[buffer(3)]],    // [kv_heads * group] logits
                      device const long* sequences [[buffer(4)]],
                      device const long* call [[buffer(5)]],
                      device uchar* out [[buffer(6)]],
                      uint3 place [[threadgroup_position_in_grid]],
                      uint tid [[thread_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 x[kv4::apple::kMaxDim / 4];
  threadgroup float4 y[kv4::apple::kMaxDim / 4];
  threadgroup float4 partial[KV4_ROW_THREADS];
  kv4::apple::merge_row(states, matrix, lambda, sinks, sequences, call, out, place.x, place.y, place.z, x, y, partial,
                        tid, lane);
}
