// Attention over sealed pages with a matrix unit: 16 rows of 64 int8 positions by 64 positions of 16 lanes. An
// instruction set that has one offers it as Isa::Tiles (amx/tiles.h, which has counts and times); elsewhere nothing
// here is compiled.
//
// The scores are those of attend_pages.inl, from the same integers: q_c = 256 h + l, h and l in int8, against the
// levels as they are, which are int8 too. The first operand holds the h of up to kTileRows query rows, and under them
// their l. Weights are not negative: their h and l are bytes without a sign, and their unit is half as large. One unit
// serves the up to kMostPages pages whose sums the registers add up, where the other path has one a page: at worst all
// weights but one page's are small, and rounding then adds up over all pages, sqrt(4) / 2 as much as there.
//
// Overflow: |sum of h L|, |sum of l L| <= 512 * 128 * 127 < 2^23 for keys, 256 * 255 * 128 < 2^23 for values, 256 h + l
// < 2^31 (portable/dot.h) and at most 256 * 65535 * 128 < 2^31.
#pragma once

#include <type_traits>

#include "cpu/matrix_levels.inl"

namespace kv4::cpu::KV4_ISA {

constexpr int kWeightLimit = 65535;

// n numbers (a multiple of 16), x(i) those from i on, times `inverse`, to the nearest integers, as a row of first
// operands: h at `high`, l at `low`, each next 64 positions kOperandBytes later. Positions from n to the next multiple
// of 64 become 0. kUnsigned: they are none below 0, and h and l are bytes without a sign.
template <class V, bool kUnsigned, class X>
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
    V::Tiles::template split<kUnsigned>(v, high, low);
  }
}

// Sums of one piece's blocks: [block, 16, 16], the `height` rows of l under those of h.
struct alignas(64) MatrixSums {
  static constexpr int kBlock = 16 * 16;
  std::int32_t sums[kMatrixBlocks * kBlock];

  template <class Tiles>
  KV4_INLINE void take() {
    Tiles::template store<0>(sums);
    Tiles::template store<1>(sums + kBlock);
    Tiles::template store<2>(sums + 2 * kBlock);
    Tiles::template store<3>(sums + 3 * kBlock);
  }
  // 256 h + l of lanes [lane, lane + kLanes) of a block; `high` is the row's h of block 0.
  template <class V>
  static KV4_INLINE typename V::F joined(const std::int32_t* high, const std::int32_t* low, int block, int lane) {
    using I = typename V::I;
    const int at = block * kBlock + lane;
    return V::to_float((load_as<I>(high + at) << 8) + load_as<I>(low + at));
  }
};

// f(std::integral_constant<int, rows>), 1 <= rows <= kTileRows.
template <int R = kTileRows, class F>
KV4_INLINE void with_rows(int rows, F f) {
  if constexpr (R > 1)
    if (rows < R) return with_rows<R - 1>(rows, f);
  f(std::integral_constant<int, R>{});
}

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
        units_of_all<V>(q, positions, &unit, &inverse);
        const std::ptrdiff_t operand = i * task.pieces.keys + g * task.pieces.steps;
        std::int8_t* const high = task.scratch.queries + operand * kOperandBytes + r * kMatrixPositions;
        quantise_row<V, false>([q](int c) { return V::load(q + c); }, positions, inverse, high,
                               high + task.height * kMatrixPositions);
        t.q_scale[(tile.row + r) * key.groups + g] = unit[0];
      }
    }
  }
}

// Which levels of the pages at work the task has.
struct Unpacked {
  bool keys = false, values = false;
};

// Does `items` pieces of work by turns with `calls` products: step(n), after the n-th product, what is due then.
template <class Work>
class Beside {
 public:
  Beside(int items, int calls, Work work) : items_(items), calls_(calls), work_(work) {}
  KV4_INLINE void step(int call) {
    for (; done_ * calls_ < items_ * call; ++done_) work_(done_);
  }
  KV4_INLINE void finish() {
    for (; done_ < items_; ++done_) work_(done_);
  }

