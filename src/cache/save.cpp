// Writing a cache: all that what follows may depend on, as it is. Nothing is sealed or dropped for it, so that a
// loaded cache can do what this one can, cropping into the last call's tokens included.
#include <cmath>
#include <unordered_map>

#include "cache/blob.h"
#include "cache/state.h"

namespace kv4 {
namespace {

// Key rows, then value rows, of all heads.
Status write_rows(blob::Writer& out, Backend& backend, const RowShape& shape, const RowBuffer& rows) {
  const std::size_t key_row = static_cast<std::size_t>(shape.head_dim_k) * size_of(shape.dtype);
  const std::size_t value_row = static_cast<std::size_t>(shape.head_dim_v) * size_of(shape.dtype);
  std::vector<std::byte> block;
  for (std::int64_t first = 0; first < rows.count(); first += kPageTokens) {
    const std::int64_t tokens = std::min<std::int64_t>(kPageTokens, rows.count() - first);
    block.resize(shape.row_bytes() * static_cast<std::size_t>(tokens));
    std::byte* to = block.data();
    for (const bool key : {true, false}) {
      const std::size_t bytes = (key ? key_row : value_row) * static_cast<std::size_t>(tokens);
      for (int h = 0; h < shape.kv_heads; ++h, to += bytes)
        KV4_RETURN_IF_ERROR(backend.copy(to, key ? rows.key(h, first) : rows.value(h, first), bytes));
    }
    KV4_RETURN_IF_ERROR(out.write(blob::Kind::rows, block));
  }
  return {};
}

Status write_sequence(const CacheState& c, const Sequence& s, std::span<const std::uint64_t> table, blob::Writer& out) {
  const Setup& setup = *c.setup;
  const ledger::Extent& x = s.ledger.extent();
  const QueryEnergy& energy = s.body.energy;
  const blob::Sequence saved{x.start,
                             x.anchored ? 1 : 0,
                             x.first_page,
                             x.pages,
                             x.last_page_tokens,
                             x.sinks,
                             x.window_rows(),
                             setup.policy.arrival() ? 0 : x.window_position,
                             x.evicted,
                             s.body.lambda ? 1 : 0,
                             energy.any() ? 1 : 0,
                             energy.any() ? energy.first : 0};
  KV4_RETURN_IF_ERROR(out.write(blob::Kind::sequence, blob::bytes_of(saved)));
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::table, table));
  KV4_RETURN_IF_ERROR(write_rows(out, c.backend(), setup.shape, s.body.sinks));
  KV4_RETURN_IF_ERROR(write_rows(out, c.backend(), setup.shape, s.body.window));
  std::vector<ledger::Seen> marks(s.ledger.marks().begin(), s.ledger.marks().end());
  marks.resize(static_cast<std::size_t>(x.window_rows()));  // a recipe that seals no pages has none
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::seen, std::span<const ledger::Seen>(marks)));
  std::vector<float> values(setup.channels());
  if (s.body.lambda) {
    KV4_RETURN_IF_ERROR(c.backend().copy(values.data(), s.body.lambda->as<float>(), values.size() * sizeof(float)));
    KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::lambda, std::span<const float>(values)));
  }
  if (!energy.any()) return {};
  std::vector<std::uint8_t> filled(blob::recorded_queries(setup.config, blob::kVersion));
  for (std::size_t i = 0; i < energy.rows.size(); ++i) filled[i] = energy.rows[i] ? 1 : 0;
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::filled, std::span<const std::uint8_t>(filled)));
  for (const std::shared_ptr<Block>& row : energy.rows) {
    if (!row) continue;
    KV4_RETURN_IF_ERROR(c.backend().copy(values.data(), row->as<float>(), values.size() * sizeof(float)));
    for (float& x : values) x = std::isfinite(x) ? x : 0.0f;  // as it counts
    KV4_RETURN_IF_ERROR(out.write(blob::Kind::energies, std::as_bytes(std::span(values))));
  }
  return {};
}

