// Attention of a few query rows over sealed pages, in integers.
//
//   score_j = q_scale k_scale_j sum_c q_c L[n_jc] + q'.m'      q_c int16, one q_scale per row and group
//   o_c    += w_scale sum_j w_j L[n_jc]                        w_j int16 of 2^(score_j - m) v_scale_j
//
// Codes are unpacked once for up to kTileRows rows. Instructions per token, KV head and R rows at
// d = 128 with one scale per vector; keys and values cost the same (counted in dot.h, /8 or /16 lanes):
//
//                        unpacking      products      softmax, weights, mean, o     bytes of the page
//   AVX2 (Zen 3)         2 x 22         R x 2 x 24    about R x 12                  136
//   AVX-512 VNNI         2 x 6          R x 2 x 4     about R x 6                   136
//
// A Zen 3 core starts at most 6 instructions and 2 vpmaddwd a cycle, so a token takes at least 17 cycles at
// R = 1 and 47 at R = 4; memory at 10 GB/s a core and 4 GHz takes 54. Up to four rows memory binds, then issue.
//
// Rounding: q_c is off by half a unit in 32512 of the row's largest q', w_j by half a unit in 32512
// of the page's largest weight: 1.5e-5 of the largest term either way. Overflow: 64 tokens of |w| <= 32512
// and |L| <= 127 stay below 2^28; keys are bounded in dot.h.
#pragma once

#include "cpu/softmax.inl"

