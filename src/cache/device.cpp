// What only backends with memory of their own need: tables on the device, notes that come late, steps of a captured graph.
#include <algorithm>
#include <string>

#include "cache/state.h"

namespace kv4 {

Status make_note(const CacheState& c, Sequence& s, std::shared_ptr<LateNote>* out) {
  Backend* const owner = &c.backend();
  s.notes.reserve(s.notes.size() + 1);
  LateNote* note = nullptr;
  KV4_RETURN_IF_ERROR(owner->alloc_note(&note));
  if (note != nullptr) out->reset(note, [owner](LateNote* p) { owner->free_note(p); });
  return {};
}

Status part_notes(const CacheState& c, Sequence& s) {
  if (!s.note_forked || s.notes.empty()) return {};
  std::shared_ptr<LateNote> note;
  KV4_RETURN_IF_ERROR(make_note(c, s, &note));
  s.turn_note(std::move(note));
  return {};
}

Status make_tables(CacheState& c) { return c.tables ? Status() : c.backend().make_tables(&c.tables); }

Status reserve(CacheState& c, std::int64_t tokens) {
  const Setup& setup = *c.setup;
  if (tokens < 0) return invalid_argument("tokens", "0 or more", std::to_string(tokens));
  if (c.sequences.empty()) return error(StatusCode::failed_precondition, "tokens", "a cache that holds tokens", "an empty cache");
  const std::int64_t room = kMostTokens - c.longest();
  if (tokens > room) return error(StatusCode::out_of_range, "tokens", "at most " + std::to_string(room), std::to_string(tokens));
  std::int64_t pages = 0;
  for (Sequence& s : c.sequences) {
    const ledger::Extent& x = s.ledger.extent();
    RowBuffer& window = s.body.window;
    // As many rows as decoding ever holds.
    const std::int64_t rows = setup.policy.arrival() ? 0 : std::min(setup.most_rows(x), window.count() + tokens);
    if (window.capacity() < rows) KV4_RETURN_IF_ERROR(window.reserve(*setup.backend, setup.shape, std::max(rows, window.count())));
    if (!setup.seals()) continue;
    const std::int64_t fresh = setup.policy.arrival() ? (tokens + kPageTokens - 1) / kPageTokens
                                                      : std::max<std::int64_t>(0, s.ledger.pages_due(x.length + tokens) - x.page_end());
    KV4_RETURN_IF_ERROR(s.body.table.reserve(*setup.backend, s.ledger.pages(), x.pages + fresh));
    pages += fresh;
  }
  if (!setup.seals()) return {};
  KV4_RETURN_IF_ERROR(c.pool->reserve(static_cast<std::size_t>(pages)));
  KV4_RETURN_IF_ERROR(make_tables(c));
  return c.tables ? c.tables->reserve(c.sequences.size()) : Status();
}

Status advance(CacheState& c) {
  const Setup& setup = *c.setup;
  if (c.sequences.empty()) return error(StatusCode::failed_precondition, "cache", "tokens", "an empty cache");
  if (setup.policy.arrival()) return error(StatusCode::unsupported, "recipe.seal", "page or never, where steps are captured", "arrival");
  KV4_RETURN_IF_ERROR(make_tables(c));
  if (!c.tables) return error(StatusCode::unsupported, "backend", "one whose steps can be captured", setup.backend->name());
  Draft draft(setup, c.pool.get());
  for (std::size_t b = 0; b < c.sequences.size(); ++b) {
    ledger::Plan plan;
    c.sequences[b].ledger.plan_append(1, c.recording, &plan);
    draft.add_if_needed(b, c.sequences[b], plan);
  }
  KV4_RETURN_IF_ERROR(draft.carry_out());
  if (c.captured != nullptr && c.captured != c.pool->memory().chunks)
    return error(StatusCode::failed_precondition, "cache", "a step captured since pages have outgrown their table, or room for them all by reserve before it",
                 "an older one");
  c.views.resize(c.sequences.size());
  for (std::size_t b = 0; b < c.sequences.size(); ++b) {
    Sequence& s = c.sequences[b];
    Change* const change = draft.find(b);
    Body& body = change != nullptr ? change->next : s.body;
    const ledger::Extent& x = change != nullptr ? change->plan.after : s.ledger.extent();
    const std::int64_t length = s.length();
    KV4_RETURN_IF_ERROR(make_room(setup, x, body.window, 1));
    if (change == nullptr) s.ledger.make_room_for_rows(1);
    KV4_RETURN_IF_ERROR(part_notes(c, s));
    SequenceView& view = c.views[b] = view_of(setup, x, body, ledger::view(setup.policy, x, length, true, length), s.note());
    view.input = static_cast<std::int32_t>(b);
    view.query_count = 1;
    view.query_position = length - 1;
  }
  KV4_RETURN_IF_ERROR(setup.backend->foresee(c.tables.get(), c.views, 1));
  for (std::size_t b = 0; b < c.sequences.size(); ++b) {
    Sequence& s = c.sequences[b];
    if (draft.find(b) != nullptr) continue;
    s.ledger.extend(1);
    s.body.window.set_count(s.ledger.extent().window_rows());
  }
  draft.commit();
  for (Sequence& s : c.sequences) s.ledger.tell(s.length() - 1, [](std::int64_t) { return true; });
  ++c.version;
  return {};
}

Status append_captured(CacheState& c, const TensorView& k, const TensorView& v) {
  if (k.shape[2] != 1) return error(StatusCode::failed_precondition, "k", "one token in a captured step", std::to_string(k.shape[2]));
  const bool arrival = c.setup->policy.arrival();
  if (c.sequences.empty() || !c.tables || arrival)
    return error(StatusCode::failed_precondition, "k", "a step that was not captured before it", arrival ? "a recipe that seals on arrival" : "none");
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

Status attend_captured(CacheState& c, const AttendArgs& args, const MutableTensorView* out) {
  if (args.q.shape[2] != 1 || out == nullptr)
    return error(StatusCode::failed_precondition, "q", "one token in a captured step, and all that is held",
                 out == nullptr ? "a part of it" : std::to_string(args.q.shape[2]) + " tokens");
  if (!c.tables) return error(StatusCode::failed_precondition, "q", "a step that was not captured before it", "none");
  c.views.resize(c.sequences.size());
  AttendJob job = attend_job(c, args);
  job.out = *out;
  KV4_RETURN_IF_ERROR(c.backend().attend(job));
  c.captured = job.pages.chunks;
  return {};
}

}  // namespace kv4
