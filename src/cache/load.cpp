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

Status expect_equal(const char* name, std::int64_t value, std::int64_t wanted) { return expect_within(name, value, wanted, wanted); }

}  // namespace

Status Cache::State::check(const blob::Sequence& s, std::int64_t tokens) const {
  const std::int64_t pages_at_most = seals() ? tokens / kPageTokens + 1 : 0;
  const std::int64_t sinks = config.recipe.seal == SealMode::page ? config.recipe.sinks : 0;
  KV4_RETURN_IF_ERROR(expect_within("start", s.start, 0, tokens));
  KV4_RETURN_IF_ERROR(expect_within("anchored", s.anchored, 0, 1));
  KV4_RETURN_IF_ERROR(expect_within("first_page", s.first_page, 0, pages_at_most));
  KV4_RETURN_IF_ERROR(expect_within("pages", s.pages, 0, pages_at_most));
  KV4_RETURN_IF_ERROR(expect_within("last_page_tokens", s.last_page_tokens, 1, kPageTokens));
  KV4_RETURN_IF_ERROR(expect_within("window_position", s.window_position, 0, tokens));
  KV4_RETURN_IF_ERROR(expect_within("evicted", s.evicted, 0, config.sliding_window > 0 ? tokens : 0));
  KV4_RETURN_IF_ERROR(expect_within("lambda", s.lambda, 0, automatic() ? 1 : 0));
  KV4_RETURN_IF_ERROR(expect_within("energies", s.energies, 0, automatic() ? 1 : 0));
  KV4_RETURN_IF_ERROR(expect_within("energy_position", s.energy_position, 0, s.energies != 0 ? tokens : 0));
  if (s.sinks != 0) KV4_RETURN_IF_ERROR(expect_equal("sinks", s.sinks, s.anchored != 0 ? sinks : 0));

  if (arrival()) {  // every token is in a page, the first of them at position 0
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
    return seals() ? Status() : expect_within("evicted", s.evicted, s.window_position, tokens);
  }
  KV4_RETURN_IF_ERROR(expect_within("anchored", s.anchored, 0, seals() ? 1 : 0));
  // Exact rows begin with a page that is held or is sealed next.
  const std::int64_t body = s.start + sinks, first = body + s.first_page * kPageTokens, end = first + s.pages * kPageTokens;
  KV4_RETURN_IF_ERROR(expect_within("pages", s.pages, 0, tokens < first ? -1 : (tokens - first) / kPageTokens));
  KV4_RETURN_IF_ERROR(expect_within("window_position", s.window_position, first, end));
  KV4_RETURN_IF_ERROR(expect_equal("rest of window_position by pages", (s.window_position - body) % kPageTokens, 0));
  // A crop asks `evicted` whether what it needs is there.
  const std::int64_t gone = s.first_page > 0 ? first : s.sinks < sinks ? body : 0;
  return expect_within("evicted", s.evicted, gone, tokens);
}

Status Cache::State::load_rows(std::int64_t count, blob::Reader& in, RowBuffer* rows) const {
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
      const std::size_t bytes = static_cast<std::size_t>(tokens * (key ? shape.head_dim_k : shape.head_dim_v)) * size_of(shape.dtype);
      for (int h = 0; h < heads(); ++h, from += bytes)
        KV4_RETURN_IF_ERROR(backend->copy(key ? rows->key(h, first) : rows->value(h, first), from, bytes));
    }
    rows->set_count(first + tokens);
  }
  return {};
}

