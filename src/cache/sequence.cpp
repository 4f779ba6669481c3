// News of NaN and infinity that a device tells late.
#include "cache/sequence.h"

#include <algorithm>

namespace kv4 {
namespace {

// What a note's key and value say beyond what was told.
void tell(const Told& told, std::int64_t key, std::int64_t value, std::vector<NonFinite>* found) {
  if (key > told.key && key <= told.end) found->push_back({key - 1, true, false});
  if (value > told.value && value <= told.end) found->push_back({value - 1, false, true});
}

}  // namespace

void Sequence::listen(std::vector<NonFinite>* found) const {
  for (const Told& told : notes) tell(told, told.note->key, told.note->value, found);
}

void Sequence::hear() {
  for (Told& told : notes) {
    const std::int64_t key = told.note->key, value = told.note->value;  // once: a device may write them at any time
    std::vector<NonFinite> found;
    tell(told, key, value, &found);
    ledger.make_room_for_notes(found.size());
    for (const NonFinite& x : found) ledger.note(x);
    told.key = std::max(told.key, key);
    told.value = std::max(told.value, value);
  }
}

void Sequence::turn_note(std::shared_ptr<LateNote> fresh) noexcept {
  for (Told& told : notes) told.end = std::min(told.end, length());
  // Rows that left the window have left no trace in the ledger either.
  const std::int64_t first = ledger.policy().arrival() ? 0 : ledger.extent().window_position;
  std::erase_if(notes, [first](const Told& told) { return told.end <= first; });
  if (fresh) notes.push_back({std::move(fresh)});
  note_forked = false;
}

}  // namespace kv4
