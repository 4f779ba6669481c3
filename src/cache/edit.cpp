// Crops, and changes of the set of sequences.
#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>

#include "blob/blob.h"
#include "cache/state.h"

namespace kv4 {
namespace {

constexpr std::int64_t kMostRows = std::numeric_limits<int>::max();

// A change of tokens that are already held. Polls their notes first; old notes are ignored afterwards.
Status carry_out(CacheState& c, Draft& draft) {
  for (Change& change : draft.changes()) {
    if (change.sequence->notes.empty()) continue;
    KV4_RETURN_IF_ERROR(make_note(c, *change.sequence, &change.note));
    change.renoted = true;
  }
  KV4_RETURN_IF_ERROR(draft.carry_out());
  draft.commit();
  ++c.version;
  return {};
}

Status plan_crop(Sequence& s, std::size_t row, std::int64_t length, Draft& draft) {
  ledger::Plan plan;
  KV4_RETURN_IF_ERROR(s.ledger.plan_crop(length, &plan));
  if (length == s.length()) return {};
  s.poll_notes();
  Change& change = draft.add(row, s);
  change.plan = std::move(plan);
  change.next.energy.crop(length);
  return {};
}

// Sequences whose pages lie in another pool: each of these pages once in the cache's own.
Status copy_pages(CacheState& c, const PagePool& from, std::vector<Sequence>& sequences) {
  std::unordered_map<PageId, std::size_t> known;
  for (const Sequence& s : sequences)
    for (const PageId id : s.ledger.pages()) known.try_emplace(id, known.size());
  FreshPages fresh(c.pool.get());
  KV4_RETURN_IF_ERROR(fresh.allocate(static_cast<std::int64_t>(known.size())));
  for (const auto& [id, at] : known)
    KV4_RETURN_IF_ERROR(c.backend().copy(c.pool->page(fresh.ids()[at]), from.page(id), from.page_bytes()));
  for (Sequence& s : sequences) {
    std::vector<PageId> ids;
    for (const PageId id : s.ledger.pages()) ids.push_back(fresh.ids()[known.at(id)]);
    PageTable table;
    KV4_RETURN_IF_ERROR(table.change(c.backend(), {}, {}, -1, ids));
    c.pool->retain(ids);
    s.move_to(c.pool.get(), std::move(ids), std::move(table));
  }
  return {};
}

}  // namespace

Status check_row(const CacheState& c, std::int64_t row) {
  if (row >= 0 && row < c.batch()) return {};
  return error(StatusCode::out_of_range, "rows", "indices from 0 to " + std::to_string(c.batch() - 1),
               std::to_string(row));
}

Status crop(CacheState& c, std::int64_t length) {
  if (length < 0 || length > c.longest())
    return error(StatusCode::out_of_range, "length", "0 to " + std::to_string(c.longest()), std::to_string(length));
  Draft draft(*c.setup, c.pool.get());
  for (std::size_t b = 0; b < c.sequences.size(); ++b)
    if (length < c.sequences[b].length()) KV4_RETURN_IF_ERROR(plan_crop(c.sequences[b], b, length, draft));
  return draft.empty() ? Status() : carry_out(c, draft);
}

Status crop_row(CacheState& c, int row, std::int64_t length) {
  KV4_RETURN_IF_ERROR(check_row(c, row));
  Draft draft(*c.setup, c.pool.get());
  KV4_RETURN_IF_ERROR(plan_crop(c.sequences[static_cast<std::size_t>(row)], 0, length, draft));
  return draft.empty() ? Status() : carry_out(c, draft);
}

Status erase(CacheState& c, int row, std::int64_t first, std::int64_t count) {
  KV4_RETURN_IF_ERROR(check_row(c, row));
  Sequence& s = c.sequences[static_cast<std::size_t>(row)];
  ledger::Plan plan;
  KV4_RETURN_IF_ERROR(s.ledger.plan_erase(first, count, c.recording, &plan));
  if (count == 0) return {};
  if (!s.notes.empty()) KV4_RETURN_IF_ERROR(c.backend().wait());  // a later report would use the old positions
  s.poll_notes();
  Draft draft(*c.setup, c.pool.get());
  Change& change = draft.add(0, s);
  change.plan = std::move(plan);
  change.next.energy.crop(first);  // later queries were at positions that have moved
  return carry_out(c, draft);
}

Status make_sequences(const CacheState& c, std::size_t count, std::vector<Sequence>* out) {
  out->reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    Sequence& s = out->emplace_back(ledger::Ledger(c.setup->policy), c.pool.get());
    std::shared_ptr<LateNote> note;
    KV4_RETURN_IF_ERROR(make_note(c, s, &note));
    s.begin_note(std::move(note));
  }
  return {};
}

