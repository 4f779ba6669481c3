// How a call becomes tasks. An item is a run of queries of one sequence and KV head: all query heads
// of the group share its pages. An item that is more than a piece of the work (share.h) is split along
// its tokens, and free threads take the next split; the last to finish merges the partial states, so
// that a call needs one parallel region and no barrier inside.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <span>

#include "cpu/attend.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/share.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"
#include "kv4/cpu.h"

namespace kv4::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kEmpty = -std::numeric_limits<float>::infinity();

// Rows of an item: enough to reuse a converted block of exact rows, few enough that q and o stay in L2.
constexpr std::int64_t kItemRows = 64;

// Reading and unpacking a token costs about as much as this many rows (share.h counts work).
constexpr double kTokenRows = 1.5;
// What an exact and a sealed token take, relative to each other: by bytes 3.8 to 1, by arithmetic at six rows 1.5 to 1
// (AVX2) to 3 to 1 (AMX).
constexpr std::int64_t kExactCost = 5, kSealedCost = 2;

std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) { return x < low ? low : x > high ? high : x; }
std::size_t padded(int dim) { return static_cast<std::size_t>(pad_channels(dim)); }

struct Item {
  int sequence, head;
  std::int64_t query, queries;  // within the job's query rows
  int page_begin, page_end;     // those that some query sees
  std::int64_t exact_begin[2], exact_end[2];
  int splits;
  std::size_t first_split;  // index of split 0 in Workspace::splits

  // The item's visible tokens as one axis: first exact set, pages, second exact set.
  std::int64_t exact(int i) const { return exact_end[i] - exact_begin[i]; }
  std::int64_t paged() const { return static_cast<std::int64_t>(page_end - page_begin) * kPageTokens; }
  std::int64_t tokens() const { return exact(0) + paged() + exact(1); }
  std::int64_t cost() const { return kExactCost * (exact(0) + exact(1)) + kSealedCost * paged(); }
  // Where split i begins, for all to cost the same: on whole pages and blocks, pages to the nearest.
  std::int64_t cut(int i) const {
    if (i == splits) return tokens();
    const std::int64_t x = cost() * i / splits;
    const std::int64_t e = kExactCost * exact(0), p = e + kSealedCost * paged();
    if (x < e) return x / kExactCost / kBlockRows * kBlockRows;
    if (x < p) return exact(0) + ((x - e) / kSealedCost + kPageTokens / 2) / kPageTokens * kPageTokens;
    return exact(0) + paged() + (x - p) / kExactCost / kBlockRows * kBlockRows;
  }
};

// One split's partial states, in the rotated and in the model's basis. o is undefined where l is 0.
struct States {
  RowStates pages, exact;

  void carve(Carver& carver, std::size_t rows, std::size_t o_stride) {
    for (RowStates* s : {&pages, &exact}) {
      s->o = carver.take<float>(rows * o_stride);
      s->m = carver.take<float>(rows);
      s->l = carver.take<float>(rows);
      s->o_stride = static_cast<std::int64_t>(o_stride);
    }
  }
};

struct Split {
  int item, index;
  States states;  // unused by an item of one split, whose states are the thread's own
};

// What one thread needs besides.
struct Arena {
  float* rows;     // [rows, max(head_dim)]: contiguous rows for the rotations
  float* q_exact;  // [rows, padded head_dim_k]
  float* q_pages;
  float* result;      // [head_dim_v]
  std::uint8_t* bad;  // [rows] the query holds NaN or infinity
  void* rotate;
  States states;    // of an item without splits
  PagesTask pages;  // scratch pointers only
  ExactTask exact;