 private:
  const int items_, calls_;
  int done_ = 0;
  Work work_;
};

// The R rows of one tile over the pages of a task, a few of which one softmax serves at a time. Where keys have one
// scale a token, those of the next few are multiplied beside the softmax of these, and their sums converted beside the
// products of the values of these: the two kinds of work wait for different things.
template <class V, int R>
class TileRun {
  using F = typename V::F;
  using Tiles = typename V::Tiles;
  using At = typename LevelStream<V>::At;

 public:
  TileRun(const MatrixTask<V>& task, int tile, int row, Unpacked& unpacked, LevelStream<V>& stream)
      : task_(task), t_(task.t), pieces_(task.pieces), height_(task.height), row_(row), unpacked_(unpacked),
        stream_(stream), operands_(task.scratch.queries + tile * task.pieces.keys * kOperandBytes),
        ahead_(task.tiles == 1 && task.t.spec->key.groups == 1) {}

  // Pages [first, last).
  void run(int first, int last) {
    page_ = first;
    last_ = last;
    Group groups[3];
    Group *now = find(groups[0]), *next = find(groups[1]), *later = &groups[2];
    if (now == nullptr) return;
    multiply_keys(*now, next != nullptr && ahead_ ? first_key(*next) : first_value(*now), [](int) {});
    if (ahead_) convert(*now);
    rank(*now);
    while (now != nullptr) {
      Group* const freed = now;
      later = find(*later);
      attend(*now, next, later);
      now = next;
      next = later;
      later = freed;
    }
  }

 private:
  // A few pages of which some row sees a token.
  struct Group {
    Pages pages;
    Span spans[R];
    int size;  // tokens that there is room for
  };

  // The next group; null where there is none.
  Group* find(Group& group) {
    for (; page_ < last_; page_ += kMostPages) {
      Pages& pages = group.pages;
      pages.count = std::min(kMostPages, last_ - page_);
      for (int i = 0; i < pages.count; ++i) pages.page[i] = page_at(t_, page_ + i, kMostPages);
      group.size = pages.count * kPageTokens;
      bool any = false;
      for (int r = 0; r < R; ++r) {
        group.spans[r] = visible_span(t_.mask, row_ + r, pages.page[0].position,
                                      group.size - kPageTokens + pages.page[pages.count - 1].tokens);
        any = any || group.spans[r].end > group.spans[r].begin;
      }
      if (!any) continue;
      page_ += kMostPages;
      return &group;
    }
    return nullptr;
  }

  At first_key(const Group& group) const { return {group.pages.page, 0, 0}; }
  At first_value(const Group& group) const { return {group.pages.page, 0, pieces_.keys}; }

  // Softmax and values of `now`, whose scores are there, and the scores of `next`, which `later` follows.
  void attend(const Group& now, const Group* next, const Group* later) {
    const bool ahead = next != nullptr && ahead_;
    if (t_.spec->value.groups == 1) widen_value_scales<V>(t_, now.pages, 0, v_scale_);
    else std::fill_n(v_scale_, now.size, 1.0f);
    Beside weighing(R + 1 + now.pages.count, ahead ? next->pages.count * pieces_.keys : 1,
                    [&](int i) KV4_INLINE_LAMBDA {
                      if (i < R) weigh_row(i, now.size);
                      else if (i == R) settle();
                      else prepare_page(i - R - 1);
                    });
    if (ahead) multiply_keys(*next, first_value(now), [&](int call) { weighing.step(call); });
    weighing.finish();
    if (gains_) {
      Beside converting(ahead ? next->pages.count : 0, now.pages.count * pieces_.values,
                        [&](int i) KV4_INLINE_LAMBDA { convert(next->pages, i, 0, raw_[i]); });
      add_values(now.pages,
                 next == nullptr    ? At()
                 : !ahead           ? first_key(*next)
                 : later != nullptr ? first_key(*later)
                                    : first_value(*next),
                 [&](int call) { converting.step(call); });
      converting.finish();
    } else {
      stream_.forget();  // the values of `now`
      if (ahead) convert(*next);
    }
    if (next == nullptr) return;
    if (!ahead) multiply_keys(*next, first_value(*next), [](int) {});
    rank(*next);
  }

