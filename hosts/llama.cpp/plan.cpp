#include "plan.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kv4/recipe.h"

namespace kv4::llama {
namespace {

constexpr std::uint16_t kHidden = 0xfc00;  // -infinity

std::int64_t common(const std::vector<std::uint64_t>& a, const std::vector<std::uint64_t>& b) {
  std::int64_t n = 0;
  for (std::size_t i = 0; i < a.size(); ++i) n += std::popcount(a[i] & b[i]);
  return n;
}
std::int64_t count(const std::vector<std::uint64_t>& a) { return common(a, a); }
bool has(const std::vector<std::uint64_t>& bits, std::int64_t b) {
  return (bits[static_cast<std::size_t>(b / 64)] >> (b % 64) & 1) != 0;
}

std::int64_t blocks_in(std::int64_t cells) { return (cells + kPageTokens - 1) / kPageTokens; }

}  // namespace

// In four lanes: a mask of a prompt's rows is megabytes, and each layer asks whether it is the same.
std::uint64_t MaskRows::digest() const {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;
  std::uint64_t lanes[4] = {1, 2, 3, 4};
  const auto columns = static_cast<std::size_t>(cells);
  for (int s = 0; s < streams && data != nullptr; ++s) {
    for (int t = 0; t < rows; ++t) {
      const std::uint16_t* x = row(s, t);
      std::size_t c = 0;
      for (; c + 16 <= columns; c += 16) {
        std::uint64_t words[4];
        std::memcpy(words, x + c, sizeof words);
        for (int i = 0; i < 4; ++i) lanes[i] = (std::rotl(lanes[i], 29) ^ words[i]) * kOdd;
      }
      for (; c < columns; ++c) lanes[c % 4] = (std::rotl(lanes[c % 4], 29) ^ x[c]) * kOdd;
    }
  }
  std::uint64_t all = 0;
  for (const std::uint64_t lane : lanes) all = (std::rotl(all, 31) ^ lane) * kOdd;
  return all;
}

// What one row sees.
struct Plan::Sight {
  std::int64_t first = 0, last = -1;
  bool plain = true;  // all from first to last, with nothing added
  std::vector<std::uint64_t> blocks;
};

Plan::Sight Plan::sight_of(const std::uint16_t* row, std::int64_t cells) {
  Sight sight;
  sight.blocks.assign(static_cast<std::size_t>((blocks_in(cells) + 63) / 64), 0);
  std::int64_t seen = 0;
  unsigned added = 0;
  for (std::int64_t b = 0; b < blocks_in(cells); ++b) {
    const std::uint16_t* x = row + b * kPageTokens;
    const int n = static_cast<int>(std::min<std::int64_t>(kPageTokens, cells - b * kPageTokens));
    unsigned here = 0, bits = 0;
    for (int j = 0; j < n; ++j) {
      const bool visible = x[j] != kHidden;
      here += visible ? 1u : 0u;
      bits |= visible ? x[j] & 0x7fffu : 0u;
    }
    if (here == 0) continue;
    if (seen == 0)
      sight.first = b * kPageTokens + (std::find_if(x, x + n, [](std::uint16_t m) { return m != kHidden; }) - x);
    int last = n - 1;
    while (x[last] == kHidden) --last;
    sight.last = b * kPageTokens + last;
    seen += here;
    added |= bits;
    sight.blocks[static_cast<std::size_t>(b / 64)] |= std::uint64_t{1} << (b % 64);
  }
  sight.plain = seen > 0 && added == 0 && seen == sight.last - sight.first + 1;
  return sight;
}

// Takes the row into the group if it sees much the same. A sequence is no shorter than its rows are many.
bool Plan::extend(Group* g, const Sight& s) {
  const std::int64_t shared = common(g->blocks, s.blocks), smaller = std::min(count(g->blocks), count(s.blocks));
  if (2 * shared < smaller || (shared == 0) != (smaller == 0)) return false;
  bool plain = g->plain && s.plain && s.last == g->last + 1;
  std::int64_t window = g->window;
  if (plain && s.first != std::max(g->start, window > 0 ? s.last - window + 1 : 0)) {
    plain = window == 0 && s.first == g->start + 1;
    window = s.last - s.first + 1;
  }
  if (!plain) {
    const std::int64_t all = std::max<std::int64_t>(1, count(g->blocks) + count(s.blocks) - shared);
    if (all * kPageTokens < g->end + 1 - g->begin) return false;
  }
  g->plain = plain;
  g->window = window;
  g->last = s.last;
  ++g->end;
  for (std::size_t i = 0; i < s.blocks.size(); ++i) g->blocks[i] |= s.blocks[i];
  return true;
}

void Plan::find_groups(const MaskRows& mask) {
  groups_.clear();
  sequences_of_stream_ = 1;
  const std::vector<std::uint16_t> all(mask.data == nullptr ? static_cast<std::size_t>(mask.cells) : 0, 0);
  for (int s = 0; s < mask.streams; ++s) {
    const std::size_t before = groups_.size();
    for (int t = 0; t < mask.rows; ++t) {
      Sight sight = sight_of(mask.data == nullptr ? all.data() : mask.row(s, t), mask.cells);
      if (groups_.size() > before && extend(&groups_.back(), sight)) continue;
      groups_.push_back({s, t, t + 1, sight.plain, sight.first, 0, sight.last, std::move(sight.blocks)});
    }
    sequences_of_stream_ = std::max(sequences_of_stream_, static_cast<int>(groups_.size() - before));
  }
}

// A plain group reads all blocks from its first to its last, so that positions go on: it stays plain where the packed
// ones come first, and its last cell does not lie in the midst of one.
void Plan::settle_group(Group* g, const std::uint8_t* packed) {
  if (count(g->blocks) == 0) {  // something has to be there to be hidden
    g->blocks[0] = 1;
    g->plain = false;
  }
  g->plain = g->plain && (packed[g->last / kPageTokens] == 0 || (g->last + 1) % kPageTokens == 0);
  bool exact = false;
  for (std::int64_t b = g->start / kPageTokens; g->plain && b <= g->last / kPageTokens; ++b) {
    g->plain = !exact || packed[b] == 0;
    exact = exact || packed[b] == 0;
  }
}

// The blocks of each group, packed ones first, both in their order.
void Plan::list_blocks(const std::uint8_t* packed, std::int64_t blocks_of_stream, int first_stream) {
  const std::size_t n = groups_.size();
  queries_.assign(1, 0);
  for (std::vector<std::int32_t>* list : {&lengths_, &sealed_, &firsts_, &starts_, &windows_}) list->clear();
  parts_.clear();
  width_ = 0;
  for (Group& g : groups_) {
    settle_group(&g, packed + (first_stream + g.stream) * blocks_of_stream);
    width_ = std::max(width_, count(g.blocks));
  }
  ids_.assign(n * static_cast<std::size_t>(width_), 0);
  for (std::size_t i = 0; i < n; ++i) {
    const Group& g = groups_[i];
    const std::int64_t base = (first_stream + g.stream) * blocks_of_stream,
                       all = static_cast<std::int64_t>(g.blocks.size()) * 64;
    std::int32_t* id = ids_.data() + i * static_cast<std::size_t>(width_);
    std::int64_t listed = 0, sealed = 0;
    for (const bool pass : {true, false}) {
      for (std::int64_t b = 0; b < all; ++b)
        if (has(g.blocks, b) && (packed[base + b] != 0) == pass) id[listed++] = static_cast<std::int32_t>(base + b);
      if (pass) sealed = listed;
    }
    const std::int64_t origin = g.start / kPageTokens * kPageTokens;
    queries_.push_back(queries_.back() + g.end - g.begin);
    lengths_.push_back(static_cast<std::int32_t>(g.plain ? g.last + 1 - origin : listed * kPageTokens));
    sealed_.push_back(static_cast<std::int32_t>(sealed * kPageTokens));
    firsts_.push_back(static_cast<std::int32_t>(base));
    starts_.push_back(static_cast<std::int32_t>(g.start - origin));
    windows_.push_back(static_cast<std::int32_t>(g.window));
    const std::int8_t sinks = sealed == 0 ? -1 : id[0] == base ? 1 : 0;
    Part* last = parts_.empty() ? nullptr : &parts_.back();
    if (last == nullptr || last->plain != g.plain || (sinks >= 0 && last->sinks >= 0 && sinks != last->sinks)) {
      parts_.push_back({i, i + 1, g.plain, sinks});
    } else {
      last->end = i + 1;
      if (sinks >= 0) last->sinks = sinks;
    }
  }
}

void Plan::copy_mask(const MaskRows& mask, std::int64_t blocks_of_stream, int first_stream) {
  const std::size_t columns = static_cast<std::size_t>(width_) * kPageTokens;
  mask_.assign(static_cast<std::size_t>(queries_.back()) * columns, kHidden);
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& g = groups_[i];
    if (g.plain) continue;
    const std::int64_t base = (first_stream + g.stream) * blocks_of_stream;
    std::uint16_t* to = mask_.data() + static_cast<std::size_t>(queries_[i]) * columns;
    for (int t = g.begin; t < g.end; ++t, to += columns) {
      for (std::int64_t j = 0; j * kPageTokens < lengths_[i]; ++j) {
        const std::int64_t cell = (ids_[i * static_cast<std::size_t>(width_) + static_cast<std::size_t>(j)] - base) *
                                  kPageTokens;
        const auto n = static_cast<std::size_t>(std::min<std::int64_t>(kPageTokens, mask.cells - cell));
        if (mask.data != nullptr) std::memcpy(to + j * kPageTokens, mask.row(g.stream, t) + cell, n * sizeof *to);
        else std::fill_n(to + j * kPageTokens, n, std::uint16_t{0});
      }
    }
  }
}