  std::size_t carve(std::byte* base, const AttendJob& job, std::size_t count, const Kernels& kernels) {
    Carver carver(base);
    const std::size_t k = padded(job.head_dim_k), v = padded(job.head_dim_v);
    rows = carver.take<float>(count * std::max(k, v));
    q_exact = carver.take<float>(count * k);
    q_pages = carver.take<float>(count * k);
    result = carver.take<float>(v);
    bad = carver.take<std::uint8_t>(count);
    states.carve(carver, count, v);
    exact.k_tile = carver.take<float>(kBlockRows * k);
    exact.v_tile = carver.take<float>(kBlockRows * v);
    if (job.spec != nullptr) {
      const std::size_t groups_k = static_cast<std::size_t>(job.spec->key.groups);
      const std::size_t groups_v = static_cast<std::size_t>(job.spec->value.groups);
      pages.q_codes = carver.take<std::uint8_t>(count * k * static_cast<std::size_t>(kernels.operand_bytes));
      pages.q_scale = carver.take<float>(count * groups_k);
      pages.q_start = carver.take<std::int32_t>(count * groups_k);
      pages.k_scale = carver.take<float>(kPagesAtOnce * groups_k * kPageTokens);
      pages.v_scale = carver.take<float>(kPagesAtOnce * groups_v * kPageTokens);
      pages.v_unit = carver.take<float>(kPagesAtOnce * groups_v);
      pages.mean = carver.take<float>(kPagesAtOnce * k);
      pages.second = carver.take<float>(kPagesAtOnce * job.spec->second.rows * k);
      pages.tiles = carver.take<std::byte>(kernels.tiles_scratch(*job.spec, static_cast<std::int64_t>(count)));
      rotate = carver.take<std::byte>(
          std::max(kernels.rotate_scratch(job.head_dim_k), kernels.rotate_scratch(job.head_dim_v)));
    }
    return carver.bytes();
  }
};

// Memory of one call: the caller's, or buffers that this thread keeps.
class Workspace {
 public:
  // Of the caller's; empty: none was given.
  void begin(std::span<std::byte> given) {
    given_ = given;
    lent_ = !given.empty();
  }
  // `bytes`, 64-byte aligned, until the next call; null where there are none left.
  std::byte* take(Buffer& own, std::size_t bytes) {
    if (!lent_) return own.reserve(bytes) ? own.data() : nullptr;
    void* p = given_.data();
    std::size_t left = given_.size();
    if (std::align(64, bytes, p, left) == nullptr) return nullptr;
    given_ = {static_cast<std::byte*>(p) + bytes, left - bytes};
    return static_cast<std::byte*>(p);
  }
  bool lent() const { return lent_; }
  Buffer items, rest;

 private:
  std::span<std::byte> given_;
  bool lent_ = false;
};

// Of a call: rows of an item, and its items.
std::int64_t queries_of_item(std::int64_t most, std::int64_t group) {
  return std::max<std::int64_t>(1, std::min(kItemRows / group, most));
}
std::int64_t runs_of(std::int64_t queries, std::int64_t item_queries) {
  return (queries + item_queries - 1) / item_queries;
}

class Call {
 public:
  Call(const AttendJob& job, Workspace& workspace, const Kernels& kernels)
      : job_(job), workspace_(workspace), kernels_(kernels), row_kernels_(row_kernels(kernels)),
        group_(job.args.q.shape[1] / job.kv_heads) {
    const float scale = job.args.scale != 0 ? job.args.scale : 1.0f / std::sqrt(static_cast<float>(job.head_dim_k));
    const float softcap = job.args.softcap;
    factor_ = softcap > 0 ? scale / softcap : scale * kLog2E;
    cap_ = softcap > 0 ? softcap * kLog2E : 0.0f;
  }

  Status run() {
    for (const SequenceView& s : job_.sequences.views) most_queries_ = std::max(most_queries_, s.query_count);
    if (most_queries_ == 0) return {};
    item_queries_ = queries_of_item(most_queries_, group_);
    KV4_RETURN_IF_ERROR(plan());
    const std::size_t bytes = carve(nullptr);
    std::byte* const memory = workspace_.take(workspace_.rest, bytes);
    if (memory == nullptr) return no_memory(bytes);
    carve(memory);
    std::size_t next = 0;
    for (std::size_t i = 0; i < items_.size(); ++i) {
      Item& item = items_[i];
      item.first_split = next;
      for (int s = 0; s < item.splits; ++s) {
        Split& split = splits_[next++];
        split.item = static_cast<int>(i);
        split.index = s;
      }
      new (pending_ + i) std::atomic<int>(item.splits);
    }
    place_states(slots_);
    parallel_for(static_cast<std::int64_t>(splits_.size()), threads_,
                 [this](std::int64_t task, int thread) { run_split(splits_[static_cast<std::size_t>(task)], thread); });
    if (non_finite_.load(std::memory_order_relaxed))
      return error(StatusCode::non_finite, "q", "finite values in queries that see a token", "NaN or infinity");
    return {};
  }

