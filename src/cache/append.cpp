// Appending tokens: checks, sealing of due pages first, room in the window; with arrival sealing, tokens are sealed at
// once.
#include <algorithm>
#include <limits>
#include <string>

#include "attention/arguments.h"
#include "cache/state.h"

namespace kv4 {
namespace {

constexpr std::int64_t kMostRows = std::numeric_limits<int>::max();

// batch: expected size of axis 0; negative: any, since the first call sets it.
Status check_rows(const Setup& setup, const TensorView& x, const char* name, int dim, std::int64_t batch) {
  const DType dtype = setup.config.dtype;
  if (x.dtype != dtype) return invalid_argument(name, std::string("dtype ") + name_of(dtype), name_of(x.dtype));
  if ((batch >= 0 && x.shape[0] != batch) || x.shape[0] < 1 || x.shape[1] != setup.heads() || x.shape[2] < 0 ||
      x.shape[3] != dim)
    return invalid_argument(name,
                            "shape [" + (batch < 0 ? std::string("batch") : std::to_string(batch)) + ", " +
                                std::to_string(setup.heads()) + ", tokens, " + std::to_string(dim) + "]",
                            shape_text(x.shape));
  if (x.stride[3] != 1 && dim > 1) return invalid_argument(name, "channel stride 1", std::to_string(x.stride[3]));
  if (x.data == nullptr && x.shape[2] > 0) return invalid_argument(name, "data", "a null pointer");
  if (x.shape[0] > kMostRows)
    return error(StatusCode::out_of_range, name, "a batch of at most " + std::to_string(kMostRows),
                 std::to_string(x.shape[0]));
  return {};
}

Status check_room(const char* name, std::int64_t held, std::int64_t tokens) {
  const std::int64_t room = kMostTokens - held;
  return tokens <= room ? Status()
                        : error(StatusCode::out_of_range, name, "at most " + std::to_string(room) + " tokens",
                                std::to_string(tokens));
}

// A window's capacity grows in steps, small ones while it is small, since short texts consist of window only; a long
// prefill gets exactly what it needs. A cache that never seals grows by an eighth, so that appending costs O(1)
// amortised. x: the extent before.
Status make_room(const Setup& setup, const ledger::Extent& x, RowBuffer& window, std::int64_t tokens) {
  const std::int64_t need = window.count() + tokens;
  std::int64_t room = window.capacity();
  if (need > room) {
    room = need + std::max<std::int64_t>(1, need / (setup.policy.seals() ? 16 : 8));
    room = std::max(need, std::min(room, setup.most_rows(x)));
  }
  return window.make_room(*setup.backend, setup.shape, tokens, room);
}

// Non-finite rows that one fork appends next are not reported to the other.
Status part_notes(const CacheState& c, Sequence& s) {
  if (!s.note_forked || s.notes.empty()) return {};
  std::shared_ptr<LateNote> note;
  KV4_RETURN_IF_ERROR(make_note(c, s, &note));
  s.begin_note(std::move(note));
  return {};
}

// One append to sequences. `all`: the cache's sequences, or the new ones of the first call.
class Append {
 public:
  Append(CacheState& c, std::vector<Sequence>& all)
      : c_(c), setup_(*c.setup), all_(all), draft_(setup_, c.pool.get()) {}

  Status run(const TensorView& k, const TensorView& v) {
    KV4_RETURN_IF_ERROR(plan(k, v));
    KV4_RETURN_IF_ERROR(place());
    reserve_reports();
    // Arrival sealing writes into open pages, and errors of storing may be reported late: no step of a call after these
    // may fail.
    KV4_RETURN_IF_ERROR(draft_.seal());
    if (setup_.policy.arrival() || k.shape[2] == 0) return {};
    StoreJob job;
    job.k = k;
    job.v = v;
    job.sequences.views = c_.views;
    job.found = c_.found.data();
    job.tables = c_.tables.get();
    KV4_RETURN_IF_ERROR(setup_.backend->store(job));
    reserve_reports();
    return {};
  }
  // The rows are stored when the captured step is replayed.
  Status foresee() {
    KV4_RETURN_IF_ERROR(plan({}, {}));
    KV4_RETURN_IF_ERROR(place());
    KV4_RETURN_IF_ERROR(draft_.seal());
    if (c_.captured != nullptr && c_.captured != c_.pool->memory().chunks)
      return error(StatusCode::failed_precondition, "cache",
                   "a step captured since pages outgrew their table (reserve before it makes room)", "an older one");
    return setup_.backend->foresee(c_.tables.get(), c_.views, 1);
  }
  void commit() noexcept {
    for (std::size_t i = 0; i < c_.parts.size(); ++i) {
      if (draft_.find(i) != nullptr) continue;
      Sequence& s = sequence(i);
      s.ledger.extend(c_.parts[i].tokens);
      s.body.window.set_count(s.ledger.extent().window_rows());
    }
    draft_.commit();
    for (std::size_t i = 0; i < c_.parts.size(); ++i)
      for (const NonFinite& x : c_.non_finite[i]) sequence(i).ledger.note(x);
  }