void Plan::make(const MaskRows& mask, std::uint64_t digest, const std::uint8_t* packed, std::int64_t blocks_of_stream,
                int first_stream) {
  find_groups(mask);
  list_blocks(packed, blocks_of_stream, first_stream);
  mask_ = {};
  if (std::any_of(parts_.begin(), parts_.end(), [](const Part& p) { return !p.plain; }))
    copy_mask(mask, blocks_of_stream, first_stream);
  digest_ = digest;
  remember(mask, packed, blocks_of_stream, first_stream);
}

void Plan::remember(const MaskRows& mask, const std::uint8_t* packed, std::int64_t blocks_of_stream, int first_stream) {
  shape_ = mask;
  first_stream_ = first_stream;
  blocks_of_stream_ = blocks_of_stream;
  packed_.clear();
  for (int s = 0; s < mask.streams; ++s) {
    const std::uint8_t* p = packed + (first_stream + s) * blocks_of_stream;
    packed_.insert(packed_.end(), p, p + blocks_in(mask.cells));
  }
}

bool Plan::holds(const MaskRows& mask, std::uint64_t digest, const std::uint8_t* packed, std::int64_t blocks_of_stream,
                 int first_stream) const {
  if (digest != digest_ || mask.cells != shape_.cells || mask.rows != shape_.rows || mask.streams != shape_.streams ||
      (mask.data == nullptr) != (shape_.data == nullptr) || first_stream != first_stream_ ||
      blocks_of_stream != blocks_of_stream_)
    return false;
  const auto blocks = static_cast<std::size_t>(blocks_in(mask.cells));
  for (int s = 0; s < mask.streams; ++s)
    if (std::memcmp(packed_.data() + static_cast<std::size_t>(s) * blocks,
                    packed + (first_stream + s) * blocks_of_stream, blocks) != 0)
      return false;
  return true;
}

