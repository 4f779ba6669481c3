// One call of attention: what it teaches the cache, which pages each query sees, and the jobs
// that the backend runs.
#include <algorithm>
#include <cmath>
#include <string>

#include "attention/output.h"
#include "cache/state.h"
#include "cache/visibility.h"

namespace kv4 {
namespace {

std::string dims(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  return "[" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + ", " + std::to_string(d) + "]";
}

}  // namespace

Status Cache::State::check_dtype(const char* name, DType dtype) const {
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return {};
  return invalid_argument(name, "dtype float32, float16 or bfloat16", std::to_string(static_cast<int>(dtype)));
}

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
  KV4_RETURN_IF_ERROR(check_dtype("q", q.dtype));
  if (q.stride[3] != 1 && q.shape[3] > 1) return invalid_argument("q", "channel stride 1", std::to_string(q.stride[3]));
  if (q.data == nullptr) return invalid_argument("q", "data", "a null pointer");
  if (!(args.softcap >= 0) || !std::isfinite(args.softcap))
    return invalid_argument("softcap", "0 (none) or a positive number", std::to_string(args.softcap));
  if (!std::isfinite(args.scale)) return invalid_argument("scale", "a number", std::to_string(args.scale));
  const Mask& m = args.mask;
  const bool offset = m.start != nullptr || m.kind != Mask::General::none;
  if (offset && (m.offset < -kMaxLength || m.offset > kMaxLength))
    return invalid_argument("mask.offset", "a position within " + std::to_string(kMaxLength) + " of 0", std::to_string(m.offset));
  if (m.kind != Mask::General::none) {
    if (m.general == nullptr) return invalid_argument("mask", "data", "a null pointer");
    if (m.columns < 0 || m.columns > kMaxLength)
      return invalid_argument("mask", "0 to " + std::to_string(kMaxLength) + " columns", std::to_string(m.columns));
    if (m.kind == Mask::General::additive) KV4_RETURN_IF_ERROR(check_dtype("mask", m.general_dtype));
  }
  return {};
}

// Non-finite tokens that some query sees.
Status Cache::State::check_seen(const AttendArgs& args) {
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    Sequence& s = sequences[b];
    hear(s);
    if (s.non_finite.empty()) continue;
    const Visibility visibility(args, static_cast<int>(b), length);
    std::vector<std::int64_t> hidden;
    if (!visibility.simple()) {
      for (const NonFinite& x : s.non_finite) hidden.push_back(x.position);
      visibility.leave_hidden(&hidden);
    }
    auto next = hidden.begin();
    for (const NonFinite& x : s.non_finite) {
      const bool is_hidden = visibility.simple() ? !visibility.seen(x.position) : next != hidden.end() && *next == x.position;
      if (is_hidden && !visibility.simple()) ++next;
      if (is_hidden) continue;
      return error(StatusCode::non_finite, x.key ? "k" : "v", "finite values in tokens that a query sees",
                   "NaN or infinity at sequence " + std::to_string(b) + ", position " + std::to_string(x.position));
    }
  }
  return {};
}

// What the call tells of exact tokens, and the energies of those of the first queries that count. Nothing of it is known
// before take.
Status Cache::State::learn(const AttendArgs& args, std::vector<Sequence>& next, Lesson* lesson) {
  if (seals() && !arrival() && args.mask.kind != Mask::General::none && args.mask.general != nullptr && args.q.shape[2] > 1) {
    for (std::size_t b = 0; b < next.size(); ++b) {
      const Sequence& s = next[b];
      std::vector<std::int64_t>& hidden = lesson->hidden.emplace_back();
      for (std::size_t j = 0; j < s.seen.size(); ++j)
        if (s.seen[j] != Seen::visible) hidden.push_back(s.window_position + static_cast<std::int64_t>(j));
      Visibility(args, static_cast<int>(b), length).leave_hidden(&hidden);
    }
  }
  return automatic() ? learn_energies(args, next, lesson) : Status();
}

Status Cache::State::learn_energies(const AttendArgs& args, std::vector<Sequence>& next, Lesson* lesson) {
  const std::int64_t queries = args.q.shape[2], limit = config.recipe.sinks + config.recipe.window + kPageTokens;
  const std::size_t bytes = static_cast<std::size_t>(heads()) * static_cast<std::size_t>(config.head_dim_k) * sizeof(float);
  energies.clear();
  for (std::size_t b = 0; b < next.size(); ++b) {
    Sequence& s = next[b];
    if (s.lambda && !s.query_energy.any()) continue;  // fixed for good
    const Visibility visibility(args, static_cast<int>(b), length);
    QueryEnergy at;
    at.first = s.query_energy.first;
    for (std::int64_t t = 0; t < queries; ++t) {
      const std::int64_t position = length - queries + t;
      if (at.any() && position - at.first >= limit) break;
      if (at.any() && at.row(position) < 0) continue;
      if (!visibility.visible(t, position)) continue;
      if (!at.any()) {
        at.first = position;
        lesson->energies.push_back({b, position, -1, nullptr});
        continue;
      }
      const std::int64_t row = at.row(position);
      if (static_cast<std::size_t>(row) >= s.query_energy.rows.capacity()) s.query_energy.rows.reserve(static_cast<std::size_t>(row) + 2);
      std::shared_ptr<Block> block;
      KV4_RETURN_IF_ERROR(Block::make(*backend, "query energies", bytes, &block));
      energies.push_back({static_cast<int>(b), t, block->as<float>()});
      lesson->energies.push_back({b, at.first, row, std::move(block)});
    }
  }
  return energies.empty() ? Status() : backend->query_energies(args.q, heads(), energies);
}

