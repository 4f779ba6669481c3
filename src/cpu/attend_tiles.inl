// Attention of many query rows over sealed pages with a matrix unit: 16 rows of 64 int8 positions by 64 positions of
// 16 lanes. An instruction set that has one offers it as Isa::Tiles (amx/tiles.h); elsewhere nothing here is compiled.
//
// The sums are those of attend_pages.inl, in the same integers: q_c = 256 h + l, h and l in int8, against the levels
// as they are, which are int8 too. A page is unpacked once for all rows of a task: 64 bytes of codes (layout.h) are,
// nibble by nibble, two rows of the multiplier's second operand, 4 positions of 16 lanes each, so that unpacking
// permutes nothing. Soft cap, mask and softmax are the code of the other path.
//
// Overflow: |sum of h L|, |sum of l L| <= 512 * 128 * 127 < 2^23, 256 h + l < 2^31 (portable/dot.h).
#pragma once

#include <type_traits>

#include "cpu/attend_pages.inl"
#include "cpu/quads.inl"

namespace kv4::cpu::KV4_ISA {

constexpr int kTileBytes = 1024;      // 16 rows of 64
constexpr int kMatrixRows = 16;       // query rows of one product
constexpr int kMatrixPositions = 64;  // positions that one product sums over

// Scratch of a task; with a null block only its size.
struct TilesScratch {
  std::int8_t* queries;  // [tiles, groups_k, steps, 2 (h, l), 16 rows, 64 positions]
  std::int8_t* weights;  // [2, 16, 64]
  // [64 / 16, padded channels / 4, 16 tokens, 4 channels]; the last product of a group may read, times 0, beyond it
  std::uint8_t* keys;
  std::uint8_t* values;  // [padded channels / 16, 64 / 4, 16 channels, 4 tokens]
  std::size_t bytes;