namespace kv4::cpu::KV4_ISA {

// A page that contributes less than this to l >= 1 leaves o as it is: 2^14 such pages change less
// than the last bit of a float.
constexpr float kNegligible = 0x1p-40f;

// n (a multiple of 16) numbers as an operand of Dot. Returns their unit; `sum` is the sum of the integers.
template <class V>
inline float quantise(const float* x, int n, std::uint8_t* operand, std::int32_t* sum) {
  using F = typename V::F;
  using I = typename V::I;
  F largest = V::set1(0.0f);
  for (int i = 0; i < n; i += V::kLanes) largest = V::max(largest, V::abs(V::load(x + i)));
  const float top = V::reduce_max(largest);
  *sum = 0;
  if (!(top > 1e-30f && top <= std::numeric_limits<float>::max())) {
    std::memset(operand, 0, static_cast<std::size_t>(n) * 2);
    return top <= 1e-30f ? 0.0f : top;  // an infinite unit turns the products into NaN, which the caller looks for
  }
  const F inverse = V::set1(Dot::kLimit / top);
  I total{};
  alignas(64) std::int32_t v[16];
  for (int i = 0; i < n; i += 16) {
    for (int lane = 0; lane < 16; lane += V::kLanes) {
      const I r = V::round(V::load(x + i + lane) * inverse);
      total += r;
      std::memcpy(v + lane, &r, sizeof r);
    }
    Dot::pack(v, operand + i * 2);
  }
  alignas(64) std::int32_t totals[V::kLanes];
  std::memcpy(totals, &total, sizeof total);
  for (int lane = 0; lane < V::kLanes; ++lane) *sum += totals[lane];
  return top / Dot::kLimit;
}

template <class V>
inline void widen_f16(const std::uint8_t* from, int count, int padded, float* to) {
  const std::uint16_t* h = reinterpret_cast<const std::uint16_t*>(from);
  int i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::store(to + i, V::load_f16(h + i));
  for (; i < count; ++i) to[i] = f16_to_f32(h[i]);
  for (; i < padded; ++i) to[i] = 0.0f;
}

template <class V>
KV4_INLINE typename V::F load_integers(const std::int32_t* p) {
  typename V::I i;
  std::memcpy(&i, p, sizeof i);
  return V::to_float(i);
}

struct PageAt {
  const std::uint8_t* slice;
  const std::uint8_t* next;  // the slice to prefetch
  std::int64_t position;
  int tokens;
};

template <class V, int R>
void attend_tile(const PagesTask& t, const PageAt& page, const Dot::Table& k_table, const Dot::Table& v_table,
                 int row0) {
  using F = typename V::F;
  const kv4_page_layout& layout = t.spec->layout;
  const int groups_k = t.spec->key.groups, groups_v = t.spec->value.groups;
  const int padded_k = static_cast<int>(t.q_stride), padded_v = static_cast<int>(t.states.o_stride);
  const int octets = (groups_k == 1 ? padded_k : t.spec->key.group) / 8;
  const std::size_t q_bytes = static_cast<std::size_t>(padded_k) * 2;

  Span spans[R];
  bool any = false;
  for (int r = 0; r < R; ++r) {
    spans[r] = visible_span(t.mask, row0 + r, page.position, page.tokens);
    any = any || spans[r].end > spans[r].begin;
  }
  if (!any) return;

  alignas(64) float scores[R][kPageTokens];
  alignas(64) std::int32_t sums[R * 16];
  float from_mean[R];
  for (int r = 0; r < R; ++r) {
    from_mean[r] = 0.0f;
    if (!t.spec->key.mean) continue;
    const float* q = t.q + (row0 + r) * t.q_stride;
    F a = V::set1(0.0f), b = a, c = a, d = a;
    int i = 0;
    for (; i + 4 * V::kLanes <= padded_k; i += 4 * V::kLanes) {
      a = V::fma(V::load(q + i), V::load(t.mean + i), a);
      b = V::fma(V::load(q + i + V::kLanes), V::load(t.mean + i + V::kLanes), b);
      c = V::fma(V::load(q + i + 2 * V::kLanes), V::load(t.mean + i + 2 * V::kLanes), c);
      d = V::fma(V::load(q + i + 3 * V::kLanes), V::load(t.mean + i + 3 * V::kLanes), d);
    }
    for (; i < padded_k; i += V::kLanes) a = V::fma(V::load(q + i), V::load(t.mean + i), a);
    from_mean[r] = V::reduce_add((a + b) + (c + d));
  }
  const std::uint8_t* k_codes = page.slice + layout.k_codes;
  const std::uint8_t* k_next = page.next + layout.k_codes;
  for (int j = 0; j < kPageTokens; j += 16) {
    for (int g = 0; g < groups_k; ++g) {
      const std::size_t at =
          (static_cast<std::size_t>(j / 16) * (padded_k / 8) + static_cast<std::size_t>(g) * octets) * 64;
      Dot::block<R>(k_codes + at, octets, t.q_codes + row0 * q_bytes + static_cast<std::size_t>(g) * octets * 16,
                    q_bytes, t.q_start + row0 * groups_k + g, static_cast<std::size_t>(groups_k), k_table, k_next + at,
                    sums);
      for (int r = 0; r < R; ++r) {
        const F unit = V::set1(t.q_scale[(row0 + r) * groups_k + g]);
        for (int lane = 0; lane < 16; lane += V::kLanes) {
          const F scale = unit * V::load(t.k_scale + g * kPageTokens + j + lane);
          const F before = g == 0 ? V::set1(from_mean[r]) : V::load(scores[r] + j + lane);
          V::store(scores[r] + j + lane, V::fma(load_integers<V>(sums + r * 16 + lane), scale, before));
        }
      }
    }
  }

  float rescale[R];
  bool needed = false;
  for (int r = 0; r < R; ++r) {
    const int row = row0 + r;
    if (t.cap != 0) {
      const F cap = V::set1(t.cap);
      for (int j = 0; j < kPageTokens; j += V::kLanes)
        V::store(scores[r] + j, cap * tanh_of<V>(V::load(scores[r] + j)));
    }
    if (t.mask.kind != Mask::General::none || spans[r].begin > 0 || spans[r].end < kPageTokens)
      apply_mask(t.mask, row, page.position, spans[r], kPageTokens, scores[r]);
    const Weights w = weigh<V>(scores[r], kPageTokens, t.states.m + row, t.states.l + row);
    rescale[r] = w.rescale;
    needed = needed || !(w.sum < kNegligible);
    if (!w.visible)
      for (int j = 0; j < kPageTokens; ++j) scores[r][j] = 0.0f;
  }
  if (!needed) return;

  alignas(64) std::uint8_t w_codes[R][kPageTokens * 2];
  float w_scale[R];
  std::int32_t w_start[R];
  const std::uint8_t* v_codes = page.slice + layout.v_codes;
  const std::uint8_t* v_next = page.next + layout.v_codes;
  const int channels = groups_v == 1 ? padded_v : t.spec->value.group;
  for (int g = 0; g < groups_v; ++g) {
    for (int r = 0; r < R; ++r) {
      alignas(64) float weights[kPageTokens];
      for (int j = 0; j < kPageTokens; j += V::kLanes)
        V::store(weights + j, V::load(scores[r] + j) * V::load(t.v_scale + g * kPageTokens + j));
      std::int32_t sum;
      w_scale[r] = quantise<V>(weights, kPageTokens, w_codes[r], &sum);
      w_start[r] = Dot::start(t.spec->value.levels, sum);
    }
    for (int c = g * channels; c < (g + 1) * channels; c += 16) {
      const std::size_t at = static_cast<std::size_t>(c / 16) * (kPageTokens / 8) * 64;
      Dot::block<R>(v_codes + at, kPageTokens / 8, w_codes[0], sizeof w_codes[0], w_start, 1, v_table, v_next + at,
                    sums);
      for (int r = 0; r < R; ++r) {
        float* o = t.states.o + (row0 + r) * t.states.o_stride + c;
        const F unit = V::set1(w_scale[r]), factor = V::set1(rescale[r]);
        for (int lane = 0; lane < 16; lane += V::kLanes)
          V::store(o + lane, V::fma(load_integers<V>(sums + r * 16 + lane), unit, V::load(o + lane) * factor));
      }
    }
  }
}

template <class V>
void attend_pages(const PagesTask& t) {
  const kv4_page_layout& layout = t.spec->layout;
  const SideSpec& key = t.spec->key;
  const int padded_k = static_cast<int>(t.q_stride);
  const int positions = key.groups == 1 ? padded_k : key.group;
  const Dot::Table k_table = Dot::table(key.levels), v_table = Dot::table(t.spec->value.levels);

  for (int r = 0; r < t.rows; ++r) {
    for (int g = 0; g < key.groups; ++g) {
      std::int32_t sum;
      t.q_scale[r * key.groups + g] = quantise<V>(
          t.q + r * t.q_stride + g * positions, positions,
          t.q_codes + (static_cast<std::size_t>(r) * padded_k + static_cast<std::size_t>(g) * positions) * 2, &sum);
      t.q_start[r * key.groups + g] = Dot::start(key.levels, sum);
    }
  }

  // Tiles of nearly equal size.
  const int tiles = (t.rows + kTileRows - 1) / kTileRows;
  for (int p = t.first; p < t.last; ++p) {
    PageAt page;
    page.slice = t.pages[p] + t.slice;
    page.next = t.pages[p + 1 < t.last ? p + 1 : p] + t.slice;
    page.position = t.position + static_cast<std::int64_t>(p) * kPageTokens;
    page.tokens = p + 1 == t.page_count ? t.last_page_tokens : kPageTokens;
    for (std::uint32_t i = layout.k_scales; i < layout.v_codes; i += 64) __builtin_prefetch(page.next + i);
    for (std::uint32_t i = layout.v_scales; i < layout.head_bytes; i += 64) __builtin_prefetch(page.next + i);
    widen_f16<V>(page.slice + layout.k_scales, key.groups * kPageTokens, 0, t.k_scale);
    widen_f16<V>(page.slice + layout.v_scales, t.spec->value.groups * kPageTokens, 0, t.v_scale);
    if (key.mean) widen_f16<V>(page.slice + layout.k_mean, key.dim, padded_k, t.mean);
    if (page.tokens < kPageTokens) {  // what follows the sealed tokens is undefined
      for (int g = 0; g < key.groups; ++g)
        for (int j = page.tokens; j < kPageTokens; ++j) t.k_scale[g * kPageTokens + j] = 0.0f;
      for (int g = 0; g < t.spec->value.groups; ++g)
        for (int j = page.tokens; j < kPageTokens; ++j) t.v_scale[g * kPageTokens + j] = 0.0f;
    }
    for (int i = 0; i < tiles; ++i) {
      const int row = t.rows * i / tiles, rows = t.rows * (i + 1) / tiles - row;
      switch (rows) {
        case 1:
          attend_tile<V, 1>(t, page, k_table, v_table, row);
          break;
        case 2:
          attend_tile<V, 2>(t, page, k_table, v_table, row);
          break;
        case 3:
          attend_tile<V, 3>(t, page, k_table, v_table, row);
          break;
        case 4:
          attend_tile<V, 4>(t, page, k_table, v_table, row);
          break;
        case 5:
          attend_tile<V, 5>(t, page, k_table, v_table, row);
          break;
        case 6:
          attend_tile<V, 6>(t, page, k_table, v_table, row);
          break;
        case 7:
          attend_tile<V, 7>(t, page, k_table, v_table, row);
          break;
        default:
          attend_tile<V, 8>(t, page, k_table, v_table, row);
          break;
      }
      page.next = page.slice;
    }
  }
}

}  // namespace kv4::cpu::KV4_ISA
