// Work items, which are divided among the readers (warps or teams of warps), and the pieces in which an item is copied
// from the cache.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/attend.h"
#include "cuda/attend_tuning.h"
#include "cuda/attend_wide.h"
#include "cuda/copies.cuh"

namespace kv4::cuda {

// How the items are divided: every reader takes the same number, the first ones one more. No more readers than items.
struct Shares {
  int readers, each, more;  // readers [0, more) take each + 1

  __device__ __forceinline__ Shares(int items, int most_readers) : readers(min(most_readers, items)), each(1), more(0) {
    if (items <= most_readers) return;
    each = items / readers;
    more = items - each * readers;
  }
  // First item of reader w's range.
  __device__ __forceinline__ int first(int w) const { return w * each + min(w, more); }
  // The reader whose range holds `item`.
  __device__ __forceinline__ int owner(int item) const {
    const int longer = more * (each + 1);
    return item < longer ? item / (each + 1) : more + (item - longer) / each;
  }
};

__device__ __forceinline__ int items_of(const ExactRows& x) {
  return static_cast<int>((x.count + kExactTokens - 1) / kExactTokens);
}

// Segments of each KV head of a sequence, which are those of its own query rows.
__device__ __forceinline__ int segments_per_head(const AttendParams& p, const SequenceView& s) {
  const int blocks = (p.group * static_cast<int>(s.query_count) + kBlockRows - 1) / kBlockRows;
  return p.segment_blocks == 1 ? blocks : (blocks + 1) / 2;
}

// Whether tiles read a sequence's pages (attend_wide.h), which are no items then.
__device__ __forceinline__ bool is_wide(const AttendParams& p, const SequenceView& s) {
  return p.wide_splits > 0 && p.group * s.query_count >= kWideFrom;
}
__device__ __forceinline__ int page_items(const AttendParams& p, const SequenceView& s) {
  return is_wide(p, s) ? 0 : s.page_count;
}

// Items of a sequence, all heads and segments.
__device__ __forceinline__ int items_of(const AttendParams& p, int b) {
  const SequenceView& s = p.sequences[b];
  return (items_of(s.exact[0]) + items_of(s.exact[1]) + page_items(p, s)) * p.kv_heads * segments_per_head(p, s);
}

// item_offsets[b] = items of the sequences before b. One warp, a lane so many sequences after each other, which it
// loads a few at a time: a batch of hundreds would otherwise wait for one load after another.
__device__ inline void sum_items(const AttendParams& p, int lane, int* item_offsets) {
  constexpr int kAtOnce = 4;
  const int each = (p.batch + kLanes - 1) / kLanes, begin = lane * each, behind = min(begin + each, p.batch);
  int mine = 0;
  for (int first = begin; first < behind; first += kAtOnce) {
    int items[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) items[i] = items_of(p, min(first + i, behind - 1));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= behind) continue;
      item_offsets[first + i] = mine;
      mine += items[i];
    }
  }
  int sum = mine;
  for (int step = 1; step < kLanes; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  for (int b = begin; b < behind; ++b) item_offsets[b] += sum - mine;
  if (lane == kLanes - 1) item_offsets[p.batch] = sum;
}

// Items of one segment that a reader takes: exact ones, then pages, each kind counted from the segment's first of it.
struct ItemRange {
  int exact = 0, exact_count = 0, page = 0, page_count = 0;
};

// A warp's position among the work items: sequence, head and segment of row blocks, and the item within these.
// A sequence's items are 16 sinks each, 16 window rows each, then its pages.
struct Cursor {
  int flat = 0, end = 0;
  int b = 0, segment = 0, per_head = 1;  // segment: KV head * segments per head + its row blocks, of this sequence's
  int item = 0, items = 0;
  int sink_items = 0, exact_items = 0;
  int behind = 0, resume = 0;  // after its last exact item of this segment the warp continues with item `resume`

