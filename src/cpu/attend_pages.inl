// Attention of a few query rows over sealed pages, in integers.
//
//   score_j = q_scale k_scale_j sum_c q_c L[n_jc] + q'.m'      q_c int16, one q_scale per row and group
//   o_c    += w_scale sum_j w_j L[n_jc]                        w_j int16 of 2^(score_j - m) v_scale_j
//
// Codes are unpacked once for up to kTileRows rows. Instructions per token, KV head and R rows at d = 128 with
// one scale per vector, 136 bytes (dot.h counts the first two columns; keys and values cost the same):
//
//                     unpacking   products   mean, softmax, weights, o    cycles: products and unpacking
//   AVX2              44          R x 32     R x 10.5 (counted)           Zen 3: 10 + 8 R (four vector pipes)
//   AVX-512 VNNI      12          R x 8      R x 4                        Zen 4: 4 + 8 R; Zen 5: 4 + 4 R; S. Rapids too
//   the same, bytes   12          R x 4      R x 4                        Zen 5: 4 + 2 R
//
// Measured on Zen 3 at 3.2 GHz, in L1: products and unpacking 22, 29, 46, 65 cycles at R = 1, 2, 4, 6, the whole
// 32, 43, 69, 94. At 11 GB/s a core 136 bytes take 40 cycles: memory binds up to R = 2, then the vector pipes.
// Half of the memory's speed at R = 6 would leave 80 cycles. Zen 4 is a count, not a run. Emerald Rapids at 2.9 GHz,
// from L2: 19, 25, 39, 51 cycles.
//
// Versions tried (Zen 3, R = 6, ns per token and head on one core):
//   34    operands of vpmaddwd broadcast by an instruction each; softmax row after row
//   31    operands repeated over a register in memory; every step of the softmax for all rows before the next
//   29.5  pointers kept out of memory that byte stores may alias
//   slower: nibbles looked up bytewise and split into 16 bits afterwards (one instruction fewer, on busier pipes)
// Prefetching (two threads from memory, R = 1 and 6): none 10.3, 19.4; 2 KiB ahead in the same page 9.2, 17.8; the
// same place of the next page into L1 7.8, 16.0; into L2, as on x86 now, 6.7, 14.9.
//
// Many rows (chunked prefill): 8 share an unpacking, and a task holds up to 64. What unpacking a page once per task, to
// levels in L1 or L2, would save at most: 7/8 of unpacking, in cycles per token of 8 rows by the pipes that bind.
//
//                          now                                     saved
//   AVX2, Zen 3            74 + 42 (vector pipes)                  2: 16-bit levels take 4 loads for 1, and then loads
//                                                                     bind, 36 a step at two a cycle           2 %
//   AVX-512, Zen 4         68 + 20                                 3.5                                          4 %
//   AVX-512, S. Rapids     37 + 20                                 4.4                                          8 %
//   AVX-VNNI, Alder Lake   68 + 28 (ports 0 and 1; 3 ports)        4                                            4 %
//   NEON sdot, 4 pipes     72 + 42                                 7                                            6 %
//   NEON smmla, 4 pipes    44 + 42                                 10.5                                        12 %
//
// The second term is what surrounds the products. None reaches 15 %, so it is not done; a matrix unit needs it
// (attend_tiles.inl).
//
// Rounding: q_c is off by half a unit in 32512 of the row's largest q', w_j by half a unit in 32512 of the page's
// largest weight times its largest value scale: 1.5e-5 of the largest term either way. A refined key's second row is
// a product of floats, as that with the mean, beside the integers of its first one. Overflow: 64 tokens of |w| <=
// 32512 and |L| <= 127 stay below 2^28; keys are bounded in dot.h.
//
// Bytes (PagesTask::bytes, Dot::ByteKeys): half a unit in 127 and up to one in 255. A key's codes are off by a tenth
// of the key, q_c by .006 of the query: of the squared error of a head's output, against float64 attention over the
// model's own keys and values, bytes add 2.1 % (Gemma 3 270M, 144 heads, the 64 last of 2,048 tokens of WikiText-2,
// two windows; pooled .7 %) and 1.5 % (Qwen2.5-Coder 0.5B, 336 heads; pooled 1.1 %). Weights are dithered
// (packed_side.inl): of many small ones rounding to the nearest would lose all or double them.
//
// Pages at once, Zen 5, ns per token at 4,096 tokens, 1 page and 4 (2 from 5 rows on): 1 row 4.1, 3.8; 2 rows 4.4,
// 4.3; 4 rows 7.0, 6.7; 6 rows 9.6, 9.9. With vectors of 8 lanes more than one loses 4 to 10 % from 6 rows on.
// Prefetching slices as one run while keys and values of several pages are read by turns: no difference.
#pragma once

