// A Cache's state and operations: each checks its arguments, plans, prepares memory that nothing reads yet, and
// commits.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache/draft.h"
#include "cache/pool.h"
#include "cache/sequence.h"
#include "cache/setup.h"
#include "kv4/cache.h"

namespace kv4 {

struct CacheState {
  std::shared_ptr<const Setup> setup;
  std::shared_ptr<PagePool> pool;        // null where the recipe never seals
  std::unique_ptr<DeviceTables> tables;  // the backend's; a copy of the cache gets its own
  void* stream = nullptr;
  std::uint8_t* const* captured = nullptr;  // the pool's table that a captured step reads
  std::vector<Sequence> sequences;
  std::uint64_t version = 0;
  bool recording = false;

  // Reused from call to call, so that decoding allocates nothing (work lists of sealing excepted).
  std::vector<Part> parts;
  std::vector<SequenceView> views;
  std::vector<std::vector<NonFinite>> non_finite;  // of the rows of this call
  std::vector<std::vector<NonFinite>*> found;

  Backend& backend() const { return *setup->backend; }
  // Call before any use of the backend.
  CacheState& on_stream() {
    backend().set_stream(stream);
    return *this;
  }
  std::int64_t batch() const { return static_cast<std::int64_t>(sequences.size()); }
  std::int64_t longest() const;
  std::int64_t shortest() const;
};

// append.cpp. rows: null where k and v have all sequences, equally long.
using RowCounts = std::span<const RowCount>;
Status append(CacheState& c, const RowCounts* rows, const TensorView& k, const TensorView& v);
Status append_captured(CacheState& c, const TensorView& k, const TensorView& v);
Status advance(CacheState& c);
Status seal(CacheState& c);
// The parts of a call: `tokens` of every sequence, or those that `rows` names, each sequence at most once; `total` in
// all.
// Errors: out_of_range and invalid_argument naming rows.
Status make_parts(CacheState& c, const RowCounts& rows, std::int64_t total, const char* of);
void make_parts(std::size_t batch, std::int64_t tokens, std::vector<Part>* parts);

// attend.cpp. Exactly one of out and partial; upto: of a partial state, one for all sequences, or for each of rows.
Status attend(CacheState& c, const RowCounts* rows, const AttendArgs& args, std::span<const std::int64_t> upto,
              const MutableTensorView* out, const PartialState* partial);
AttendJob attend_job(CacheState& c, const AttendArgs& args);
Status attend_captured(CacheState& c, const AttendArgs& args, const MutableTensorView* out);

// edit.cpp
Status crop(CacheState& c, std::int64_t length);
Status crop_row(CacheState& c, int row, std::int64_t length);
Status erase(CacheState& c, int row, std::int64_t first, std::int64_t count);
Status select(CacheState& c, std::span<const std::int64_t> rows);
Status repeat(CacheState& c, int times);
Status fork(CacheState& c, std::unique_ptr<CacheState>* out);
Status add(CacheState& c, int count);
Status remove(CacheState& c, std::span<const std::int64_t> rows);
Status extend(CacheState& c, CacheState& other);
Status make_sequences(const CacheState& c, std::size_t count, std::vector<Sequence>* out);
Status check_row(const CacheState& c, std::int64_t row);

// read.cpp
Status dense(const CacheState& c, bool keys, std::int64_t first, std::int64_t count, const MutableTensorView& out);
Status lambda(const CacheState& c, int row, std::vector<float>* out);
Status page_codes(const CacheState& c, int row, int index, int head, std::span<std::uint8_t> k,
                  std::span<std::uint8_t> v);
Status page_scales(const CacheState& c, int row, int index, int head, std::span<std::uint16_t> k,
                   std::span<std::uint16_t> v);
Status page_second_rows(const CacheState& c, int row, int index, int head, SecondRows* out);
std::size_t nbytes(const CacheState& c);
std::vector<SharedMemory> shared(const CacheState& c);

// save.cpp, load.cpp
Status save(const CacheState& c, const Sink& sink);
Status load(CacheState& c, const Source& source);

// device.cpp
Status reserve(CacheState& c, std::int64_t tokens);
Status make_tables(CacheState& c);
// A note for the next rows; null where the backend reports within the call. Its capacity is reserved.
Status make_note(const CacheState& c, Sequence& s, std::shared_ptr<LateNote>* out);

}  // namespace kv4