  // The products of the keys, which leave sums, or scores where keys have several scales. `then`: what is multiplied
  // next. beside(n): after the n-th product.
  template <class Beside>
  KV4_INLINE void multiply_keys(const Group& group, const At& then, Beside beside) {
    const Pages& pages = group.pages;
    const int count = pages.count, keys = pieces_.keys, steps = pieces_.steps;
    const bool unpacked = unpacked_.keys;
    int call = 0;
    for (int number = 0; number < count; ++number) {
      const PageAt& page = pages.page[number];
      for (int i = 0, g = 0; i < keys; ++g) {
        clear_sums<Tiles>();
        for (const int end = i + steps; i < end; ++i) {
          const At next = i + 1 < keys         ? At{&page, number, i + 1}
                          : number + 1 < count ? At{&page + 1, number + 1, 0}
                                               : then;
          stream_.template multiply<false>(operands_ + i * kOperandBytes, {&page, number, i}, next, unpacked);
          beside(++call);
        }
        raw_[number].template take<Tiles>();
        if (!ahead_) convert(pages, number, g, raw_[number]);
      }
    }
    unpacked_.keys = task_.tiles > 1;
  }

  // The scores of one page, of the sums of group g of its keys.
  [[gnu::noinline]] void convert(const Pages& pages, int number, int g, const MatrixSums& sums) {
    const PageAt& page = pages.page[number];
    const int groups = t_.spec->key.groups;
    if (g == 0) {
      prefetch_scales(t_, page);
      widen_keys<V>(t_, page, 0);
      if (t_.spec->key.mean) dot_rows<V, R>(t_, row_, t_.mean, from_mean_);
    }
    F k_scale[kPageTokens / V::kLanes];
    KV4_UNROLL
    for (int i = 0; i < kPageTokens / V::kLanes; ++i)
      k_scale[i] = V::load(t_.k_scale + g * kPageTokens + i * V::kLanes);
    const F overflow = overflow_factor<V>(t_.cap);
    const float* const q_scale = t_.q_scale + row_ * groups + g;
    float* to = scores_[0] + number * kPageTokens;
    const std::int32_t *high = sums.sums, *low = high + height_ * 16;
    for (int r = 0; r < R; ++r, to += kMostTokens, high += 16, low += 16) {
      const F unit = V::set1(q_scale[r * groups]), mean = V::set1(from_mean_[r]);
      KV4_UNROLL
      for (int i = 0; i < kPageTokens / V::kLanes; ++i) {
        const int j = i * V::kLanes;
        const F before = g == 0 ? mean : V::load(to + j);
        const F s = V::fma(MatrixSums::joined<V>(high, low, j / 16, j % 16), unit * k_scale[i], before);
        V::store(to + j, V::fma(s, overflow, s));
      }
    }
    if (g == groups - 1 && t_.spec->second.rows > 0)
      add_second<V>(t_, page.slice, t_.second, row_, number * kPageTokens, scores_);
  }
  void convert(const Group& group) {
    for (int number = 0; number < group.pages.count; ++number) convert(group.pages, number, 0, raw_[number]);
  }

  // Soft cap and mask of the scores, and their maxima.
  void rank(const Group& group) {
    mask_scores<V>(t_, group.pages.page[0].position, row_, group.spans, group.size, scores_);
    F lanes[R];
    for (int r = 0; r < R; ++r) {
      F top[4];
      KV4_UNROLL
      for (int k = 0; k < 4; ++k) top[k] = V::load(scores_[r] + k * V::kLanes);
      for (int j = 4 * V::kLanes; j < group.size; j += 4 * V::kLanes) {
        KV4_UNROLL
        for (int k = 0; k < 4; ++k) top[k] = V::max(top[k], V::load(scores_[r] + j + k * V::kLanes));
      }
      lanes[r] = V::max(V::max(top[0], top[1]), V::max(top[2], top[3]));
    }
    F top[kRowLanes / V::kLanes];
    fold_lanes<V, MaxLanes<V>>(lanes, top);
    raise_maxima<V, R>(top, t_.states.m + row_, centre_, rescale_);
  }