  __device__ __forceinline__ void enter(const AttendParams& p) {
    const SequenceView& s = p.sequences[b];
    sink_items = items_of(s.exact[0]);
    behind = resume = exact_items = sink_items + items_of(s.exact[1]);
    items = exact_items + page_items(p, s);
    per_head = segments_per_head(p, s);
  }
  __device__ void start(const AttendParams& p, const int* item_offsets, int first, int last) {
    flat = first;
    end = last;
    if (flat >= end) return;
    int low = 0, high = p.batch - 1;  // the last sequence that begins at or before `first`
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (item_offsets[middle] <= first) low = middle;
      else high = middle - 1;
    }
    b = low;
    enter(p);
    const int at = first - item_offsets[b];
    segment = at / items;
    item = at - segment * items;
  }
  // Starts in a range of segment `part` of a head, whose items are numbered as if there were no others.
  __device__ void start_within(const AttendParams& p, int sequence, int its_head, int part, const ItemRange& range) {
    flat = 0;
    end = range.exact_count + range.page_count;
    b = sequence;
    enter(p);
    segment = its_head * per_head + part;
    behind = range.exact + range.exact_count;
    resume = exact_items + range.page;
    item = range.exact_count > 0 ? range.exact : resume;
  }
  // Advances by `count` items in a range of one segment (start_within).
  __device__ __forceinline__ void skip_within(int count) {
    flat += count;
    item += count;
    if (item == behind) item = resume;
  }
  // Advances by `count` items, at most to the end of those of the same kind.
  __device__ __forceinline__ void skip(const AttendParams& p, int count) {
    flat += count;
    item += count;
    if (item < items) return;
    item = 0;
    if (++segment < p.kv_heads * per_head) return;
    segment = 0;
    if (flat >= end) return;
    do {
      ++b;
      enter(p);
    } while (items == 0 || per_head == 0);
  }
  __device__ __forceinline__ int head() const { return per_head == 1 ? segment : segment / per_head; }
  __device__ __forceinline__ bool packed() const { return item >= exact_items; }
  // Items of this kind and segment from here on.
  __device__ __forceinline__ int run() const { return min((packed() ? items : behind) - item, end - flat); }
};

// An exact item: its first row in exact[set] of its sequence, how many there are of it, and their positions.
struct ExactItem {
  int set, first, rows;
  long long position;

  __device__ __forceinline__ ExactItem(const AttendParams& p, const Cursor& at) {
    set = at.item < at.sink_items ? 0 : 1;
    first = (set == 0 ? at.item : at.item - at.sink_items) * kExactTokens;
    const ExactRows& x = p.sequences[at.b].exact[set];
    rows = min(kExactTokens, static_cast<int>(x.count) - first);
    position = x.position + first;
  }
};
// Keys or values (half 0 or 1) of ExactRows, whose fields for both lie beside each other: looked up at once.
struct ExactHalf {
  long long from, head_stride, stride, block_stride;
  __device__ __forceinline__ ExactHalf(const ExactRows& x, int half) {
    static_assert(offsetof(ExactRows, v) == 8 && offsetof(ExactRows, k_head_stride) == 16 &&
                  offsetof(ExactRows, k_stride) == 32 && offsetof(ExactRows, k_block_stride) == 56 &&
                  offsetof(ExactRows, v_block_stride) == 64);
    const auto* fields = reinterpret_cast<const long long*>(&x) + half;
    from = fields[0];
    head_stride = fields[2];
    stride = fields[4];
    block_stride = fields[7];
  }
  // Whether they can be copied 16 bytes at a time, wherever their block lies.
  __device__ __forceinline__ bool aligned() const {
    return ((static_cast<uint32_t>(from) | static_cast<uint32_t>(head_stride | stride | block_stride) * 2) & 15) == 0;
  }
};
__device__ __forceinline__ bool exact_aligned(const ExactRows& x, int half) { return ExactHalf(x, half).aligned(); }
// Keys or values of an exact item. Its rows are of one block.
__device__ __forceinline__ Piece exact_piece(const AttendParams& p, int b, int set, int first, int rows, int head,
                                             int half) {
  const ExactRows& x = p.sequences[b].exact[set];
  const ExactHalf its(x, half);
  const std::int32_t* const blocks = x.blocks;
  Piece piece;
  piece.pitch = its.stride * 2;
  piece.aligned = its.aligned();
  piece.rows = rows;
  piece.bytes = static_cast<uint32_t>(p.dim) * 2;
  long long offset = head * its.head_stride + (blocks == nullptr ? first : first % kPageTokens) * its.stride;
  if (blocks != nullptr) offset += blocks[static_cast<unsigned>(first) / kPageTokens] * its.block_stride;
  piece.from = reinterpret_cast<const unsigned char*>(its.from) + offset * 2;
  return piece;
}

