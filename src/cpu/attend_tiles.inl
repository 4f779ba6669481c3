// Attention over sealed pages with a matrix unit: 16 rows of 64 int8 positions by 64 positions of 16 lanes. An
// instruction set that has one offers it as Isa::Tiles (amx/tiles.h); elsewhere nothing here is compiled.
//
// The sums are those of attend_pages.inl, in the same integers: q_c = 256 h + l, h and l in int8, against the levels
// as they are, which are int8 too. The first operand holds the h of up to kTileRows query rows, and under them their l.
// A register of codes (layout.h) is a row of the second operand, 4 positions of 16 lanes, so that unpacking permutes
// nothing, whatever the width. Soft cap, mask and softmax are the code of the other path. The levels of one piece,
// 4 KiB, are unpacked before it is multiplied: a tile load waits for stores to reach L1, and the little that a page
// needs stays there. Several tiles keep a page's levels, unpacked once for all.
//
// Overflow: |sum of h L|, |sum of l L| <= 512 * 128 * 127 < 2^23, 256 h + l < 2^31 (portable/dot.h).
#pragma once

#include <type_traits>

#include "cpu/attend_pages.inl"
#include "cpu/quads.inl"

namespace kv4::cpu::KV4_ISA {

constexpr int kOperandBytes = 1024;   // 16 rows of 64
constexpr int kMatrixPositions = 64;  // positions that one product sums over
constexpr int kMatrixBlocks = 4;      // blocks of 16 lanes whose sums the unit holds at once
constexpr int kPieceBytes = kMatrixBlocks * kOperandBytes;
constexpr int kMostPages = 2;  // that one softmax serves
constexpr int kPairRows = 4;   // most rows with which it serves two

// Codes of `blocks` blocks of 16 lanes, `octets` <= 8 octets of positions each, an even number: what is multiplied with
// one first operand.
struct Piece {
  std::size_t codes;   // bytes from the slice's first, in the first plane
  std::size_t more;    // alike, in the second
  std::size_t stride;  // bytes between blocks in the first plane; half as many in the second
  int blocks, octets;
};

struct PieceSide : SidePlanes {
  using SidePlanes::SidePlanes;
  // `blocks` blocks, each `stride` octets behind the last; the first octet is number `at` of the side's.
  Piece piece(std::size_t at, std::size_t stride, int blocks, int octets) const {
    return {first_at(at), second_at(at), stride * octet, blocks, octets};
  }
};

// A page's pieces: those of the keys, [groups, steps], then those of the values, [groups, rounds].
struct Pieces {
  int key_octets, steps, keys;  // of a group; of a group; of all
  int value_blocks, rounds, values;
  int key_bits, value_bits;
  std::size_t key_stride;  // octets between blocks
  PieceSide key_side, value_side;

  explicit Pieces(const PageSpec& spec)
      : key_side(spec.key, spec.layout.k_codes), value_side(spec.value, spec.layout.v_codes) {
    const SideSpec &key = spec.key, &value = spec.value;
    key_octets = (key.groups == 1 ? pad_channels(key.dim) : key.group) / 8;
    steps = (key_octets + 7) / 8;
    keys = key.groups * steps;
    value_blocks = (value.groups == 1 ? pad_channels(value.dim) : value.group) / 16;
    rounds = (value_blocks + kMatrixBlocks - 1) / kMatrixBlocks;
    values = value.groups * rounds;
    key_bits = key.levels.bits;
    value_bits = value.levels.bits;
    key_stride = static_cast<std::size_t>(pad_channels(key.dim)) / 8;
  }
  Piece key(int i) const {
    const int first = i % steps * 8, octet = i / steps * key_octets + first;
    return key_side.piece(static_cast<std::size_t>(octet), key_stride, kPageTokens / 16,
                          std::min(8, key_octets - first));
  }
  Piece value(int i) const {
    constexpr int kOctets = kPageTokens / 8;
    const int first = i % rounds * kMatrixBlocks, octet = (i / rounds * value_blocks + first) * kOctets;
    return value_side.piece(static_cast<std::size_t>(octet), kOctets, std::min(kMatrixBlocks, value_blocks - first),
                            kOctets);
  }
};

// Scratch of a task; with a null block only its size. `height` below: rows of h in a first operand.
struct TilesScratch {
  std::int8_t* queries;  // [tiles, key pieces] first operands
  std::int8_t* weights;  // [kMostPages] first operands
  std::uint8_t* levels;  // [kMostPages, pieces] second operands of kPieceBytes; of a single tile those of one piece
  std::size_t bytes;

