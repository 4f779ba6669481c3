// Exact rows of one sequence: keys [kv_heads][capacity][head_dim_k] and values alike, in the
// model's dtype. Shared between forks until one of them writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/backend.h"

namespace kv4 {

struct RowShape {
  int kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  DType dtype = DType::f32;

  std::size_t row_bytes() const {  // one token, keys and values, all heads
    return static_cast<std::size_t>(kv_heads) * (head_dim_k + head_dim_v) * size_of(dtype);
  }
};

class RowBuffer {
 public:
  RowBuffer() = default;

  std::int64_t count() const { return count_; }
  std::int64_t capacity() const { return block_ ? block_->capacity : 0; }
  std::byte* key(int head, std::int64_t row) const;
  std::byte* value(int head, std::int64_t row) const;
  // Rows [first, first + rows); none of them where nothing is allocated.
  ExactRows view(std::int64_t first, std::int64_t rows, std::int64_t position) const;

  // Makes the rows private and gives them exactly `capacity` (>= count) rows of room; the
  // content stays. out_of_memory leaves the buffer as it was.
  Status reserve(Backend& backend, const RowShape& shape, std::int64_t capacity);
  // Ready to be written without changing the capacity.
  Status own(Backend& backend, const RowShape& shape) {
    return shared() ? reserve(backend, shape, capacity()) : Status();
  }
  bool shared() const { return block_.use_count() > 1; }
  void set_count(std::int64_t count) { count_ = count; }
  // Drops the first `rows` rows; the buffer must be private.
  Status drop_front(std::int64_t rows);
  // Copies `rows` rows of `from` behind the last; room must be there and the buffer private.
  Status push_rows(const RowBuffer& from, std::int64_t first, std::int64_t rows);
  void clear() {
    block_.reset();
    count_ = 0;
  }

  const void* identity() const { return block_.get(); }  // equal for buffers that share memory
  std::size_t bytes() const { return block_ ? block_->bytes + sizeof(Block) : 0; }

 private:
  struct Block {
    Backend* backend = nullptr;
    std::byte* memory = nullptr;
    std::size_t bytes = 0;
    std::int64_t capacity = 0;
    RowShape shape;
    ~Block() { backend->free(memory, bytes); }
    Block(Backend* b, std::byte* m, std::size_t n, std::int64_t c, const RowShape& s)
        : backend(b), memory(m), bytes(n), capacity(c), shape(s) {}
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
  };
  // rows [first, first + rows) of `from` to rows [to, to + rows); within one buffer only downwards
  Status copy_rows(const RowBuffer& from, std::int64_t first, std::int64_t to, std::int64_t rows);

  std::shared_ptr<Block> block_;
  std::int64_t count_ = 0;
};

}  // namespace kv4
