// Private state of a Cache, shared by the files that implement it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cache/sequence.h"
#include "kv4/cache.h"

namespace kv4 {

namespace blob {
class Reader;
class Writer;
struct Sequence;
}  // namespace blob

// Calls of at most this many tokens answer every query as if tokens came one by one; longer ones
// are prefill and see their own tokens exactly.
constexpr std::int64_t kStepwiseTokens = kPageTokens;
// Tokens of a sequence at most: positions stay far from overflow, counts of pages fit an int.
constexpr std::int64_t kMaxLength = std::int64_t{1} << 36;

// The tables that a backend keeps for one cache; a copy of the cache gets its own.
struct OwnTables {
  std::unique_ptr<DeviceTables> tables;
  OwnTables() = default;
  OwnTables(const OwnTables&) {}
};

// What a call of attention teaches of each sequence.
struct Lesson {
  struct Energies {
    std::size_t sequence;
    std::int64_t first, row;  // of QueryEnergy; row -1: none but the first position
    std::shared_ptr<Block> block;
  };
  std::vector<Energies> energies;
  // [batch] positions in the window, ascending, that neither a query of the call sees nor one before it did; empty where that
  // follows for each position alone (Visibility::simple).
  std::vector<std::vector<std::int64_t>> hidden;
};

struct Cache::State {
  explicit State(std::shared_ptr<const CacheConfig> c) : shared_config(std::move(c)), config(*shared_config) {}

  std::shared_ptr<const CacheConfig> shared_config;  // clones have it in common
  const CacheConfig& config;
  Backend* backend = nullptr;
  RowShape shape;
  PageSpec spec;                        // valid unless the recipe never seals
  std::shared_ptr<PagePool> pool;       // null where the recipe never seals
  std::shared_ptr<Block> given_k, given_v;  // lambda of the configuration; null where it has none
  OwnTables own;
  void* stream = nullptr;
  std::vector<Sequence> sequences;
  std::int64_t length = 0;
  std::uint64_t version = 0;
  bool recording = false;

  // Reused from call to call, so that decoding allocates nothing (work lists of sealing excepted).
  std::vector<SequenceView> views;
  std::vector<SealJob> jobs;
  std::vector<std::uint8_t> masked;
  std::vector<std::int32_t> windows;
  std::vector<std::vector<NonFinite>> news;      // of the rows of this call
  std::vector<std::vector<NonFinite>*> found;
  std::vector<EnergyJob> energies;

  bool seals() const { return config.recipe.seal != SealMode::never; }
  bool arrival() const { return config.recipe.seal == SealMode::arrival; }
  int heads() const { return config.kv_heads; }
  // Before anything is asked of the backend.
  State& on_stream() {
    backend->set_stream(stream);
    return *this;
  }
  static Status create(const CacheConfig& config, std::unique_ptr<Cache>* out);
  Status select(std::span<const std::int64_t> rows);
  Status copy_lambda(int row, std::vector<float>* out) const;
  Status find_slice(int row, int index, int head, const std::uint8_t** out) const;
  std::uint8_t* slice(const PageRef& page, int head) const {
    return page.data() + static_cast<std::size_t>(head) * spec.layout.head_bytes;
  }
  const float* lambda_k(const Sequence& s, int head) const;
  const float* lambda_v(int head) const;

  // seal.cpp
  Status seal();
  Status settle(Draft& draft);                      // seals and evicts what is due at `length`; makes the draft where anything is
  bool seals_more(const Sequence& s, std::int64_t n, bool told) const;
  bool releases(const Sequence& s) const;
  bool evicts(const Sequence& s) const;
  std::int64_t decode_rows(const Sequence& s) const;
  Status seal_until(std::vector<Sequence>& next, std::int64_t n);  // the pages due once n tokens are held; keeps their exact rows
  Status anchor(Sequence& s) const;                 // fixes start, moves the sinks out
  Status release_rows(Sequence& s, std::int64_t position) const;  // drops exact rows below it
  Status shrink(Sequence& s, std::int64_t room) const;
  Status evict(Sequence& s) const;                  // what a sliding window no longer shows; nothing while recording
  Status evict_below(Sequence& s, std::int64_t needed) const;
  Status fix_lambda(Sequence& s);
  void note_masked(const Sequence& s, std::int64_t first_row, std::int64_t rows);
  Status seal_arrived(std::vector<Sequence>& next, const TensorView& k, const TensorView& v);

