#include "cache/rows.h"

#include <cstring>
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
  if (rows <= 0) return view;
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
  if (count_ > 0) grown.push_rows(*this, 0, count_);
  *this = std::move(grown);
  return {};
}

void RowBuffer::drop_front(std::int64_t rows) {
  const RowShape& s = block_->shape;
  const std::int64_t kept = count_ - rows;
  if (rows > 0 && kept > 0) {
    for (int h = 0; h < s.kv_heads; ++h) {
      std::memmove(key(h, 0), key(h, rows), static_cast<std::size_t>(kept) * s.head_dim_k * size_of(s.dtype));
      std::memmove(value(h, 0), value(h, rows), static_cast<std::size_t>(kept) * s.head_dim_v * size_of(s.dtype));
    }
  }
  count_ = kept;
}

void RowBuffer::push_rows(const RowBuffer& from, std::int64_t first, std::int64_t rows) {
  const RowShape& s = block_->shape;
  for (int h = 0; h < s.kv_heads; ++h) {
    std::memcpy(key(h, count_), from.key(h, first), static_cast<std::size_t>(rows) * s.head_dim_k * size_of(s.dtype));
    std::memcpy(value(h, count_), from.value(h, first), static_cast<std::size_t>(rows) * s.head_dim_v * size_of(s.dtype));
  }
  count_ += rows;
}

}  // namespace kv4