 private:
  Status no_memory(std::size_t bytes) const {
    return error(StatusCode::out_of_memory, "workspace", std::to_string(bytes) + " free bytes",
                 workspace_.lent() ? "less" : "none");
  }

  // Lays all but the items out from `base` (null: only sizes them).
  std::size_t carve(std::byte* base) {
    Carver carver(base);
    std::size_t splits = 0;
    for (const Item& item : items_) splits += static_cast<std::size_t>(item.splits);
    splits_ = {carver.take<Split>(splits), splits};
    pending_ = carver.take<std::atomic<int>>(items_.size());
    arena_bytes_ = Arena().carve(nullptr, job_, rows_of_item(), kernels_);
    arenas_ = carver.take<std::byte>(arena_bytes_ * static_cast<std::size_t>(threads_));
    slots_ = carver.take<std::byte>(base == nullptr ? place_states(nullptr) : 0);
    return carver.bytes();
  }
  std::size_t rows_of_item() const { return static_cast<std::size_t>(item_queries_ * group_); }

  const SequenceView& view_of(const Item& item) const {
    return job_.sequences.views[static_cast<std::size_t>(item.sequence)];
  }
  // Position of the first token that is read from pages.
  static std::int64_t first_of_pages(const SequenceView& s) { return s.pages_position + s.pages_hidden; }
  std::int64_t rows_of(const Item& item) const { return item.queries * group_; }
  double work_of(const Item& item) const {
    return static_cast<double>(item.cost()) / kExactCost * (static_cast<double>(rows_of(item)) + kTokenRows) *
           (job_.head_dim_k + job_.head_dim_v);
  }

  Status plan() {
    const std::span<const SequenceView> views = job_.sequences.views;
    std::size_t count = 0;
    for (const SequenceView& s : views)
      count += static_cast<std::size_t>(runs_of(s.query_count, item_queries_) * job_.kv_heads);
    std::byte* const memory = workspace_.take(workspace_.items, count * sizeof(Item));
    if (memory == nullptr) return no_memory(count * sizeof(Item));
    items_ = {reinterpret_cast<Item*>(memory), count};
    double total = 0;
    std::size_t next = 0;
    // Late queries see most under a causal mask: their items come first, so that none is left for the end.
    for (std::int64_t run = runs_of(most_queries_, item_queries_) - 1; run >= 0; --run) {
      for (int b = 0; b < static_cast<int>(views.size()); ++b) {
        if (run * item_queries_ >= views[static_cast<std::size_t>(b)].query_count) continue;
        Item item = visible_part(b, run * item_queries_);
        total += work_of(item) * job_.kv_heads;
        for (int h = 0; h < job_.kv_heads; ++h) {
          item.head = h;
          items_[next++] = item;
        }
      }
    }
    const Share shared = share(total, num_threads());
    threads_ = shared.threads;
    for (Item& item : items_)
      item.splits = pieces(work_of(item), shared, std::max<std::int64_t>(1, item.tokens() / kPageTokens));
    return {};
  }

  // Lays the states of split items out from base (null: only sizes them).
  std::size_t place_states(std::byte* base) {
    Carver carver(base);
    for (const Item& item : items_) {
      if (item.splits == 1) continue;
      for (int i = 0; i < item.splits; ++i) {
        States sized;
        States& states = base == nullptr ? sized : splits_[item.first_split + static_cast<std::size_t>(i)].states;
        states.carve(carver, static_cast<std::size_t>(rows_of(item)), padded(job_.head_dim_v));
      }
    }
    return carver.bytes();
  }