 private:
  Sequence& sequence(std::size_t i) { return all_[c_.parts[i].row]; }
  Status plan(const TensorView& k, const TensorView& v) {
    c_.non_finite.resize(c_.parts.size());
    for (std::size_t i = 0; i < c_.parts.size(); ++i) {
      c_.non_finite[i].clear();
      KV4_RETURN_IF_ERROR(part_notes(c_, sequence(i)));
      draft_.add_append(i, sequence(i), c_.parts[i].tokens, c_.recording);
    }
    const Arriving arriving{k, v, c_.parts, c_.non_finite};
    return draft_.prepare(&arriving);
  }
  void reserve_reports() {
    for (std::size_t i = 0; i < c_.parts.size(); ++i)
      if (!c_.non_finite[i].empty()) sequence(i).ledger.make_room_for_notes(c_.non_finite[i].size());
  }

  // New rows follow those of the windows, which are grown if they have no room.
  Status place() {
    c_.views.resize(c_.parts.size());
    c_.found.clear();
    for (std::size_t i = 0; i < c_.parts.size(); ++i) {
      const Part& part = c_.parts[i];
      Sequence& s = sequence(i);
      Change* const change = draft_.find(i);
      Body& body = change != nullptr ? change->next : s.body;
      const ledger::Extent& x = change != nullptr ? change->plan.after : s.ledger.extent();
      const std::int64_t tokens = setup_.policy.arrival() ? 0 : part.tokens, length = s.length();
      if (tokens > 0) KV4_RETURN_IF_ERROR(make_room(setup_, x, body.window, tokens));
      if (change == nullptr) s.ledger.make_room_for_rows(tokens);
      SequenceView& view = c_.views[i] =
          view_of(setup_, x, body, ledger::view(setup_.policy, x, length, true, length), s.note());
      view.input = part.input;
      view.input_row = part.input_row;
      view.query_count = tokens;
      view.query_position = length - tokens;
      c_.found.push_back(&c_.non_finite[i]);
    }
    return make_tables(c_);
  }
  CacheState& c_;
  const Setup& setup_;
  std::vector<Sequence>& all_;
  Draft draft_;
};

}  // namespace

void make_parts(std::size_t batch, std::int64_t tokens, std::vector<Part>* parts) {
  parts->resize(batch);
  for (std::size_t b = 0; b < batch; ++b) (*parts)[b] = {b, tokens, static_cast<std::int32_t>(b)};
}

Status make_parts(CacheState& c, const RowCounts& rows, std::int64_t total, const char* of) {
  std::vector<Part>& parts = c.parts;
  parts.clear();
  std::int64_t sum = 0;
  for (const auto& [row, tokens] : rows) {
    KV4_RETURN_IF_ERROR(check_row(c, row));
    if (tokens < 0 || tokens > kMostTokens)
      return error(StatusCode::out_of_range, "rows", "0 to " + std::to_string(kMostTokens) + " tokens of each",
                   std::to_string(tokens));
    parts.push_back({static_cast<std::size_t>(row), tokens, 0, sum});
    sum += tokens;
  }
  if (sum != total)
    return invalid_argument("rows", "as many tokens in all as " + std::string(of) + ", " + std::to_string(total),
                            std::to_string(sum));
  // The common case: ascending rows contain no duplicates.
  const auto less = [](const Part& a, const Part& b) { return a.row < b.row; };
  if (std::is_sorted(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.row <= b.row; }))
    return {};
  std::vector<Part> sorted = parts;
  std::sort(sorted.begin(), sorted.end(), less);
  const auto twice =
      std::adjacent_find(sorted.begin(), sorted.end(), [](const Part& a, const Part& b) { return a.row == b.row; });
  return twice == sorted.end() ? Status()
                               : invalid_argument("rows", "each sequence once", std::to_string(twice->row) + " twice");
}

