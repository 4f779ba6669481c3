// Attention of up to R query rows of one KV head over a stretch of the cache, by one threadgroup of 4 SIMD-groups. Each
// SIMD-group takes a page, or 64 exact rows, at a time and keeps its own state (m, l, o) in registers; rows are queries
// times query heads of the KV head, so that codes are unpacked once for all of them.
//
//   scores   lanes own keys: lane l tokens 2l and 2l + 1 of the 64, all channels. No sum across lanes.
//   weights  exp2(score - m) times the value's scale, to threadgroup memory.
//   output   lanes own pairs of channels, all tokens. No sum across lanes.
//
// Scores and maxima are in units of log2. Count for d = 128, lane-instructions per key of int4 (docs/metal_model.md has
// the compiled numbers): 256 multiply-adds a row, 2 * 64 look-ups of a byte in a table of level pairs and as many
// extracts, a load of four query or weight numbers per 8 and 16 multiply-adds, about 15 a row for the softmax. Bytes:
// 136.
#ifndef KV4_METAL_ATTEND_H
#define KV4_METAL_ATTEND_H

#include "metal/device.h"

namespace kv4 {
namespace apple {

constant constexpr uint kAttendGroups = KV4_ATTEND_THREADS / 32;
// Copies of each table entry side by side, for lanes l, l + 4, ...: random look-ups then have fewer bank conflicts.
constant constexpr uint kTableCopies = 4;
constant constexpr uint kTableSize = 256 * kTableCopies;
constant constexpr float kHidden = -1e38f;       // a masked score; finite, for fast math
constant constexpr float kHiddenBelow = -1e37f;  // scores at or below are hidden
constant constexpr float kLog2e = 1.44269504088896341f;

// Pairs of channels of a lane.
template <int D>
struct Pairs {
  static constant constexpr int count = (D / 2 + 31) / 32;
};

struct AttendArguments {
  device const float* queries;  // prepare_row's output
  device const uchar* pages;
  device const int* ids;  // of pages and of blocks of exact rows
  device const uchar* exact_k;
  device const uchar* exact_v;
  device const uchar* mask;
  device const char* levels;  // [2, 16]: keys, values
  device const long* sequences;
  device const long* call;
  device const float* factors;
};

// The query rows of a threadgroup.
struct Block {
  uint b, head;    // sequence, KV head
  uint first_row;  // of the KV head's rows, its sequence's queries times the group
  uint rows;
  uint group;
  long input;  // the call's tensors: index of axis 0, and of axis 2 of query 0
  long input_row;
  long query_position;  // of query 0
  long first_query;     // positions of the first and the last query of the block
  long last_query;
  long start;
  long window;
  bool causal;
};

template <int D, int R>
struct State {
  float m[R];  // the same in all lanes
  float l[R];  // of the lane's own keys
  float2 o[R][(D / 2 + 31) / 32];
};

template <int D, int R>
inline void clear(thread State<D, R>& state) {
  for (int r = 0; r < R; ++r) {
    state.m[r] = kHidden;
    state.l[r] = 0.0f;
    for (int n = 0; n < Pairs<D>::count; ++n) state.o[r][n] = float2(0.0f);
  }
}

inline Block block_of(thread const AttendArguments& a, uint b, uint head, uint block) {
  device const long* s = a.sequences + b * kv4_sequence_fields;
  Block out;
  out.b = b;
  out.head = head;
  out.first_row = block * uint(a.call[kv4_call_block_rows]);
  out.group = uint(a.call[kv4_call_group]);
  out.rows = out.group * uint(s[kv4_sequence_queries]);
  out.input = s[kv4_sequence_input];
  out.input_row = s[kv4_sequence_input_row];
  out.query_position = s[kv4_sequence_query_position];
  out.first_query = out.query_position + long(out.first_row / out.group);
  out.last_query = out.query_position +
                   long((min(out.first_row + uint(a.call[kv4_call_block_rows]), out.rows) - 1) / out.group);
  out.start = s[kv4_sequence_start];
  out.window = s[kv4_sequence_window];
  out.causal = a.call[kv4_call_causal] != 0;
  return out;
}

// Applies the general mask to a score.
inline float general_mask(thread const AttendArguments& a, thread const Block& block, uint row, long position,
                          float score) {
  device const long* c = a.call;
  const long column = position - c[kv4_call_general_offset];
  if (column < 0 || column >= c[kv4_call_general_columns]) return kHidden;
  const long at = block.input * c[kv4_call_general_stride_batch] +
                  long(block.head * block.group + row % block.group) * c[kv4_call_general_stride_head] +
                  (block.input_row + long(row / block.group)) * c[kv4_call_general_stride_query] +
                  column * c[kv4_call_general_stride_column];
  if (c[kv4_call_general_kind] == 1) return a.mask[at] != 0 ? score : kHidden;
  const int dtype = int(c[kv4_call_general_dtype]);
  const float added = load_element(a.mask, dtype, at);
  return added > (dtype == 1 ? -65504.0f : -1e30f) ? score + added * kLog2e : kHidden;
}

// Masks the lane's scores of tokens 2 lane and 2 lane + 1 from `position` that a row does not see, or that do not
// exist: tokens `hidden` ... `tokens` - 1 do.
template <int R>
inline void hide(thread const AttendArguments& a, thread const Block& block, long position, int hidden, int tokens,
                 uint lane, thread float2* s) {
  const bool general = a.call[kv4_call_general_kind] != 0;
  for (int r = 0; r < R; ++r) {
    const uint row = block.first_row + uint(r);
    const long query = block.query_position + long(row / block.group);
    const long first = block.window > 0 ? max(block.start, query - block.window + 1) : block.start;
    for (int e = 0; e < 2; ++e) {
      const int j = int(2 * lane) + e;
      const long at = position + long(j);
      float score = s[r][e];
      if (j < hidden || j >= tokens || row >= block.rows || at < first || (block.causal && at > query)) score = kHidden;
      else if (general) score = general_mask(a, block, row, at, score);
      s[r][e] = score;
    }
  }
}

// Whether every row sees all 64 positions from `position` on; and whether none sees any of `tokens`.
inline bool all_seen(thread const AttendArguments& a, thread const Block& block, long position, int hidden,
                     int tokens) {
  return hidden == 0 && tokens == int(kPageTokens) && a.call[kv4_call_general_kind] == 0 && position >= block.start &&
         (block.window <= 0 || position > block.last_query - block.window) &&
         (!block.causal || position + long(kPageTokens) - 1 <= block.first_query);
}
inline bool none_seen(thread const Block& block, long position, int tokens) {
  const long last = position + long(tokens) - 1;
  return last < block.start || (block.window > 0 && last <= block.first_query - block.window) ||
         (block.causal && position > block.last_query);
}

// Scores of 64 tokens to weights: masks, raises the maxima, adds to l, rescales o, and writes weight times `scale` to
// p [R][64]. All lanes.
template <int D, int R>
inline void weigh(thread const AttendArguments& a, thread const Block& block, thread State<D, R>& state,
                  thread float2* s, float2 scale, long position, int hidden, int tokens, threadgroup float* p,
                  uint lane) {
  const float cap = a.factors[kv4_factor_cap];
  if (cap > 0.0f)
    for (int r = 0; r < R; ++r) s[r] = cap * precise::tanh(s[r]);
  if (!all_seen(a, block, position, hidden, tokens)) hide<R>(a, block, position, hidden, tokens, lane, s);
  for (int r = 0; r < R; ++r) {
    const float top = simd_max(max(s[r].x, s[r].y));
    if (top > state.m[r]) {
      const float shrink = exp2(state.m[r] - top);
      state.m[r] = top;
      state.l[r] *= shrink;
      for (int n = 0; n < Pairs<D>::count; ++n) state.o[r][n] *= shrink;
    }
    const float x = s[r].x <= kHiddenBelow ? 0.0f : exp2(s[r].x - state.m[r]);
    const float y = s[r].y <= kHiddenBelow ? 0.0f : exp2(s[r].y - state.m[r]);
    state.l[r] += x + y;
    ((threadgroup float2*)p)[uint(r) * (kPageTokens / 2) + lane] = float2(x * scale.x, y * scale.y);
  }
}

// s[r] = sum over channels of q[r] times the levels of tokens 2 lane and 2 lane + 1. `table`: the lane's copies.
template <int D, int R>
inline void key_scores(device const uint4* codes, threadgroup const float4* q, threadgroup const half2* table,
                       uint lane, thread float2* s) {
  for (int r = 0; r < R; ++r) s[r] = float2(0.0f);
  for (int i = 0; i < D / 16; ++i) {
    const uint4 w = codes[uint(i) * kLanes + lane];
    threadgroup const float4* from = q + i * 4;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint x = (n < 2 ? w.x : w.y) >> (16 * (n % 2)), y = (n < 2 ? w.z : w.w) >> (16 * (n % 2));
      const half2 x0 = table[(x & 255u) * kTableCopies], x1 = table[((x >> 8) & 255u) * kTableCopies];
      const half2 y0 = table[(y & 255u) * kTableCopies], y1 = table[((y >> 8) & 255u) * kTableCopies];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float4 four = from[r * (D / 4) + n];
        s[r].x = fma(four.x, float(x0.x),
                     fma(four.y, float(x0.y), fma(four.z, float(x1.x), fma(four.w, float(x1.y), s[r].x))));
        s[r].y = fma(four.x, float(y0.x),
                     fma(four.y, float(y0.y), fma(four.z, float(y1.x), fma(four.w, float(y1.y), s[r].y))));
      }
    }
  }
}

