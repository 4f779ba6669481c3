#include "cache/rows.h"

#include <limits>
#include <memory>
#include <string>

namespace kv4 {

std::byte* RowBuffer::key(int head, std::int64_t row) const {
  const RowShape& s = block_->shape;
  return block_->memory +
         (head * block_->capacity + begin_ + row) * s.head_dim_k * static_cast<std::int64_t>(size_of(s.dtype));
}

std::byte* RowBuffer::value(int head, std::int64_t row) const {
  const RowShape& s = block_->shape;
  const std::int64_t keys = s.kv_heads * block_->capacity * s.head_dim_k;
  return block_->memory +
         (keys + (head * block_->capacity + begin_ + row) * s.head_dim_v) * static_cast<std::int64_t>(size_of(s.dtype));
}

ExactRows RowBuffer::view(std::int64_t first, std::int64_t rows, std::int64_t position) const {
  ExactRows view;
  if (block_ == nullptr || rows < 0) return view;
  const RowShape& s = block_->shape;
  view.k = key(0, first);
  view.v = value(0, first);
  view.k_head_stride = block_->capacity * s.head_dim_k;
  view.v_head_stride = block_->capacity * s.head_dim_v;
  view.k_stride = s.head_dim_k;
  view.v_stride = s.head_dim_v;
  view.position = position;
  view.count = rows;
  return view;
}

void RowBuffer::clear() {
  if (block_ != nullptr && block_->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete block_;
  block_ = nullptr;
  begin_ = count_ = 0;
  draft_ = false;
}

Status RowBuffer::reserve(Backend& backend, const RowShape& shape, std::int64_t capacity) {
  if (block_ != nullptr && !shared() && begin_ == 0 && block_->capacity == capacity) return {};
  if (capacity == 0) {
    clear();
    return {};
  }
  const auto rows = static_cast<std::size_t>(capacity);
  const bool fits = rows <= static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max()) / shape.row_bytes();
  auto block = std::make_unique<Block>();
  block->backend = &backend;
  block->bytes = fits ? shape.row_bytes() * rows : 0;
  block->capacity = capacity;
  block->shape = shape;
  block->memory = fits ? static_cast<std::byte*>(backend.alloc(block->bytes)) : nullptr;
  if (block->memory == nullptr)
    return error(StatusCode::out_of_memory, "window",
                 "memory for " + std::to_string(capacity) + " rows of " + std::to_string(shape.row_bytes()) + " bytes",
                 "none");
  RowBuffer grown;
  grown.block_ = block.release();
  if (count_ > 0) KV4_RETURN_IF_ERROR(grown.push_rows(*this, 0, count_));
  *this = std::move(grown);
  return {};
}

Status RowBuffer::make_room(Backend& backend, const RowShape& shape, std::int64_t rows, std::int64_t capacity) {
  if (has_room(rows)) return {};
  const bool within = block_ != nullptr && !shared() && !draft_ && count_ + rows <= block_->capacity;
  // Keys and values as rows of one strided copy; two copies if their lengths differ.
  if (within && shape.head_dim_k == shape.head_dim_v) return compact();
  return reserve(backend, shape, capacity);
}

// Moves the rows to the front of their block.
Status RowBuffer::compact() {
  const RowShape& s = block_->shape;
  const std::size_t row = static_cast<std::size_t>(s.head_dim_k) * size_of(s.dtype),
                    pitch = static_cast<std::size_t>(block_->capacity) * row;
  if (count_ > 0)
    KV4_RETURN_IF_ERROR(block_->backend->copy_lines(block_->memory, pitch,
                                                    block_->memory + static_cast<std::size_t>(begin_) * row, pitch,
                                                    static_cast<std::size_t>(count_) * row, 2 * s.kv_heads));
  begin_ = 0;
  return {};
}

Status RowBuffer::push_rows(const RowBuffer& from, std::int64_t first, std::int64_t rows) {
  if (rows <= 0) return {};
  const RowShape& s = block_->shape;
  const auto side = [&](std::byte* into, const std::byte* out_of, int dim) {
    const std::size_t row = static_cast<std::size_t>(dim) * size_of(s.dtype);
    return block_->backend->copy_lines(into, static_cast<std::size_t>(block_->capacity) * row, out_of,
                                       static_cast<std::size_t>(from.block_->capacity) * row,
                                       static_cast<std::size_t>(rows) * row, s.kv_heads);
  };
  KV4_RETURN_IF_ERROR(side(key(0, count_), from.key(0, first), s.head_dim_k));
  KV4_RETURN_IF_ERROR(side(value(0, count_), from.value(0, first), s.head_dim_v));
  count_ += rows;
  return {};
}

}  // namespace kv4