  TilesScratch(void* block, const Pieces& pieces, std::int64_t rows) {
    Parts parts(block);
    const std::int64_t tiles = tiles_of(rows);
    queries = parts.take<std::int8_t>(static_cast<std::size_t>(tiles * pieces.keys) * kOperandBytes);
    weights = parts.take<std::int8_t>(kMostPages * kOperandBytes);
    const int kept = tiles == 1 ? 1 : kMostPages * (pieces.keys + pieces.values);
    levels = parts.take<std::uint8_t>(static_cast<std::size_t>(kept) * kPieceBytes);
    bytes = parts.used();
  }
  static std::int64_t tiles_of(std::int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
};

// n numbers (a multiple of 16), x(i) those from i on, times `inverse`, to the nearest integers, as a row of first
// operands: h at `high`, l at `low`, each next 64 positions kOperandBytes later. Positions from n to the next multiple
// of 64 become 0.
template <class V, class X>
KV4_INLINE void quantise_row(X x, int n, typename V::F inverse, std::int8_t* high, std::int8_t* low) {
  using I = typename V::I;
  constexpr int kVectors = kMatrixPositions / V::kLanes;
  for (int i = 0; i < n; i += kMatrixPositions, high += kOperandBytes, low += kOperandBytes) {
    I v[kVectors];
    KV4_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int at = i + k * V::kLanes;
      const typename V::F scaled = at < n ? x(at) * inverse : typename V::F{};
      v[k] = V::round(scaled) & (I)(scaled == scaled);  // what is NaN, or 0 times infinity, has no integer
    }
    V::Tiles::split(v, high, low);
  }
}

// One or two pages, which one softmax serves: with few rows what stands between two products takes as long for 128
// tokens as for 64.
struct Pages {
  PageAt page[kMostPages];
  int count, tokens;
};

// Of pages with room for N tokens.
template <int N>
KV4_INLINE int count_of(const Pages& pages) {
  return N == kPageTokens ? 1 : pages.count;
}

inline Pages pages_at(const PagesTask& t, int p, int most) {
  Pages pages;
  pages.count = std::min(most, t.last - p);
  pages.tokens = 0;
  for (int i = 0; i < pages.count; ++i) {
    pages.page[i] = page_at(t, p + i);
    pages.tokens += pages.page[i].tokens;
  }
  return pages;
}

// The slices of the pages after those at work, fetched into L2 a few lines at a time wherever that work has got to:
// more at once than a core has buffers for would keep its own loads waiting.
class NextPages {
 public:
  // Pages [p, p + most), as many as the task has, by `calls` of fetch.
  NextPages(const PagesTask& t, int p, int most, int calls)
      : bytes_(t.spec->layout.head_bytes), step_((most * bytes_ / 64 + calls) / calls * 64) {
    for (; count_ < std::min(most, t.last - p); ++count_)
      slices_[count_] = slice_at(t.memory, t.pages[p + count_], t.head);
  }
  KV4_INLINE void fetch() {
    if (slice_ == count_) return;
    const std::int64_t to = std::min(at_ + step_, bytes_);
    for (; at_ < to; at_ += 64) __builtin_prefetch(slices_[slice_] + at_, 0, 2);
    if (at_ < bytes_) return;
    ++slice_;
    at_ = 0;
  }

