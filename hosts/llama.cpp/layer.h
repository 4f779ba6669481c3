// Keys and values of one layer: blocks of 64 cells that lie exact in llama.cpp's own tensors, or packed in pages beside
// them. A block's page has the block's number, so that one number serves for both; memory is taken where it is used and
// given back.
//
// A block is packed once all its cells were written and none of them among the newest `window` cells of its stream,
// times the number of sequences that write to it in turn; before the next write, not as attention ends, so that layers
// that read another's cache see the same as it. Whoever writes to a packed block, or reads it in some other way than by
// attention, has it unpacked first (expose), or reads a copy (read).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cells.h"
#include "kv4/paged.h"
#include "mapping.h"

namespace kv4::llama {

// How attention reads the rows of a layer.
struct Geometry {
  int q_heads = 0, kv_heads = 0, head_dim_k = 0, head_dim_v = 0;
  bool operator==(const Geometry&) const = default;
};

class Layer {
 public:
  // A layer that kv4 serves. Errors: invalid_argument or unsupported with the reason why it does not.
  static Status create(Cells& k, Cells& v, const Geometry& geometry, std::unique_ptr<Layer>* out);

  const Geometry& geometry() const { return geometry_; }
  const Cells& keys() const { return k_; }
  const Cells& values() const { return v_; }
  // False from the first keep_exact on: then attention is llama.cpp's own, over the exact rows.
  bool packs() const { return packs_; }
  void keep_exact();

  // [blocks] 1 where the block is packed.
  const std::uint8_t* packed() const { return packed_.data(); }
  // Unpacks what of the blocks [begin, end) is packed.
  Status expose(std::int64_t begin, std::int64_t end);
  Status expose_all() { return expose(0, k_.blocks()); }
  // The exact rows of one side of a block, kPageTokens rows, to `out`, whether it is packed or not.
  Status read(const Cells& side, std::int64_t block, std::byte* out);
  // Before cells [first, first + count), through all streams, are written: packs what is due after the attentions since
  // the last write, and unpacks the blocks that are written to.
  Status begin_write(std::int64_t first, std::int64_t count);
  // An attention has seen the layer: `q` [1, q_heads, rows, head_dim_k] were its queries, of `sequences` sequences that
  // write in turn.
  void attended(const TensorView& q, int sequences);
  // Packs what is due by now, if anything was packed before.
  Status settle();
  // Stream `to` becomes a copy of stream `from`, keys and values.
  Status copy_stream(std::int64_t from, std::int64_t to);
  void forget();

  // The caller, which knows the sequences, fills in the tables.
  PagedBatch batch() const;
  const PageFormat& format() const { return *format_; }
  // Memory of `bytes` for a call, kept from one to the next by the thread.
  static std::span<std::byte> scratch(std::size_t bytes);
  // Bytes of exact rows and of pages that are in use.
  void held(std::size_t* exact, std::size_t* packed) const;

 private:
  Layer(Cells& k, Cells& v, const Geometry& geometry);
  Status pack(std::span<const std::int32_t> blocks);
  Status unpack(std::int64_t block, const RowMemory& to, std::int32_t to_block);
  Status pack_due();
  Status take_calibration();
  void learn_queries(const TensorView& q);
  Status learn_lambda(std::span<const std::int32_t> due);
  bool first_of_stream(std::int64_t block) const { return block % k_.blocks_of_stream() == 0; }
  void release_rows(std::int64_t block);

  Cells& k_;
  Cells& v_;
  const Geometry geometry_;
  DType dtype_ = DType::f16;
  bool packs_ = true;
  std::unique_ptr<PageFormat> format_;
  Mapping pages_;
  std::vector<std::uint8_t> packed_;
  std::vector<std::int32_t> due_;
  int sequences_ = 1;
  bool any_packed_ = false;
  bool attended_ = false;  // since the last write
  std::vector<float>
      lambda_;  // [kv_heads, head_dim_k]; measured, or learnt as the first page is packed and empty until then
  std::vector<float> lambda_v_;   // [kv_heads, head_dim_v] measured, or empty for 1
  std::vector<double> energies_;  // [q_heads, head_dim_k] sums of q^2 until then
  std::int64_t queries_ = 0;
};

}  // namespace kv4::llama