// o[r] += sum over the 64 tokens of p[r] times the levels of the lane's channels.
template <int D, int R>
inline void add_values(device const uint4* codes, threadgroup const float4* p, threadgroup const half2* table,
                       uint lane, thread State<D, R>& state) {
  constexpr int kPairs = (D / 2 + 31) / 32;
  for (int t = 0; t < 4; ++t) {
    threadgroup const float4* from = p + t * 4;
    uint4 w[kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) w[n] = codes[uint(t) * (D / 2) + min(lane + uint(n) * kLanes, uint(D / 2 - 1))];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      half2 v[kPairs][4];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const uint x = k == 0 ? w[n].x : k == 1 ? w[n].y : k == 2 ? w[n].z : w[n].w;
        v[n][0] = table[(x & 255u) * kTableCopies];
        v[n][1] = table[((x >> 8) & 255u) * kTableCopies];
        v[n][2] = table[((x >> 16) & 255u) * kTableCopies];
        v[n][3] = table[(x >> 24) * kTableCopies];
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float4 four = from[r * 16 + k];
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          const float2 o = state.o[r][n];
          state.o[r][n] = float2(
              fma(four.x, float(v[n][0].x),
                  fma(four.y, float(v[n][1].x), fma(four.z, float(v[n][2].x), fma(four.w, float(v[n][3].x), o.x)))),
              fma(four.x, float(v[n][0].y),
                  fma(four.y, float(v[n][1].y), fma(four.z, float(v[n][2].y), fma(four.w, float(v[n][3].y), o.y)))));
        }
      }
    }
  }
}