  RowMask mask_of(const Item& item) const {
    const Mask& m = job_.args.mask;
    const SequenceView& s = view_of(item);
    RowMask mask;
    mask.heads = static_cast<int>(group_);
    mask.causal = m.causal;
    mask.query_position = s.query_position + item.query;
    mask.start = m.start != nullptr ? m.offset + m.start[item.sequence] : 0;
    mask.window = m.window != nullptr ? m.window[item.sequence] : job_.window;
    mask.kind = m.kind;
    if (m.kind != Mask::General::none) {
      mask.dtype = m.general_dtype;
      const auto size = static_cast<std::int64_t>(m.kind == Mask::General::boolean ? 1 : size_of(m.general_dtype));
      mask.general = static_cast<const std::byte*>(m.general) +
                     (s.input * m.general_stride[0] + item.head * group_ * m.general_stride[1] +
                      (s.input_row + item.query) * m.general_stride[2]) *
                         size;
      mask.head_stride = m.general_stride[1];
      mask.query_stride = m.general_stride[2];
      mask.column_stride = m.general_stride[3];
      mask.offset = m.offset;
      mask.columns = m.columns;
    }
    return mask;
  }

  // The pages and exact rows that some of the queries from `query` on may see.
  Item visible_part(int sequence, std::int64_t query) const {
    constexpr std::int64_t kFar = std::int64_t{1} << 62;
    const SequenceView& s = job_.sequences.views[static_cast<std::size_t>(sequence)];
    Item item{};
    item.sequence = sequence;
    item.query = query;
    item.queries = std::min(item_queries_, s.query_count - query);
    const RowMask mask = mask_of(item);
    std::int64_t low = mask.start, high = mask.causal ? mask.query_position + item.queries : kFar;
    if (mask.window > 0) low = std::max(low, mask.query_position - mask.window + 1);
    if (mask.kind != Mask::General::none) {
      low = std::max(low, mask.offset);
      high = std::min(high, mask.offset + mask.columns);
    }
    if (s.page_count > 0) {
      const std::int64_t sealed = static_cast<std::int64_t>(s.page_count) * kPageTokens;
      item.page_begin =
          static_cast<int>(clamp(std::max(low, first_of_pages(s)) - s.pages_position, 0, sealed) / kPageTokens);
      item.page_end = static_cast<int>((clamp(high - s.pages_position, 0, sealed) + kPageTokens - 1) / kPageTokens);
      item.page_end = std::max(item.page_end, item.page_begin);
    }
    for (int i = 0; i < 2; ++i) {
      const ExactRows& rows = s.exact[i];
      item.exact_begin[i] = clamp(low - rows.position, 0, rows.count);
      item.exact_end[i] = std::max(item.exact_begin[i], clamp(high - rows.position, 0, rows.count));
    }
    return item;
  }

  void run_split(const Split& split, int thread) {
    const Item& item = items_[static_cast<std::size_t>(split.item)];
    Arena arena;
    arena.carve(arenas_ + static_cast<std::size_t>(thread) * arena_bytes_, job_, rows_of_item(), kernels_);
    const bool whole = item.splits == 1;
    const States& states = whole ? arena.states : split.states;
    attend_part(item, item.cut(split.index), item.cut(split.index + 1), arena, states);
    if (whole) {
      const States own = states;
      join_item(item, arena, [&own](int) -> const States& { return own; });
    } else if (pending_[split.item].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      const Split* splits = splits_.data() + item.first_split;
      join_item(item, arena, [splits](int i) -> const States& { return splits[i].states; });
    }
  }