#include "cpu/packed_side.inl"
#include "cpu/second_rows.inl"
#include "cpu/softmax.inl"

namespace kv4::cpu::KV4_ISA {

// A page that contributes less than this to l >= 1 leaves o as it is: 2^14 such pages change less
// than the last bit of a float.
constexpr float kNegligible = 0x1p-40f;

struct PageAt {
  const std::uint8_t* slice;
  const std::uint8_t* next;  // the slice to prefetch
  std::int64_t position;
  int tokens;
};

// Pages that one softmax serves: what stands between the products of keys and of values is a chain of instructions that
// wait for each other, which takes hardly longer for many tokens than for few.
constexpr int kMostPages = kPagesAtOnce;
struct Pages {
  PageAt page[kMostPages];  // `next` is as far on as there may be pages
  int count;
};

// With more rows there are more chains, and fewer registers for each.
constexpr int pages_at_once(int rows) { return rows <= 4 ? kMostPages : Isa::kLanes < 16 ? 1 : 2; }

// Rows [row, row + rows) of a task: one tile.
struct TileAt {
  int row, rows;
};

// Tile i of `tiles`: of nearly equal size.
inline TileAt tile_at(const PagesTask& t, int i, int tiles) {
  const int row = t.rows * i / tiles;
  return {row, t.rows * (i + 1) / tiles - row};
}

// What page `number` of those at work has in the task's scratch.
struct Widened {
  float *k_scale, *v_scale, *mean, *second;