// The pieces of a range in the order in which they are read: the keys of kExact exact items or kPages pages, or as
// many as are left of their run, then their values. kOne: of one segment.
template <int kExact, int kPages, bool kOne = false>
class PiecesOf {
 public:
  __device__ __forceinline__ PiecesOf(const AttendParams& p, const Cursor& at, int head = 0)
      : p_(p), at_(at), head_(head) {}
  // Moves to the next pages or exact items where the current ones are done. Call it before the other functions.
  __device__ __forceinline__ void settle() {
    if (step_ < 2 * pages_ || done()) return;
    left_ -= pages_;
    if (left_ <= 0) {
      if (kOne) at_.skip_within(run_);
      else if (run_ > 0) at_.skip(p_, run_);
      pages_ = run_ = step_ = 0;
      if (done()) return;
      enter();
    }
    take();
  }
  __device__ __forceinline__ bool done() const { return at_.flat >= at_.end; }
  __device__ __forceinline__ bool packed() const { return at_.packed(); }
  // The next piece, of a page, and how many bytes it is.
  __device__ __forceinline__ const unsigned char* of_page(uint32_t* bytes) const {
    const bool values = step_ >= pages_;
    *bytes = values ? p_.v_copy_bytes : p_.k_copy_bytes;
    const int i = step_ - (values ? pages_ : 0);
    return (kPages == 1 || i == 0 ? page_[0] : page_[kPages - 1]) + (values ? slice_ + p_.v_codes : slice_);
  }
  __device__ __forceinline__ Piece piece() const {
    if (packed()) {
      Piece piece;
      piece.from = of_page(&piece.bytes);
      return piece;
    }
    const bool values = step_ >= pages_;
    Cursor at = at_;
    at.item += step_ - (values ? pages_ : 0);
    const ExactItem item(p_, at);
    return exact_piece(p_, at.b, item.set, item.first, item.rows, head(), values ? 1 : 0);
  }
  __device__ __forceinline__ void next() { ++step_; }

 private:
  __device__ __forceinline__ int head() const { return kOne ? head_ : at_.head(); }
  // Looks up coming pages: their ids, then the chunks that hold them.
  struct Some {
    std::uint32_t id[kPages];
    const std::uint8_t* chunk[kPages];
  };
  // `left`: pages of the run that there are from these on.
  __device__ __forceinline__ void ask_for_ids(Some& some, int left) {
#pragma unroll
    for (int i = 0; i < kPages; ++i) load_into(some.id[i], ids_ + i, left > i);
    ids_ += kPages;
  }
  __device__ __forceinline__ void ask_for_chunks(Some& some, int left) const {
    if (p_.pages.chunks == nullptr) return;
#pragma unroll
    for (int i = 0; i < kPages; ++i)
      if (left > i) some.chunk[i] = p_.pages.chunks[some.id[i] >> p_.pages.shift];
  }
  __device__ __forceinline__ const unsigned char* address(const Some& some, int i) const {
    const std::uint32_t within = some.id[i] & ((1u << p_.pages.shift) - 1);
    return (p_.pages.chunks != nullptr ? some.chunk[i] : p_.pages.data) +
           static_cast<std::uint64_t>(within) * p_.pages.page_stride;
  }
  // Ids are loaded before chunks, chunks before their use, so that neither is waited for within a run.
  __device__ __forceinline__ void take() {
    step_ = 0;
    if (!at_.packed()) {
      pages_ = left_;
      return;
    }
    pages_ = min(kPages, left_);
#pragma unroll
    for (int i = 0; i < kPages; ++i) page_[i] = address(next_, i);
    next_ = after_;
    ask_for_chunks(next_, left_ - kPages);
    ask_for_ids(after_, left_ - 2 * kPages);
  }
  // A run of pages, or the exact items that are taken together.
  __device__ __forceinline__ void enter() {
    run_ = at_.packed() ? at_.run() : min(kExact, at_.run());
    left_ = run_;
    if (at_.packed()) {
      slice_ = static_cast<std::uint32_t>(head()) * p_.pages.head_stride;
      ids_ = p_.sequences[at_.b].pages + (at_.item - at_.exact_items);
      ask_for_ids(next_, left_);
      ask_for_ids(after_, left_ - kPages);
      ask_for_chunks(next_, left_);
    }
  }