  // The partial states of an item over the tokens [begin, end) of its axis.
  void attend_part(const Item& item, std::int64_t begin, std::int64_t end, Arena& arena, const States& states) {
    const SequenceView& s = view_of(item);
    const int rows = static_cast<int>(rows_of(item));
    const std::int64_t first_page = item.exact(0), second = first_page + item.paged();
    const std::int64_t from_page = clamp(begin, first_page, second), to_page = clamp(end, first_page, second);
    const std::int64_t exact_from[2] = {clamp(begin, 0, first_page), clamp(begin - second, 0, item.exact(1))};
    const std::int64_t exact_to[2] = {clamp(end, 0, first_page), clamp(end - second, 0, item.exact(1))};
    const bool any_page = to_page > from_page;
    const bool any_exact = exact_to[0] > exact_from[0] || exact_to[1] > exact_from[1];
    clear(states.pages, rows, any_page);
    clear(states.exact, rows, any_exact);
    if (!any_page && !any_exact) return;
    load_queries(item, arena, any_page, any_exact);
    const RowMask mask = mask_of(item);
    for (int i = 0; i < 2; ++i)
      if (exact_to[i] > exact_from[i])
        attend_rows(item, s.exact[i], item.exact_begin[i] + exact_from[i], item.exact_begin[i] + exact_to[i], mask,
                    arena, states.exact);
    if (any_page) {
      PagesTask task = arena.pages;
      task.spec = job_.spec;
      task.pages = s.pages;
      task.memory = job_.pages;
      task.head = item.head;
      task.first = item.page_begin + static_cast<int>((from_page - first_page) / kPageTokens);
      task.last = item.page_begin + static_cast<int>((to_page - first_page) / kPageTokens);
      task.page_count = s.page_count;
      task.last_page_tokens = s.last_page_tokens;
      task.position = s.pages_position;
      task.rows = rows;
      task.q = arena.q_pages;
      task.q_stride = static_cast<std::int64_t>(padded(job_.head_dim_k));
      task.cap = cap_;
      task.mask = mask;
      task.mask.start = std::max(mask.start, first_of_pages(s));
      task.states = states.pages;
      task.bytes = takes_bytes(kernels_, *job_.spec);
      kernels_.attend_pages(task);
    }
    for (int r = 0; r < rows; ++r)
      if (arena.bad[r] != 0 && (states.pages.l[r] != 0 || states.exact.l[r] != 0))
        non_finite_.store(true, std::memory_order_relaxed);
  }

  // Rows [first, last) of an exact set, block by block where it lies in blocks.
  void attend_rows(const Item& item, const ExactRows& x, std::int64_t first, std::int64_t last, const RowMask& mask,
                   const Arena& arena, const RowStates& states) const {
    const std::int64_t size = static_cast<std::int64_t>(size_of(job_.dtype));
    ExactTask task = arena.exact;
    task.dtype = job_.dtype;
    task.k_stride = x.k_stride;
    task.v_stride = x.v_stride;
    task.head_dim_k = job_.head_dim_k;
    task.head_dim_v = job_.head_dim_v;
    task.rows = static_cast<int>(rows_of(item));
    task.q = arena.q_exact;
    task.q_stride = static_cast<std::int64_t>(padded(job_.head_dim_k));
    task.cap = cap_;
    task.mask = mask;
    task.states = states;
    while (first < last) {
      const std::int64_t begin = x.blocks == nullptr ? 0 : first / kPageTokens * kPageTokens;  // row 0 of the task
      const std::int64_t end = x.blocks == nullptr ? last : std::min(last, begin + kPageTokens);
      task.k = static_cast<const std::byte*>(x.k) + row_offset(x, true, item.head, begin) * size;
      task.v = static_cast<const std::byte*>(x.v) + row_offset(x, false, item.head, begin) * size;
      task.first = first - begin;
      task.last = end - begin;
      task.position = x.position + begin;
      kernels_.attend_exact(task);
      first = end;
    }
  }

  static void clear(const RowStates& states, int rows, bool used) {
    for (int r = 0; r < rows; ++r) {
      states.m[r] = kEmpty;
      states.l[r] = 0;
    }
    if (used) std::fill_n(states.o, static_cast<std::size_t>(rows) * static_cast<std::size_t>(states.o_stride), 0.0f);
  }

