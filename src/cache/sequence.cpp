// NaN and infinity that a device reports after the call.
#include "cache/sequence.h"

#include <algorithm>

namespace kv4 {
namespace {

// What a note's key and value report that has not been polled yet.
void add_new(const PolledNote& polled, std::int64_t key, std::int64_t value, std::vector<NonFinite>* found) {
  if (key > polled.key && key <= polled.end) found->push_back({key - 1, true, false});
  if (value > polled.value && value <= polled.end) found->push_back({value - 1, false, true});
}

}  // namespace

void Sequence::pending_non_finite(std::vector<NonFinite>* found) const {
  for (const PolledNote& polled : notes) add_new(polled, polled.note->key, polled.note->value, found);
}

void Sequence::poll_notes() {
  for (PolledNote& polled : notes) {
    const std::int64_t key = polled.note->key,
                       value = polled.note->value;  // read once: the device may write them at any time
    std::vector<NonFinite> found;
    add_new(polled, key, value, &found);
    ledger.make_room_for_notes(found.size());
    for (const NonFinite& x : found) ledger.note(x);
    polled.key = std::max(polled.key, key);
    polled.value = std::max(polled.value, value);
  }
}

void Sequence::begin_note(std::shared_ptr<LateNote> fresh) noexcept {
  for (PolledNote& polled : notes) polled.end = std::min(polled.end, length());
  // The ledger does not record rows that have left the window.
  const std::int64_t first = ledger.policy().arrival() ? 0 : ledger.extent().window_position;
  std::erase_if(notes, [first](const PolledNote& polled) { return polled.end <= first; });
  if (fresh) notes.push_back({std::move(fresh)});
  note_forked = false;
}

}  // namespace kv4
