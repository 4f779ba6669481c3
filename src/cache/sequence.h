// One sequence of a layer's cache: its ledger, which tracks what is exact, sealed and due, and its memory.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cache/page_table.h"
#include "cache/rows.h"
#include "cache/setup.h"
#include "ledger/queries.h"

namespace kv4 {

// Energies of the queries that lambda is learnt from. Blocks are written once and then shared by forks.
struct QueryEnergy : ledger::Queries {
  std::vector<std::shared_ptr<Block>> rows;  // float [kv_heads * head_dim_k], by row(); null: masked or not asked

  void crop(std::int64_t length) {
    const auto kept = static_cast<std::size_t>(rows_below(length));
    if (length <= first) *this = QueryEnergy();
    if (rows.size() > kept) rows.resize(kept);
  }
};

// A note that a backend writes asynchronously, and how much of it has been polled into the ledger. `end`: positions
// from there on belong to a fork, or to tokens that a crop removed.
struct PolledNote {
  std::shared_ptr<LateNote> note;
  std::int64_t key = 0, value = 0;
  std::int64_t end = std::numeric_limits<std::int64_t>::max();
};

// A sequence's memory. The window's first row is at the extent's window_position.
struct Body {
  RowBuffer sinks, window;
  PageTable table;
  std::shared_ptr<Block> lambda;  // float [kv_heads, head_dim_k], where one was learnt
  QueryEnergy energy;             // until it is fixed
};

class Sequence {
 public:
  Sequence(const ledger::Ledger& held, PagePool* owner) : ledger(held), pool(owner) {}
  Sequence(Sequence&&) noexcept = default;
  Sequence& operator=(Sequence&& o) noexcept {
    std::swap(ledger, o.ledger);
    std::swap(body, o.body);
    std::swap(notes, o.notes);
    std::swap(note_forked, o.note_forked);
    std::swap(pool, o.pool);
    return *this;
  }
  ~Sequence() {
    if (!ledger.pages().empty()) pool->release(ledger.pages());
  }

  // An independent copy. Neither of the two writes to memory that they share.
  Sequence fork() {
    Sequence copy(*this);
    for (Sequence* each : {this, &copy}) {
      each->body.table.fork();
      each->note_forked = true;
    }
    return copy;
  }

  // Replaces its pages by copies in another pool; takes over one reference to each id.
  void move_to(PagePool* to, std::vector<PageId> ids, PageTable table) noexcept {
    if (!ledger.pages().empty()) pool->release(ledger.pages());
    ledger.take_pages(std::move(ids));
    body.table = std::move(table);
    pool = to;
  }

  std::int64_t length() const { return ledger.extent().length; }
  // Whether lambda is final.
  bool lambda_fixed() const { return !ledger.policy().learns || ledger.extent().lambda == ledger::Lambda::fixed; }
  // After commit: frees the energies once lambda is fixed, or its values once it is open again.
  void settle_lambda() noexcept {
    if (ledger.extent().lambda == ledger::Lambda::fixed) body.energy = QueryEnergy();
    if (ledger.extent().lambda == ledger::Lambda::open) body.lambda.reset();
  }
  // Moves what late notes report into the ledger. Errors: none; std::bad_alloc changes nothing.
  void poll_notes();
  // What the notes report that has not been polled yet.
  void pending_non_finite(std::vector<NonFinite>* found) const;
  // Existing notes count for positions below the length only; the next rows are reported in `fresh`, or by the call
  // itself where it is null. `notes` has the capacity for one more.
  void begin_note(std::shared_ptr<LateNote> fresh) noexcept;
  // The note that the next rows are reported in; null where the backend reports within the call.
  LateNote* note() const {
    return notes.empty() || notes.back().end != PolledNote().end ? nullptr : notes.back().note.get();
  }

  ledger::Ledger ledger;
  Body body;
  std::vector<PolledNote> notes;  // the last is being written; none where the backend reports within the call
  bool note_forked = false;       // a fork has the last one too: the next rows need a note of their own
  PagePool* pool;                 // null where nothing is sealed

 private:
  Sequence(const Sequence& o)
      : ledger(o.ledger), body(o.body), notes(o.notes), note_forked(o.note_forked), pool(o.pool) {
    if (!ledger.pages().empty()) pool->retain(ledger.pages());
  }
};

// The view of a sequence that kernels read, from the ledger's.
SequenceView view_of(const Setup& setup, const ledger::Extent& x, const Body& body, const ledger::View& view,
                     LateNote* note);

}  // namespace kv4