Status Cache::State::load_queries(std::int64_t first, blob::Reader& in, QueryEnergy* energy) const {
  const std::size_t channels = static_cast<std::size_t>(heads()) * static_cast<std::size_t>(config.head_dim_k);
  constexpr auto kEvery = static_cast<std::size_t>(QueryEnergy::kEvery);
  std::vector<std::uint8_t> filled;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::filled, blob::recorded_queries(config, in.version()), &filled));
  for (const std::uint8_t each : filled) KV4_RETURN_IF_ERROR(expect_within("record of queries", each, 0, 1));
  energy->first = first;
  std::vector<float> values(channels);
  for (std::size_t i = 0; i < filled.size(); ++i) {
    if (filled[i] == 0) continue;
    KV4_RETURN_IF_ERROR(in.read(blob::Kind::energies, std::as_writable_bytes(std::span(values))));
    for (const float x : values)
      if (!(x >= 0) || !std::isfinite(x)) return error(StatusCode::data_loss, "saved query energies", "finite values that are not negative", std::to_string(x));
    if (in.version() == 1 && i % kEvery != kEvery - 1) continue;  // counts no more
    const std::size_t row = in.version() == 1 ? i / kEvery : i;
    energy->rows.resize(row + 1);
    KV4_RETURN_IF_ERROR(Block::copy_of(*backend, "query energies", values.data(), channels * sizeof(float), &energy->rows[row]));
  }
  return {};
}

Status Cache::State::load_sequence(std::int64_t tokens, blob::Reader& in, Sequence* s, std::vector<std::uint64_t>* table) const {
  blob::Sequence saved{};
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::sequence, std::as_writable_bytes(std::span(&saved, 1))));
  KV4_RETURN_IF_ERROR(check(saved, tokens));
  s->length = tokens;
  s->start = saved.start;
  s->anchored = saved.anchored != 0;
  s->sink_limit = seals() ? config.recipe.sinks : 0;
  s->first_page = saved.first_page;
  s->last_page_tokens = static_cast<int>(saved.last_page_tokens);
  s->window_position = saved.window_position;
  s->evicted = saved.evicted;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::table, static_cast<std::uint64_t>(saved.pages), table));
  KV4_RETURN_IF_ERROR(load_rows(saved.sinks, in, &s->sinks));
  KV4_RETURN_IF_ERROR(load_rows(saved.window, in, &s->window));
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::seen, static_cast<std::uint64_t>(saved.window), &s->seen));
  for (const Seen seen : s->seen) KV4_RETURN_IF_ERROR(expect_within("record of masks", static_cast<std::int64_t>(seen), 0, 2));
  if (saved.lambda != 0) {
    const std::size_t channels = static_cast<std::size_t>(heads()) * static_cast<std::size_t>(config.head_dim_k);
    std::vector<float> values;
    KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::lambda, channels, &values));
    for (const float x : values)
      if (!(x > 0) || !std::isfinite(x)) return error(StatusCode::data_loss, "saved lambda", "positive finite values", std::to_string(x));
    KV4_RETURN_IF_ERROR(Block::copy_of(*backend, "lambda", values.data(), channels * sizeof(float), &s->lambda));
  }
  if (saved.energies != 0) KV4_RETURN_IF_ERROR(load_queries(saved.energy_position, in, &s->query_energy));
  return give_note(*s);
}

Status Cache::State::load_page(blob::Reader& in, const PageRef& page) const {
  const kv4_page_layout to = spec.layout, from = blob::slice_layout(to);
  std::vector<std::byte> block(static_cast<std::size_t>(from.head_bytes) * static_cast<std::size_t>(heads()));
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::page, block));
  for (int h = 0; h < heads(); ++h) {
    const auto* got = block.data() + static_cast<std::size_t>(h) * from.head_bytes;
    const bool ok = finite(got + from.k_scales, DType::f16, static_cast<int>(blob::key_scale_bytes(from) / 2)) &&
                    finite(got + from.v_scales, DType::f16, static_cast<int>(blob::value_scale_bytes(from) / 2));
    if (!ok) return error(StatusCode::data_loss, "saved page", "finite scales and means", "NaN or infinity");
  }
  KV4_RETURN_IF_ERROR(backend->clear(page.data(), pool->page_bytes()));
  for (int h = 0; h < heads(); ++h) {
    const auto* got = reinterpret_cast<const std::uint8_t*>(block.data()) + static_cast<std::size_t>(h) * from.head_bytes;
    std::uint8_t* put = slice(page, h);
    KV4_RETURN_IF_ERROR(backend->codes_from_canonical(spec, got + from.k_codes, got + from.v_codes, put));
    KV4_RETURN_IF_ERROR(backend->copy(put + to.k_scales, got + from.k_scales, blob::key_scale_bytes(from)));
    KV4_RETURN_IF_ERROR(backend->copy(put + to.v_scales, got + from.v_scales, blob::value_scale_bytes(from)));
  }
  return {};
}