  // Weights of row r (softmax.inl), times v_scale_, over `size` tokens.
  [[gnu::noinline]] void weigh_row(int r, int size) {
    const F c = V::set1(centre_[r]);
    F total = F{}, top = F{};
    for (int j = 0; j < size; j += 4 * V::kLanes) {
      KV4_UNROLL
      for (int k = j; k < j + 4 * V::kLanes; k += V::kLanes) {
        const F w = exp2_of<V>(V::load(scores_[r] + k) - c), x = w * V::load(v_scale_ + k);
        V::store(scores_[r] + k, x);
        total += w;
        top = V::max(top, x);
      }
    }
    totals_[r] = total;
    largest_[r] = top;
  }
  // What the weights of all rows add up to, and the units of those that are multiplied with scales.
  [[gnu::noinline]] void settle() {
    gains_ = gain_weights<V>(totals_, t_.states.l + row_, kNegligible, rescale_);
    units_of_rows();
  }
  KV4_INLINE void units_of_rows() {
    F top[kRowLanes / V::kLanes];
    fold_lanes<V, MaxLanes<V>>(largest_, top);
    KV4_UNROLL
    for (int i = 0; i * V::kLanes < R; ++i) {
      F unit, inverse;
      units_of<V, kWeightLimit>(top[i], &unit, &inverse);
      V::store(units_ + i * V::kLanes, unit);
      V::store(inverse_ + i * V::kLanes, inverse);
    }
  }
  // The first operand of the values of a page.
  [[gnu::noinline]] void prepare_page(int number) {
    if (!gains_ || t_.spec->value.groups > 1) return;
    quantise_weights(number, [&](int r, int j) KV4_INLINE_LAMBDA { return V::load(scores_[r] + j); });
  }
  // x(r, j): weight j of row r.
  template <class X>
  KV4_INLINE void quantise_weights(int number, X x) {
    std::int8_t *high = task_.scratch.weights + number * kOperandBytes, *low = high + height_ * kMatrixPositions;
    for (int r = 0; r < R; ++r, high += kMatrixPositions, low += kMatrixPositions)
      quantise_row<V, true>([&](int j) KV4_INLINE_LAMBDA { return x(r, number * kPageTokens + j); }, kPageTokens,
                            V::set1(inverse_[r]), high, low);
  }
  // The same for all rows and group g of several.
  [[gnu::noinline]] void prepare_group(const Pages& pages, int g) {
    alignas(64) float v_scale[kMostTokens];
    widen_value_scales<V>(t_, pages, g, v_scale);
    const auto scaled = [&](int r, int j) { return V::load(scores_[r] + j) * V::load(v_scale + j); };
    for (int r = 0; r < R; ++r) {
      largest_[r] = F{};
      for (int j = 0; j < pages.count * kPageTokens; j += V::kLanes) largest_[r] = V::max(largest_[r], scaled(r, j));
    }
    units_of_rows();
    for (int i = 0; i < pages.count; ++i) quantise_weights(i, scaled);
  }