  // Queries holding NaN or infinity become zeros: whether they see a token shows in l.
  void load_queries(const Item& item, Arena& arena, bool for_pages, bool for_exact) const {
    const int d = job_.head_dim_k, rows = static_cast<int>(rows_of(item));
    const TensorView& q = job_.args.q;
    const SequenceView& s = view_of(item);
    for (int r = 0; r < rows; ++r) {
      float* x = arena.rows + static_cast<std::size_t>(r) * d;
      const void* row = q.at(s.input, item.head * group_ + r % group_, s.input_row + item.query + r / group_);
      arena.bad[r] = row_kernels_.load(q.dtype, row, d, x) ? 0 : 1;
      if (arena.bad[r] != 0) std::fill_n(x, d, 0.0f);
    }
    if (for_exact) spread(arena.rows, rows, arena.q_exact);
    if (!for_pages) return;
    if (s.lambda_k != nullptr) {
      const float* lambda = s.lambda_k + static_cast<std::size_t>(item.head) * d;
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < d; ++c) arena.rows[static_cast<std::size_t>(r) * d + c] /= lambda[c];
    }
    kernels_.rotate_dual(*job_.spec->key.rotation, arena.rows, arena.rows, rows, arena.rotate);
    spread(arena.rows, rows, arena.q_pages);
  }

  // Contiguous rows of head_dim_k, times factor_, to rows padded with zeros.
  void spread(const float* from, int rows, float* to) const {
    const int d = job_.head_dim_k, stride = pad_channels(d);
    for (int r = 0; r < rows; ++r, from += d, to += stride) {
      row_kernels_.scale(from, d, factor_, to);
      for (int c = d; c < stride; ++c) to[c] = 0.0f;
    }
  }

  // Row r of `count` partial states (at(i)) as one, in out. Returns l.
  template <class At>
  float join(int count, At at, std::int64_t r, float* out, float* m) const {
    const int d = job_.head_dim_v;
    float top = kEmpty;
    for (int i = 0; i < count; ++i)
      if (at(i).l[r] != 0 && !(at(i).m[r] <= top)) top = at(i).m[r];
    *m = top;
    float l = 0;
    bool first = true;
    for (int i = 0; i < count; ++i) {
      const RowStates& s = at(i);
      if (s.l[r] == 0) continue;
      const float weight = s.m[r] == top ? 1.0f : std::exp2(s.m[r] - top);
      const float* o = s.o + r * s.o_stride;
      if (first) row_kernels_.scale(o, d, weight, out);
      else row_kernels_.add(o, d, weight, out);
      first = false;
      l += weight * s.l[r];
    }
    if (first) std::fill_n(out, d, 0.0f);
    return l;
  }

  // Joins the splits of an item, takes pages back to the model's basis and writes the answer.
  template <class At>
  void join_item(const Item& item, Arena& arena, At at) {
    const SequenceView& s = view_of(item);
    const int d = job_.head_dim_v, rows = static_cast<int>(rows_of(item));
    // The joined pages go to arena.rows, contiguous as the rotation wants them; m and l to the arena's states
    // of the pages, which no split reads any more.
    RowStates joined = arena.states.pages;
    joined.o = arena.rows;
    joined.o_stride = d;
    bool any_page = false;
    for (int i = 0; i < item.splits && !any_page; ++i)
      for (int r = 0; r < rows && !any_page; ++r) any_page = at(i).pages.l[r] != 0;
    if (any_page) {
      for (int r = 0; r < rows; ++r) {
        float m;
        const float l = join(
            item.splits, [&](int i) -> const RowStates& { return at(i).pages; }, r,
            joined.o + static_cast<std::int64_t>(r) * d, &m);
        joined.m[r] = m;
        joined.l[r] = l;
      }
      kernels_.unrotate(*job_.spec->value.rotation, joined.o, joined.o, rows, arena.rotate);
      if (s.lambda_v != nullptr) {
        const float* lambda = s.lambda_v + static_cast<std::size_t>(item.head) * d;
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < d; ++c) joined.o[static_cast<std::size_t>(r) * d + c] /= lambda[c];
      }
    }
    const int first = any_page ? 0 : 1;
    for (int r = 0; r < rows; ++r) {
      float m;
      const float l = join(
          item.splits + 1 - first,
          [&](int i) -> const RowStates& { return i + first == 0 ? joined : at(i + first - 1).exact; }, r, arena.result,
          &m);
      if (!(l <= std::numeric_limits<float>::max())) non_finite_.store(true, std::memory_order_relaxed);
      store(item, r, arena.result, m, l);
    }
  }

  void store(const Item& item, int r, const float* o, float m, float l) const {
    const int d = job_.head_dim_v;
    const SequenceView& s = view_of(item);
    const std::int64_t head = item.head * group_ + r % group_, t = s.input_row + item.query + r / group_;
    if (job_.partial.o != nullptr) {
      const TensorView& q = job_.args.q;
      const std::int64_t row = (s.input * q.shape[1] + head) * q.shape[2] + t;
      std::copy_n(o, d, job_.partial.o + row * d);
      job_.partial.m[row] = m * kLn2;
      job_.partial.l[row] = l;
      return;
    }
    float factor = 0.0f;
    if (l != 0) {
      const float sink = job_.args.sinks != nullptr ? job_.args.sinks[head] * kLog2E : kEmpty;
      const float top = sink > m ? sink : m;
      const float weight = std::exp2(m - top);
      factor = weight / (weight * l + std::exp2(sink - top));
    }
    row_kernels_.store(o, d, factor, job_.out.dtype, job_.out.at(s.input, head, t));
  }

  const AttendJob& job_;
  Workspace& workspace_;
  const Kernels& kernels_;
  const RowKernels& row_kernels_;
  const std::int64_t group_;  // query heads per KV head
  float factor_, cap_;
  std::int64_t most_queries_ = 0, item_queries_ = 1;
  int threads_ = 1;
  std::span<Item> items_;
  std::span<Split> splits_;
  std::atomic<int>* pending_ = nullptr;  // [items] splits that still run
  std::byte* arenas_ = nullptr;          // [threads] of arena_bytes_
  std::byte* slots_ = nullptr;           // the states of split items
  std::size_t arena_bytes_ = 0;
  std::atomic<bool> non_finite_{false};
};

}  // namespace

