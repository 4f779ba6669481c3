// What a mask says, as sequences over blocks of cells. llama.cpp passes attention neither sequences nor positions, only
// who sees which cell: rows of queries that see much the same blocks become one sequence, which reads these blocks
// alone, packed ones first. Where every row of a call sees a run of cells that ends with its own, the mask is no more
// than a beginning and a window, and is not read again.
#pragma once

#include <cstdint>
#include <vector>

#include "kv4/attention.h"
#include "kv4/paged.h"

namespace kv4::llama {

// Rows of additive f16, one for each query of each stream; data null: everything is seen.
struct MaskRows {
  const std::byte* data = nullptr;
  std::size_t row_bytes = 0, stream_bytes = 0;  // 0: the same for all
  std::int64_t cells = 0;                       // columns
  int rows = 0, streams = 1;                    // rows of a stream

  std::uint64_t digest() const;  // of what all rows hold

  const std::uint16_t* row(int stream, int row) const {
    return reinterpret_cast<const std::uint16_t*>(data + static_cast<std::size_t>(stream) * stream_bytes +
                                                  static_cast<std::size_t>(row) * row_bytes);
  }
};

class Plan {
 public:
  // `packed`: of each block of the streams, one stream after another; stream 0 of the mask is stream first_stream
  // there. `digest` is the mask's.
  void make(const MaskRows& mask, std::uint64_t digest, const std::uint8_t* packed, std::int64_t blocks_of_stream,
            int first_stream);
  // Whether it was made of the same mask and the same packed blocks.
  bool holds(const MaskRows& mask, std::uint64_t digest, const std::uint8_t* packed, std::int64_t blocks_of_stream,
             int first_stream) const;

  // Consecutive sequences that one call serves.
  struct Part {
    std::size_t begin, end;
    bool plain;
    std::int8_t
        sinks;  // 1: all read their stream's first tokens from its first block; 0: none does; -1: either will do
  };
  const std::vector<Part>& parts() const { return parts_; }
  // Fills in the tables of a part's call, whose arrays live as long as the plan does not change, and its mask.
  void apply(const Part& part, PagedBatch* batch, Mask* mask) const;
  PageFormat::Limits limits() const;
  int sequences_of_stream() const { return sequences_of_stream_; }

 private:
  // Rows [begin, end) of a stream.
  struct Group {
    int stream, begin, end;
    bool plain;  // row t sees cells start (or the newest `window`) ... last - (end - 1 - t)
    std::int64_t start, window, last;
    std::vector<std::uint64_t> blocks;  // a bit for each that some row sees
  };
  struct Sight;
  static Sight sight_of(const std::uint16_t* row, std::int64_t cells);
  static bool extend(Group* group, const Sight& sight);
  void find_groups(const MaskRows& mask);
  void settle_group(Group* group, const std::uint8_t* packed);
  void list_blocks(const std::uint8_t* packed, std::int64_t blocks_of_stream, int first_stream);
  void copy_mask(const MaskRows& mask, std::int64_t blocks_of_stream, int first_stream);
  void remember(const MaskRows& mask, const std::uint8_t* packed, std::int64_t blocks_of_stream, int first_stream);

  std::vector<Group> groups_;
  std::vector<Part> parts_;
  int sequences_of_stream_ = 1;
  std::vector<std::int32_t> queries_, lengths_, sealed_, ids_, firsts_, starts_, windows_;
  std::int64_t width_ = 0;           // ids of a sequence
  std::vector<std::uint16_t> mask_;  // [rows, 64 width_] of the groups that are not plain
  // What it was made of.
  MaskRows shape_;
  int first_stream_ = 0;
  std::int64_t blocks_of_stream_ = 0;
  std::uint64_t digest_ = 0;
  std::vector<std::uint8_t> packed_;
};

}  // namespace kv4::llama