 private:
  const std::uint8_t* slices_[kMostPages];
  const std::int64_t bytes_, step_;
  int count_ = 0, slice_ = 0;  // slices, and that which is being fetched
  std::int64_t at_ = 0;
};

// Levels of octets and blocks that a piece lacks stay what they were: they meet zeros, or their sums are not read.
template <class Tiles, int B>
KV4_INLINE void unpack_bits(const Piece& piece, const std::uint8_t* slice, const typename Tiles::Table& table,
                            std::uint8_t* levels, NextPages& next) {
  constexpr int kFirst = step_bytes(first_plane(B)), kSecond = step_bytes(B - first_plane(B));
  for (int b = 0; b < piece.blocks; ++b) {
    next.fetch();
    const std::size_t block = static_cast<std::size_t>(b) * piece.stride;
    const std::uint8_t *const codes = slice + piece.codes + block, *const more = slice + piece.more + block / 2;
    std::uint8_t* const to = levels + b * kOperandBytes;
    const auto step = [&](int s) {
      Tiles::template unpack<B>(codes + s * kFirst, more + s * kSecond, table, to + s * 256);
    };
    if (piece.octets == 8) {
      KV4_UNROLL
      for (int s = 0; s < 4; ++s) step(s);
    } else {
      for (int s = 0; s < piece.octets / 2; ++s) step(s);
    }
  }
}
// Code of its own: each of many kernels has that of 4 bits inlined.
template <class Tiles, int B>
[[gnu::noinline]] void unpack_other(const Piece& piece, const std::uint8_t* slice, const typename Tiles::Table& table,
                                    std::uint8_t* levels, NextPages& next) {
  unpack_bits<Tiles, B>(piece, slice, table, levels, next);
}
template <class Tiles>
KV4_INLINE void unpack(const Piece& piece, int bits, const std::uint8_t* slice, const typename Tiles::Table& table,
                       std::uint8_t* levels, NextPages& next) {
  switch (bits) {
    case 2: return unpack_other<Tiles, 2>(piece, slice, table, levels, next);
    case 3: return unpack_other<Tiles, 3>(piece, slice, table, levels, next);
    case 6: return unpack_other<Tiles, 6>(piece, slice, table, levels, next);
    case 8: return unpack_other<Tiles, 8>(piece, slice, table, levels, next);
    default: return unpack_bits<Tiles, 4>(piece, slice, table, levels, next);
  }
}

// Registers 0 to 3 hold the sums of four blocks, 4 the rows, 5 to 7 levels.
template <class Tiles>
KV4_INLINE void clear_sums() {
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  Tiles::template zero<2>();
  Tiles::template zero<3>();
}
template <class Tiles>
KV4_INLINE void multiply(const std::int8_t* operand, const std::uint8_t* levels) {
  Tiles::template load<4>(operand);
  Tiles::template load<5>(levels);
  Tiles::template multiply<0, 4, 5>();
  Tiles::template load<6>(levels + kOperandBytes);
  Tiles::template multiply<1, 4, 6>();
  Tiles::template load<7>(levels + 2 * kOperandBytes);
  Tiles::template multiply<2, 4, 7>();
  Tiles::template load<5>(levels + 3 * kOperandBytes);
  Tiles::template multiply<3, 4, 5>();
}

// Sums of one piece's blocks: [block, 2 height, 16], the rows of l under those of h.
struct alignas(64) MatrixSums {
  std::int32_t sums[kMatrixBlocks * 2 * kTileRows * 16];