  Widened(const PagesTask& t, int number)
      : k_scale(t.k_scale + number * t.spec->key.groups * kPageTokens),
        v_scale(t.v_scale + number * t.spec->value.groups * kPageTokens), mean(t.mean + number * t.q_stride),
        second(t.second + number * static_cast<std::int64_t>(t.spec->second.rows) * t.q_stride) {}
};

// q'.x of every row, x [q_stride].
template <class V, int R>
KV4_INLINE void dot_rows(const PagesTask& t, int row0, const float* x, float* out) {
  using F = typename V::F;
  const int padded = static_cast<int>(t.q_stride);
  const float* q = t.q + row0 * t.q_stride;
  F sums[R] = {};
  for (int i = 0; i < padded; i += V::kLanes) {
    const F factor = V::load(x + i);
    KV4_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = V::fma(V::load(q + r * padded + i), factor, sums[r]);
  }
  F joined[kRowLanes / V::kLanes];
  fold_lanes<V, AddLanes>(sums, joined);
  KV4_UNROLL
  for (int i = 0; i * V::kLanes < R; ++i) V::store(out + i * V::kLanes, joined[i]);
}

// Adds what second rows of codes have of the scores of their tokens; token 0 of the page is at `first`. Code of its
// own: pages without refined keys pay for a comparison.
template <class V, int R, int N>
[[gnu::noinline]] void add_second(const PagesTask& t, const std::uint8_t* slice, const float* second, int row0,
                                  int first, float (&scores)[R][N]) {
  const float overflow = overflow_factor<V>(t.cap)[0];
  for (std::uint32_t i = 0; i < t.spec->second.rows; ++i) {
    alignas(64) float more[kRowLanes];
    dot_rows<V, R>(t, row0, second + i * t.q_stride, more);
    const int at = first + slice[t.spec->second.places + i];
    for (int r = 0; r < R; ++r) {
      const float s = scores[r][at] + more[r];
      scores[r][at] = s + s * overflow;
    }
  }
}

// Scores of page `number` of those at work.
template <class V, class K, int R, int N>
KV4_INLINE void score_page(const PagesTask& t, const PageAt& page, int number, const PackedSide<K>& keys, int row0,
                           float (&scores)[R][N]) {
  using F = typename V::F;
  const int groups = t.spec->key.groups, padded = static_cast<int>(t.q_stride);
  const int octets = (groups == 1 ? padded : t.spec->key.group) / 8;
  const std::uint8_t* operands = t.q_codes + static_cast<std::size_t>(row0) * (padded / 8) * K::kOctetBytes;
  const std::int32_t* const start = t.q_start + row0 * groups;
  const Widened widened(t, number);
  const F overflow = overflow_factor<V>(t.cap);
  const float* const q_scale = t.q_scale + row0 * groups;
  alignas(64) float from_mean[kRowLanes] = {};
  if (t.spec->key.mean) dot_rows<V, R>(t, row0, widened.mean, from_mean);
  alignas(64) std::int32_t sums[R * 16 * K::kBlocks];
  for_blocks<K>(kPageTokens / 16, [&](int i, auto count) KV4_INLINE_LAMBDA {
    constexpr int kLanes = count * 16;
    for (int g = 0; g < groups; ++g) {
      const std::size_t octet = static_cast<std::size_t>(g) * octets;
      const std::size_t at = static_cast<std::size_t>(i) * (padded / 8) + octet;
      keys.template block<R, count>(page.slice, page.next, at, octets, operands + octet * R * K::kOctetBytes, start + g,
                                    static_cast<std::size_t>(groups), sums, static_cast<std::size_t>(padded / 8));
      KV4_UNROLL
      for (int lane = 0; lane < kLanes; lane += V::kLanes) {
        const F step = V::load(widened.k_scale + g * kPageTokens + i * 16 + lane);
        float* const to = scores[0] + number * kPageTokens + i * 16 + lane;
        KV4_UNROLL
        for (int r = 0; r < R; ++r) {
          const F scale = V::set1(q_scale[r * groups + g]) * step;
          const F before = g == 0 ? V::set1(from_mean[r]) : V::load(to + r * N);
          const F s = V::fma(load_integers<V>(sums + r * kLanes + lane), scale, before);
          V::store(to + r * N, V::fma(s, overflow, s));
        }
      }
    }
  });
  if (t.spec->second.rows > 0) add_second<V>(t, page.slice, widened.second, row0, number * kPageTokens, scores);
}

// What the weights of each page are multiplied with on their way into a row's state, and what the state was before.
struct PageFactors {
  alignas(64) float page[kMostPages][kRowLanes], before[kRowLanes];
};

// Turns the scores of R rows over `pages` pages into weights 2^(score - the row's largest on that page), at most 1, and
// takes them into m and l. Returns false where no row gains enough to be worth its values. Each step is done for all
// rows and pages before the next: their chains of dependent instructions then run side by side.
template <class V, int R, int N>
KV4_INLINE bool weigh_pages(int pages, float (&scores)[R][N], float* m, float* l, PageFactors& factors) {
  using F = typename V::F;
  constexpr int kVectors = kRowLanes / V::kLanes;
  alignas(64) float centre[kMostPages][kRowLanes], all[kRowLanes];
  F top[kMostPages][kVectors], largest[kVectors], lanes[R];
  KV4_UNROLL
  for (int i = 0; i < kVectors; ++i) largest[i] = V::set1(kHidden);
  for (int p = 0; p < pages; ++p) {
    const float* const from = scores[0] + p * kPageTokens;
    for (int r = 0; r < R; ++r) {
      lanes[r] = V::load(from + r * N);
      for (int j = V::kLanes; j < kPageTokens; j += V::kLanes) lanes[r] = V::max(lanes[r], V::load(from + r * N + j));
    }
    fold_lanes<V, MaxLanes<V>>(lanes, top[p]);
    KV4_UNROLL
    for (int i = 0; i * V::kLanes < R; ++i) {
      largest[i] = V::max(largest[i], top[p][i]);
      V::store(centre[p] + i * V::kLanes, centred<V>(top[p][i]));
    }
  }
  raise_maxima<V, R>(largest, m, all, factors.before);
  for (int p = 0; p < pages; ++p) {
    KV4_UNROLL
    for (int i = 0; i * V::kLanes < R; ++i)
      V::store(factors.page[p] + i * V::kLanes, exp2_of<V>(top[p][i] - V::load(all + i * V::kLanes)));
  }
  KV4_UNROLL
  for (int r = 0; r < R; ++r) lanes[r] = F{};
  for (int p = 0; p < pages; ++p) {
    for (int r = 0; r < R; ++r) {
      float* const at = scores[r] + p * kPageTokens;
      const F c = V::set1(centre[p][r]);
      F total = F{};
      for (int j = 0; j < kPageTokens; j += V::kLanes) {
        const F w = exp2_of<V>(V::load(at + j) - c);
        V::store(at + j, w);
        total += w;
      }
      lanes[r] = V::fma(total, V::set1(factors.page[p][r]), lanes[r]);
    }
  }
  return gain_weights<V>(lanes, l, kNegligible, factors.before);
}

// o += the values of the pages weighted with the rows of `weights`, after o *= factors.before.
template <class V, class W, int R, int N>
KV4_INLINE void add_values(const PagesTask& t, const Pages& pages, const PackedSide<W>& values, int row0,
                           const float (&weights)[R][N], const PageFactors& factors) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int kOctets = kPageTokens / 8, kVectors = kRowLanes / V::kLanes, kMost = N / kPageTokens;
  const int groups = t.spec->value.groups, count = kMost == 1 ? 1 : pages.count;
  const int channels = groups == 1 ? static_cast<int>(t.states.o_stride) : t.spec->value.group;
  const Levels& levels = t.spec->value.levels;
  const std::int64_t o_stride = t.states.o_stride;
  alignas(64) std::uint8_t operands[kMost][kOctets * R * W::kOctetBytes];
  alignas(64) std::int32_t start[kMost][kRowLanes], sums[kMost][R * 16 * W::kBlocks];
  alignas(64) float units[kMost][kRowLanes];
  for (int g = 0; g < groups; ++g) {
    for (int p = 0; p < count; ++p) {
      const float* const v_scale = Widened(t, p).v_scale + g * kPageTokens;
      I parts[R], total[kVectors] = {};
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        const float* const w = weights[r] + p * kPageTokens;
        parts[r] = quantise<V, W::kLimit <= 255>(
            [=](int j) KV4_INLINE_LAMBDA { return V::load(w + j) * V::load(v_scale + j); }, kPageTokens,
            DotOperand<W>{operands[p] + r * W::kOctetBytes, R * W::kOctetBytes});
      }
      fold_lanes<V, AddLanes>(parts, total);
      std::memcpy(start[p], total, sizeof start[p]);
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        start[p][r] = W::start(levels, start[p][r]);
        units[p][r] = factors.page[p][r] * t.v_unit[p * groups + g];
      }
    }
    for_blocks<W>(channels / 16, [&](int i, auto blocks) KV4_INLINE_LAMBDA {
      constexpr int kLanes = blocks * 16;
      const int c = g * channels + i * 16;
      for (int p = 0; p < count; ++p) {
        const std::size_t at = static_cast<std::size_t>(c / 16) * kOctets;
        values.template block<R, blocks>(pages.page[p].slice, pages.page[p].next, at, kOctets, operands[p], start[p], 1,
                                         sums[p], kOctets);
      }
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        float* const to = t.states.o + (row0 + r) * o_stride + c;
        const F before = V::set1(factors.before[r]);
        F o[kLanes / V::kLanes];
        KV4_UNROLL
        for (int lane = 0; lane < kLanes; lane += V::kLanes) o[lane / V::kLanes] = V::load(to + lane) * before;
        for (int p = 0; p < count; ++p) {
          const F unit = V::set1(units[p][r]);
          KV4_UNROLL
          for (int lane = 0; lane < kLanes; lane += V::kLanes)
            o[lane / V::kLanes] = V::fma(load_integers<V>(sums[p] + r * kLanes + lane), unit, o[lane / V::kLanes]);
        }
        KV4_UNROLL
        for (int lane = 0; lane < kLanes; lane += V::kLanes) V::store(to + lane, o[lane / V::kLanes]);
      }
    });
  }
}

