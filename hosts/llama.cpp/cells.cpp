#include "cells.h"

#include <algorithm>
#include <charconv>

namespace kv4::llama {

Cells::Cells(const ggml_tensor& tensor)
    : name(tensor.name), type(tensor.type), channels(tensor.ne[0]), cells(tensor.ne[1]), streams(tensor.ne[2]),
      row_bytes(tensor.nb[1]), data(static_cast<std::byte*>(tensor.data)), bytes(ggml_nbytes(&tensor)) {
  forget();
}

int Cells::layer_number() const {
  const std::size_t at = name.rfind("_l");
  int number = -1;
  if (at != std::string::npos) std::from_chars(name.data() + at + 2, name.data() + name.size(), number);
  return number;
}

void Cells::forget() {
  written_.assign(static_cast<std::size_t>(blocks()), 0);
  last_write_.assign(static_cast<std::size_t>(blocks()), 0);
  clock_.assign(static_cast<std::size_t>(streams), 0);
}

void Cells::wrote(std::int64_t cell) {
  const auto block = static_cast<std::size_t>(block_of(cell));
  written_[block] |= std::uint64_t{1} << (cell % cells % kPageTokens);
  last_write_[block] = ++clock_[static_cast<std::size_t>(cell / cells)];
}

bool Cells::settled(std::int64_t block, std::int64_t tokens) const {
  const auto b = static_cast<std::size_t>(block);
  return written_[b] == ~std::uint64_t{0} &&
         clock_[static_cast<std::size_t>(block / blocks_of_stream())] - last_write_[b] >= tokens;
}

bool Cells::finite(std::int64_t b) const {
  const auto mask = static_cast<std::uint16_t>(type == GGML_TYPE_BF16 ? 0x7f80 : 0x7c00);
  const auto* x = reinterpret_cast<const std::uint16_t*>(block(b));
  int bad = 0;
  for (std::size_t i = 0; i < block_bytes() / sizeof *x; ++i) bad |= (x[i] & mask) == mask;
  return bad == 0;
}

void Cells::take_history(std::int64_t block, const Cells& from, std::int64_t from_block) {
  const auto b = static_cast<std::size_t>(block), f = static_cast<std::size_t>(from_block);
  written_[b] = from.written_[f];
  last_write_[b] = from.last_write_[f];
  clock_[static_cast<std::size_t>(block / blocks_of_stream())] =
      from.clock_[static_cast<std::size_t>(from_block / from.blocks_of_stream())];
}

bool dtype_of(ggml_type type, DType* out) {
  if (type == GGML_TYPE_F16) *out = DType::f16;
  else if (type == GGML_TYPE_BF16) *out = DType::bf16;
  else return false;
  return true;
}

}  // namespace kv4::llama
