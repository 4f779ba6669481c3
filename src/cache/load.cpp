// Reading a cache back. A file may say anything: what it says is held against what append, seal, crop and eviction can
// leave behind, so that no later call indexes outside of what is there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cache/blob.h"
#include "cache/state.h"
#include "format/finite.h"

namespace kv4 {
namespace {

using blob::expect_within;

Status expect_equal(const char* name, std::int64_t value, std::int64_t wanted) {
  return expect_within(name, value, wanted, wanted);
}

// `tokens`: its length.
Status check(const Setup& setup, const blob::Sequence& s, std::int64_t tokens) {
  const CacheConfig& config = setup.config;
  const bool seals = setup.seals(), learns = setup.policy.learns;
  const std::int64_t pages_at_most = seals ? tokens / kPageTokens + 1 : 0;
  const std::int64_t sinks = setup.policy.sinks;
  KV4_RETURN_IF_ERROR(expect_within("start", s.start, 0, tokens));
  KV4_RETURN_IF_ERROR(expect_within("anchored", s.anchored, 0, 1));
  KV4_RETURN_IF_ERROR(expect_within("first_page", s.first_page, 0, pages_at_most));
  KV4_RETURN_IF_ERROR(expect_within("pages", s.pages, 0, pages_at_most));
  KV4_RETURN_IF_ERROR(expect_within("last_page_tokens", s.last_page_tokens, 1, kPageTokens));
  KV4_RETURN_IF_ERROR(expect_within("window_position", s.window_position, 0, tokens));
  KV4_RETURN_IF_ERROR(expect_within("evicted", s.evicted, 0, config.sliding_window > 0 ? tokens : 0));
  KV4_RETURN_IF_ERROR(expect_within("lambda", s.lambda, 0, learns ? 1 : 0));
  KV4_RETURN_IF_ERROR(expect_within("energies", s.energies, 0, learns ? 1 : 0));
  KV4_RETURN_IF_ERROR(expect_within("energy_position", s.energy_position, 0, s.energies != 0 ? tokens : 0));
  if (s.sinks != 0) KV4_RETURN_IF_ERROR(expect_equal("sinks", s.sinks, s.anchored != 0 ? sinks : 0));

  if (setup.policy.arrival()) {  // every token is in a page, the first of them at position 0
    KV4_RETURN_IF_ERROR(expect_equal("anchored", s.anchored, 1));
    KV4_RETURN_IF_ERROR(expect_equal("start", s.start, 0));
    KV4_RETURN_IF_ERROR(expect_equal("window_position", s.window_position, 0));
    KV4_RETURN_IF_ERROR(expect_equal("window", s.window, 0));
    const std::int64_t open = s.pages == 0 ? 0 : kPageTokens - s.last_page_tokens;
    if (s.pages == 0) KV4_RETURN_IF_ERROR(expect_equal("last_page_tokens", s.last_page_tokens, kPageTokens));
    KV4_RETURN_IF_ERROR(expect_equal("tokens in pages", (s.first_page + s.pages) * kPageTokens - open, tokens));
    return expect_within("evicted", s.evicted, s.first_page * kPageTokens, tokens);
  }
  KV4_RETURN_IF_ERROR(expect_equal("last_page_tokens", s.last_page_tokens, kPageTokens));
  KV4_RETURN_IF_ERROR(expect_equal("window", s.window, tokens - s.window_position));
  if (s.anchored == 0) {  // every token is in the window
    KV4_RETURN_IF_ERROR(expect_equal("start", s.start, 0));
    KV4_RETURN_IF_ERROR(expect_equal("first_page", s.first_page, 0));
    KV4_RETURN_IF_ERROR(expect_equal("pages", s.pages, 0));
    return seals ? Status() : expect_within("evicted", s.evicted, s.window_position, tokens);
  }
  KV4_RETURN_IF_ERROR(expect_within("anchored", s.anchored, 0, seals ? 1 : 0));
  // Exact rows begin with a page that is held or is sealed next.
  const std::int64_t body = s.start + sinks, first = body + s.first_page * kPageTokens,
                     end = first + s.pages * kPageTokens;
  KV4_RETURN_IF_ERROR(expect_within("pages", s.pages, 0, tokens < first ? -1 : (tokens - first) / kPageTokens));
  KV4_RETURN_IF_ERROR(expect_within("window_position", s.window_position, first, end));
  KV4_RETURN_IF_ERROR(expect_equal("rest of window_position by pages", (s.window_position - body) % kPageTokens, 0));
  // A crop asks `evicted` whether what it needs is there.
  const std::int64_t gone = s.first_page > 0 ? first : s.sinks < sinks ? body : 0;
  return expect_within("evicted", s.evicted, gone, tokens);
}

Status load_rows(const Setup& setup, std::int64_t count, blob::Reader& in, RowBuffer* rows) {
  const RowShape& shape = setup.shape;
  Backend* const backend = setup.backend;
  std::vector<std::byte> block;
  for (std::int64_t first = 0; first < count; first += kPageTokens) {
    const std::int64_t tokens = std::min<std::int64_t>(kPageTokens, count - first);
    block.resize(shape.row_bytes() * static_cast<std::size_t>(tokens));
    KV4_RETURN_IF_ERROR(in.read(blob::Kind::rows, block));
    if (!finite(block.data(), shape.dtype, static_cast<int>(block.size() / size_of(shape.dtype))))
      return error(StatusCode::data_loss, "saved exact rows", "finite values", "NaN or infinity");
    if (first + tokens > rows->capacity()) {
      const std::int64_t grown = std::max(2 * rows->capacity(), first + tokens);
      KV4_RETURN_IF_ERROR(rows->reserve(*backend, shape, std::min(grown, count)));
    }
    const std::byte* from = block.data();
    for (const bool key : {true, false}) {
      const std::size_t bytes = static_cast<std::size_t>(tokens * (key ? shape.head_dim_k : shape.head_dim_v)) *
                                size_of(shape.dtype);
      for (int h = 0; h < setup.heads(); ++h, from += bytes)
        KV4_RETURN_IF_ERROR(backend->copy(key ? rows->key(h, first) : rows->value(h, first), from, bytes));
    }
    rows->set_count(first + tokens);
  }
  return {};
}

Status load_queries(const Setup& setup, std::int64_t first, blob::Reader& in, QueryEnergy* energy) {
  const std::size_t channels = setup.channels();
  constexpr auto kEvery = static_cast<std::size_t>(QueryEnergy::kEvery);
  std::vector<std::uint8_t> filled;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::filled, blob::recorded_queries(setup.config, in.version()), &filled));
  for (const std::uint8_t each : filled) KV4_RETURN_IF_ERROR(expect_within("record of queries", each, 0, 1));
  energy->first = first;
  std::vector<float> values(channels);
  for (std::size_t i = 0; i < filled.size(); ++i) {
    if (filled[i] == 0) continue;
    KV4_RETURN_IF_ERROR(in.read(blob::Kind::energies, std::as_writable_bytes(std::span(values))));
    for (const float x : values)
      if (!(x >= 0) || !std::isfinite(x))
        return error(StatusCode::data_loss, "saved query energies", "finite values that are not negative",
                     std::to_string(x));
    if (in.version() == 1 && i % kEvery != kEvery - 1) continue;  // counts no more
    const std::size_t row = in.version() == 1 ? i / kEvery : i;
    energy->rows.resize(row + 1);
    KV4_RETURN_IF_ERROR(
        Block::copy_of(*setup.backend, "query energies", values.data(), channels * sizeof(float), &energy->rows[row]));
  }
  return {};
}

