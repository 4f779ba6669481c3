// For backends with memory of their own: tables on the device, errors that are reported late, capacity for captured
// steps.
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

Status make_tables(CacheState& c) { return c.tables ? Status() : c.backend().make_tables(&c.tables); }

Status reserve(CacheState& c, std::int64_t tokens) {
  const Setup& setup = *c.setup;
  if (tokens < 0) return invalid_argument("tokens", "0 or more", std::to_string(tokens));
  if (c.sequences.empty())
    return error(StatusCode::failed_precondition, "tokens", "a cache that holds tokens", "an empty cache");
  const std::int64_t room = kMostTokens - c.longest();
  if (tokens > room)
    return error(StatusCode::out_of_range, "tokens", "at most " + std::to_string(room), std::to_string(tokens));
  std::int64_t pages = 0;
  for (Sequence& s : c.sequences) {
    const ledger::Extent& x = s.ledger.extent();
    RowBuffer& window = s.body.window;
    // As many rows as decoding ever holds.
    const std::int64_t rows = setup.policy.arrival() ? 0 : std::min(setup.most_rows(x), window.count() + tokens);
    if (window.capacity() < rows)
      KV4_RETURN_IF_ERROR(window.reserve(*setup.backend, setup.shape, std::max(rows, window.count())));
    if (!setup.seals()) continue;
    const std::int64_t fresh = setup.policy.arrival()
                                   ? (tokens + kPageTokens - 1) / kPageTokens
                                   : std::max<std::int64_t>(0, s.ledger.pages_due(x.length + tokens) - x.page_end());
    KV4_RETURN_IF_ERROR(s.body.table.reserve(*setup.backend, s.ledger.pages(), x.pages + fresh));
    pages += fresh;
  }
  if (!setup.seals()) return {};
  KV4_RETURN_IF_ERROR(c.pool->reserve(static_cast<std::size_t>(pages)));
  KV4_RETURN_IF_ERROR(make_tables(c));
  return c.tables ? c.tables->reserve(c.sequences.size()) : Status();
}

}  // namespace kv4
