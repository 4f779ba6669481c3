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
//   AVX-512 VNNI      12          R x 8      R x 5                        Zen 4: 4 + 8 R; Sapphire Rapids: 4 + 4 R
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
// Rounding: q_c is off by half a unit in 32512 of the row's largest q', w_j by half a unit in 32512
// of the page's largest weight: 1.5e-5 of the largest term either way. A refined key's second row is a product of
// floats, as that with the mean, beside the integers of its first one. Overflow: 64 tokens of |w| <= 32512 and |L| <=
// 127 stay below 2^28; keys are bounded in dot.h.
#pragma once

#include "cpu/second_rows.inl"
#include "cpu/softmax.inl"

namespace kv4::cpu::KV4_ISA {

// A page that contributes less than this to l >= 1 leaves o as it is: 2^14 such pages change less
// than the last bit of a float.
constexpr float kNegligible = 0x1p-40f;

// n (a multiple of 16) numbers times `inverse`, to the nearest integers, which pack(i, v) takes 16 at a time:
// v = those of numbers i ... i + 15. Returns the sum of the integers, one part in each lane.
template <class V, class Pack>
KV4_INLINE typename V::I quantise(const float* x, int n, typename V::F inverse, Pack pack) {
  using I = typename V::I;
  I total{};
  for (int i = 0; i < n; i += 16) {
    alignas(64) std::int32_t v[16];
    KV4_UNROLL
    for (int lane = 0; lane < 16; lane += V::kLanes) {
      const typename V::F scaled = V::load(x + i + lane) * inverse;
      const I r = V::round(scaled) & (I)(scaled == scaled);  // what is NaN, or 0 times infinity, has no integer
      total += r;
      std::memcpy(v + lane, &r, sizeof r);
    }
    pack(i, v);
  }
  return total;
}

// Takes integers as operands of Dot.
struct DotOperand {
  std::uint8_t* operand;
  std::size_t octet_stride;
  KV4_INLINE void operator()(int i, const std::int32_t* v) const {
    Dot::pack(v, operand + static_cast<std::size_t>(i / 8) * octet_stride, octet_stride);
  }
};

// The units in which numbers of at most `top` become integers of at most kLimit, and their inverses. Where top is next
// to 0 both are 0; where it is not finite the unit is not either, which shows in the products.
template <class V, int kLimit = Dot::kLimit>
KV4_INLINE void units_of(typename V::F top, typename V::F* unit, typename V::F* inverse) {
  using F = typename V::F;
  using I = typename V::I;
  const I tiny = (I)(top <= V::set1(1e-30f)), finite = (I)(top <= V::set1(std::numeric_limits<float>::max()));
  *unit = (F)((I)(top * V::set1(1.0f / kLimit)) & ~tiny);
  *inverse = (F)((I)(V::set1(static_cast<float>(kLimit)) / top) & ~tiny & finite);
}

// Those of n numbers of a query.
template <class V>
KV4_INLINE void units_of_query(const float* q, int n, typename V::F* unit, typename V::F* inverse) {
  using F = typename V::F;
  // max may lose a NaN, which the rotation makes of a query that overflows in it; 0 times it does not.
  F largest = F{}, poison = F{};
  for (int c = 0; c < n; c += V::kLanes) {
    const F x = V::load(q + c);
    largest = V::max(largest, V::abs(x));
    poison = V::fma(x, F{}, poison);
  }
  units_of<V>(V::set1(V::reduce_max(largest) + V::reduce_add(poison)), unit, inverse);
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

// Where the codes of a side lie in a slice: blocks of 16 lanes, whose octets of positions are counted through.
struct SidePlanes {
  std::size_t codes;   // bytes from a slice's first to its first plane
  std::size_t second;  // from that to the second, which has half as many bits
  std::size_t octet;   // bytes of 16 lanes and 8 positions in the first

  SidePlanes(const SideSpec& side, std::size_t at)
      : codes(at), second(second_plane(side.levels.bits, pad_channels(side.dim))),
        octet(static_cast<std::size_t>(step_bytes(first_plane(side.levels.bits)) / 2)) {}
  std::size_t first_at(std::size_t i) const { return codes + i * octet; }
  std::size_t second_at(std::size_t i) const { return codes + second + i * octet / 2; }
};

// How one side of a task's pages is read: its levels, Dot::block of its width by rows, where its planes lie.
using DotBlock = void (*)(const std::uint8_t* codes, const std::uint8_t* more, int octets, const std::uint8_t* operands,
                          const std::int32_t* start, std::size_t start_stride, const Dot::Table& table,
                          const std::uint8_t* next, std::int32_t* sums);
template <int R, int B>
inline constexpr DotBlock kDotBlock = Dot::block<R, B>;
template <int B>
inline constexpr DotBlock kDotBlocks[kTileRows] = {kDotBlock<1, B>, kDotBlock<2, B>, kDotBlock<3, B>, kDotBlock<4, B>,
                                                   kDotBlock<5, B>, kDotBlock<6, B>, kDotBlock<7, B>, kDotBlock<8, B>};

struct PackedSide : SidePlanes {
  Dot::Table table;
  const DotBlock* blocks;

  PackedSide(const SideSpec& side, std::size_t at) : SidePlanes(side, at), table(Dot::table(side.levels)) {
    switch (side.levels.bits) {
      case 2: blocks = kDotBlocks<2>; break;
      case 3: blocks = kDotBlocks<3>; break;
      case 6: blocks = kDotBlocks<6>; break;
      case 8: blocks = kDotBlocks<8>; break;
      default: blocks = kDotBlocks<4>;
    }
  }
  // The sums of 16 lanes over `octets` octets, the first of them number `at` of the side's, of a page's slice.
  template <int R>
  KV4_INLINE void block(const std::uint8_t* slice, const std::uint8_t* next, std::size_t at, int octets,
                        const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                        std::int32_t* sums) const {
    const std::uint8_t *first = slice + first_at(at), *more = slice + second_at(at), *fetched = next + first_at(at);
    // Called by name, so that the compiler makes a copy for the octets of a page's values: AVX-512 takes 4 to 7 %
    // longer at one row without.
    if (blocks == kDotBlocks<4>)
      Dot::block<R, 4>(first, more, octets, operands, start, start_stride, table, fetched, sums);
    else blocks[R - 1](first, more, octets, operands, start, start_stride, table, fetched, sums);
  }
};

struct PageAt {
  const std::uint8_t* slice;
  const std::uint8_t* next;  // the slice to prefetch
  std::int64_t position;
  int tokens;
};

// Rows [row, row + rows) of a task: one tile.
struct TileAt {
  int row, rows;
};

// Tile i of `tiles`: of nearly equal size.
inline TileAt tile_at(const PagesTask& t, int i, int tiles) {
  const int row = t.rows * i / tiles;
  return {row, t.rows * (i + 1) / tiles - row};
}

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

template <class V, int R>
KV4_INLINE void dot_mean(const PagesTask& t, int row0, float* out) {
  dot_rows<V, R>(t, row0, t.mean, out);
}

// Adds what second rows of codes have of the scores of their tokens; token 0 of the page is at `first`. Code of its
// own: pages without refined keys pay for a comparison.
template <class V, int R, int N>
[[gnu::noinline]] void add_second(const PagesTask& t, const std::uint8_t* slice, int row0, int first,
                                  float (&scores)[R][N]) {
  const float overflow = overflow_factor<V>(t.cap)[0];
  for (std::uint32_t i = 0; i < t.spec->second.rows; ++i) {
    alignas(64) float more[kRowLanes];
    dot_rows<V, R>(t, row0, t.second + i * t.q_stride, more);
    const int at = first + slice[t.spec->second.places + i];
    for (int r = 0; r < R; ++r) {
      const float s = scores[r][at] + more[r];
      scores[r][at] = s + s * overflow;
    }
  }
}

template <class V, int R>
KV4_INLINE void score_tile(const PagesTask& t, const PageAt& page, const PackedSide& keys, int row0,
                           float (&scores)[R][kPageTokens]) {
  using F = typename V::F;
  const int groups = t.spec->key.groups, padded = static_cast<int>(t.q_stride);
  const int octets = (groups == 1 ? padded : t.spec->key.group) / 8;
  const std::uint8_t* operands = t.q_codes + static_cast<std::size_t>(row0) * (padded / 8) * Dot::kOctetBytes;
  const std::int32_t* const start = t.q_start + row0 * groups;
  const float* const k_scale = t.k_scale;
  const F overflow = overflow_factor<V>(t.cap);
  const float* const q_scale = t.q_scale + row0 * groups;
  alignas(64) float from_mean[kRowLanes] = {};
  if (t.spec->key.mean) dot_mean<V, R>(t, row0, from_mean);
  alignas(64) std::int32_t sums[R * 16];
  for (int j = 0; j < kPageTokens; j += 16) {
    for (int g = 0; g < groups; ++g) {
      const std::size_t octet = static_cast<std::size_t>(g) * octets;
      keys.block<R>(page.slice, page.next, static_cast<std::size_t>(j / 16) * (padded / 8) + octet, octets,
                    operands + octet * R * Dot::kOctetBytes, start + g, static_cast<std::size_t>(groups), sums);
      KV4_UNROLL
      for (int lane = 0; lane < 16; lane += V::kLanes) {
        const F step = V::load(k_scale + g * kPageTokens + j + lane);
        KV4_UNROLL
        for (int r = 0; r < R; ++r) {
          const F scale = V::set1(q_scale[r * groups + g]) * step;
          const F before = g == 0 ? V::set1(from_mean[r]) : V::load(scores[r] + j + lane);
          const F s = V::fma(load_integers<V>(sums + r * 16 + lane), scale, before);
          V::store(scores[r] + j + lane, V::fma(s, overflow, s));
        }
      }
    }
  }
  if (t.spec->second.rows > 0) add_second<V>(t, page.slice, row0, 0, scores);
}

// o += the values of the page weighted with the rows of `weights`, after o *= rescale.
template <class V, int R>
KV4_INLINE void add_values(const PagesTask& t, const PageAt& page, const PackedSide& values, int row0,
                           const float (&weights)[R][kPageTokens], const float* rescale) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int kOctets = kPageTokens / 8, kVectors = kRowLanes / V::kLanes;
  const int groups = t.spec->value.groups;
  const int channels = groups == 1 ? static_cast<int>(t.states.o_stride) : t.spec->value.group;
  const Levels& levels = t.spec->value.levels;
  const std::int64_t o_stride = t.states.o_stride;
  float* const o = t.states.o + row0 * o_stride;
  const float* const v_scale = t.v_scale;
  alignas(64) std::uint8_t operands[kOctets * R * Dot::kOctetBytes];
  alignas(64) float scaled[R][kPageTokens];
  alignas(64) float unit[kRowLanes], inverse[kRowLanes];
  alignas(64) std::int32_t start[kRowLanes], sums[R * 16];
  for (int g = 0; g < groups; ++g) {
    F largest[R] = {};
    for (int j = 0; j < kPageTokens; j += V::kLanes) {
      const F step = V::load(v_scale + g * kPageTokens + j);
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        const F w = V::load(weights[r] + j) * step;
        V::store(scaled[r] + j, w);
        largest[r] = V::max(largest[r], w);
      }
    }
    F top[kVectors];
    fold_lanes<V, MaxLanes<V>>(largest, top);
    KV4_UNROLL
    for (int i = 0; i * V::kLanes < R; ++i) {
      F u, v;
      units_of<V>(top[i], &u, &v);
      V::store(unit + i * V::kLanes, u);
      V::store(inverse + i * V::kLanes, v);
    }
    I parts[R], total[kVectors] = {};
    KV4_UNROLL
    for (int r = 0; r < R; ++r)
      parts[r] = quantise<V>(scaled[r], kPageTokens, V::set1(inverse[r]),
                             DotOperand{operands + r * Dot::kOctetBytes, R * Dot::kOctetBytes});
    fold_lanes<V, AddLanes>(parts, total);
    std::memcpy(start, total, sizeof start);
    KV4_UNROLL
    for (int r = 0; r < R; ++r) start[r] = Dot::start(levels, start[r]);
    for (int c = g * channels; c < (g + 1) * channels; c += 16) {
      values.block<R>(page.slice, page.next, static_cast<std::size_t>(c / 16) * kOctets, kOctets, operands, start, 1,
                      sums);
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        float* const to = o + r * o_stride + c;
        const F scale = V::set1(unit[r]), factor = V::set1(rescale[r]);
        KV4_UNROLL
        for (int lane = 0; lane < 16; lane += V::kLanes)
          V::store(to + lane, V::fma(load_integers<V>(sums + r * 16 + lane), scale, V::load(to + lane) * factor));
      }
    }
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

template <class V, int R>
void attend_tile(const PagesTask& t, const PageAt& page, const PackedSide& keys, const PackedSide& values, int row0) {
  Span spans[R];
  bool any = false;
  for (int r = 0; r < R; ++r) {
    spans[r] = visible_span(t.mask, row0 + r, page.position, page.tokens);
    any = any || spans[r].end > spans[r].begin;
  }
  if (!any) return;
  alignas(64) float scores[R][kPageTokens];
  score_tile<V>(t, page, keys, row0, scores);
  alignas(64) float rescale[kRowLanes];
  mask_scores<V>(t, page.position, row0, spans, kPageTokens, scores);
  if (weigh<V>(scores, t.states.m + row0, t.states.l + row0, kNegligible, rescale))
    add_values<V>(t, page, values, row0, scores, rescale);
}

template <class V, int R = kTileRows>
void attend_few(const PagesTask& t, const PageAt& page, const PackedSide& keys, const PackedSide& values, int row,
                int rows) {
  if constexpr (R > 1)
    if (rows < R) return attend_few<V, R - 1>(t, page, keys, values, row, rows);
  attend_tile<V, R>(t, page, keys, values, row);
}

// The queries as operands, tile by tile.
template <class V>
inline void prepare_queries(const PagesTask& t, int tiles) {
  using F = typename V::F;
  const SideSpec& key = t.spec->key;
  const int padded = static_cast<int>(t.q_stride), positions = key.groups == 1 ? padded : key.group;
  for (int i = 0; i < tiles; ++i) {
    const TileAt tile = tile_at(t, i, tiles);
    const std::size_t stride = static_cast<std::size_t>(tile.rows) * Dot::kOctetBytes;
    std::uint8_t* operands = t.q_codes + static_cast<std::size_t>(tile.row) * (padded / 8) * Dot::kOctetBytes;
    for (int r = 0; r < tile.rows; ++r) {
      for (int g = 0; g < key.groups; ++g) {
        const float* q = t.q + (tile.row + r) * t.q_stride + g * positions;
        F unit, inverse;
        units_of_query<V>(q, positions, &unit, &inverse);
        std::uint8_t* first = operands + static_cast<std::size_t>(g) * (positions / 8) * stride + r * Dot::kOctetBytes;
        const typename V::I total = quantise<V>(q, positions, inverse, DotOperand{first, stride});
        alignas(64) std::int32_t parts[V::kLanes];
        std::memcpy(parts, &total, sizeof parts);
        std::int32_t sum = 0;
        for (std::int32_t part : parts) sum += part;
        t.q_scale[(tile.row + r) * key.groups + g] = unit[0];
        t.q_start[(tile.row + r) * key.groups + g] = Dot::start(key.levels, sum);
      }
    }
  }
}

// ahead: pages to the one that is prefetched meanwhile.
inline PageAt page_at(const PagesTask& t, int p, int ahead = 1) {
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

// Scales, means and second rows of keys, and scales of values.
template <class V>
inline void widen_keys(const PagesTask& t, const PageAt& page) {
  const SideSpec& key = t.spec->key;
  widen_scales<V>(page.slice + t.spec->layout.k_scales, key.groups, page.tokens, t.k_scale);
  if (key.mean) widen_f16<V>(page.slice + t.spec->layout.k_mean, key.dim, static_cast<int>(t.q_stride), t.mean);
  const int rows = static_cast<int>(t.spec->second.rows);
  for (int r = 0; r < rows; ++r) widen_second<V>(*t.spec, page.slice, r, t.second + r * t.q_stride);
}
template <class V>
inline void widen_values(const PagesTask& t, const PageAt& page) {
  widen_scales<V>(page.slice + t.spec->layout.v_scales, t.spec->value.groups, page.tokens, t.v_scale);
}

template <class V>
void attend_pages(const PagesTask& t) {
  const PackedSide keys(t.spec->key, t.spec->layout.k_codes), values(t.spec->value, t.spec->layout.v_codes);
  const int tiles = (t.rows + kTileRows - 1) / kTileRows;
  prepare_queries<V>(t, tiles);
  for (int p = t.first; p < t.last; ++p) {
    PageAt page = page_at(t, p);
    prefetch_scales(t, page);
    widen_keys<V>(t, page);
    widen_values<V>(t, page);
    for (int i = 0; i < tiles; ++i) {
      const TileAt tile = tile_at(t, i, tiles);
      attend_few<V>(t, page, keys, values, tile.row, tile.rows);
      page.next = page.slice;
    }
  }
}

}  // namespace kv4::cpu::KV4_ISA