// Soft cap and mask of the scores of R rows over the `size` tokens from `position` on, a multiple of the lanes;
// spans[r] is what row row0 + r may see.
template <class V, int R, int N>
KV4_INLINE void mask_scores(const PagesTask& t, std::int64_t position, int row0, const Span* spans, int size,
                            float (&scores)[R][N]) {
  for (int r = 0; r < R; ++r) {
    if (t.cap != 0) {
      const typename V::F cap = V::set1(t.cap);
      for (int j = 0; j < size; j += V::kLanes) V::store(scores[r] + j, cap * tanh_of<V>(V::load(scores[r] + j)));
    }
    if (t.mask.kind != Mask::General::none || spans[r].begin > 0 || spans[r].end < size)
      apply_mask(t.mask, row0 + r, position, spans[r], size, scores[r]);
  }
}

template <class V, class K, class W, int R>
void attend_tile(const PagesTask& t, const Pages& pages, const PackedSide<K>& keys, const PackedSide<W>& values,
                 int row0) {
  constexpr int kMost = pages_at_once(R), kTokens = kMost * kPageTokens;
  const int count = kMost == 1 ? 1 : pages.count, size = count * kPageTokens;
  Span spans[R];
  bool any = false;
  for (int r = 0; r < R; ++r) {
    spans[r] =
        visible_span(t.mask, row0 + r, pages.page[0].position, size - kPageTokens + pages.page[count - 1].tokens);
    any = any || spans[r].end > spans[r].begin;
  }
  if (!any) return;
  alignas(64) float scores[R][kTokens];
  for (int p = 0; p < count; ++p) score_page<V, K>(t, pages.page[p], p, keys, row0, scores);
  mask_scores<V>(t, pages.page[0].position, row0, spans, size, scores);
  PageFactors factors;
  if (weigh_pages<V>(count, scores, t.states.m + row0, t.states.l + row0, factors))
    add_values<V, W>(t, pages, values, row0, scores, factors);
}

