#include "cache/rows.h"

#include <string>

namespace kv4 {

std::byte* RowBuffer::key(int head, std::int64_t row) const {
  const RowShape& s = block_->shape;
  return block_->memory + (head * block_->capacity + row) * s.head_dim_k * static_cast<std::int64_t>(size_of(s.dtype));
}

std::byte* RowBuffer::value(int head, std::int64_t row) const {
  const RowShape& s = block_->shape;
  const std::int64_t keys = s.kv_heads * block_->capacity * s.head_dim_k;
  return block_->memory + (keys + (head * block_->capacity + row) * s.head_dim_v) * static_cast<std::int64_t>(size_of(s.dtype));
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

Status RowBuffer::reserve(Backend& backend, const RowShape& shape, std::int64_t capacity) {
  if (block_ && !shared() && block_->capacity == capacity) return {};
  if (capacity == 0) {
    clear();
    return {};
  }
  const std::size_t bytes = shape.row_bytes() * static_cast<std::size_t>(capacity);
  auto* memory = static_cast<std::byte*>(backend.alloc(bytes));
  if (memory == nullptr)
    return error(StatusCode::out_of_memory, "window", std::to_string(bytes) + " free bytes", "none");
  RowBuffer grown;
  grown.block_ = std::make_shared<Block>(&backend, memory, bytes, capacity, shape);
  if (count_ > 0) KV4_RETURN_IF_ERROR(grown.push_rows(*this, 0, count_));
  *this = std::move(grown);
  return {};
}

Status RowBuffer::copy_rows(const RowBuffer& from, std::int64_t first, std::int64_t to, std::int64_t rows) {
  if (rows <= 0) return {};
  const RowShape& s = block_->shape;
  const auto side = [&](std::byte* into, const std::byte* out_of, int dim) {
    const std::size_t row = static_cast<std::size_t>(dim) * size_of(s.dtype);
    return block_->backend->copy_lines(into, static_cast<std::size_t>(block_->capacity) * row, out_of,
                                       static_cast<std::size_t>(from.block_->capacity) * row, static_cast<std::size_t>(rows) * row, s.kv_heads);
  };
  KV4_RETURN_IF_ERROR(side(key(0, to), from.key(0, first), s.head_dim_k));
  return side(value(0, to), from.value(0, first), s.head_dim_v);
}

Status RowBuffer::drop_front(std::int64_t rows) {
  if (rows > 0) KV4_RETURN_IF_ERROR(copy_rows(*this, rows, 0, count_ - rows));
  count_ -= rows;
  return {};
}

Status RowBuffer::push_rows(const RowBuffer& from, std::int64_t first, std::int64_t rows) {
  KV4_RETURN_IF_ERROR(copy_rows(from, first, count_, rows));
  count_ += rows;
  return {};
}

}  // namespace kv4