void Plan::apply(const Part& part, PagedBatch* batch, Mask* mask) const {
  const std::size_t i = part.begin;
  batch->size = static_cast<int>(part.end - i);
  batch->queries = queries_.data() + i;
  batch->lengths = lengths_.data() + i;
  batch->sealed = sealed_.data() + i;
  batch->pages = batch->blocks = ids_.data() + i * static_cast<std::size_t>(width_);
  batch->pages_stride = batch->blocks_stride = width_;
  batch->sinks = part.sinks == 1 ? firsts_.data() + i : nullptr;
  mask->causal = part.plain;
  if (part.plain) {
    mask->start = starts_.data() + i;
    mask->window = windows_.data() + i;
    return;
  }
  mask->kind = Mask::General::additive;
  mask->general = mask_.data();
  mask->general_dtype = DType::f16;
  mask->columns = width_ * kPageTokens;
  mask->general_stride = {0, 0, mask->columns, 1};
}

PageFormat::Limits Plan::limits() const {
  PageFormat::Limits limits;
  limits.sequences = static_cast<int>(groups_.size());
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    limits.most_queries = std::max<std::int64_t>(limits.most_queries, queries_[i + 1] - queries_[i]);
    limits.longest = std::max<std::int64_t>(limits.longest, lengths_[i]);
    limits.all += lengths_[i];
  }
  return limits;
}

}  // namespace kv4::llama