Status write_page(const CacheState& c, PageId page, blob::Writer& out) {
  const PageSpec& spec = c.setup->spec;
  const kv4_page_layout from = spec.layout, to = blob::slice_layout(from);
  std::vector<std::byte> block(static_cast<std::size_t>(to.head_bytes) * static_cast<std::size_t>(c.setup->heads()));
  for (int h = 0; h < c.setup->heads(); ++h) {
    const std::uint8_t* held = c.pool->page(page) + static_cast<std::size_t>(h) * from.head_bytes;
    auto* put = reinterpret_cast<std::uint8_t*>(block.data()) + static_cast<std::size_t>(h) * to.head_bytes;
    KV4_RETURN_IF_ERROR(c.backend().codes_to_canonical(spec, held, put + to.k_codes, put + to.v_codes));
    KV4_RETURN_IF_ERROR(c.backend().copy(put + to.k_scales, held + from.k_scales, blob::key_scale_bytes(from)));
    KV4_RETURN_IF_ERROR(c.backend().copy(put + to.v_scales, held + from.v_scales, blob::value_scale_bytes(from)));
  }
  return out.write(blob::Kind::page, block);
}

// Last, since a device tells late: what was queued has run by the time that rows and pages are here.
Status write_notes(const CacheState& c, blob::Writer& out) {
  std::vector<std::vector<std::uint64_t>> rows;
  std::vector<std::uint64_t> told;
  for (const Sequence& s : c.sequences) {
    std::vector<NonFinite> found(s.ledger.non_finite().begin(), s.ledger.non_finite().end());
    s.listen(&found);
    told.push_back(found.size());
    rows.emplace_back();
    for (const NonFinite& x : found)
      rows.back().push_back(static_cast<std::uint64_t>(x.position) << 2 | (x.value ? 2u : 0u) | (x.key ? 1u : 0u));
  }
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::told, std::span<const std::uint64_t>(told)));
  for (const std::vector<std::uint64_t>& each : rows)
    KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::non_finite, std::span<const std::uint64_t>(each)));
  return {};
}

}  // namespace

Status save(const CacheState& c, const Sink& sink) {
  if (!sink) return invalid_argument("sink", "a function", "none");
  if (c.backend().capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  const bool ragged = c.shortest() < c.longest();
  blob::Writer out(sink);
  KV4_RETURN_IF_ERROR(out.begin(ragged ? blob::kRagged : blob::kVersion));
  std::vector<std::uint64_t> numbers;
  for (const blob::Field& field : blob::fields(c.setup->config, c.setup->spec)) numbers.push_back(field.value);
  KV4_RETURN_IF_ERROR(out.write(blob::Kind::config, std::as_bytes(std::span(numbers))));

  // Pages are numbered as the tables first name them; forks share them in the file too.
  std::unordered_map<PageId, std::uint64_t> known;
  std::vector<PageId> pages;
  std::vector<std::vector<std::uint64_t>> tables;
  for (const Sequence& s : c.sequences) {
    std::vector<std::uint64_t>& table = tables.emplace_back();
    for (const PageId id : s.ledger.pages()) {
      const auto [at, fresh] = known.try_emplace(id, pages.size());
      if (fresh) pages.push_back(id);
      table.push_back(at->second);
    }
  }
  const blob::State saved{c.sequences.size(), static_cast<std::uint64_t>(c.longest()), pages.size(),
                          c.recording ? 1u : 0u};
  KV4_RETURN_IF_ERROR(out.write(blob::Kind::state, blob::bytes_of(saved)));
  if (ragged) {
    std::vector<std::uint64_t> lengths;
    for (const Sequence& s : c.sequences) lengths.push_back(static_cast<std::uint64_t>(s.length()));
    KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::lengths, std::span<const std::uint64_t>(lengths)));
  }
  for (std::size_t b = 0; b < c.sequences.size(); ++b)
    KV4_RETURN_IF_ERROR(write_sequence(c, c.sequences[b], tables[b], out));
  for (const PageId page : pages) KV4_RETURN_IF_ERROR(write_page(c, page, out));
  return write_notes(c, out);
}

}  // namespace kv4
