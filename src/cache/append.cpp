// Taking tokens in: checks, non-finite rows, room in the window; arrival mode seals at once.
#include <algorithm>
#include <limits>
#include <string>

#include "cache/state.h"
#include "format/finite.h"

namespace kv4 {
namespace {

std::string shape_text(const std::array<std::int64_t, 4>& s) {
  return "[" + std::to_string(s[0]) + ", " + std::to_string(s[1]) + ", " + std::to_string(s[2]) + ", " + std::to_string(s[3]) + "]";
}

}  // namespace

Status Cache::State::check_rows(const TensorView& x, const char* name, int dim) const {
  if (x.dtype != config.dtype)
    return invalid_argument(name, std::string("dtype ") + name_of(config.dtype), name_of(x.dtype));
  const std::int64_t batch = sequences.empty() ? x.shape[0] : static_cast<std::int64_t>(sequences.size());
  if (x.shape[0] != batch || x.shape[0] < 1 || x.shape[1] != config.kv_heads || x.shape[2] < 0 || x.shape[3] != dim)
    return invalid_argument(name,
                            "shape [" + (sequences.empty() ? std::string("batch") : std::to_string(batch)) + ", " +
                                std::to_string(config.kv_heads) + ", tokens, " + std::to_string(dim) + "]",
                            shape_text(x.shape));
  if (x.stride[3] != 1 && dim > 1) return invalid_argument(name, "channel stride 1", std::to_string(x.stride[3]));
  if (x.data == nullptr && x.shape[2] > 0) return invalid_argument(name, "data", "a null pointer");
  const std::int64_t room = kMaxLength - (sequences.empty() ? 0 : length);
  if (x.shape[2] > room) return error(StatusCode::out_of_range, name, "at most " + std::to_string(room) + " tokens", std::to_string(x.shape[2]));
  if (x.shape[0] > std::numeric_limits<int>::max())
    return error(StatusCode::out_of_range, name, "a batch of at most " + std::to_string(std::numeric_limits<int>::max()), std::to_string(x.shape[0]));
  return {};
}

Status Cache::State::append(const TensorView& k, const TensorView& v) {
  KV4_RETURN_IF_ERROR(check_rows(k, "k", config.head_dim_k));
  KV4_RETURN_IF_ERROR(check_rows(v, "v", config.head_dim_v));
  if (v.shape[0] != k.shape[0] || v.shape[2] != k.shape[2])
    return invalid_argument("v", "the batch and tokens of k, " + shape_text(k.shape), shape_text(v.shape));
  const std::int64_t tokens = k.shape[2];
  if (backend->capturing()) return append_captured(k, v);
  const bool opening = sequences.empty();
  Draft draft(sequences);
  KV4_RETURN_IF_ERROR(opening ? open(k.shape[0], draft) : settle(draft));
  std::vector<Sequence>& next = draft.sequences();
  if (tokens > 0) KV4_RETURN_IF_ERROR(arrival() ? seal_arrived(next, k, v) : push(next, k, v));
  // All is there: what follows cannot fail.
  draft.commit();
  if (opening) length = 0;
  if (tokens == 0) return {};
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    Sequence& s = sequences[b];
    s.length += tokens;
    s.non_finite.insert(s.non_finite.end(), news[b].begin(), news[b].end());
    if (arrival()) continue;
    s.window.set_count(s.window.count() + tokens);
    s.seen.resize(static_cast<std::size_t>(s.window.count()), Seen::unknown);
  }
  length += tokens;
  ++version;
  return {};
}

// Sequences that hold nothing yet.
Status Cache::State::open(std::int64_t batch, Draft& draft) {
  std::vector<Sequence> fresh(static_cast<std::size_t>(batch));
  for (Sequence& s : fresh) {
    s.sink_limit = seals() ? config.recipe.sinks : 0;
    s.anchored = arrival();
    KV4_RETURN_IF_ERROR(give_note(s));
  }
  own.tables.reset();
  draft.make(std::move(fresh));
  return {};
}

// Room for `tokens` more rows. A window grows by steps, small ones while it is small, since short texts are all window; a long
// prefill's takes just what comes. One that never seals grows by an eighth, so that appending costs O(1).
Status Cache::State::make_room(Sequence& s, std::int64_t tokens) const {
  const std::int64_t need = s.window.count() + tokens;
  std::int64_t room = s.window.capacity();
  if (need > room) {
    room = need + std::max<std::int64_t>(2, need / (seals() ? 16 : 8));
    const std::int64_t most = seals() ? decode_rows(s) : config.sliding_window > 0 ? config.sliding_window + kPageTokens : room;
    room = std::max(need, std::min(room, most));
  }
  KV4_RETURN_IF_ERROR(s.window.make_room(*backend, shape, tokens, room));
  // One per row, so that what is counted later has its place.
  if (s.seen.capacity() < static_cast<std::size_t>(need)) s.seen.reserve(static_cast<std::size_t>(s.window.capacity()));
  return {};
}