  template <class Tiles>
  KV4_INLINE void take(int height) {
    const std::ptrdiff_t block = 2 * height * 16;
    Tiles::template store<0>(sums);
    Tiles::template store<1>(sums + block);
    Tiles::template store<2>(sums + 2 * block);
    Tiles::template store<3>(sums + 3 * block);
  }
  // 256 h + l of lanes [lane, lane + kLanes) of row r.
  template <class V>
  KV4_INLINE typename V::F joined(int height, int block, int r, int lane) const {
    using I = typename V::I;
    const std::int32_t* const high = sums + (block * 2 * height + r) * 16 + lane;
    return V::to_float((load_as<I>(high) << 8) + load_as<I>(high + height * 16));
  }
};

// f(std::integral_constant<int, rows>), 1 <= rows <= kTileRows.
template <int R = kTileRows, class F>
KV4_INLINE void with_rows(int rows, F f) {
  if constexpr (R > 1)
    if (rows < R) return with_rows<R - 1>(rows, f);
  f(std::integral_constant<int, R>{});
}

// What a task's kernels share.
template <class V>
struct MatrixTask {
  using Table = typename V::Tiles::Table;
  const PagesTask& t;
  const Pieces pieces{*t.spec};
  const TilesScratch scratch{t.tiles, pieces, t.rows};
  const int tiles = static_cast<int>(TilesScratch::tiles_of(t.rows));
  const int height = (t.rows + tiles - 1) / tiles;
  const Table key_table = V::Tiles::table(t.spec->key.levels), value_table = V::Tiles::table(t.spec->value.levels);

