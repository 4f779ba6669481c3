// One call of attention: what it teaches the cache, which pages each query sees, and the jobs
// that the backend runs.
#include <algorithm>
#include <string>

#include "cache/output.h"
#include "cache/state.h"
#include "cache/visibility.h"

namespace kv4 {
namespace {

std::string dims(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  return "[" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + ", " + std::to_string(d) + "]";
}

}  // namespace

Status Cache::State::check_queries(const AttendArgs& args) const {
  const TensorView& q = args.q;
  if (sequences.empty())
    return error(StatusCode::failed_precondition, "q", "a cache that holds tokens", "an empty cache");
  const std::int64_t batch = static_cast<std::int64_t>(sequences.size());
  const bool shape_ok = q.shape[0] == batch && q.shape[1] >= config.kv_heads && q.shape[1] % config.kv_heads == 0 &&
                        q.shape[2] >= 1 && q.shape[2] <= length && q.shape[3] == config.head_dim_k;
  if (!shape_ok)
    return invalid_argument("q",
                            "shape [" + std::to_string(batch) + ", a multiple of " + std::to_string(config.kv_heads) + ", 1 to " +
                                std::to_string(length) + ", " + std::to_string(config.head_dim_k) + "]",
                            dims(q.shape[0], q.shape[1], q.shape[2], q.shape[3]));
  if (q.stride[3] != 1 && q.shape[3] > 1) return invalid_argument("q", "channel stride 1", std::to_string(q.stride[3]));
  if (q.data == nullptr) return invalid_argument("q", "data", "a null pointer");
  if (!(args.softcap >= 0)) return invalid_argument("softcap", "0 (none) or a positive number", std::to_string(args.softcap));
  if (args.scale != args.scale) return invalid_argument("scale", "a number", "NaN");
  const Mask& m = args.mask;
  if (m.kind != Mask::General::none) {
    if (m.general == nullptr) return invalid_argument("mask", "data", "a null pointer");
    if (m.columns < 0) return invalid_argument("mask", "0 or more columns", std::to_string(m.columns));
  }
  return {};
}

// Remembers which exact tokens the call's queries see, and the energies of the first queries.
Status Cache::State::record(const AttendArgs& args) {
  const std::int64_t queries = args.q.shape[2];
  const bool told = args.mask.kind == Mask::General::none || args.mask.general != nullptr;
  energies.clear();
  const bool wants_energy = automatic();
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    Sequence& s = sequences[b];
    const Visibility visibility(args, static_cast<int>(b), length);
    if (seals() && !arrival() && told) {
      for (std::int64_t j = 0; j < static_cast<std::int64_t>(s.seen.size()); ++j)
        if (s.seen[static_cast<std::size_t>(j)] != Seen::visible)
          s.seen[static_cast<std::size_t>(j)] = visibility.seen(s.window_position + j) ? Seen::visible : Seen::masked;
    }
    if (!wants_energy || (s.lambda && !s.query_energy.rows)) continue;
    QueryEnergy& energy = s.query_energy;
    const std::int64_t row_size = static_cast<std::int64_t>(heads()) * config.head_dim_k;
    const std::int64_t limit = config.recipe.sinks + config.recipe.window + kPageTokens;
    const std::size_t bytes = static_cast<std::size_t>(limit * row_size) * sizeof(float);
    for (std::int64_t t = 0; t < queries; ++t) {
      const std::int64_t position = length - queries + t;
      if (energy.rows && position - energy.first >= limit) break;
      if (!visibility.visible(t, position)) continue;
      if (!energy.rows) {
        KV4_RETURN_IF_ERROR(Block::make(*backend, "query energies", bytes, &energy.rows));
        energy.first = position;
        energy.filled.assign(static_cast<std::size_t>(limit), 0);
      }
      const std::int64_t slot = position - energy.first;
      if (slot < 0) continue;
      if (energy.rows.use_count() > 1) {
        std::shared_ptr<Block> mine;
        KV4_RETURN_IF_ERROR(Block::make(*backend, "query energies", bytes, &mine));
        KV4_RETURN_IF_ERROR(backend->copy(mine->as<float>(), energy.rows->as<float>(), bytes));
        energy.rows = std::move(mine);
      }
      energy.filled[static_cast<std::size_t>(slot)] = 1;
      const int row = static_cast<int>(b);
      if (!energies.empty() && energies.back().sequence == row && energies.back().first + energies.back().count == t)
        ++energies.back().count;
      else
        energies.push_back({row, t, 1, energy.rows->as<float>() + slot * row_size});
    }
  }
  if (energies.empty()) return {};
  return backend->query_energies(args.q, heads(), energies);
}

// Pages that a query at `position` reads packed: those due before its token came. Released ones
// have no exact rows any more; those sealed later are read from the window.
std::int64_t Cache::State::visible_pages(const Sequence& s, std::int64_t position, bool stepwise) const {
  if (arrival()) return s.page_end();
  const std::int64_t due = stepwise && s.anchored ? s.pages_due(position, config.recipe.window) : 0;
  return std::clamp(due, s.released_pages(), s.page_end());
}