// Pages [first + group, last) of the sequence, every kAttendGroups-th. q: rotated queries; p: of this SIMD-group.
template <int D, int R>
inline void attend_pages(thread const AttendArguments& a, thread const Block& block, thread State<D, R>& state,
                         uint first, uint last, threadgroup const float* q, threadgroup const half2* key_table,
                         threadgroup const half2* value_table, threadgroup float* p, uint lane, uint group) {
  device const long* s = a.sequences + block.b * kv4_sequence_fields;
  device const long* c = a.call;
  const uint count = uint(s[kv4_sequence_page_count]), copy = lane % kTableCopies;
  for (uint page = first + group; page < last; page += kAttendGroups) {
    const int tokens = page + 1 == count ? int(s[kv4_sequence_last_page_tokens]) : int(kPageTokens);
    const int hidden = page == 0 ? int(s[kv4_sequence_pages_hidden]) : 0;
    const long position = s[kv4_sequence_pages_position] + long(page * kPageTokens);
    if (none_seen(block, position, tokens)) continue;
    device const uchar* slice =
        a.pages + slice_offset(c + kv4_call_pages, long(a.ids[s[kv4_sequence_ids] + long(page)]), block.head);
    float2 score[R];
    key_scores<D, R>((device const uint4*)slice, (threadgroup const float4*)q, key_table + copy, lane, score);
    const half2 stored = ((device const half2*)(slice + c[kv4_call_k_scales]))[lane];
    const float2 scale = float2(stored);
    float2 value_scale = float2(((device const half2*)(slice + c[kv4_call_v_scales]))[lane]);
    // Scales of absent tokens are undefined.
    const int j = int(2 * lane);
    if (j < hidden || j >= tokens) value_scale.x = 0.0f;
    if (j + 1 < hidden || j + 1 >= tokens) value_scale.y = 0.0f;
    for (int r = 0; r < R; ++r) score[r] *= scale;
    if (c[kv4_call_has_mean] != 0) {
      device const half* mean = (device const half*)(slice + c[kv4_call_k_mean]);
      float part[R];
      for (int r = 0; r < R; ++r) part[r] = 0.0f;
      for (uint i = lane; i < uint(D); i += kLanes) {
        const float mu = float(mean[i]);
        for (int r = 0; r < R; ++r) part[r] = fma(q[uint(r) * D + i], mu, part[r]);
      }
      for (int r = 0; r < R; ++r) score[r] += simd_sum(part[r]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // p of the previous page has been read
    weigh<D, R>(a, block, state, score, value_scale, position, hidden, tokens, p, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    add_values<D, R>((device const uint4*)(slice + c[kv4_call_v_codes]), (threadgroup const float4*)p,
                     value_table + copy, lane, state);
  }
}

// Exact rows: items of 64 rows of the sinks, then of the window; items [first + group, ..) every `step`-th.
// q: queries as they are.
template <int D, int R>
inline void attend_exact(thread const AttendArguments& a, thread const Block& block, thread State<D, R>& state,
                         uint first, uint step, threadgroup const float* q, threadgroup float* p, uint lane) {
  constexpr int kPairs = (D / 2 + 31) / 32;
  const int dtype = int(a.call[kv4_call_exact_dtype]);
  uint item = 0;
  for (uint set = 0; set < 2; ++set) {
    device const long* x = a.sequences + block.b * kv4_sequence_fields + kv4_sequence_exact + set * kv4_exact_fields;
    const long count = x[kv4_exact_count];
    const long k_stride = x[kv4_exact_k_stride], v_stride = x[kv4_exact_v_stride];
    const long k_head = x[kv4_exact_k_offset] + long(block.head) * x[kv4_exact_k_stride_head];
    const long v_head = x[kv4_exact_v_offset] + long(block.head) * x[kv4_exact_v_stride_head];
    const long k_block = x[kv4_exact_k_stride_block], v_block = x[kv4_exact_v_stride_block], ids = x[kv4_exact_ids];
    const bool k_aligned = ((k_stride | k_head | k_block) & 3) == 0,
               v_aligned = ((v_stride | v_head | v_block) & 1) == 0;
    for (long row = 0; row < count; row += long(kPageTokens), ++item) {
      if (item % step != first) continue;
      const int tokens = int(min(count - row, long(kPageTokens)));
      const long position = x[kv4_exact_position] + row;
      if (none_seen(block, position, tokens)) continue;
      const long id = ids < 0 ? 0 : long(a.ids[ids + row / long(kPageTokens)]);
      const long k_first = k_head + (ids < 0 ? row * k_stride : id * k_block);
      const long v_first = v_head + (ids < 0 ? row * v_stride : id * v_block);
      float2 score[R];
      for (int r = 0; r < R; ++r) score[r] = float2(0.0f);
      // Lanes past the last token repeat it with a weight of 0.
      const long k0 = k_first + long(min(int(2 * lane), tokens - 1)) * k_stride;
      const long k1 = k_first + long(min(int(2 * lane) + 1, tokens - 1)) * k_stride;
      device const uchar* row0 = a.exact_k + k0 * long(element_bytes(dtype));
      device const uchar* row1 = a.exact_k + k1 * long(element_bytes(dtype));
      for (int i = 0; i < D / 4; ++i) {
        const float4 x = load_four(row0, dtype, uint(4 * i), k_aligned),
                     y = load_four(row1, dtype, uint(4 * i), k_aligned);
        threadgroup const float4* from = (threadgroup const float4*)q + i;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float4 four = from[r * (D / 4)];
          score[r].x = fma(four.x, x.x, fma(four.y, x.y, fma(four.z, x.z, fma(four.w, x.w, score[r].x))));
          score[r].y = fma(four.x, y.x, fma(four.y, y.y, fma(four.z, y.z, fma(four.w, y.w, score[r].y))));
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      weigh<D, R>(a, block, state, score, float2(1.0f), position, 0, tokens, p, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (int j = 0; j < tokens; j += 4) {
        float2 v[kPairs][4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const long at = v_first + long(min(j + e, tokens - 1)) * v_stride;
          device const uchar* value = a.exact_v + at * long(element_bytes(dtype));
#pragma unroll
          for (int n = 0; n < kPairs; ++n)
            v[n][e] = load_two(value, dtype, 2 * min(lane + uint(n) * kLanes, uint(D / 2 - 1)), v_aligned);
        }
        threadgroup const float4* from = (threadgroup const float4*)p + j / 4;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float4 four = from[r * 16];
#pragma unroll
          for (int n = 0; n < kPairs; ++n) {
            const float2 o = state.o[r][n];
            state.o[r][n] = float2(
                fma(four.x, v[n][0].x, fma(four.y, v[n][1].x, fma(four.z, v[n][2].x, fma(four.w, v[n][3].x, o.x)))),
                fma(four.x, v[n][0].y, fma(four.y, v[n][1].y, fma(four.z, v[n][2].y, fma(four.w, v[n][3].y, o.y)))));
          }
        }
      }
    }
  }
}

// Tables of pairs of levels: entry n is (level of its low nibble, level of its high one). All threads.
inline void fill_table(device const char* levels, threadgroup half2* table, uint tid) {
  for (uint i = tid; i < kTableSize; i += KV4_ATTEND_THREADS) {
    const uint n = i / kTableCopies;
    table[i] = half2(half(levels[n & 15u]), half(levels[n >> 4]));
  }
}

// One threadgroup's work: split `split` of exact_splits + page_splits, of block `block` of KV head `head` of sequence
// b. Nothing where the sequence has fewer rows. Writes states[b][head][block][split][R][D + 2]: o, m, l. Threadgroup
// memory: share [R * D], tables [kTableSize], p [kAttendGroups * R * 64], top and sum [kAttendGroups * R].
template <int D, int R>
inline void attend(thread const AttendArguments& a, device float* states, uint split, uint head_block, uint b,
                   threadgroup float* share, threadgroup half2* key_table, threadgroup half2* value_table,
                   threadgroup float* p, threadgroup float* top, threadgroup float* sum, uint tid, uint lane,
                   uint group) {
  device const long* c = a.call;
  const uint blocks = uint(c[kv4_call_blocks]), heads = uint(c[kv4_call_kv_heads]);
  const uint exact_splits = uint(c[kv4_call_exact_splits]), page_splits = uint(c[kv4_call_page_splits]);
  const uint head = head_block / blocks, block_index = head_block % blocks;
  const Block block = block_of(a, b, head, block_index);
  if (block.first_row >= block.rows) return;  // the whole threadgroup
  const uint rows = block.group * uint(c[kv4_call_queries]);
  const bool exact = split < exact_splits;

  device const float* from = a.queries + (exact ? 0 : long(c[kv4_call_batch]) * long(heads) * long(rows) * long(D)) +
                             (long(b * heads + head) * long(rows) + long(block.first_row)) * long(D);
  const uint held = min(uint(R), block.rows - block.first_row) * uint(D);
  for (uint i = tid; i < uint(R * D); i += KV4_ATTEND_THREADS) share[i] = i < held ? from[i] : 0.0f;
  if (!exact) {
    fill_table(a.levels, key_table, tid);
    fill_table(a.levels + 16, value_table, tid);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  State<D, R> state;
  clear<D, R>(state);
  threadgroup float* own = p + group * (uint(R) * kPageTokens);
  if (exact) {
    attend_exact<D, R>(a, block, state, split * kAttendGroups + group, exact_splits * kAttendGroups, share, own, lane);
  } else {
    const uint count = uint(a.sequences[b * kv4_sequence_fields + kv4_sequence_page_count]), k = split - exact_splits;
    attend_pages<D, R>(a, block, state, count * k / page_splits, count * (k + 1) / page_splits, share, key_table,
                       value_table, own, lane, group);
  }

  for (int r = 0; r < R; ++r) {
    const float l = simd_sum(state.l[r]);
    if (lane == 0) {
      top[group * uint(R) + uint(r)] = state.m[r];
      sum[group * uint(R) + uint(r)] = l;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // and all have read the queries
  for (int r = 0; r < R; ++r) {
    float m = kHidden;
    for (uint g = 0; g < kAttendGroups; ++g) m = max(m, top[g * uint(R) + uint(r)]);
    const float weight = state.m[r] <= kHiddenBelow ? 0.0f : exp2(state.m[r] - m);
    for (int n = 0; n < Pairs<D>::count; ++n) state.o[r][n] *= weight;
  }
  for (uint g = 0; g < kAttendGroups; ++g) {
    if (g == group) {
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < Pairs<D>::count; ++n) {
          const uint pair = lane + uint(n) * kLanes;
          if (pair >= uint(D / 2)) continue;
          threadgroup float2* at = (threadgroup float2*)(share + r * D) + pair;
          *at = g == 0 ? state.o[r][n] : *at + state.o[r][n];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  const long slot = (long(b * heads + head) * long(blocks) + long(block_index)) * long(exact_splits + page_splits) +
                    long(split);
  device float* out = states + slot * long(R * (D + 2));
  for (uint i = tid; i < uint(R * D); i += KV4_ATTEND_THREADS) out[i / uint(D) * uint(D + 2) + i % uint(D)] = share[i];
  if (tid < uint(R)) {
    float m = kHidden, l = 0.0f;
    for (uint g = 0; g < kAttendGroups; ++g) m = max(m, top[g * uint(R) + tid]);
    for (uint g = 0; g < kAttendGroups; ++g) {
      const float own_m = top[g * uint(R) + tid];
      l += own_m <= kHiddenBelow ? 0.0f : sum[g * uint(R) + tid] * exp2(own_m - m);
    }
    out[tid * uint(D + 2) + uint(D)] = m;
    out[tid * uint(D + 2) + uint(D + 1)] = l;
  }
}

}  // namespace apple
}  // namespace kv4

#endif  // KV4_METAL_ATTEND_H
