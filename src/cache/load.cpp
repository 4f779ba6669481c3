// Loading a cache; blob/read.cpp validates what the file says.
#include <algorithm>
#include <string>

#include "blob/contents.h"
#include "cache/state.h"

namespace kv4 {
namespace {

class CacheTarget final : public blob::LoadTarget {
 public:
  CacheTarget(const CacheState& c, const blob::SliceLayout& slice) : c_(c), slice_(slice), pages_(c.pool.get()) {}

  Status rows(std::size_t b, bool sinks, std::int64_t first, std::int64_t tokens, std::int64_t total,
              std::span<const std::byte> block) override {
    if (b >= bodies_.size()) bodies_.resize(b + 1);
    RowBuffer& rows = sinks ? bodies_[b].sinks : bodies_[b].window;
    const RowShape& shape = c_.setup->shape;
    if (first + tokens > rows.capacity()) {
      const std::int64_t grown = std::max(2 * rows.capacity(), first + tokens);
      KV4_RETURN_IF_ERROR(rows.reserve(c_.backend(), shape, std::min(grown, total)));
    }
    const std::byte* from = block.data();
    for (const bool key : {true, false})
      for (int h = 0; h < shape.kv_heads; ++h, from += shape.head_bytes(key, tokens))
        KV4_RETURN_IF_ERROR(
            c_.backend().copy(key ? rows.key(h, first) : rows.value(h, first), from, shape.head_bytes(key, tokens)));
    rows.set_count(first + tokens);
    return {};
  }

  Status page(std::int64_t number, std::int64_t count, std::span<const std::byte> block) override {
    // Allocates no more than has been read: a table's claim alone must not take memory.
    if (number == static_cast<std::int64_t>(pages_.ids().size()))
      KV4_RETURN_IF_ERROR(pages_.allocate(std::min(count - number, std::max<std::int64_t>(kPageTokens, number))));
    const PageSpec& spec = c_.setup->spec;
    std::uint8_t* const page = c_.pool->page(pages_.ids()[static_cast<std::size_t>(number)]);
    KV4_RETURN_IF_ERROR(c_.backend().clear(page, c_.pool->page_bytes()));
    for (int h = 0; h < c_.setup->heads(); ++h) {
      const auto* got = reinterpret_cast<const std::uint8_t*>(block.data()) +
                        static_cast<std::size_t>(h) * slice_.head_bytes;
      std::uint8_t* put = page + static_cast<std::size_t>(h) * spec.layout.head_bytes;
      KV4_RETURN_IF_ERROR(c_.backend().codes_from_canonical(spec, got + slice_.k_codes, got + slice_.v_codes, put));
      const auto copy = [&](auto... x) { return c_.backend().copy(x...); };
      KV4_RETURN_IF_ERROR(blob::copy_scales(put, spec.layout, got, slice_, copy));
      KV4_RETURN_IF_ERROR(blob::copy_second_rows(put, spec.second, got, slice_.second, spec.key, copy));
    }
    return {};
  }

  // The sequences, with what has been read for them.
  Status finish(blob::Contents& contents, std::vector<Sequence>* out) {
    bodies_.resize(contents.sequences.size());
    for (std::size_t b = 0; b < bodies_.size(); ++b) {
      auto& [ledger, learnt] = contents.sequences[b];
      Body& body = bodies_[b];
      KV4_RETURN_IF_ERROR(copied("lambda", learnt.lambda, &body.lambda));
      static_cast<ledger::Queries&>(body.energy) = learnt.queries;
      body.energy.rows.resize(learnt.energies.size());
      for (std::size_t i = 0; i < learnt.energies.size(); ++i)
        KV4_RETURN_IF_ERROR(copied("query energies", learnt.energies[i], &body.energy.rows[i]));
      std::vector<PageId> ids;
      for (const PageId number : ledger.pages()) ids.push_back(pages_.ids()[static_cast<std::size_t>(number)]);
      ledger.take_pages({});
      Sequence& s = out->emplace_back(ledger, c_.pool.get());
      s.body = std::move(body);
      if (!ids.empty()) {
        KV4_RETURN_IF_ERROR(s.body.table.change(c_.backend(), {}, {}, -1, ids));
        c_.pool->retain(ids);
        s.ledger.take_pages(std::move(ids));
      }
      std::shared_ptr<LateNote> note;
      KV4_RETURN_IF_ERROR(make_note(c_, s, &note));
      s.begin_note(std::move(note));
    }
    return {};
  }

 private:
  Status copied(const char* what, const std::vector<float>& from, std::shared_ptr<Block>* to) const {
    return Block::copy_of(c_.backend(), what, from.data(), from.size() * sizeof(float), to);
  }

  const CacheState& c_;
  const blob::SliceLayout slice_;
  FreshPages pages_;  // those that the tables name
  std::vector<Body> bodies_;
};

}  // namespace

Status load(CacheState& c, const Source& source) {
  if (!source) return invalid_argument("source", "a function", "none");
  if (!c.sequences.empty())
    return error(StatusCode::failed_precondition, "cache", "an empty cache (reset empties it)",
                 std::to_string(c.sequences.size()) + " sequences");
  if (c.backend().capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  const blob::Format format = blob::Format::of(c.setup->config, c.setup->spec);
  CacheTarget target(c, format.slice);
  blob::Contents contents;
  KV4_RETURN_IF_ERROR(blob::read(format, source, target, &contents));
  std::vector<Sequence> next;
  next.reserve(contents.sequences.size());
  KV4_RETURN_IF_ERROR(target.finish(contents, &next));
  c.sequences = std::move(next);
  c.recording = contents.recording;
  c.tables.reset();
  ++c.version;
  return {};
}

}  // namespace kv4
