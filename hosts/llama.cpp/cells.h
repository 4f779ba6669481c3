// One tensor of llama.cpp's cache: rows of cells, by streams. Its bytes are the exact rows, where they lie; which of
// them were written, and how long ago, is kept beside them by blocks of kPageTokens cells, numbered through all
// streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ggml.h"
#include "kv4/recipe.h"
#include "kv4/types.h"

namespace kv4::llama {

class Layer;

struct Cells {
  explicit Cells(const ggml_tensor& tensor);

  std::string name;
  ggml_type type;
  std::int64_t channels;  // of a row
  std::int64_t cells;     // of a stream
  std::int64_t streams;
  std::size_t row_bytes;
  std::byte* data;
  std::size_t bytes;
  Layer* layer = nullptr;       // whose keys or values they are, once an attention has named both
  bool stays_exact = false;     // kv4 does not serve them
  std::int64_t neighbours = 0;  // channels of a head whose rotary pairs lie side by side, as far as is known

  // Of the model, from the name: cache_k_l7. -1 where it has none.
  int layer_number() const;
  std::int64_t blocks_of_stream() const { return (cells + kPageTokens - 1) / kPageTokens; }
  std::int64_t blocks() const { return blocks_of_stream() * streams; }
  std::int64_t block_of(std::int64_t cell) const {
    return cell / cells * blocks_of_stream() + cell % cells / kPageTokens;
  }
  std::byte* block(std::int64_t b) const {
    return data +
           static_cast<std::size_t>(b / blocks_of_stream() * cells + b % blocks_of_stream() * kPageTokens) * row_bytes;
  }
  std::size_t block_bytes() const { return static_cast<std::size_t>(kPageTokens) * row_bytes; }

  // Cell `cell` (through all streams) has been written just now.
  void wrote(std::int64_t cell);
  // All cells of the block were written, the last of them before the newest `tokens` of its stream.
  bool settled(std::int64_t block, std::int64_t tokens) const;
  bool used(std::int64_t block) const { return written_[static_cast<std::size_t>(block)] != 0; }
  // All NaN-free and finite. Of a block of f16 or bf16 in memory, not of a packed one.
  bool finite(std::int64_t block) const;
  void forget();
  // The block's history is that of another one, here or in tensors alike.
  void take_history(std::int64_t block, const Cells& from, std::int64_t from_block);

 private:
  std::vector<std::uint64_t> written_;    // [blocks] a bit for each cell
  std::vector<std::int64_t> last_write_;  // [blocks] by the stream's clock
  std::vector<std::int64_t> clock_;       // [streams] cells written
};

// Whether kv4 has rows of this type, and which.
bool dtype_of(ggml_type type, DType* out);

}  // namespace kv4::llama