// One sequence but for its pages and its notes, and how many pages it has.
Status load_sequence(const CacheState& c, std::int64_t tokens, blob::Reader& in, std::vector<Sequence>* to,
                     std::vector<std::uint64_t>* table) {
  const Setup& setup = *c.setup;
  blob::Sequence saved{};
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::sequence, std::as_writable_bytes(std::span(&saved, 1))));
  KV4_RETURN_IF_ERROR(check(setup, saved, tokens));
  ledger::Extent x;
  x.length = tokens;
  x.start = saved.start;
  x.anchored = saved.anchored != 0;
  x.lambda = saved.lambda == 0     ? ledger::Lambda::open
             : saved.energies != 0 ? ledger::Lambda::learnt
                                   : ledger::Lambda::fixed;
  x.sinks = saved.sinks;
  x.first_page = saved.first_page;
  x.last_page_tokens = static_cast<int>(saved.last_page_tokens);
  x.window_position = setup.policy.arrival() ? tokens : saved.window_position;
  x.evicted = saved.evicted;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::table, static_cast<std::uint64_t>(saved.pages), table));
  Body body;
  KV4_RETURN_IF_ERROR(load_rows(setup, saved.sinks, in, &body.sinks));
  KV4_RETURN_IF_ERROR(load_rows(setup, saved.window, in, &body.window));
  std::vector<ledger::Seen> marks;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::seen, static_cast<std::uint64_t>(saved.window), &marks));
  for (const ledger::Seen seen : marks)
    KV4_RETURN_IF_ERROR(expect_within("record of masks", static_cast<std::int64_t>(seen), 0, 2));
  if (!setup.policy.seals()) marks.clear();
  if (saved.lambda != 0) {
    std::vector<float> values;
    KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::lambda, setup.channels(), &values));
    for (const float value : values)
      if (!(value > 0) || !std::isfinite(value))
        return error(StatusCode::data_loss, "saved lambda", "positive finite values", std::to_string(value));
    KV4_RETURN_IF_ERROR(
        Block::copy_of(*setup.backend, "lambda", values.data(), values.size() * sizeof(float), &body.lambda));
  }
  if (saved.energies != 0) KV4_RETURN_IF_ERROR(load_queries(setup, saved.energy_position, in, &body.energy));
  Sequence& s = to->emplace_back(ledger::Ledger(setup.policy, x, std::move(marks)), c.pool.get());
  s.body = std::move(body);
  std::shared_ptr<LateNote> note;
  KV4_RETURN_IF_ERROR(make_note(c, s, &note));
  s.turn_note(std::move(note));
  return {};
}