  // As add_values of attend_pages.inl; then and beside: as for keys.
  template <class Beside>
  KV4_INLINE void add_values(const Pages& pages, const At& then, Beside beside) {
    const Piece* const list = task_.scratch.list + pieces_.keys;
    const std::int8_t* const weights = task_.scratch.weights;
    const int count = pages.count, keys = pieces_.keys, values = pieces_.values, rounds = pieces_.rounds;
    const bool unpacked = unpacked_.values;
    MatrixSums sums[2];
    float* o = t_.states.o + row_ * t_.states.o_stride;
    int call = 0, added = 0;
    const auto add = [&](const float* units) {
      const int blocks = list[added].blocks;
      add_sums(blocks, sums[added % 2], units, o);
      o += blocks * 16;
      ++added;
    };
    alignas(64) float units[kRowLanes];
    for (int g = 0, i = 0; g < t_.spec->value.groups; ++g) {
      if (t_.spec->value.groups > 1) {
        if (i > 0) add(units);
        prepare_group(pages, g);
      }
      std::copy_n(units_, kRowLanes, units);
      for (int round = 0; round < rounds; ++round, ++i) {
        clear_sums<Tiles>();
        for (int number = 0; number < count; ++number) {
          const At next = number + 1 < count ? At{pages.page + number + 1, number + 1, keys + i}
                          : i + 1 < values   ? At{pages.page, 0, keys + i + 1}
                                             : then;
          stream_.template multiply<true>(weights + number * kOperandBytes, {pages.page + number, number, keys + i},
                                          next, unpacked);
          beside(++call);
        }
        if (added < i) add(units);
        sums[i % 2].template take<Tiles>();
      }
    }
    add(units);
    unpacked_.values = task_.tiles > 1;
  }
  // o += the sums of a piece, after o *= rescale.
  [[gnu::noinline]] void add_sums(int blocks, const MatrixSums& sums, const float* units, float* o) {
    const int height = height_;
    const std::int64_t stride = t_.states.o_stride;
    for (int r = 0; r < R; ++r) {
      float* to = o + r * stride;
      const F unit = V::set1(units[r]), factor = V::set1(rescale_[r]);
      const std::int32_t *const high = sums.sums + r * 16, *const low = high + height * 16;
      for (int b = 0; b < blocks; ++b, to += 16) {
        KV4_UNROLL
        for (int lane = 0; lane < 16; lane += V::kLanes)
          V::store(to + lane, V::fma(MatrixSums::joined<V>(high, low, b, lane), unit, V::load(to + lane) * factor));
      }
    }
  }

  const MatrixTask<V>& task_;
  const PagesTask& t_;
  const Pieces& pieces_;
  const int height_, row_;
  Unpacked& unpacked_;
  LevelStream<V>& stream_;
  const std::int8_t* const operands_;
  const bool ahead_;
  int page_ = 0, last_ = 0;  // pages that are left
  bool gains_ = false;       // some row's weights are worth taking into o
  MatrixSums raw_[kMostPages];
  alignas(64) float scores_[R][kMostTokens], v_scale_[kMostTokens];  // later weights
  alignas(64) float from_mean_[kRowLanes] = {}, centre_[kRowLanes], rescale_[kRowLanes], units_[kRowLanes],
                    inverse_[kRowLanes];
  F totals_[R], largest_[R];
};

template <class V>
void attend_tiles(const PagesTask& t) {
  const MatrixTask<V> task(t);
  prepare_matrix_queries<V>(task);
  LevelStream<V> stream(task);
  V::Tiles::configure(2 * task.height);
  const int most = task.tiles == 1 ? std::max(1, t.last - t.first) : kMostPages;
  for (int p = t.first; p < t.last; p += most) {
    Unpacked unpacked;
    for (int i = 0; i < task.tiles; ++i) {
      const TileAt tile = tile_at(t, i, task.tiles);
      with_rows(tile.rows,
                [&](auto n) { TileRun<V, n>(task, i, tile.row, unpacked, stream).run(p, std::min(t.last, p + most)); });
    }
  }
  V::Tiles::release();
}

template <class V, class D = Dot>
inline constexpr bool kTakesBytes = requires { typename D::ByteKeys; } && !requires { typename V::Tiles; };

template <class V, class D = Dot>
void attend_any_rows(const PagesTask& t) {
  if constexpr (requires { typename V::Tiles; }) {
    attend_tiles<V>(t);
  } else {
    if constexpr (kTakesBytes<V, D>)
      if (t.bytes) return attend_pages<V, typename D::ByteKeys, typename D::ByteWeights>(t);
    attend_pages<V>(t);
  }
}

template <class V>
std::size_t tiles_scratch(const PageSpec& spec, std::int64_t rows) {
  if constexpr (requires { typename V::Tiles; }) return TilesScratch(nullptr, Pieces(spec), rows).bytes;
  return 0;
}

}  // namespace kv4::cpu::KV4_ISA
