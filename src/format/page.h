// Bytes of a sealed page. This header compiles as C++, CUDA and Metal Shading Language.
//
// A page holds 64 consecutive tokens of one sequence and one layer, for all KV heads, one
// head slice after another. A head slice of head_bytes bytes:
//
//   offset      bytes                 content
//   k_codes     k_code_bytes          key codes, in the backend's own order
//   k_scales    groups_k * 64 * 2     fp16 key scales, [group][token]
//   k_mean      head_dim_k * 2        fp16 R(lambda * mean), [channel]; absent without a mean
//   v_codes     v_code_bytes          value codes, in the backend's own order
//   v_scales    groups_v * 64 * 2     fp16 value scales, [group][token]
//
// and, where keys are refined, behind them kv4_second_layout has
//
//   codes       rows * row_bytes      second codes, 4 bits, [row][channel], in canonical order on every backend
//   scales      rows * groups_k * 2   fp16 second scales, [row][group]
//   places      rows                  the row's token, one byte
//
// Every offset is a multiple of 16, head_bytes of 64. At d = 128 a slice is 8,704 bytes:
// 136 bytes per token, 4.25 bits per value.
//
// Canonical code order (files, tests): the code of token j, channel c is bits [n, n + b) of the part, n = (j * d + c) *
// b, counted from the lowest bit of the first byte, b bits a code. At 4 bits that is byte j * d/2 + c/2, even channels
// in the low nibble; of a second row byte c/2. Channels that a backend pads hold code 0 and are never read as values.
#ifndef KV4_FORMAT_PAGE_H
#define KV4_FORMAT_PAGE_H

#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

#define KV4_PAGE_TOKENS 64

struct kv4_page_layout {
  uint32_t head_dim_k;    // channels
  uint32_t head_dim_v;    // channels
  uint32_t groups_k;      // scales per key vector
  uint32_t groups_v;      // scales per value vector
  uint32_t k_code_bytes;  // bytes of key codes in a head slice
  uint32_t v_code_bytes;  // bytes of value codes in a head slice
  uint32_t k_codes;       // byte offsets within a head slice
  uint32_t k_scales;
  uint32_t k_mean;  // equals v_codes where there is no mean
  uint32_t v_codes;
  uint32_t v_scales;
  uint32_t head_bytes;  // bytes of a head slice; a page is kv_heads of them
};

#ifdef __cplusplus
static_assert(sizeof(kv4_page_layout) == 48, "kv4_page_layout is part of the format");

// Second rows of codes, for what the first left of refined keys. Apart from the layout that device code is handed.
struct kv4_second_layout {
  uint32_t rows;       // 0: none, and nothing below counts
  uint32_t row_bytes;  // of a row's codes
  uint32_t codes;      // byte offsets within a head slice, multiples of 16
  uint32_t scales;
  uint32_t places;
};

// layout: head_bytes may be unknown.
constexpr inline kv4_second_layout kv4_make_second_layout(kv4_page_layout layout, uint32_t code_channels_k,
                                                          uint32_t rows) {
  kv4_second_layout s = {};
  s.rows = rows;
  s.row_bytes = code_channels_k / 2;
  s.codes = layout.v_scales + layout.groups_v * KV4_PAGE_TOKENS * 2;
  s.scales = (s.codes + rows * s.row_bytes + 15) / 16 * 16;
  s.places = (s.scales + rows * layout.groups_k * 2 + 15) / 16 * 16;
  return s;
}

// code_channels_*: channels the backend stores per token (>= head_dim, a multiple of 2). bits_*: of a code. refined:
// rows of kv4_second_layout.
constexpr inline kv4_page_layout kv4_make_page_layout(uint32_t head_dim_k, uint32_t head_dim_v, uint32_t groups_k,
                                                      uint32_t groups_v, bool mean, uint32_t code_channels_k,
                                                      uint32_t code_channels_v, uint32_t bits_k = 4,
                                                      uint32_t bits_v = 4, uint32_t refined = 0) {
  kv4_page_layout l = {};
  l.head_dim_k = head_dim_k;
  l.head_dim_v = head_dim_v;
  l.groups_k = groups_k;
  l.groups_v = groups_v;
  l.k_code_bytes = KV4_PAGE_TOKENS / 8 * bits_k * code_channels_k;
  l.v_code_bytes = KV4_PAGE_TOKENS / 8 * bits_v * code_channels_v;
  l.k_codes = 0;
  l.k_scales = l.k_code_bytes;
  l.k_mean = l.k_scales + groups_k * KV4_PAGE_TOKENS * 2;
  l.v_codes = (l.k_mean + (mean ? head_dim_k * 2 : 0) + 15) / 16 * 16;
  l.v_scales = l.v_codes + l.v_code_bytes;
  const kv4_second_layout second = kv4_make_second_layout(l, code_channels_k, refined);
  l.head_bytes = ((refined > 0 ? second.places + refined : second.codes) + 63) / 64 * 64;
  return l;
}
static_assert(kv4_make_page_layout(128, 128, 1, 1, true, 128, 128).head_bytes == 64 * 136,
              "4.25 bits per value at d = 128");
static_assert(kv4_make_page_layout(128, 128, 1, 1, true, 128, 128, 3, 3).head_bytes == 64 * 104,
              "3.25 bits per value at d = 128");
static_assert(kv4_make_page_layout(256, 256, 1, 1, true, 256, 256, 4, 4, 1).head_bytes ==
                  kv4_make_page_layout(256, 256, 1, 1, true, 256, 256).head_bytes + 192,
              "a refined key of 256 channels takes 131 bytes, 192 in whole lines of 64");
#endif

#endif  // KV4_FORMAT_PAGE_H