void Cache::State::take(const AttendArgs& args, Lesson& lesson, std::vector<Sequence>& next) const noexcept {
  const bool told = args.mask.kind == Mask::General::none || args.mask.general != nullptr;
  for (std::size_t b = 0; b < next.size() && seals() && !arrival() && told; ++b) {
    Sequence& s = next[b];
    const Visibility visibility(args, static_cast<int>(b), length);
    std::size_t at = 0;
    for (std::size_t j = 0; j < s.seen.size(); ++j) {
      if (s.seen[j] == Seen::visible) continue;
      const std::int64_t position = s.window_position + static_cast<std::int64_t>(j);
      const bool hidden = visibility.simple() ? !visibility.seen(position) : at < lesson.hidden[b].size() && lesson.hidden[b][at] == position;
      if (hidden) ++at;
      s.seen[j] = hidden ? Seen::masked : Seen::visible;
    }
  }
  for (Lesson::Energies& e : lesson.energies) {
    QueryEnergy& energy = next[e.sequence].query_energy;
    energy.first = e.first;
    if (e.row < 0) continue;
    if (static_cast<std::size_t>(e.row) >= energy.rows.size()) energy.rows.resize(static_cast<std::size_t>(e.row) + 1);
    energy.rows[static_cast<std::size_t>(e.row)] = std::move(e.block);
  }
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
    KV4_RETURN_IF_ERROR(check_dtype("out", out->dtype));
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
  KV4_RETURN_IF_ERROR(check_seen(readable));
  KV4_RETURN_IF_ERROR(make_tables());  // a clone or a loaded cache has none yet

  // Sealing uses what the call tells, and the call sees what is sealed: then all that is done before it knows whether its
  // queries are finite is done to a draft. Else it learns last.
  const std::int64_t sealed_at = queries <= kStepwiseTokens ? length - 1 : 0;
  Draft draft(sequences);
  Lesson lesson;
  if (std::any_of(sequences.begin(), sequences.end(), [&](const Sequence& s) { return seals_more(s, sealed_at, true); })) {
    draft.make();
    KV4_RETURN_IF_ERROR(learn(readable, draft.sequences(), &lesson));
    take(readable, lesson, draft.sequences());
    KV4_RETURN_IF_ERROR(seal_until(draft.sequences(), sealed_at));
  }
  KV4_RETURN_IF_ERROR(run(args, upto, out, partial, draft.sequences()));
  if (!draft.made()) {
    KV4_RETURN_IF_ERROR(learn(readable, sequences, &lesson));
    take(readable, lesson, sequences);
  }
  draft.commit();
  return {};
}

// The jobs of a call, whose sequences are `next`.
Status Cache::State::run(const AttendArgs& args, std::int64_t upto, const MutableTensorView* out, const PartialState* partial,
                         std::vector<Sequence>& next) {
  const std::int64_t queries = args.q.shape[2], first_query = length - queries;
  const bool stepwise = queries <= kStepwiseTokens;
  for (const Sequence& s : next) {  // the last query's pages are the most
    const std::int64_t pages = visible_pages(s, length - 1, stepwise);
    const std::int64_t sealed = s.page_position(pages) - (pages == s.page_end() ? kPageTokens - s.last_page_tokens : 0);
    if (pages > s.first_page && upto < sealed)
      return error(StatusCode::out_of_range, "upto", "at least " + std::to_string(sealed) + ", the end of the sealed tokens", std::to_string(upto));
  }
  views.resize(next.size());
  std::int64_t begin = 0;
  while (begin < queries) {
    // The longest run of queries that see the same pages, in every sequence.
    std::int64_t end = queries;
    for (std::size_t b = 0; b < next.size(); ++b) {
      const Sequence& s = next[b];
      const std::int64_t pages = visible_pages(s, first_query + begin, stepwise);
      if (stepwise && !arrival() && s.anchored && pages < s.page_end())  // until one more is due
        end = std::min(end, s.page_position(pages + 1) + config.recipe.window - first_query);
      view(s, pages, upto, &views[b]);
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