// What is held below `upto`, with the first `pages` pages packed and the rest exact.
void Cache::State::view(const Sequence& s, std::int64_t pages, std::int64_t upto, SequenceView* out) const {
  *out = SequenceView();
  const auto below = [upto](std::int64_t position, std::int64_t count) {
    return std::clamp<std::int64_t>(upto - position, 0, count);
  };
  out->exact[0] = s.sinks.view(0, below(s.start, s.sinks.count()), s.start);
  if (!s.pages.empty()) {
    out->pages = s.pages.data();
    out->pages_stamp = s.pages.stamp();
    out->page_count = static_cast<int>(pages - s.first_page);
    out->pages_position = s.page_position(s.first_page);
    out->last_page_tokens = pages == s.page_end() ? s.last_page_tokens : kPageTokens;
  }
  const std::int64_t skip = s.pages.empty() ? 0 : std::max<std::int64_t>(0, s.page_position(pages) - s.window_position);
  const std::int64_t rows = below(s.window_position, s.window.count());
  out->exact[1] = s.window.view(skip, rows - skip, s.window_position + skip);
  out->lambda_k = lambda_k(s, 0);
  out->lambda_v = lambda_v(0);
  out->note = s.note();
}

Status Cache::State::check_output(const AttendArgs& args, const MutableTensorView* out, const PartialState* partial) const {
  if (out != nullptr) {
    const auto& s = out->shape;
    if (s[0] != args.q.shape[0] || s[1] != args.q.shape[1] || s[2] != args.q.shape[2] || s[3] != config.head_dim_v)
      return invalid_argument("out", "shape " + dims(args.q.shape[0], args.q.shape[1], args.q.shape[2], config.head_dim_v),
                              dims(s[0], s[1], s[2], s[3]));
    if (out->stride[3] != 1 && s[3] > 1) return invalid_argument("out", "channel stride 1", std::to_string(out->stride[3]));
    return check_places(*out, &args.q);
  }
  if (partial->o == nullptr || partial->m == nullptr || partial->l == nullptr)
    return invalid_argument("state", "pointers to o, m and l", "a null pointer");
  return check_places(*partial, args.q, config.head_dim_v);
}

// All but the queries' range and the output.
AttendJob Cache::State::job_of(const AttendArgs& args) {
  AttendJob job;
  job.args = args;
  job.spec = seals() ? &spec : nullptr;
  job.dtype = config.dtype;
  job.kv_heads = heads();
  job.head_dim_k = config.head_dim_k;
  job.head_dim_v = config.head_dim_v;
  job.sequences = views;
  job.tables = own.tables.get();
  return job;
}

Status Cache::State::attend(const AttendArgs& given, std::int64_t upto, const MutableTensorView* out,
                            const PartialState* partial) {
  KV4_RETURN_IF_ERROR(check_queries(given));
  AttendArgs args = given;
  const std::int64_t queries = args.q.shape[2];
  const std::int64_t first_query = length - queries;
  if (config.sliding_window > 0 && args.mask.window == nullptr && args.mask.causal) {
    windows.assign(sequences.size(), config.sliding_window);
    args.mask.window = windows.data();
  }
  KV4_RETURN_IF_ERROR(check_output(args, out, partial));
  if (backend->capturing()) return attend_captured(args, out);
  if (upto < 0 || upto > length)
    return error(StatusCode::out_of_range, "upto", "0 to " + std::to_string(length), std::to_string(upto));

  // Masks as the host can read them.
  AttendArgs readable = args;
  if (!backend->host_memory()) {
    readable.mask.general = args.mask.host_general;
    readable.mask.general_stride = args.mask.host_general_stride;
  }
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    Sequence& s = sequences[b];
    hear(s);
    if (s.non_finite.empty()) continue;
    const Visibility visibility(readable, static_cast<int>(b), length);
    for (const NonFinite& x : s.non_finite)
      if (visibility.seen(x.position))
        return error(StatusCode::non_finite, x.key ? "k" : "v", "finite values in tokens that a query sees",
                     "NaN or infinity at sequence " + std::to_string(b) + ", position " + std::to_string(x.position));
  }
  KV4_RETURN_IF_ERROR(record(readable));
  KV4_RETURN_IF_ERROR(make_tables());  // a clone or a loaded cache has none yet
  const bool stepwise = queries <= kStepwiseTokens;
  if (seals() && !arrival() && stepwise) KV4_RETURN_IF_ERROR(seal_until(length - 1));

  std::int64_t begin = 0;
  while (begin < queries) {
    // The longest run of queries that see the same pages, in every sequence.
    std::int64_t end = queries;
    if (stepwise && !arrival()) {
      for (const Sequence& s : sequences) {
        const std::int64_t pages = visible_pages(s, first_query + begin, true);
        for (std::int64_t t = begin + 1; t < end; ++t)
          if (visible_pages(s, first_query + t, true) != pages) end = t;
      }
    }
    views.resize(sequences.size());
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      const Sequence& s = sequences[b];
      const std::int64_t pages = visible_pages(s, first_query + begin, stepwise);
      view(s, pages, upto, &views[b]);
      const std::int64_t sealed = s.pages.empty() ? 0
                                                  : s.page_position(pages) - (pages == s.page_end() ? kPageTokens - s.last_page_tokens : 0);
      if (views[b].page_count > 0 && upto < sealed)
        return error(StatusCode::out_of_range, "upto", "at least " + std::to_string(sealed) + ", the end of the sealed tokens",
                     std::to_string(upto));
      views[b].query_position = first_query + begin;
    }
    AttendJob job = job_of(args);
    job.query_begin = begin;
    job.query_count = end - begin;
    if (out != nullptr) job.out = *out;
    if (partial != nullptr) job.partial = *partial;
    KV4_RETURN_IF_ERROR(backend->attend(job));
    begin = end;
  }
  return {};
}

}  // namespace kv4