  // append.cpp
  Status check_rows(const TensorView& x, const char* name, int dim) const;
  Status append(const TensorView& k, const TensorView& v);
  Status open(std::int64_t batch, Draft& draft);
  Status make_room(Sequence& s, std::int64_t tokens) const;
  Status push(std::vector<Sequence>& next, const TensorView& k, const TensorView& v);
  Status append_captured(const TensorView& k, const TensorView& v);
  void await_news(std::size_t batch);
  void make_room_for_news(std::vector<Sequence>& next) const;
  // Those rows of sequence `row` that seal_arrived marked go to news.
  void note_non_finite(const Sequence& s, std::size_t row, const TensorView& k, const TensorView& v);
  Status give_note(Sequence& s) const;
  void hear(Sequence& s) const;                     // takes over what the note says
  // What is new of the notes goes to `found`.
  void listen(const Sequence& s, std::vector<NonFinite>* found) const;
  Status make_tables();
  // Views as a store of `tokens` rows finds them.
  Status view_before(std::vector<Sequence>& next, std::int64_t tokens);
  Status reserve(std::int64_t tokens);
  Status advance();

  // attend.cpp
  Status check_dtype(const char* name, DType dtype) const;
  Status check_queries(const AttendArgs& args) const;
  Status attend(const AttendArgs& args, std::int64_t upto, const MutableTensorView* out,
                const PartialState* partial);
  Status attend_captured(const AttendArgs& args, const MutableTensorView* out);
  Status check_seen(const AttendArgs& args);
  Status learn(const AttendArgs& args, std::vector<Sequence>& next, Lesson* lesson);
  Status learn_energies(const AttendArgs& args, std::vector<Sequence>& next, Lesson* lesson);
  void take(const AttendArgs& args, Lesson& lesson, std::vector<Sequence>& next) const noexcept;
  Status run(const AttendArgs& args, std::int64_t upto, const MutableTensorView* out, const PartialState* partial, std::vector<Sequence>& next);
  AttendJob job_of(const AttendArgs& args);
  Status check_output(const AttendArgs& args, const MutableTensorView* out, const PartialState* partial) const;
  std::int64_t visible_pages(const Sequence& s, std::int64_t query_position, bool stepwise) const;
  void view(const Sequence& s, std::int64_t pages, std::int64_t upto, SequenceView* out) const;

  // edit.cpp
  Status crop(std::int64_t n);
  Status crop_sequence(Sequence& s, std::int64_t n) const;
  Status reopen_page(Sequence& s, std::int64_t index, std::int64_t rows) const;
  Status dense(bool keys, std::int64_t first, std::int64_t count, const MutableTensorView& out) const;

  // save.cpp
  Status save(const Sink& sink) const;
  Status save_sequence(const Sequence& s, std::span<const std::uint64_t> table, blob::Writer& out) const;
  Status save_page(const PageRef& page, blob::Writer& out) const;

  // load.cpp
  Status load(const Source& source);
  bool automatic() const { return seals() && config.recipe.key.lambda == LambdaMode::automatic; }
  bool lambda_fixed(const Sequence& s) const { return !automatic() || (s.lambda && !s.query_energy.any()); }
  Status check(const blob::Sequence& saved, std::int64_t tokens) const;
  Status load_sequence(std::int64_t tokens, blob::Reader& in, Sequence* s, std::vector<std::uint64_t>* table) const;
  Status load_rows(std::int64_t count, blob::Reader& in, RowBuffer* rows) const;
  Status load_queries(std::int64_t first, blob::Reader& in, QueryEnergy* energy) const;
  Status load_page(blob::Reader& in, const PageRef& page) const;
};

}  // namespace kv4