  const AttendParams& p_;
  Cursor at_;
  const int head_;            // of the one segment
  int step_ = 0, pages_ = 0;  // pages or exact items together
  int run_ = 0, left_ = 0;    // of those that the cursor stands before
  std::uint32_t slice_ = 0;   // offset of the head's in a page
  const std::int32_t* ids_ = nullptr;
  const unsigned char* page_[kPages] = {};
  Some next_ = {}, after_ = {};
};
using Pieces = PiecesOf<1, 1>;

// Calls f with the bits of a code as a constant: those of a side, or 4 where a kernel reads no others.
template <Codes kCodes, class F>
__device__ __forceinline__ void with_bits(int bits, F f) {
  if (kCodes == Codes::fours || bits == 4) f(std::integral_constant<int, 4>());
  else if (bits == 3) f(std::integral_constant<int, 3>());
  else f(std::integral_constant<int, 2>());
}

// In a slot of keys, scales and the mean.
template <int D, Codes kCodes>
__device__ __forceinline__ uint32_t scales_at(const AttendParams& p) {
  return kCodes == Codes::fours ? Shape<D>::kKeyCodeBytes : p.key_scales;
}
template <int D, Codes kCodes>
__device__ __forceinline__ uint32_t mean_at(const AttendParams& p) {
  return scales_at<D, kCodes>(p) + kPageTokens * 2;
}

// Prefetches the table of chunks, which every run of pages looks up first.
__device__ __forceinline__ void prefetch_chunks(const AttendParams& p) {
  if (p.pages.chunks != nullptr) prefetch_l2(p.pages.chunks);
}
// The same, and the ids of a sequence's first pages, a line of L2 for each lane. One warp.
__device__ __forceinline__ void prefetch_tables(const AttendParams& p, const SequenceView& s, int lane) {
  if (lane == 0) prefetch_chunks(p);
  if (lane * kIdsPerLine < s.page_count) prefetch_l2(s.pages + lane * kIdsPerLine);
}

// Copies all pieces as slots become free; by the filling warp, each lane for its own queue. `begin` is called when the
// first pieces are known.
template <class PiecesT, class FillerT, class Begin>
__device__ __forceinline__ void fill_all(PiecesT& pieces, FillerT& filler, int lane, Begin begin) {
  for (bool begun = false;; begun = true) {
    pieces.settle();
    if (!begun) begin();
    if (!__any_sync(kAll, !pieces.done())) return;
    const bool mine = !pieces.done() && filler.ready(), page = mine && pieces.packed();
    // Pages, the common case, need no further checks.
    if (page) {
      uint32_t bytes;
      const unsigned char* const from = pieces.of_page(&bytes);
      filler.put(from, bytes);
      pieces.next();
    }
    const bool exact = mine && !page;
    if (!__any_sync(kAll, exact)) continue;
    filler.put(exact, exact ? pieces.piece() : Piece(), lane);
    if (exact) pieces.next();
  }
}

}  // namespace kv4::cuda
