// Exact rows of one sequence: keys [kv_heads][capacity][head_dim_k] and values alike, in the
// model's dtype. Shared between forks until one of them writes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "backend/backend.h"

namespace kv4 {

struct RowShape {
  int kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  DType dtype = DType::f32;

  std::size_t row_bytes() const {  // one token, keys and values, all heads
    return static_cast<std::size_t>(kv_heads) * (head_dim_k + head_dim_v) * size_of(dtype);
  }
  std::size_t head_bytes(bool key, std::int64_t tokens) const {  // one head's keys, or values
    return static_cast<std::size_t>(tokens * (key ? head_dim_k : head_dim_v)) * size_of(dtype);
  }
};

// Where a job's rows are: those of a view.
template <class Job>
void set_rows(Job& job, const ExactRows& rows) {
  job.k = const_cast<void*>(rows.k);
  job.v = const_cast<void*>(rows.v);
  job.k_head_stride = rows.k_head_stride;
  job.v_head_stride = rows.v_head_stride;
  job.k_stride = rows.k_stride;
  job.v_stride = rows.v_stride;
}

// Rows [begin, begin + count) of a block of memory, shared by buffers and written only by a sole owner. Dropping rows
// at the front moves none; new rows are written after all existing ones.
class RowBuffer {
 public:
  RowBuffer() = default;
  RowBuffer(const RowBuffer& o) : block_(o.block_), begin_(o.begin_), count_(o.count_) {
    if (block_ != nullptr) block_->owners.fetch_add(1, std::memory_order_relaxed);
  }
  RowBuffer(RowBuffer&& o) noexcept
      : block_(std::exchange(o.block_, nullptr)), begin_(std::exchange(o.begin_, 0)),
        count_(std::exchange(o.count_, 0)), draft_(o.draft_) {}
  RowBuffer& operator=(RowBuffer o) noexcept {
    std::swap(block_, o.block_);
    std::swap(begin_, o.begin_);
    std::swap(count_, o.count_);
    draft_ = o.draft_;
    return *this;
  }
  ~RowBuffer() { clear(); }

  // A draft of this buffer; only one of the two will be used further. It writes after the rows of the other as if it
  // owned them, but moves none.
  RowBuffer draft() const {
    RowBuffer copy = *this;
    copy.draft_ = true;
    return copy;
  }
  // The other buffer of the pair is gone.
  void settle() { draft_ = false; }

  std::int64_t count() const { return count_; }
  std::int64_t capacity() const { return block_ != nullptr ? block_->capacity : 0; }
  std::byte* key(int head, std::int64_t row) const;
  std::byte* value(int head, std::int64_t row) const;
  // Rows [first, first + rows); none of them where nothing is allocated.
  ExactRows view(std::int64_t first, std::int64_t rows, std::int64_t position) const;

  // Makes the rows private and gives them exactly `capacity` (>= count) rows of room; the
  // content stays. A failure leaves the buffer as it was.
  Status reserve(Backend& backend, const RowShape& shape, std::int64_t capacity);
  // Whether the rows are private and there is room for `rows` more.
  bool has_room(std::int64_t rows) const { return !shared() && begin_ + count_ + rows <= capacity(); }
  // Makes that so, in the present memory or in a block of `capacity` (>= count + rows) rows.
  Status make_room(Backend& backend, const RowShape& shape, std::int64_t rows, std::int64_t capacity);
  void set_count(std::int64_t count) { count_ = count; }
  void drop_front(std::int64_t rows) {
    begin_ += rows;
    count_ -= rows;
  }
  // Appends a copy of `rows` rows of `from`; the buffer must be private and have room.
  Status push_rows(const RowBuffer& from, std::int64_t first, std::int64_t rows);
  void clear();

  const void* identity() const { return block_; }  // equal for buffers that share memory
  std::size_t bytes() const { return block_ != nullptr ? block_->bytes + sizeof(Block) : 0; }

 private:
  struct Block {
    Backend* backend = nullptr;
    std::byte* memory = nullptr;
    std::size_t bytes = 0;
    std::int64_t capacity = 0;
    RowShape shape;
    std::atomic<std::int32_t> owners{1};
    ~Block() {
      if (memory != nullptr) backend->free(memory, bytes);
    }
  };
  // Whether others own the block too. Forks may live in several threads: a buffer that finds itself the sole owner sees
  // everything that the previous owners wrote.
  bool shared() const { return block_ != nullptr && block_->owners.load(std::memory_order_acquire) > (draft_ ? 2 : 1); }
  Status compact();

  Block* block_ = nullptr;
  std::int64_t begin_ = 0, count_ = 0;
  bool draft_ = false;
};

}  // namespace kv4