Status Cache::State::push(std::vector<Sequence>& next, const TensorView& k, const TensorView& v) {
  const std::int64_t tokens = k.shape[2];
  for (Sequence& s : next) KV4_RETURN_IF_ERROR(make_room(s, tokens));
  KV4_RETURN_IF_ERROR(make_tables());
  KV4_RETURN_IF_ERROR(view_before(next, tokens));
  await_news(next.size());
  found.clear();
  for (std::vector<NonFinite>& each : news) found.push_back(&each);
  StoreJob job;
  job.k = k;
  job.v = v;
  job.sequences = views;
  job.found = found.data();
  job.tables = own.tables.get();
  KV4_RETURN_IF_ERROR(backend->store(job));
  make_room_for_news(next);
  return {};
}

void Cache::State::await_news(std::size_t batch) {
  news.resize(batch);
  for (std::vector<NonFinite>& each : news) each.clear();
}

// News that a call takes over once it succeeded.
void Cache::State::make_room_for_news(std::vector<Sequence>& next) const {
  for (std::size_t b = 0; b < next.size(); ++b)
    if (!news[b].empty()) next[b].non_finite.reserve(next[b].non_finite.size() + news[b].size());
}

void Cache::State::note_non_finite(const Sequence& s, std::size_t row, const TensorView& k, const TensorView& v) {
  const std::int64_t tokens = k.shape[2];
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (masked[row * static_cast<std::size_t>(tokens) + static_cast<std::size_t>(t)] == 0) continue;
    NonFinite x{s.length + t, false, false};
    for (int h = 0; h < heads(); ++h) {
      x.key |= !finite(k.at(static_cast<std::int64_t>(row), h, t), config.dtype, config.head_dim_k);
      x.value |= !finite(v.at(static_cast<std::int64_t>(row), h, t), config.dtype, config.head_dim_v);
    }
    news[row].push_back(x);
  }
}

// Arrival mode: the new tokens go straight into the last page and the pages after it.
Status Cache::State::seal_arrived(std::vector<Sequence>& next, const TensorView& k, const TensorView& v) {
  const std::int64_t tokens = k.shape[2];
  await_news(next.size());
  // All pages first, so that running out of memory changes nothing.
  std::vector<std::vector<PageRef>> fresh(next.size());
  std::vector<bool> copied(next.size());
  for (std::size_t b = 0; b < next.size(); ++b) {
    const Sequence& s = next[b];
    const std::int64_t room = s.pages.empty() ? 0 : kPageTokens - s.last_page_tokens;
    std::int64_t count = (std::max<std::int64_t>(0, tokens - room) + kPageTokens - 1) / kPageTokens;
    copied[b] = room > 0 && s.pages.back().shared();  // forks write to a copy of the open page
    count += copied[b] ? 1 : 0;
    KV4_RETURN_IF_ERROR(pool->allocate(static_cast<std::size_t>(count), &fresh[b]));
  }
  jobs.clear();
  masked.assign(next.size() * static_cast<std::size_t>(tokens), 0);
  std::vector<PageList> pages(next.size());
  std::vector<int> last(next.size());
  for (std::size_t b = 0; b < next.size(); ++b) {
    const Sequence& s = next[b];
    pages[b] = s.pages;
    auto page = fresh[b].begin();
    int used = s.pages.empty() ? kPageTokens : s.last_page_tokens;
    if (copied[b]) {
      KV4_RETURN_IF_ERROR(backend->copy(page->data(), s.pages.back().data(), pool->page_bytes()));
      pages[b].replace_back(*page++);
    }
    std::uint8_t* skip = masked.data() + b * static_cast<std::size_t>(tokens);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (int h = 0; h < heads(); ++h)
        if (!finite(k.at(b, h, t), config.dtype, config.head_dim_k) || !finite(v.at(b, h, t), config.dtype, config.head_dim_v))
          skip[t] = 1;
    for (std::int64_t t = 0; t < tokens;) {
      if (used == kPageTokens) {
        KV4_RETURN_IF_ERROR(backend->clear(page->data(), pool->page_bytes()));
        pages[b].append(*page++);
        used = 0;
      }
      const int count = static_cast<int>(std::min<std::int64_t>(kPageTokens - used, tokens - t));
      for (int h = 0; h < heads(); ++h) {
        SealJob job;
        job.k = k.at(static_cast<std::int64_t>(b), h, t);
        job.v = v.at(static_cast<std::int64_t>(b), h, t);
        job.dtype = config.dtype;
        job.k_stride = k.stride[2];
        job.v_stride = v.stride[2];
        job.skip = skip + t;
        job.lambda_k = lambda_k(s, h);
        job.lambda_v = lambda_v(h);
        job.slice = slice(pages[b].back(), h);
        job.first = used;
        job.count = count;
        jobs.push_back(job);
      }
      used += count;
      t += count;
    }
    last[b] = used;
  }
  for (std::size_t b = 0; b < next.size(); ++b) note_non_finite(next[b], b, k, v);
  make_room_for_news(next);
  // Last: it writes into the open page, behind the tokens that are there.
  KV4_RETURN_IF_ERROR(backend->seal(spec, jobs));
  for (std::size_t b = 0; b < next.size(); ++b) {
    next[b].pages = std::move(pages[b]);
    next[b].last_page_tokens = last[b];
  }
  return {};
}

}  // namespace kv4
