// The second operands of attend_tiles.inl: codes of pages, in pieces of 4 KiB of levels, each unpacked while the one
// before it is multiplied.
#pragma once

#include "cpu/attend_pages.inl"
#include "cpu/quads.inl"
#include "cpu/steps.h"

namespace kv4::cpu::KV4_ISA {

constexpr int kOperandBytes = 1024;   // 16 rows of 64
constexpr int kMatrixPositions = 64;  // positions that one product sums over
constexpr int kMatrixBlocks = 4;      // blocks of 16 lanes whose sums the unit holds at once
constexpr int kPieceBytes = kMatrixBlocks * kOperandBytes;
constexpr int kMostTokens = kMostPages * kPageTokens;

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
  Piece* list;           // [pieces]
  std::uint8_t* levels;  // [kMostPages, pieces] second operands of kPieceBytes; of a single tile those of two pieces
  std::size_t bytes;

  TilesScratch(void* block, const Pieces& pieces, std::int64_t rows) {
    Parts parts(block);
    const std::int64_t tiles = tiles_of(rows);
    queries = parts.take<std::int8_t>(static_cast<std::size_t>(tiles * pieces.keys) * kOperandBytes);
    weights = parts.take<std::int8_t>(kMostPages * kOperandBytes);
    list = parts.take<Piece>(static_cast<std::size_t>(pieces.keys + pieces.values));
    const int kept = tiles == 1 ? 2 : kMostPages * (pieces.keys + pieces.values);
    levels = parts.take<std::uint8_t>(static_cast<std::size_t>(kept) * kPieceBytes);
    bytes = parts.used();
  }
  static std::int64_t tiles_of(std::int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
};

// [count, 64] value scales of group g.
template <class V>
inline void widen_value_scales(const PagesTask& t, const Pages& pages, int g, float* v_scale) {
  for (int i = 0; i < pages.count; ++i)
    widen_scales<V>(pages.page[i].slice + t.spec->layout.v_scales + 2 * g * kPageTokens, 1, pages.page[i].tokens,
                    v_scale + i * kPageTokens);
}

// A piece to unpack, `blocks` and `octets` as in Piece.
template <class Table>
struct Packed {
  const std::uint8_t *codes, *more;  // in the first plane and in the second
  const std::uint8_t* next;          // codes of the page to prefetch
  std::size_t stride;
  const Table* table;
  std::uint8_t* levels;
  int blocks, octets;
};

// Block b of a piece. Levels of octets and blocks that a piece lacks stay what they were: they meet zeros, or their
// sums are not read.
template <class Tiles, int B>
KV4_INLINE void unpack_block(const Packed<typename Tiles::Table>& packed, int b) {
  using Steps = kv4::cpu::Steps<B, false>;
  const std::size_t block = static_cast<std::size_t>(b) * packed.stride;
  const std::uint8_t *const codes = packed.codes + block, *const more = packed.more + block / 2,
                            *const next = packed.next + block;
  std::uint8_t* const to = packed.levels + b * kOperandBytes;
  const auto step = [&](int s) KV4_INLINE_LAMBDA {
    Steps::prefetch(next, more - codes, 2 * s);
    Tiles::template unpack<B>(Steps::first(codes, 2 * s), Steps::second(more, 2 * s), *packed.table, to + s * 256);
  };
  if (packed.octets == 8) {
    KV4_UNROLL
    for (int s = 0; s < 4; ++s) step(s);
  } else {
    for (int s = 0; s < packed.octets / 2; ++s) step(s);
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

// Multiplies `levels`, while the next piece is unpacked: a block's stores and another's loads and products run side by
// side. Code of its own: each of many kernels needs it twice, and for every width.
template <class Tiles, bool kUnsigned, int B>
[[gnu::noinline]] void multiply_and_unpack(const std::int8_t* operand, const std::uint8_t* levels,
                                           const Packed<typename Tiles::Table>& next) {
  const Packed<typename Tiles::Table> packed =
      next;  // in registers: what the unit writes may be `next`, for all C++ knows
  Tiles::template load<4>(operand);
  unpack_block<Tiles, B>(packed, 0);
  Tiles::template load<5>(levels);
  Tiles::template multiply<kUnsigned, 0, 4, 5>();
  if (packed.blocks > 1) unpack_block<Tiles, B>(packed, 1);
  Tiles::template load<6>(levels + kOperandBytes);
  Tiles::template multiply<kUnsigned, 1, 4, 6>();
  if (packed.blocks > 2) unpack_block<Tiles, B>(packed, 2);
  Tiles::template load<7>(levels + 2 * kOperandBytes);
  Tiles::template multiply<kUnsigned, 2, 4, 7>();
  if (packed.blocks > 3) unpack_block<Tiles, B>(packed, 3);
  Tiles::template load<5>(levels + 3 * kOperandBytes);
  Tiles::template multiply<kUnsigned, 3, 4, 5>();
}
template <class Tiles, bool kUnsigned>
KV4_INLINE void multiply(const std::int8_t* operand, const std::uint8_t* levels) {
  Tiles::template load<4>(operand);
  Tiles::template load<5>(levels);
  Tiles::template multiply<kUnsigned, 0, 4, 5>();
  Tiles::template load<6>(levels + kOperandBytes);
  Tiles::template multiply<kUnsigned, 1, 4, 6>();
  Tiles::template load<7>(levels + 2 * kOperandBytes);
  Tiles::template multiply<kUnsigned, 2, 4, 7>();
  Tiles::template load<5>(levels + 3 * kOperandBytes);
  Tiles::template multiply<kUnsigned, 3, 4, 5>();
}
template <class Tiles, int B>
[[gnu::noinline]] void unpack_piece(const Packed<typename Tiles::Table>& packed) {
  for (int b = 0; b < packed.blocks; ++b) unpack_block<Tiles, B>(packed, b);
}

// How pieces of a side are unpacked, by the width of its codes.
template <class Tiles>
struct Unpacking {
  using Table = typename Tiles::Table;
  using WithProducts = void (*)(const std::int8_t* operand, const std::uint8_t* levels, const Packed<Table>& next);
  WithProducts with_products[2];  // of signed and of unsigned first operands
  void (*alone)(const Packed<Table>& packed);

  static Unpacking of(int bits) {
    switch (bits) {
      case 2: return with<2>();
      case 3: return with<3>();
      case 6: return with<6>();
      case 8: return with<8>();
      default: return with<4>();
    }
  }

 private:
  template <int B>
  static Unpacking with() {
    return {{multiply_and_unpack<Tiles, false, B>, multiply_and_unpack<Tiles, true, B>}, unpack_piece<Tiles, B>};
  }
};

// What a task's kernels share.
template <class V>
struct MatrixTask {
  const PagesTask& t;
  const Pieces pieces{*t.spec};
  const TilesScratch scratch{t.tiles, pieces, t.rows};
  const int tiles = static_cast<int>(TilesScratch::tiles_of(t.rows));
  const int height = (t.rows + tiles - 1) / tiles;

  explicit MatrixTask(const PagesTask& task) : t(task) {
    for (int i = 0; i < pieces.keys; ++i) scratch.list[i] = pieces.key(i);
    for (int i = 0; i < pieces.values; ++i) scratch.list[pieces.keys + i] = pieces.value(i);
  }
};

// The levels of pieces in the order in which they are multiplied, each unpacked while the one before it is. Several
// tiles keep those of the pages at work, a single one those of two pieces.
template <class V>
class LevelStream {
 public:
  using Tiles = typename V::Tiles;
  using Table = typename Tiles::Table;
  // Piece i, keys first, of page `number` of those at work; none where the page is null.
  struct At {
    const PageAt* page = nullptr;
    int number = 0, piece = 0;
  };

  explicit LevelStream(const MatrixTask<V>& task)
      : list_(task.scratch.list), levels_(task.scratch.levels), keys_count_(task.pieces.keys),
        pieces_(task.pieces.keys + task.pieces.values), one_(task.tiles == 1),
        keys_(Unpacking<Tiles>::of(task.t.spec->key.levels.bits)),
        values_(Unpacking<Tiles>::of(task.t.spec->value.levels.bits)),
        key_table_(Tiles::table(task.t.spec->key.levels)), value_table_(Tiles::table(task.t.spec->value.levels)) {}

  // Adds the products of a piece to the sums. `then`: the piece of the next call, unless forget comes before it.
  template <bool kUnsigned>
  KV4_INLINE void multiply(const std::int8_t* operand, const At& at, const At& then, bool unpacked) {
    if (unpacked) return cpu::KV4_ISA::multiply<Tiles, kUnsigned>(operand, levels(at));
    if (!ready_) alone(at);
    const std::uint8_t* const now = levels(at);
    ready_ = then.page != nullptr;
    if (!ready_) return cpu::KV4_ISA::multiply<Tiles, kUnsigned>(operand, now);
    turn_ ^= 1;
    const Packed<Table> next = packed(then);
    (then.piece < keys_count_ ? keys_ : values_).with_products[kUnsigned](operand, now, next);
  }
  void forget() { ready_ = false; }

 private:
  [[gnu::noinline]] void alone(const At& at) {
    turn_ ^= 1;
    (at.piece < keys_count_ ? keys_ : values_).alone(packed(at));
  }
  KV4_INLINE std::uint8_t* levels(const At& at) const {
    const int i = one_ ? turn_ : at.number * pieces_ + at.piece;
    return levels_ + i * kPieceBytes;
  }
  KV4_INLINE Packed<Table> packed(const At& at) const {
    const Piece& piece = list_[at.piece];
    return {at.page->slice + piece.codes,
            at.page->slice + piece.more,
            at.page->next + piece.codes,
            piece.stride,
            at.piece < keys_count_ ? &key_table_ : &value_table_,
            levels(at),
            piece.blocks,
            piece.octets};
  }

  const Piece* const list_;
  std::uint8_t* const levels_;
  const int keys_count_, pieces_;
  const bool one_;  // tile
  const Unpacking<Tiles> keys_, values_;
  const Table key_table_, value_table_;
  bool ready_ = false;  // the levels of the next call's piece are there
  int turn_ = 0;        // of a single tile, which of two places has the last unpacked ones
};

}  // namespace kv4::cpu::KV4_ISA