Status append(CacheState& c, const RowCounts* rows, const TensorView& k, const TensorView& v) {
  const Setup& setup = *c.setup;
  const bool opening = rows == nullptr && c.sequences.empty();
  const std::int64_t batch = rows != nullptr ? 1 : opening ? -1 : c.batch();
  KV4_RETURN_IF_ERROR(check_rows(setup, k, "k", setup.config.head_dim_k, batch));
  KV4_RETURN_IF_ERROR(check_rows(setup, v, "v", setup.config.head_dim_v, batch));
  if (v.shape[0] != k.shape[0] || v.shape[2] != k.shape[2])
    return invalid_argument("v", "the batch and tokens of k, " + shape_text(k.shape), shape_text(v.shape));
  if (rows == nullptr) KV4_RETURN_IF_ERROR(check_room("k", c.longest(), k.shape[2]));
  if (c.backend().capturing()) {
    if (rows != nullptr)
      return error(StatusCode::failed_precondition, "rows", "all sequences in a captured step", "some of them");
    return append_captured(c, k, v);
  }
  std::vector<Sequence> fresh;
  if (rows != nullptr) {
    KV4_RETURN_IF_ERROR(make_parts(c, *rows, k.shape[2], "k"));
    for (const Part& part : c.parts)
      KV4_RETURN_IF_ERROR(check_room("rows", c.sequences[part.row].length(), part.tokens));
  } else {
    if (opening) {
      KV4_RETURN_IF_ERROR(make_sequences(c, static_cast<std::size_t>(k.shape[0]), &fresh));
      c.tables.reset();
    }
    make_parts(static_cast<std::size_t>(k.shape[0]), k.shape[2], &c.parts);
  }
  Append call(c, opening ? fresh : c.sequences);
  KV4_RETURN_IF_ERROR(call.run(k, v));
  call.commit();
  if (opening) c.sequences.swap(fresh);
  if (k.shape[2] > 0) ++c.version;
  return {};
}

Status append_captured(CacheState& c, const TensorView& k, const TensorView& v) {
  if (k.shape[2] != 1)
    return error(StatusCode::failed_precondition, "k", "one token in a captured step", std::to_string(k.shape[2]));
  const bool arrival = c.setup->policy.arrival();
  if (c.sequences.empty() || !c.tables || arrival)
    return error(StatusCode::failed_precondition, "k", "a step that was not captured before it",
                 arrival ? "a recipe that seals on arrival" : "none");
  for (const Sequence& s : c.sequences)
    if (!s.lambda_fixed())
      return error(StatusCode::failed_precondition, "k", "capture after the first page was sealed, which fixes lambda",
                   std::to_string(s.ledger.extent().sealed_tokens()) + " sealed tokens");
  StoreJob job;
  job.k = k;
  job.v = v;
  job.tables = c.tables.get();
  return c.backend().store(job);
}

Status advance(CacheState& c) {
  if (c.sequences.empty()) return error(StatusCode::failed_precondition, "cache", "tokens", "an empty cache");
  if (c.setup->policy.arrival())
    return error(StatusCode::unsupported, "recipe.seal", "page or never, where steps are captured", "arrival");
  KV4_RETURN_IF_ERROR(make_tables(c));
  if (!c.tables)
    return error(StatusCode::unsupported, "backend", "one whose steps can be captured", c.backend().name());
  make_parts(c.sequences.size(), 1, &c.parts);
  Append call(c, c.sequences);
  KV4_RETURN_IF_ERROR(call.foresee());
  call.commit();
  for (Sequence& s : c.sequences) s.ledger.mark_seen(s.length() - 1, [](std::int64_t) { return true; });
  ++c.version;
  return {};
}

Status seal(CacheState& c) {
  Draft draft(*c.setup, c.pool.get());
  for (std::size_t i = 0; i < c.sequences.size(); ++i) draft.add_append(i, c.sequences[i], 0, c.recording);
  KV4_RETURN_IF_ERROR(draft.carry_out());
  draft.commit();
  return {};
}

}  // namespace kv4