Status Cache::State::load(const Source& source) {
  if (!source) return invalid_argument("source", "a function", "none");
  if (!sequences.empty())
    return error(StatusCode::failed_precondition, "cache", "an empty cache (reset empties it)", std::to_string(sequences.size()) + " sequences");
  if (backend->capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  blob::Reader in(source);
  KV4_RETURN_IF_ERROR(in.begin());
  const std::vector<blob::Field> mine = blob::fields(config, spec);
  std::vector<std::uint64_t> theirs(mine.size());
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::config, std::as_writable_bytes(std::span(theirs))));
  for (std::size_t i = 0; i < mine.size(); ++i)
    if (mine[i].value != theirs[i]) return invalid_argument(mine[i].name, mine[i].text(mine[i].value), mine[i].text(theirs[i]));

  blob::State saved{};
  KV4_RETURN_IF_ERROR(in.read(blob::Kind::state, std::as_writable_bytes(std::span(&saved, 1))));
  const auto batch = static_cast<std::int64_t>(saved.batch), tokens = static_cast<std::int64_t>(saved.length);
  KV4_RETURN_IF_ERROR(expect_within("batch", batch, 0, std::numeric_limits<int>::max()));
  KV4_RETURN_IF_ERROR(expect_within("length", tokens, 0, batch > 0 ? kMaxLength : 0));
  KV4_RETURN_IF_ERROR(expect_within("recording", static_cast<std::int64_t>(saved.recording), 0, 1));

  std::vector<Sequence> next;
  std::vector<std::vector<std::uint64_t>> tables;
  std::uint64_t named = 0;  // pages, each first named in order
  for (std::int64_t b = 0; b < batch; ++b) {
    KV4_RETURN_IF_ERROR(load_sequence(tokens, in, &next.emplace_back(), &tables.emplace_back()));
    for (const std::uint64_t page : tables.back()) {
      KV4_RETURN_IF_ERROR(expect_within("page table", static_cast<std::int64_t>(page), 0, static_cast<std::int64_t>(named)));
      if (page == named) ++named;
    }
  }
  KV4_RETURN_IF_ERROR(expect_equal("pages", static_cast<std::int64_t>(saved.pages), static_cast<std::int64_t>(named)));
  std::vector<PageRef> pages;
  for (std::size_t i = 0; i < named; ++i) {
    // No more at once than have come: a table alone is no reason to take memory.
    if (i == pages.size())
      KV4_RETURN_IF_ERROR(pool->allocate(std::min<std::size_t>(static_cast<std::size_t>(named) - i, std::max<std::size_t>(kPageTokens, i)), &pages));
    KV4_RETURN_IF_ERROR(load_page(in, pages[i]));
  }
  std::vector<std::uint64_t> told, rows;
  KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::told, saved.batch, &told));
  for (std::size_t b = 0; b < next.size(); ++b) {
    for (const std::uint64_t page : tables[b]) next[b].pages.append(pages[static_cast<std::size_t>(page)]);
    KV4_RETURN_IF_ERROR(in.read_array(blob::Kind::non_finite, told[b], &rows));
    for (const std::uint64_t x : rows) {
      KV4_RETURN_IF_ERROR(expect_within("non-finite row", static_cast<std::int64_t>(x >> 2), 0, tokens - 1));
      next[b].non_finite.push_back({static_cast<std::int64_t>(x >> 2), (x & 1u) != 0, (x & 2u) != 0});
    }
  }
  sequences = std::move(next);
  length = tokens;
  recording = saved.recording != 0;
  own.tables.reset();
  ++version;
  return {};
}

}  // namespace kv4
