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

}  // namespace

Status Cache::State::save_sequence(const Sequence& s, std::span<const std::uint64_t> table, blob::Writer& out) const {
  const std::size_t channels = static_cast<std::size_t>(heads()) * static_cast<std::size_t>(config.head_dim_k);
  const QueryEnergy& energy = s.query_energy;
  const blob::Sequence saved{s.start,
                             s.anchored ? 1 : 0,
                             s.first_page,
                             static_cast<std::int64_t>(s.pages.size()),
                             s.last_page_tokens,
                             s.sinks.count(),
                             s.window.count(),
                             s.window_position,
                             s.evicted,
                             s.lambda ? 1 : 0,
                             energy.any() ? 1 : 0,
                             energy.any() ? energy.first : 0};
  KV4_RETURN_IF_ERROR(out.write(blob::Kind::sequence, blob::bytes_of(saved)));
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::table, table));
  KV4_RETURN_IF_ERROR(write_rows(out, *backend, shape, s.sinks));
  KV4_RETURN_IF_ERROR(write_rows(out, *backend, shape, s.window));
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::seen, std::span<const Seen>(s.seen)));
  std::vector<float> values(channels);
  if (s.lambda) {
    KV4_RETURN_IF_ERROR(backend->copy(values.data(), s.lambda->as<float>(), channels * sizeof(float)));
    KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::lambda, std::span<const float>(values)));
  }
  if (!energy.any()) return {};
  std::vector<std::uint8_t> filled(blob::recorded_queries(config, blob::kVersion));
  for (std::size_t i = 0; i < energy.rows.size(); ++i) filled[i] = energy.rows[i] ? 1 : 0;
  KV4_RETURN_IF_ERROR(out.write_array(blob::Kind::filled, std::span<const std::uint8_t>(filled)));
  for (const std::shared_ptr<Block>& row : energy.rows) {
    if (!row) continue;
    KV4_RETURN_IF_ERROR(backend->copy(values.data(), row->as<float>(), channels * sizeof(float)));
    for (float& x : values) x = std::isfinite(x) ? x : 0.0f;  // as it counts
    KV4_RETURN_IF_ERROR(out.write(blob::Kind::energies, std::as_bytes(std::span(values))));
  }
  return {};
}

Status Cache::State::save_page(const PageRef& page, blob::Writer& out) const {
  const kv4_page_layout from = spec.layout, to = blob::slice_layout(from);
  std::vector<std::byte> block(static_cast<std::size_t>(to.head_bytes) * static_cast<std::size_t>(heads()));
  for (int h = 0; h < heads(); ++h) {
    const std::uint8_t* held = slice(page, h);
    auto* put = reinterpret_cast<std::uint8_t*>(block.data()) + static_cast<std::size_t>(h) * to.head_bytes;
    KV4_RETURN_IF_ERROR(backend->codes_to_canonical(spec, held, put + to.k_codes, put + to.v_codes));
    KV4_RETURN_IF_ERROR(backend->copy(put + to.k_scales, held + from.k_scales, blob::key_scale_bytes(from)));
    KV4_RETURN_IF_ERROR(backend->copy(put + to.v_scales, held + from.v_scales, blob::value_scale_bytes(from)));
  }
  return out.write(blob::Kind::page, block);
}

Status Cache::State::save(const Sink& sink) const {
  if (!sink) return invalid_argument("sink", "a function", "none");
  if (backend->capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  blob::Writer out(sink);
  KV4_RETURN_IF_ERROR(out.begin());
  std::vector<std::uint64_t> numbers;
  for (const blob::Field& field : blob::fields(config, spec)) numbers.push_back(field.value);
  KV4_RETURN_IF_ERROR(out.write(blob::Kind::config, std::as_bytes(std::span(numbers))));

  // Pages are numbered as the tables first name them; forks share them in the file too.
  std::unordered_map<const std::uint8_t*, std::uint64_t> known;
  std::vector<const PageRef*> pages;
  std::vector<std::vector<std::uint64_t>> tables;
  for (const Sequence& s : sequences) {
    std::vector<std::uint64_t>& table = tables.emplace_back();
    for (std::size_t i = 0; i < s.pages.size(); ++i) {
      const auto [at, fresh] = known.try_emplace(s.pages[i].data(), pages.size());
      if (fresh) pages.push_back(&s.pages[i]);
      table.push_back(at->second);
    }
  }
  const blob::State saved{sequences.size(), sequences.empty() ? 0 : static_cast<std::uint64_t>(length), pages.size(), recording ? 1u : 0u};
  KV4_RETURN_IF_ERROR(out.write(blob::Kind::state, blob::bytes_of(saved)));
  for (std::size_t b = 0; b < sequences.size(); ++b) KV4_RETURN_IF_ERROR(save_sequence(sequences[b], tables[b], out));
  for (const PageRef* page : pages) KV4_RETURN_IF_ERROR(save_page(*page, out));

  // Last, since a device tells late: what was queued has run by the time that rows and pages are here.
  std::vector<std::vector<std::uint64_t>> rows;
  std::vector<std::uint64_t> told;
  for (const Sequence& s : sequences) {
    std::vector<NonFinite> found = s.non_finite;
    listen(s, &found);
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

}  // namespace kv4