Status load_page(const CacheState& c, blob::Reader& in, PageId id) {
  const PageSpec& spec = c.setup->spec;
  const int heads = c.setup->heads();
  std::uint8_t* const page = c.pool->page(id);
  const kv4_page_layout to = spec.layout, from = blob::slice_layout(to);
  std::vector<std::byte> block(static_cast<std::size_t>(from.head_bytes) * static_cast<std::size_t>(heads));
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::page, block));
  for (int h = 0; h < heads; ++h) {
    const auto* got = block.data() + static_cast<std::size_t>(h) * from.head_bytes;
    const bool ok = finite(got + from.k_scales, DType::f16, static_cast<int>(blob::key_scale_bytes(from) / 2)) &&
                    finite(got + from.v_scales, DType::f16, static_cast<int>(blob::value_scale_bytes(from) / 2));
    if (!ok) return error(StatusCode::data_loss, "saved page", "finite scales and means", "NaN or infinity");
  }
  KV4_RETURN_IF_ERROR(c.backend().clear(page, c.pool->page_bytes()));
  for (int h = 0; h < heads; ++h) {
    const auto* got = reinterpret_cast<const std::uint8_t*>(block.data()) +
                      static_cast<std::size_t>(h) * from.head_bytes;
    std::uint8_t* put = page + static_cast<std::size_t>(h) * to.head_bytes;
    KV4_RETURN_IF_ERROR(c.backend().codes_from_canonical(spec, got + from.k_codes, got + from.v_codes, put));
    KV4_RETURN_IF_ERROR(c.backend().copy(put + to.k_scales, got + from.k_scales, blob::key_scale_bytes(from)));
    KV4_RETURN_IF_ERROR(c.backend().copy(put + to.v_scales, got + from.v_scales, blob::value_scale_bytes(from)));
  }
  return {};
}

// Fresh pages for those that the tables name, with what is saved of them.
Status load_pages(const CacheState& c, std::int64_t count, blob::Reader& in, FreshPages* pages) {
  for (std::int64_t i = 0; i < count; ++i) {
    // No more at once than have come: a table alone is no reason to take memory.
    if (i == static_cast<std::int64_t>(pages->ids().size()))
      KV4_RETURN_IF_ERROR(pages->allocate(std::min(count - i, std::max<std::int64_t>(kPageTokens, i))));
    KV4_RETURN_IF_ERROR(load_page(c, in, pages->ids()[static_cast<std::size_t>(i)]));
  }
  return {};
}

