// Saving a cache; blob/write.cpp defines the layout of the file.
#include "blob/contents.h"
#include "cache/state.h"

namespace kv4 {
namespace {

class CacheSource final : public blob::SaveSource {
 public:
  explicit CacheSource(const CacheState& c, const blob::SliceLayout& slice) : c_(c), slice_(slice) {}

  const ledger::Ledger& ledger(std::size_t b) const override { return c_.sequences[b].ledger; }

  Status learnt(std::size_t b, blob::Learnt* out) const override {
    const Body& body = c_.sequences[b].body;
    if (body.lambda) KV4_RETURN_IF_ERROR(floats(*body.lambda, &out->lambda));
    out->queries = body.energy;
    out->energies.resize(body.energy.rows.size());
    for (std::size_t i = 0; i < out->energies.size(); ++i)
      if (body.energy.rows[i]) KV4_RETURN_IF_ERROR(floats(*body.energy.rows[i], &out->energies[i]));
    return {};
  }

  Status rows(std::size_t b, bool sinks, std::int64_t first, std::int64_t tokens,
              std::span<std::byte> out) const override {
    const Body& body = c_.sequences[b].body;
    const RowBuffer& held = sinks ? body.sinks : body.window;
    std::byte* to = out.data();
    for (const bool key : {true, false})
      for (int h = 0; h < c_.setup->heads(); ++h, to += c_.setup->shape.head_bytes(key, tokens))
        KV4_RETURN_IF_ERROR(c_.backend().copy(to, key ? held.key(h, first) : held.value(h, first),
                                              c_.setup->shape.head_bytes(key, tokens)));
    return {};
  }

  Status page(PageId id, std::span<std::byte> out) const override {
    const PageSpec& spec = c_.setup->spec;
    for (int h = 0; h < c_.setup->heads(); ++h) {
      const std::uint8_t* held = c_.pool->page(id) + static_cast<std::size_t>(h) * spec.layout.head_bytes;
      auto* put = reinterpret_cast<std::uint8_t*>(out.data()) + static_cast<std::size_t>(h) * slice_.head_bytes;
      KV4_RETURN_IF_ERROR(c_.backend().codes_to_canonical(spec, held, put + slice_.k_codes, put + slice_.v_codes));
      const auto copy = [&](auto... x) { return c_.backend().copy(x...); };
      KV4_RETURN_IF_ERROR(blob::copy_scales(put, slice_, held, spec.layout, copy));
      KV4_RETURN_IF_ERROR(blob::copy_second_rows(put, slice_.second, held, spec.second, spec.key, copy));
    }
    return {};
  }

  void pending_non_finite(std::size_t b, std::vector<NonFinite>* found) const override {
    c_.sequences[b].pending_non_finite(found);
  }

 private:
  Status floats(const Block& from, std::vector<float>* to) const {
    to->resize(c_.setup->channels());
    return c_.backend().copy(to->data(), from.as<float>(), to->size() * sizeof(float));
  }

  const CacheState& c_;
  const blob::SliceLayout slice_;
};

}  // namespace

Status save(const CacheState& c, const Sink& sink) {
  if (!sink) return invalid_argument("sink", "a function", "none");
  if (c.backend().capturing())
    return error(StatusCode::failed_precondition, "cache", "a stream that is not being captured", "one that is");
  const blob::Format format = blob::Format::of(c.setup->config, c.setup->spec);
  return blob::write(format, c.sequences.size(), c.recording, CacheSource(c, format.slice), sink);
}

}  // namespace kv4