  TilesScratch(void* block, const PageSpec& spec, std::int64_t rows) {
    Parts parts(block);
    const std::size_t tiles = static_cast<std::size_t>((rows + kMatrixRows - 1) / kMatrixRows);
    queries = parts.take<std::int8_t>(query_bytes(spec, tiles));
    weights = parts.take<std::int8_t>(2 * kTileBytes);
    keys = parts.take<std::uint8_t>(static_cast<std::size_t>(kPageTokens * pad_channels(spec.key.dim)) + kTileBytes);
    values = parts.take<std::uint8_t>(static_cast<std::size_t>(kPageTokens * pad_channels(spec.value.dim)));
    bytes = parts.used();
  }
  static int positions(const SideSpec& key) { return key.groups == 1 ? pad_channels(key.dim) : key.group; }
  static int steps(const SideSpec& key) { return (positions(key) + kMatrixPositions - 1) / kMatrixPositions; }
  static std::size_t query_bytes(const PageSpec& spec, std::size_t tiles) {
    return tiles * static_cast<std::size_t>(spec.key.groups * steps(spec.key)) * 2 * kTileBytes;
  }
  std::int8_t* query(const SideSpec& key, int tile, int group) const {
    return queries + static_cast<std::size_t>((tile * key.groups + group) * steps(key)) * 2 * kTileBytes;
  }
};

// Takes integers as one row of the multiplier's first operand.
template <class V>
struct MatrixOperand {
  std::int8_t* row;  // of h; that of l follows kTileBytes later, the next 64 positions 2 * kTileBytes later
  KV4_INLINE void operator()(int i, const std::int32_t* v) const {
    using I = typename V::I;
    typedef std::int8_t Half __attribute__((vector_size(V::kLanes)));
    std::int8_t* to = row + static_cast<std::size_t>(i / kMatrixPositions) * 2 * kTileBytes + i % kMatrixPositions;
    KV4_UNROLL
    for (int lane = 0; lane < 16; lane += V::kLanes) {
      const I x = load_as<I>(v + lane);
      const Half high = __builtin_convertvector((x + 128) >> 8, Half), low = __builtin_convertvector(x, Half);
      std::memcpy(to + lane, &high, sizeof high);
      std::memcpy(to + kTileBytes + lane, &low, sizeof low);
    }
  }
};

// `bytes` of codes, a multiple of 64, to levels; as many bytes at `next` are prefetched.
template <class V>
inline void unpack_levels(const std::uint8_t* codes, std::size_t bytes, const Levels& levels, const std::uint8_t* next,
                          std::uint8_t* to) {
  using I = typename V::I;
  const I table = load_table16<V>(levels.table.data());
  for (std::size_t i = 0; i < bytes; i += 64, to += 128) {
    __builtin_prefetch(next + i, 0, 2);
    KV4_UNROLL
    for (std::size_t lane = 0; lane < 64; lane += sizeof(I)) {
      const I word = load_as<I>(codes + i + lane);
      store_as(to + lane, SealOps::lookup16(table, word & 0x0f0f0f0f));
      store_as(to + 64 + lane, SealOps::lookup16(table, word >> 4 & 0x0f0f0f0f));
    }
  }
}

// sums[half][block][row][lane] of 16 rows and kBlocks blocks of 16 lanes: `operand` holds a task's 16 rows, `steps`
// times 64 positions; the levels of block b are at levels + b * block_stride. Registers 0 to 3 hold sums, 4 and 5 rows,
// 6 and 7 levels.
template <class Tiles, int kBlocks>
KV4_INLINE void multiply(const std::int8_t* operand, int steps, const std::uint8_t* levels, std::size_t block_stride,
                         std::int32_t (&sums)[2][2][kMatrixRows][16]) {
  Tiles::template zero<0>();
  Tiles::template zero<2>();
  if constexpr (kBlocks == 2) {
    Tiles::template zero<1>();
    Tiles::template zero<3>();
  }
  for (int s = 0; s < steps; ++s, operand += 2 * kTileBytes, levels += kTileBytes) {
    Tiles::template load<4>(operand);
    Tiles::template load<6>(levels);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template load<5>(operand + kTileBytes);
    Tiles::template multiply<2, 5, 6>();
    if constexpr (kBlocks == 2) {
      Tiles::template load<7>(levels + block_stride);
      Tiles::template multiply<1, 4, 7>();
      Tiles::template multiply<3, 5, 7>();
    }
  }
  Tiles::template store<0>(sums[0][0]);
  Tiles::template store<2>(sums[1][0]);
  if constexpr (kBlocks == 2) {
    Tiles::template store<1>(sums[0][1]);
    Tiles::template store<3>(sums[1][1]);
  }
}

template <class V>
KV4_INLINE typename V::F joined_sums(const std::int32_t (&sums)[2][2][kMatrixRows][16], int block, int row, int lane) {
  using I = typename V::I;
  return V::to_float((load_as<I>(sums[0][block][row] + lane) << 8) + load_as<I>(sums[1][block][row] + lane));
}

// f(std::integral_constant<int, rows>), 1 <= rows <= kTileRows.
template <int R = kTileRows, class F>
KV4_INLINE void with_rows(int rows, F f) {
  if constexpr (R > 1)
    if (rows < R) return with_rows<R - 1>(rows, f);
  f(std::integral_constant<int, R>{});
}

template <class V>
inline void prepare_matrix_queries(const PagesTask& t, const TilesScratch& scratch) {
  using F = typename V::F;
  const SideSpec& key = t.spec->key;
  const int positions = TilesScratch::positions(key), tiles = (t.rows + kMatrixRows - 1) / kMatrixRows;
  // Rows and positions that no query fills count as 0.
  std::memset(scratch.queries, 0, TilesScratch::query_bytes(*t.spec, static_cast<std::size_t>(tiles)));
  for (int row = 0; row < t.rows; ++row) {
    for (int g = 0; g < key.groups; ++g) {
      const float* q = t.q + row * t.q_stride + g * positions;
      F unit, inverse;
      units_of_query<V>(q, positions, &unit, &inverse);
      quantise<V>(q, positions, inverse,
                  MatrixOperand<V>{scratch.query(key, row / kMatrixRows, g) + row % kMatrixRows * kMatrixPositions});
      t.q_scale[row * key.groups + g] = unit[0];
    }
  }
}

// Scores of rows [row0, row0 + rows), one product's.
template <class V>
inline void score_matrix(const PagesTask& t, const TilesScratch& scratch, int row0, int rows,
                         float (&scores)[kMatrixRows][kPageTokens]) {
  using F = typename V::F;
  const SideSpec& key = t.spec->key;
  const int steps = TilesScratch::steps(key);
  const std::size_t block_bytes = static_cast<std::size_t>(t.q_stride) * 16;
  const F overflow = overflow_factor<V>(t.cap);
  const float* const q_scale = t.q_scale + row0 * key.groups;
  alignas(64) float from_mean[kMatrixRows + kRowLanes] = {};
  if (key.mean)
    for (int r = 0; r < rows; r += kTileRows)
      with_rows(std::min(rows - r, kTileRows), [&](auto n) { dot_mean<V, n>(t, row0 + r, from_mean + r); });
  alignas(64) std::int32_t sums[2][2][kMatrixRows][16];
  for (int j = 0; j < kPageTokens; j += 32) {
    for (int g = 0; g < key.groups; ++g) {
      const std::size_t at = static_cast<std::size_t>(g * TilesScratch::positions(key)) * 16;
      multiply<typename V::Tiles, 2>(scratch.query(key, row0 / kMatrixRows, g), steps,
                                     scratch.keys + static_cast<std::size_t>(j / 16) * block_bytes + at, block_bytes,
                                     sums);
      for (int r = 0; r < rows; ++r) {
        const F unit = V::set1(q_scale[r * key.groups + g]), mean = V::set1(from_mean[r]);
        KV4_UNROLL
        for (int lane = 0; lane < 32; lane += V::kLanes) {
          const F scale = unit * V::load(t.k_scale + g * kPageTokens + j + lane);
          const F before = g == 0 ? mean : V::load(scores[r] + j + lane);
          const F s = V::fma(joined_sums<V>(sums, lane / 16, r, lane % 16), scale, before);
          V::store(scores[r] + j + lane, V::fma(s, overflow, s));
        }
      }
    }
  }
}

// Weights times the value scales of group g as the multiplier's first operand. units[r]: what a sum counts.
template <class V>
inline void prepare_weights(const PagesTask& t, int g, const float (&weights)[kMatrixRows][kPageTokens], int rows,
                            std::int8_t* operand, float* units) {
  using F = typename V::F;
  alignas(64) float scaled[kMatrixRows][kPageTokens], top[kMatrixRows] = {}, inverse[kMatrixRows];
  for (int r = 0; r < rows; ++r) {
    F largest = F{};
    KV4_UNROLL
    for (int j = 0; j < kPageTokens; j += V::kLanes) {
      const F w = V::load(weights[r] + j) * V::load(t.v_scale + g * kPageTokens + j);
      V::store(scaled[r] + j, w);
      largest = V::max(largest, w);
    }
    top[r] = V::reduce_max(largest);
  }
  for (int r = 0; r < kMatrixRows; r += V::kLanes) {
    F unit, other;
    units_of<V>(V::load(top + r), &unit, &other);
    V::store(units + r, unit);
    V::store(inverse + r, other);
  }
  for (int r = 0; r < rows; ++r)
    quantise<V>(scaled[r], kPageTokens, V::set1(inverse[r]), MatrixOperand<V>{operand + r * kMatrixPositions});
}

// As add_values of attend_pages.inl.
template <class V>
inline void add_matrix_values(const PagesTask& t, const TilesScratch& scratch, int row0, int rows,
                              const float (&weights)[kMatrixRows][kPageTokens], const float* rescale) {
  using F = typename V::F;
  const SideSpec& value = t.spec->value;
  const std::int64_t o_stride = t.states.o_stride;
  const int channels = value.groups == 1 ? static_cast<int>(o_stride) : value.group;
  alignas(64) float units[kMatrixRows];
  alignas(64) std::int32_t sums[2][2][kMatrixRows][16];
  for (int g = 0; g < value.groups; ++g) {
    prepare_weights<V>(t, g, weights, rows, scratch.weights, units);
    for (int c = g * channels; c < (g + 1) * channels; c += 32) {
      const int lanes = std::min(32, (g + 1) * channels - c);
      const std::uint8_t* levels = scratch.values + static_cast<std::size_t>(c / 16) * kTileBytes;
      if (lanes == 32) multiply<typename V::Tiles, 2>(scratch.weights, 1, levels, kTileBytes, sums);
      else multiply<typename V::Tiles, 1>(scratch.weights, 1, levels, kTileBytes, sums);
      for (int r = 0; r < rows; ++r) {
        float* const to = t.states.o + (row0 + r) * o_stride + c;
        const F unit = V::set1(units[r]), factor = V::set1(rescale[r]);
        for (int lane = 0; lane < lanes; lane += V::kLanes)
          V::store(to + lane, V::fma(joined_sums<V>(sums, lane / 16, r, lane % 16), unit, V::load(to + lane) * factor));
      }
    }
  }
}

template <class V>
void attend_tiles(const PagesTask& t) {
  using Tiles = typename V::Tiles;
  const SideSpec &key = t.spec->key, &value = t.spec->value;
  const kv4_page_layout& layout = t.spec->layout;
  const TilesScratch scratch(t.tiles, *t.spec, t.rows);
  const std::size_t key_bytes = static_cast<std::size_t>(t.q_stride) * (kPageTokens / 2);
  const std::size_t value_bytes = static_cast<std::size_t>(t.states.o_stride) * (kPageTokens / 2);
  prepare_matrix_queries<V>(t, scratch);
  std::memset(scratch.weights, 0, 2 * kTileBytes);
  Tiles::configure();
  for (int p = t.first; p < t.last; ++p) {
    const PageAt page = open_page<V>(t, p);
    bool keys = false, values = false;  // unpacked
    for (int row0 = 0; row0 < t.rows; row0 += kMatrixRows) {
      const int rows = std::min(t.rows - row0, kMatrixRows);
      Span spans[kMatrixRows];
      bool any = false;
      for (int r = 0; r < rows; ++r) {
        spans[r] = visible_span(t.mask, row0 + r, page.position, page.tokens);
        any = any || spans[r].end > spans[r].begin;
      }
      if (!any) continue;
      if (!keys)
        unpack_levels<V>(page.slice + layout.k_codes, key_bytes, key.levels, page.next + layout.k_codes, scratch.keys);
      keys = true;
      alignas(64) float scores[kMatrixRows][kPageTokens], rescale[kMatrixRows + kRowLanes];
      score_matrix<V>(t, scratch, row0, rows, scores);
      bool gains = false;
      for (int r = 0; r < rows; r += kTileRows)
        with_rows(std::min(rows - r, kTileRows), [&](auto n) {
          float(&part)[n][kPageTokens] = *reinterpret_cast<float(*)[n][kPageTokens]>(scores[r]);
          gains = weigh_page<V, n>(t, page, row0 + r, spans + r, part, rescale + r) || gains;
        });
      if (!gains) continue;
      if (!values)
        unpack_levels<V>(page.slice + layout.v_codes, value_bytes, value.levels, page.next + layout.v_codes,
                         scratch.values);
      values = true;
      add_matrix_values<V>(t, scratch, row0, rows, scores, rescale);
    }
  }
  Tiles::release();
}

// Few rows are best served by the vector unit, which wastes no part of a tile.
template <class V>
void attend_any_rows(const PagesTask& t) {
  if constexpr (requires { typename V::Tiles; })
    if (t.rows >= V::Tiles::kFewestRows) return attend_tiles<V>(t);
  attend_pages<V>(t);
}

template <class V>
std::size_t tiles_scratch(const PageSpec& spec, std::int64_t rows) {
  if constexpr (requires { typename V::Tiles; }) return TilesScratch(nullptr, spec, rows).bytes;
  return 0;
}

}  // namespace kv4::cpu::KV4_ISA