Status load_lengths(const blob::State& saved, blob::Reader& in, std::vector<std::uint64_t>* lengths) {
  if (in.version() != blob::kRagged) return {};
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::lengths, saved.batch, lengths));
  for (const std::uint64_t length : *lengths)
    KV4_RETURN_IF_ERROR(
        expect_within("length", static_cast<std::int64_t>(length), 0, static_cast<std::int64_t>(saved.length)));
  return expect_equal(
      "longest", saved.batch == 0 ? 0 : static_cast<std::int64_t>(*std::max_element(lengths->begin(), lengths->end())),
      static_cast<std::int64_t>(saved.length));
}

// The ledgers take the pages over, and hear of non-finite rows.
Status finish(const CacheState& c, const std::vector<std::vector<std::uint64_t>>& tables, FreshPages& pages,
              blob::Reader& in, std::vector<Sequence>* sequences) {
  std::vector<std::uint64_t> told, rows;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::told, sequences->size(), &told));
  for (std::size_t b = 0; b < sequences->size(); ++b) {
    Sequence& s = (*sequences)[b];
    std::vector<PageId> ids;
    for (const std::uint64_t page : tables[b]) ids.push_back(pages.ids()[static_cast<std::size_t>(page)]);
    KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::non_finite, told[b], &rows));
    for (const std::uint64_t x : rows) {
      KV4_RETURN_IF_ERROR(expect_within("non-finite row", static_cast<std::int64_t>(x >> 2), 0, s.length() - 1));
      s.ledger.make_room_for_notes(1);
      s.ledger.note({static_cast<std::int64_t>(x >> 2), (x & 1u) != 0, (x & 2u) != 0});
    }
    if (ids.empty()) continue;
    KV4_RETURN_IF_ERROR(s.body.table.change(c.backend(), {}, {}, -1, ids));
    c.pool->retain(ids);
    s.ledger.take_pages(std::move(ids));
  }
  return {};
}

}  // namespace

Status load(CacheState& c, const Source& source) {
  if (!source) return invalid_argument("source", "a function", "none");
  if (!c.sequences.empty())
    return error(StatusCode::failed_precondition, "cache", "an empty cache (reset empties it)",
                 std::to_string(c.sequences.size()) + " sequences");
  if (c.backend().capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  blob::Reader in(source);
  KV4_RETURN_IF_ERROR(in.begin());
  const std::vector<blob::Field> mine = blob::fields(c.setup->config, c.setup->spec);
  std::vector<std::uint64_t> theirs(mine.size());
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::config, std::as_writable_bytes(std::span(theirs))));
  KV4_RETURN_IF_ERROR(blob::expect_same(mine, theirs));

  blob::State saved{};
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::state, std::as_writable_bytes(std::span(&saved, 1))));
  const auto batch = static_cast<std::int64_t>(saved.batch), longest = static_cast<std::int64_t>(saved.length);
  KV4_RETURN_IF_ERROR(expect_within("batch", batch, 0, std::numeric_limits<int>::max()));
  KV4_RETURN_IF_ERROR(expect_within("length", longest, 0, batch > 0 ? kMostTokens : 0));
  KV4_RETURN_IF_ERROR(expect_within("recording", static_cast<std::int64_t>(saved.recording), 0, 1));
  std::vector<std::uint64_t> lengths;  // where they differ
  KV4_RETURN_IF_ERROR(load_lengths(saved, in, &lengths));

  std::vector<Sequence> next;
  std::vector<std::vector<std::uint64_t>> tables;
  std::int64_t named = 0;  // pages, each first named in order
  for (std::size_t b = 0; b < saved.batch; ++b) {
    const std::int64_t tokens = lengths.empty() ? longest : static_cast<std::int64_t>(lengths[b]);
    KV4_RETURN_IF_ERROR(load_sequence(c, tokens, in, &next, &tables.emplace_back()));
    for (const std::uint64_t page : tables.back()) {
      KV4_RETURN_IF_ERROR(expect_within("page table", static_cast<std::int64_t>(page), 0, named));
      if (static_cast<std::int64_t>(page) == named) ++named;
    }
  }
  KV4_RETURN_IF_ERROR(expect_equal("pages", static_cast<std::int64_t>(saved.pages), named));
  FreshPages pages(c.pool.get());
  KV4_RETURN_IF_ERROR(load_pages(c, named, in, &pages));
  KV4_RETURN_IF_ERROR(finish(c, tables, pages, in, &next));
  c.sequences = std::move(next);
  c.recording = saved.recording != 0;
  c.tables.reset();
  ++c.version;
  return {};
}

}  // namespace kv4