template <class V, class K, class W, int R = kTileRows>
void attend_few(const PagesTask& t, const Pages& pages, const PackedSide<K>& keys, const PackedSide<W>& values, int row,
                int rows) {
  if constexpr (R > 1)
    if (rows < R) return attend_few<V, K, W, R - 1>(t, pages, keys, values, row, rows);
  attend_tile<V, K, W, R>(t, pages, keys, values, row);
}

// The queries as operands, tile by tile.
template <class V, class K>
inline void prepare_queries(const PagesTask& t, int tiles) {
  using F = typename V::F;
  const SideSpec& key = t.spec->key;
  const int padded = static_cast<int>(t.q_stride), positions = key.groups == 1 ? padded : key.group;
  for (int i = 0; i < tiles; ++i) {
    const TileAt tile = tile_at(t, i, tiles);
    const std::size_t stride = static_cast<std::size_t>(tile.rows) * K::kOctetBytes;
    std::uint8_t* operands = t.q_codes + static_cast<std::size_t>(tile.row) * (padded / 8) * K::kOctetBytes;
    for (int r = 0; r < tile.rows; ++r) {
      for (int g = 0; g < key.groups; ++g) {
        const float* q = t.q + (tile.row + r) * t.q_stride + g * positions;
        F unit, inverse;
        units_of_all<V, K::kLimit>(q, positions, &unit, &inverse);
        std::uint8_t* first = operands + static_cast<std::size_t>(g) * (positions / 8) * stride + r * K::kOctetBytes;
        const typename V::I total = quantise<V, false>(
            [=](int c) KV4_INLINE_LAMBDA { return V::load(q + c) * inverse; }, positions, DotOperand<K>{first, stride});
        alignas(64) std::int32_t parts[V::kLanes];
        std::memcpy(parts, &total, sizeof parts);
        std::int32_t sum = 0;
        for (std::int32_t part : parts) sum += part;
        t.q_scale[(tile.row + r) * key.groups + g] = unit[0];
        t.q_start[(tile.row + r) * key.groups + g] = K::start(key.levels, sum);
      }
    }
  }
}