const RowKernels& row_kernels(const Kernels& kernels) {
#define KV4_ROW_KERNELS(isa) \
  if (&kernels == &isa::kernels) return isa::row_kernels;
  KV4_CPU_ISAS(KV4_ROW_KERNELS)
#undef KV4_ROW_KERNELS
  return portable::row_kernels;
}

Status attend(const AttendJob& job) {
  if (job.sequences.views.empty()) return {};
  KV4_RETURN_IF_ERROR(check_isa());
  thread_local Workspace workspace;
  workspace.begin(job.workspace);
  return Call(job, workspace, attending(job.spec)).run();
}

// What Call takes at most: its items and, of the items that are split, up to kManyPieces states a thread and as many
// more for what is left over of each.
std::size_t attend_workspace(const AttendJob& job) {
  const std::int64_t group = job.args.q.shape[1] / job.kv_heads,
                     most = std::max<std::int64_t>(1, job.sequences.most_queries);
  const std::int64_t queries = queries_of_item(most, group),
                     batch = static_cast<std::int64_t>(job.sequences.views.size());
  const auto items = static_cast<std::size_t>(batch * runs_of(most, queries) * job.kv_heads),
             rows = static_cast<std::size_t>(queries * group);
  const auto threads = static_cast<std::size_t>(num_threads()), more = static_cast<std::size_t>(kManyPieces) * threads;
  Carver carver(nullptr);
  carver.take<Item>(items);
  carver.take<Split>(items + more);
  carver.take<std::atomic<int>>(items);
  carver.take<std::byte>(Arena().carve(nullptr, job, rows, attending(job.spec)) * threads);
  States states;
  for (std::size_t i = 0; i < 2 * more; ++i) states.carve(carver, rows, padded(job.head_dim_v));
  constexpr std::size_t kAlignment = 3 * 64;  // of the parts that are taken
  return carver.bytes() + kAlignment;
}

}  // namespace kv4::cpu