  // That one softmax serves.
  int pages() const { return height <= kPairRows ? kMostPages : 1; }
  // Calls of NextPages::fetch while all rows see the pages at work.
  int fetches() const {
    const int blocks = pieces.keys * (kPageTokens / 16) + t.spec->value.groups * pieces.value_blocks;
    return pages() * (blocks + t.rows * t.spec->key.groups) + t.rows * pieces.values;
  }
  // Levels of piece i, keys first, of a page at work.
  std::uint8_t* levels(int page, int i) const {
    return scratch.levels + (tiles == 1 ? 0 : page * (pieces.keys + pieces.values) + i) * kPieceBytes;
  }
};

template <class V>
inline void prepare_matrix_queries(const MatrixTask<V>& task) {
  const PagesTask& t = task.t;
  const SideSpec& key = t.spec->key;
  const int positions = task.pieces.key_octets * 8;
  for (int i = 0; i < task.tiles; ++i) {
    const TileAt tile = tile_at(t, i, task.tiles);
    for (int r = 0; r < tile.rows; ++r) {
      for (int g = 0; g < key.groups; ++g) {
        const float* q = t.q + (tile.row + r) * t.q_stride + g * positions;
        typename V::F unit, inverse;
        units_of_query<V>(q, positions, &unit, &inverse);
        const std::ptrdiff_t operand = i * task.pieces.keys + g * task.pieces.steps;
        std::int8_t* const high = task.scratch.queries + operand * kOperandBytes + r * kMatrixPositions;
        quantise_row<V>([q](int c) { return V::load(q + c); }, positions, inverse, high,
                        high + task.height * kMatrixPositions);
        t.q_scale[(tile.row + r) * key.groups + g] = unit[0];
      }
    }
  }
}

// Scores of the R rows of a tile. unpacked: the task has the pages' keys already.
template <class V, int R, int N>
KV4_INLINE void score_matrix(const MatrixTask<V>& task, const Pages& pages, int tile, int row0, bool unpacked,
                             NextPages& next, float (&scores)[R][N]) {
  using F = typename V::F;
  using Tiles = typename V::Tiles;
  const PagesTask& t = task.t;
  const Pieces& pieces = task.pieces;
  const int groups = t.spec->key.groups, height = task.height;
  const int count = count_of<N>(pages);
  const F overflow = overflow_factor<V>(t.cap);
  const float* const q_scale = t.q_scale + row0 * groups;
  alignas(64) float from_mean[kRowLanes] = {};
  MatrixSums sums;
  for (int page = 0; page < count; ++page) {
    widen_keys<V>(t, pages.page[page]);
    for (int i = 0; i < pieces.keys; ++i) {
      std::uint8_t* const levels = task.levels(page, i);
      if (!unpacked)
        unpack<Tiles>(pieces.key(i), pieces.key_bits, pages.page[page].slice, task.key_table, levels, next);
      if (i % pieces.steps == 0) clear_sums<Tiles>();
      multiply<Tiles>(task.scratch.queries + (tile * pieces.keys + i) * kOperandBytes, levels);
      if (i % pieces.steps < pieces.steps - 1) continue;
      sums.template take<Tiles>(height);
      const int g = i / pieces.steps;
      if (g == 0 && t.spec->key.mean) dot_mean<V, R>(t, row0, from_mean);
      const float* const k_scale = t.k_scale + g * kPageTokens;
      KV4_UNROLL
      for (int r = 0; r < R; ++r) {
        next.fetch();
        float* const to = scores[r] + page * kPageTokens;
        const F unit = V::set1(q_scale[r * groups + g]), mean = V::set1(from_mean[r]);
        KV4_UNROLL
        for (int j = 0; j < kPageTokens; j += V::kLanes) {
          const F before = g == 0 ? mean : V::load(to + j);
          const F s = V::fma(sums.template joined<V>(height, j / 16, r, j % 16), unit * V::load(k_scale + j), before);
          V::store(to + j, V::fma(s, overflow, s));
        }
      }
    }
    if (t.spec->second.rows > 0) add_second<V>(t, pages.page[page].slice, row0, page * kPageTokens, scores);
  }
  const int scored = count * kPageTokens;
  for (int r = 0; r < R; ++r) std::fill_n(scores[r] + scored, N - scored, 0.0f);
}

// Weights times the value scales of group g as first operands, one a page. units[r]: what a sum counts.
template <class V, int R, int N>
KV4_INLINE void prepare_weights(const MatrixTask<V>& task, const Pages& pages, int g, const float (&weights)[R][N],
                                float* units) {
  using F = typename V::F;
  alignas(64) float inverse[kRowLanes], v_scale[N] = {};
  const int count = count_of<N>(pages);
  for (int page = 0; page < count; ++page)
    widen_scales<V>(pages.page[page].slice + task.t.spec->layout.v_scales + 2 * g * kPageTokens, 1,
                    pages.page[page].tokens, v_scale + page * kPageTokens);
  F largest[R], top[kRowLanes / V::kLanes];
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    largest[r] = F{};
    KV4_UNROLL
    for (int j = 0; j < N; j += V::kLanes)
      largest[r] = V::max(largest[r], V::load(weights[r] + j) * V::load(v_scale + j));
  }
  fold_lanes<V, MaxLanes<V>>(largest, top);
  KV4_UNROLL
  for (int i = 0; i * V::kLanes < R; ++i) {
    F unit, other;
    units_of<V>(top[i], &unit, &other);
    V::store(units + i * V::kLanes, unit);
    V::store(inverse + i * V::kLanes, other);
  }
  KV4_UNROLL
  for (int r = 0; r < R; ++r) {
    std::int8_t* const high = task.scratch.weights + r * kMatrixPositions;
    const auto scaled = [&](int j) { return V::load(weights[r] + j) * V::load(v_scale + j); };
    quantise_row<V>(scaled, N, V::set1(inverse[r]), high, high + task.height * kMatrixPositions);
  }
}

