// What only backends with memory of their own need: tables on the device, steps of a captured graph, news that come late.
#include <algorithm>
#include <string>

#include "cache/state.h"

namespace kv4 {
namespace {

// What a note's key and value say beyond what was told.
void tell(const Told& told, std::int64_t key, std::int64_t value, std::vector<NonFinite>* found) {
  if (key > told.key && key <= told.end) found->push_back({key - 1, true, false});
  if (value > told.value && value <= told.end) found->push_back({value - 1, false, true});
}

}  // namespace

Status Cache::State::give_note(Sequence& s) const {
  Backend* const owner = backend;
  s.notes.reserve(s.notes.size() + 1);
  LateNote* note = nullptr;
  KV4_RETURN_IF_ERROR(owner->alloc_note(&note));
  std::shared_ptr<LateNote> fresh;
  if (note != nullptr) fresh.reset(note, [owner](LateNote* p) { owner->free_note(p); });
  for (Told& told : s.notes) told.end = std::min(told.end, s.length);
  // Rows that left the window have left no trace in non_finite either.
  std::erase_if(s.notes, [&s](const Told& told) { return told.end <= s.window_position; });
  if (fresh) s.notes.push_back({std::move(fresh)});
  s.note_forked = false;
  return {};
}

void Cache::State::listen(const Sequence& s, std::vector<NonFinite>* found) const {
  for (const Told& told : s.notes) tell(told, told.note->key, told.note->value, found);
}

void Cache::State::hear(Sequence& s) const {
  for (Told& told : s.notes) {
    s.non_finite.reserve(s.non_finite.size() + 2);
    const std::int64_t key = told.note->key, value = told.note->value;  // once: a device may write them at any time
    tell(told, key, value, &s.non_finite);
    told.key = std::max(told.key, key);
    told.value = std::max(told.value, value);
  }
}

Status Cache::State::make_tables() { return own.tables ? Status() : backend->make_tables(&own.tables); }

Status Cache::State::view_before(std::vector<Sequence>& next, std::int64_t tokens) {
  views.resize(next.size());
  for (std::size_t b = 0; b < next.size(); ++b) {
    Sequence& s = next[b];
    // A fork's next rows are no news for the other.
    if (s.note_forked && !s.notes.empty()) KV4_RETURN_IF_ERROR(give_note(s));
    view(s, s.page_end(), s.length, &views[b]);
    views[b].query_position = s.length - tokens;
  }
  return {};
}

Status Cache::State::reserve(std::int64_t tokens) {
  if (tokens < 0) return invalid_argument("tokens", "0 or more", std::to_string(tokens));
  if (sequences.empty()) return error(StatusCode::failed_precondition, "tokens", "a cache that holds tokens", "an empty cache");
  if (tokens > kMaxLength - length)
    return error(StatusCode::out_of_range, "tokens", "at most " + std::to_string(kMaxLength - length), std::to_string(tokens));
  if (!seals()) {
    const std::int64_t kept = config.sliding_window > 0 ? config.sliding_window + kPageTokens : sequences[0].length + tokens;
    for (Sequence& s : sequences)
      if (s.window.capacity() < kept) KV4_RETURN_IF_ERROR(s.window.reserve(*backend, shape, std::max(kept, s.window.count())));
    return {};
  }
  std::int64_t pages = 0, longest = 0;
  for (Sequence& s : sequences) {
    // As many rows as decoding ever holds.
    const std::int64_t rows = std::min(decode_rows(s), s.window.count() + tokens);
    if (!arrival() && s.window.capacity() < rows) KV4_RETURN_IF_ERROR(s.window.reserve(*backend, shape, rows));
    const std::int64_t due = s.pages_due(s.length + tokens, config.recipe.window);
    const std::int64_t fresh = arrival() ? (tokens + kPageTokens - 1) / kPageTokens : std::max<std::int64_t>(0, due - s.page_end());
    pages += fresh;
    longest = std::max(longest, static_cast<std::int64_t>(s.pages.size()) + fresh);
  }
  KV4_RETURN_IF_ERROR(pool->reserve(static_cast<std::size_t>(pages)));
  KV4_RETURN_IF_ERROR(make_tables());
  return own.tables ? own.tables->reserve(sequences.size(), static_cast<std::size_t>(longest)) : Status();
}

Status Cache::State::advance() {
  if (sequences.empty()) return error(StatusCode::failed_precondition, "cache", "tokens", "an empty cache");
  if (arrival()) return error(StatusCode::unsupported, "recipe.seal", "page or never, where steps are captured", "arrival");
  KV4_RETURN_IF_ERROR(make_tables());
  if (!own.tables) return error(StatusCode::unsupported, "backend", "one whose steps can be captured", backend->name());
  Draft draft(sequences);
  KV4_RETURN_IF_ERROR(settle(draft));
  std::vector<Sequence>& next = draft.sequences();
  for (Sequence& s : next) KV4_RETURN_IF_ERROR(make_room(s, 1));
  KV4_RETURN_IF_ERROR(view_before(next, 1));
  KV4_RETURN_IF_ERROR(backend->foresee(own.tables.get(), views, 1));
  draft.commit();
  for (Sequence& s : sequences) {
    s.window.set_count(s.window.count() + 1);
    s.seen.resize(static_cast<std::size_t>(s.window.count()), Seen::visible);
    ++s.length;
  }
  ++length;
  ++version;
  return {};
}

Status Cache::State::append_captured(const TensorView& k, const TensorView& v) {
  if (k.shape[2] != 1) return error(StatusCode::failed_precondition, "k", "one token in a captured step", std::to_string(k.shape[2]));
  if (sequences.empty() || !own.tables || arrival())
    return error(StatusCode::failed_precondition, "k", "a step that was not captured before it", arrival() ? "a recipe that seals on arrival" : "none");
  for (const Sequence& s : sequences)
    if (!lambda_fixed(s))
      return error(StatusCode::failed_precondition, "k", "capture after the first page was sealed, which fixes lambda",
                   std::to_string(s.sealed_tokens()) + " sealed tokens");
  StoreJob job;
  job.k = k;
  job.v = v;
  job.tables = own.tables.get();
  return backend->store(job);
}

Status Cache::State::attend_captured(const AttendArgs& args, const MutableTensorView* out) {
  if (args.q.shape[2] != 1 || out == nullptr)
    return error(StatusCode::failed_precondition, "q", "one token in a captured step, and all that is held",
                 out == nullptr ? "a part of it" : std::to_string(args.q.shape[2]) + " tokens");
  if (!own.tables) return error(StatusCode::failed_precondition, "q", "a step that was not captured before it", "none");
  views.resize(sequences.size());
  AttendJob job = job_of(args);
  job.query_count = 1;
  job.out = *out;
  return backend->attend(job);
}

}  // namespace kv4