Status add(CacheState& c, int count) {
  if (count < 0) return invalid_argument("count", "0 or more", std::to_string(count));
  if (count > kMostRows - c.batch())
    return error(StatusCode::out_of_range, "count", "at most " + std::to_string(kMostRows - c.batch()),
                 std::to_string(count));
  std::vector<Sequence> fresh;
  KV4_RETURN_IF_ERROR(make_sequences(c, static_cast<std::size_t>(count), &fresh));
  c.sequences.reserve(c.sequences.size() + fresh.size());
  for (Sequence& s : fresh) c.sequences.push_back(std::move(s));
  if (count > 0) ++c.version;
  return {};
}

Status remove(CacheState& c, std::span<const std::int64_t> rows) {
  std::vector<std::uint8_t> gone(c.sequences.size());
  for (const std::int64_t row : rows) {
    KV4_RETURN_IF_ERROR(check_row(c, row));
    if (gone[static_cast<std::size_t>(row)]++ != 0)
      return invalid_argument("rows", "each sequence once", std::to_string(row) + " twice");
  }
  std::size_t kept = 0;
  for (std::size_t b = 0; b < c.sequences.size(); ++b)
    if (gone[b] == 0 && b != kept++) std::swap(c.sequences[kept - 1], c.sequences[b]);
  c.sequences.erase(c.sequences.begin() + static_cast<std::ptrdiff_t>(kept), c.sequences.end());
  if (!rows.empty()) ++c.version;
  return {};
}

Status extend(CacheState& c, CacheState& other) {
  const Setup &mine = *c.setup, &theirs = *other.setup;
  if (mine.backend != theirs.backend) return invalid_argument("backend", mine.config.backend, theirs.config.backend);
  if (&mine != &theirs) {
    std::vector<std::uint64_t> values;
    for (const blob::Field& field : blob::fields(theirs.config, theirs.spec)) values.push_back(field.value);
    KV4_RETURN_IF_ERROR(blob::expect_same(blob::fields(mine.config, mine.spec), values));
  }
  if (c.backend().capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  if (other.batch() > kMostRows - c.batch())
    return error(StatusCode::out_of_range, "other", "at most " + std::to_string(kMostRows - c.batch()) + " sequences",
                 std::to_string(other.batch()));
  if (other.stream != c.stream) {  // its pages may still be being written
    KV4_RETURN_IF_ERROR(other.on_stream().backend().wait());
    c.on_stream();
  }
  std::vector<Sequence> taken;
  taken.reserve(other.sequences.size());
  for (Sequence& s : other.sequences) taken.push_back(s.fork());
  if (c.pool != other.pool) KV4_RETURN_IF_ERROR(copy_pages(c, *other.pool, taken));
  c.sequences.reserve(c.sequences.size() + taken.size());
  for (Sequence& s : taken) c.sequences.push_back(std::move(s));
  if (!taken.empty()) ++c.version;
  return {};
}

Status select(CacheState& c, std::span<const std::int64_t> rows) {
  for (const std::int64_t row : rows) KV4_RETURN_IF_ERROR(check_row(c, row));
  std::vector<Sequence> next;
  next.reserve(rows.size());
  for (const std::int64_t row : rows) next.push_back(c.sequences[static_cast<std::size_t>(row)].fork());
  c.sequences = std::move(next);
  ++c.version;
  return {};
}

Status fork(CacheState& c, std::unique_ptr<CacheState>* out) {
  auto copy = std::make_unique<CacheState>();
  copy->setup = c.setup;
  copy->pool = c.pool;
  copy->stream = c.stream;
  copy->version = c.version;
  copy->recording = c.recording;
  copy->sequences.reserve(c.sequences.size());
  for (Sequence& s : c.sequences) copy->sequences.push_back(s.fork());
  *out = std::move(copy);
  return {};
}

Status repeat(CacheState& c, int times) {
  if (times < 1) return invalid_argument("times", "at least 1", std::to_string(times));
  const std::int64_t most = kMostRows / std::max<std::int64_t>(1, c.batch());
  if (times > most)
    return error(StatusCode::out_of_range, "times", "at most " + std::to_string(most), std::to_string(times));
  std::vector<std::int64_t> rows;
  for (std::int64_t b = 0; b < c.batch(); ++b) rows.insert(rows.end(), static_cast<std::size_t>(times), b);
  return select(c, rows);
}

}  // namespace kv4