// ahead: pages to the one that is prefetched meanwhile.
inline PageAt page_at(const PagesTask& t, int p, int ahead) {
  PageAt page;
  page.slice = slice_at(t.memory, t.pages[p], t.head);
  page.next = slice_at(t.memory, t.pages[p + ahead < t.last ? p + ahead : p], t.head);
  page.position = t.position + static_cast<std::int64_t>(p) * kPageTokens;
  page.tokens = p + 1 == t.page_count ? t.last_page_tokens : kPageTokens;
  return page;
}

// Scales and mean of the page that is prefetched.
inline void prefetch_scales(const PagesTask& t, const PageAt& page) {
  const kv4_page_layout& layout = t.spec->layout;
  // Into L2, as the codes: L1 has too few line buffers to hold what a page of memory latency takes.
  for (std::uint32_t i = layout.k_scales; i < layout.v_codes; i += 64) __builtin_prefetch(page.next + i, 0, 2);
  for (std::uint32_t i = layout.v_scales; i < layout.head_bytes; i += 64) __builtin_prefetch(page.next + i, 0, 2);
}

// [groups, 64] scales of a page. What follows its sealed tokens is undefined there, and 0 here.
template <class V>
inline void widen_scales(const std::uint8_t* from, int groups, int tokens, float* to) {
  widen_f16<V>(from, groups * kPageTokens, 0, to);
  for (int g = 0; g < groups; ++g)
    for (int j = tokens; j < kPageTokens; ++j) to[g * kPageTokens + j] = 0.0f;
}

// Scales, means and second rows of the keys of page `number` of those at work.
template <class V>
inline void widen_keys(const PagesTask& t, const PageAt& page, int number) {
  const SideSpec& key = t.spec->key;
  const Widened to(t, number);
  widen_scales<V>(page.slice + t.spec->layout.k_scales, key.groups, page.tokens, to.k_scale);
  if (key.mean) widen_f16<V>(page.slice + t.spec->layout.k_mean, key.dim, static_cast<int>(t.q_stride), to.mean);
  const int rows = static_cast<int>(t.spec->second.rows);
  for (int r = 0; r < rows; ++r) widen_second<V>(*t.spec, page.slice, r, to.second + r * t.q_stride);
}
// Its scales of values in units of which the largest of a group has kLimit, so that the integer of weight 1 and that
// scale is kLimit.
template <class V, int kLimit>
inline void widen_values(const PagesTask& t, const PageAt& page, int number) {
  const int groups = t.spec->value.groups;
  float* scale = Widened(t, number).v_scale;
  widen_scales<V>(page.slice + t.spec->layout.v_scales, groups, page.tokens, scale);
  for (int g = 0; g < groups; ++g, scale += kPageTokens) {
    typename V::F unit, inverse;
    units_of_all<V, kLimit>(scale, kPageTokens, &unit, &inverse);
    for (int j = 0; j < kPageTokens; j += V::kLanes) V::store(scale + j, V::load(scale + j) * inverse);
    t.v_unit[number * groups + g] = unit[0];
  }
}

// K and W: products of queries and keys, and of weights and values.
template <class V, class K = Dot, class W = Dot>
void attend_pages(const PagesTask& t) {
  const PackedSide<K> keys(t.spec->key, t.spec->layout.k_codes);
  const PackedSide<W> values(t.spec->value, t.spec->layout.v_codes);
  const int tiles = (t.rows + kTileRows - 1) / kTileRows;
  prepare_queries<V, K>(t, tiles);
  const int most = pages_at_once(tiles == 1 ? t.rows : kTileRows);
  for (int p = t.first; p < t.last; p += most) {
    Pages pages;
    pages.count = std::min(most, t.last - p);
    for (int i = 0; i < pages.count; ++i) {
      pages.page[i] = page_at(t, p + i, most);
      prefetch_scales(t, pages.page[i]);
      widen_keys<V>(t, pages.page[i], i);
      widen_values<V, W::kLimit>(t, pages.page[i], i);
    }
    for (int i = 0; i < tiles; ++i) {
      const TileAt tile = tile_at(t, i, tiles);
      attend_few<V, K, W>(t, pages, keys, values, tile.row, tile.rows);
      for (int n = 0; n < pages.count; ++n) pages.page[n].next = pages.page[n].slice;
    }
  }
}

}  // namespace kv4::cpu::KV4_ISA
