// Which positions a query row sees, and the masking of its scores.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/attend.h"
#include "cuda/device.cuh"

namespace kv4::cuda {

// Which positions the rows of a KV head see.
struct Sight {
  long long query_position;  // of query 0
  long long start;
  int window;
  int head0, queries, b;  // head0: first query head of the KV head

  __device__ Sight(const AttendParams& p, int sequence, int kv_head)
      : query_position(p.sequences[sequence].query_position),
        start(p.mask.start != nullptr ? p.mask.offset + p.mask.start[sequence] : -(1ll << 62)),
        window(p.mask.window != nullptr ? p.mask.window[sequence] : p.window), head0(kv_head * p.group),
        queries(static_cast<int>(p.sequences[sequence].query_count)), b(sequence) {}

  // First and last position that every row sees, where there is no general mask.
  __device__ long long first_of_all(const AttendParams& p) const {
    return window > 0 ? max(start, query_position + queries - window) : start;
  }
  __device__ long long last_of_all(const AttendParams& p) const { return p.mask.causal ? query_position : 1ll << 62; }

  // First and last position that `row` sees; an empty range for rows that do not exist.
  __device__ longlong2 range(const AttendParams& p, int row) const {
    if (row >= p.group * queries) return {0, -1};
    const long long query = query_position + row / p.group;
    return {window > 0 ? max(start, query - window + 1) : start, p.mask.causal ? query : 1ll << 62};
  }
};

// The page that does not hold kPageTokens tokens; -1: none.
__device__ __forceinline__ int broken_page(const AttendParams& p, int b) {
  const SequenceView& s = p.sequences[b];
  return s.last_page_tokens < kPageTokens ? s.page_count - 1 : -1;
}

// First and last page that every row sees whole.
__device__ __forceinline__ int2 plain_pages(const AttendParams& p, int b, int kv_head) {
  const SequenceView& s = p.sequences[b];
  int2 plain = {s.pages_hidden > 0 ? 1 : 0, s.page_count - (s.last_page_tokens < kPageTokens ? 2 : 1)};
  if (p.mask.kind != Mask::General::none) {
    plain.y = -1;
  } else {
    const Sight sight(p, b, kv_head);
    const long long low = sight.first_of_all(p) - s.pages_position, high = sight.last_of_all(p) + 1 - s.pages_position;
    if (low > 0)
      plain.x = max(plain.x,
                    static_cast<int>(min((low + kPageTokens - 1) / kPageTokens, static_cast<long long>(s.page_count))));
    plain.y = high <= 0 ? -1 : static_cast<int>(min(high / kPageTokens - 1, static_cast<long long>(plain.y)));
  }
  return plain;
}

// The general mask on one score: a cold path, kept out of line.
__device__ __noinline__ inline float general_mask(const AttendParams& p, int b, int head, int query, long long position,
                                                  float score) {
  const long long column = position - p.mask.offset;
  if (column < 0 || column >= p.mask.columns) return -INFINITY;
  const auto& stride = p.mask.general_stride;
  const SequenceView& s = p.sequences[b];
  const long long at = s.input * stride[0] + head * stride[1] + (s.input_row + query) * stride[2] + column * stride[3];
  if (p.mask.kind == Mask::General::boolean)
    return static_cast<const unsigned char*>(p.mask.general)[at] != 0 ? score : -INFINITY;
  constexpr float kLog2e = 1.4426950408889634f;
  const float added = load_element(p.mask.general, p.mask.general_dtype, at);
  const float lowest = p.mask.general_dtype == DType::f16 ? -65504.0f : -1e30f;
  return added > lowest ? score + added * kLog2e : -INFINITY;
}

__device__ __noinline__ inline float soft_cap(float cap, float x) { return cap * tanhf(x); }

// Masks the scores that the row does not see. token(i): offset of score i from `position`; offsets before `hidden` and
// from `tokens` on do not exist. kRolled: the general mask as a loop, for code that runs once, where fetching unrolled
// instructions costs more. In the loop over a warp's pages a rolled mask costs 4 % through register pressure, even
// where there is no general mask.
template <int kScores, bool kRolled, class Token>
__device__ __forceinline__ void hide(const AttendParams& p, int b, int kv_head, int row, long long position, int hidden,
                                     int tokens, float* score, Token token) {
  const Sight sight(p, b, kv_head);
  const longlong2 seen = sight.range(p, row);
  const int first = static_cast<int>(max(seen.x - position, static_cast<long long>(hidden)));
  const int last = static_cast<int>(min(seen.y - position, static_cast<long long>(tokens - 1)));
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int j = token(i);
    if (j < first || j > last) score[i] = -INFINITY;
    else if (!kRolled && p.mask.kind != Mask::General::none)
      score[i] = general_mask(p, sight.b, sight.head0 + row % p.group, row / p.group, position + j, score[i]);
  }
  if constexpr (kRolled) {
    if (p.mask.kind == Mask::General::none) return;
#pragma unroll 1
    for (int i = 0; i < kScores; ++i) {  // rotates the scores, so that each is the first once
      const int j = token(i);
      float x = score[0];
      if (j >= first && j <= last)
        x = general_mask(p, sight.b, sight.head0 + row % p.group, row / p.group, position + j, x);
#pragma unroll
      for (int n = 1; n < kScores; ++n) score[n - 1] = score[n];
      score[kScores - 1] = x;
    }
  }
}

// The same for page `page` of the sequence. What depends on the page is computed where it is needed, to save registers.
template <int kScores, bool kRolled, class Token>
__device__ __forceinline__ void hide_page(const AttendParams& p, int b, int kv_head, int row, int page, float* score,
                                          Token token) {
  const SequenceView& s = p.sequences[b];
  hide<kScores, kRolled>(p, b, kv_head, row, s.pages_position + static_cast<long long>(page) * kPageTokens,
                         page == 0 ? s.pages_hidden : 0, page + 1 == s.page_count ? s.last_page_tokens : kPageTokens,
                         score, token);
}

}  // namespace kv4::cuda