// As add_values of attend_pages.inl.
template <class V, int R, int N>
KV4_INLINE void add_matrix_values(const MatrixTask<V>& task, const Pages& pages, int row0, bool unpacked,
                                  NextPages& next, const float (&weights)[R][N], const float* rescale) {
  using F = typename V::F;
  using Tiles = typename V::Tiles;
  const Pieces& pieces = task.pieces;
  const int height = task.height, count = count_of<N>(pages);
  const std::int64_t o_stride = task.t.states.o_stride;
  alignas(64) float units[kRowLanes];
  MatrixSums sums;
  for (int i = 0; i < pieces.values; ++i) {
    const int g = i / pieces.rounds, first = g * pieces.value_blocks + i % pieces.rounds * kMatrixBlocks;
    const Piece piece = pieces.value(i);
    if (i % pieces.rounds == 0) prepare_weights<V>(task, pages, g, weights, units);
    for (int page = 0; page < count; ++page) {
      std::uint8_t* const levels = task.levels(page, pieces.keys + i);
      if (!unpacked) unpack<Tiles>(piece, pieces.value_bits, pages.page[page].slice, task.value_table, levels, next);
      if (page == 0) clear_sums<Tiles>();
      multiply<Tiles>(task.scratch.weights + page * kOperandBytes, levels);
    }
    sums.template take<Tiles>(height);
    float* const o = task.t.states.o + row0 * o_stride + first * 16;
    KV4_UNROLL
    for (int r = 0; r < R; ++r) {
      next.fetch();
      float* to = o + r * o_stride;
      const F unit = V::set1(units[r]), factor = V::set1(rescale[r]);
      for (int b = 0; b < piece.blocks; ++b, to += 16) {
        KV4_UNROLL
        for (int lane = 0; lane < 16; lane += V::kLanes)
          V::store(to + lane, V::fma(sums.template joined<V>(height, b, r, lane), unit, V::load(to + lane) * factor));
      }
    }
  }
}

// Which levels of the pages at work the task has.
struct Unpacked {
  bool keys = false, values = false;
};

template <class V, int R, int N>
void attend_matrix(const MatrixTask<V>& task, const Pages& pages, int tile, int row0, Unpacked& unpacked,
                   NextPages& next) {
  const PagesTask& t = task.t;
  const std::int64_t position = pages.page[0].position;
  Span spans[R];
  bool any = false;
  for (int r = 0; r < R; ++r) {
    spans[r] = visible_span(t.mask, row0 + r, position, pages.tokens);
    any = any || spans[r].end > spans[r].begin;
  }
  if (!any) return;
  alignas(64) float scores[R][N], rescale[kRowLanes];
  score_matrix<V>(task, pages, tile, row0, unpacked.keys, next, scores);
  unpacked.keys = task.tiles > 1;
  if (!weigh_scores<V>(t, position, row0, spans, scores, rescale)) return;
  add_matrix_values<V>(task, pages, row0, unpacked.values, next, scores, rescale);
  unpacked.values = task.tiles > 1;
}

template <class V>
void attend_tiles(const PagesTask& t) {
  const MatrixTask<V> task{t};
  prepare_matrix_queries<V>(task);
  V::Tiles::configure(2 * task.height);
  const int most = task.pages();
  for (int p = t.first; p < t.last; p += most) {
    const Pages pages = pages_at(t, p, most);
    NextPages next(t, p + most, most, task.fetches());
    Unpacked unpacked;
    for (int i = 0; i < task.tiles; ++i) {
      const TileAt tile = tile_at(t, i, task.tiles);
      with_rows(tile.rows, [&](auto n) {
        constexpr int kTokens = kMostPages * kPageTokens;
        if constexpr (n <= kPairRows)
          if (most == kMostPages) return attend_matrix<V, n, kTokens>(task, pages, i, tile.row, unpacked, next);
        attend_matrix<V, n, kPageTokens>(task, pages, i, tile.row, unpacked, next);
      });
    }
  }
  V::Tiles::release();
}

// One or two rows are best served by the vector unit: what the matrix unit takes for a page hardly depends on rows.
template <class V>
void attend_any_rows(const PagesTask& t) {
  if constexpr (requires { typename V::Tiles; })
    if (t.rows >= V::Tiles::kFewestRows) return attend_tiles<V>(t);
  attend_pages<V>(t);
}

template <class V>
std::size_t tiles_scratch(const PageSpec& spec, std::int64_t rows) {
  if constexpr (requires { typename V::Tiles; }) return TilesScratch(nullptr, Pieces(spec), rows).bytes;
  return 0;
}

}  // namespace kv4::cpu::KV4_ISA
