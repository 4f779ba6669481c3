// Taking tokens in: checks, non-finite rows, room in the window; arrival mode seals at once.
#include <algorithm>
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
  return {};
}

Status Cache::State::append(const TensorView& k, const TensorView& v) {
  KV4_RETURN_IF_ERROR(check_rows(k, "k", config.head_dim_k));
  KV4_RETURN_IF_ERROR(check_rows(v, "v", config.head_dim_v));
  if (v.shape[0] != k.shape[0] || v.shape[2] != k.shape[2])
    return invalid_argument("v", "the batch and tokens of k, " + shape_text(k.shape), shape_text(v.shape));
  const std::int64_t tokens = k.shape[2];
  if (backend->capturing()) return append_captured(k, v);
  KV4_RETURN_IF_ERROR(settle());
  const bool opening = sequences.empty();
  if (opening) {
    std::vector<Sequence> fresh(static_cast<std::size_t>(k.shape[0]));
    for (Sequence& s : fresh) {
      s.sink_limit = seals() ? config.recipe.sinks : 0;
      s.anchored = arrival();
      KV4_RETURN_IF_ERROR(give_note(s));
    }
    sequences = std::move(fresh);
    length = 0;
    own.tables.reset();
  }
  if (tokens == 0) return {};
  Status status;
  if (arrival()) {
    status = seal_arrived(k, v);
  } else {
    for (Sequence& s : sequences)
      if (status = make_room(s, tokens); !status.ok()) break;
    if (status.ok()) status = push(k, v);
  }
  if (!status.ok()) {
    if (opening) sequences.clear();
    return status;
  }
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    sequences[b].length += tokens;
    if (arrival()) note_non_finite(sequences[b], static_cast<std::int64_t>(b), k, v);
  }
  length += tokens;
  ++version;
  return {};
}

// Room for `tokens` more rows. A sealing cache holds what decoding needs, or exactly what a long
// prefill brings; one that never seals grows by an eighth, so that appending costs O(1).
Status Cache::State::make_room(Sequence& s, std::int64_t tokens) const {
  const std::int64_t need = s.window.count() + tokens;
  std::int64_t room = s.window.capacity();
  if (need > room) {
    if (seals()) {
      const std::int64_t decode = config.recipe.window + kPageTokens + (s.anchored ? 0 : s.sink_limit);
      room = std::max(need, need <= decode ? decode : 0);
    } else {
      room = std::max(need, std::max<std::int64_t>(kPageTokens, need + need / 8));
    }
    return s.window.reserve(*backend, shape, room);
  }
  return s.window.own(*backend, shape);
}

Status Cache::State::push(const TensorView& k, const TensorView& v) {
  const std::int64_t tokens = k.shape[2];
  KV4_RETURN_IF_ERROR(make_tables());
  KV4_RETURN_IF_ERROR(view_before(tokens));
  found.clear();
  for (Sequence& s : sequences) found.push_back(&s.non_finite);
  StoreJob job;
  job.k = k;
  job.v = v;
  job.sequences = views;
  job.found = found.data();
  job.tables = own.tables.get();
  KV4_RETURN_IF_ERROR(backend->store(job));
  for (Sequence& s : sequences) {
    s.window.set_count(s.window.count() + tokens);
    s.seen.resize(static_cast<std::size_t>(s.window.count()), Seen::unknown);
  }
  return {};
}

// Remembers which of the newest tokens held NaN or infinity: of those that seal_arrived marked, whether key or value.
void Cache::State::note_non_finite(Sequence& s, std::int64_t row, const TensorView& k, const TensorView& v) const {
  const std::int64_t tokens = k.shape[2];
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (masked[static_cast<std::size_t>(row * tokens + t)] == 0) continue;
    NonFinite x{s.length - tokens + t, false, false};
    for (int h = 0; h < heads(); ++h) {
      x.key |= !finite(k.at(row, h, t), config.dtype, config.head_dim_k);
      x.value |= !finite(v.at(row, h, t), config.dtype, config.head_dim_v);
    }
    s.non_finite.push_back(x);
  }
}

// Arrival mode: the new tokens go straight into the last page and the pages after it.
Status Cache::State::seal_arrived(const TensorView& k, const TensorView& v) {
  const std::int64_t tokens = k.shape[2];
  // All pages first, so that running out of memory changes nothing.
  std::vector<std::vector<PageRef>> fresh(sequences.size());
  std::vector<bool> copied(sequences.size());
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const Sequence& s = sequences[b];
    const std::int64_t room = s.pages.empty() ? 0 : kPageTokens - s.last_page_tokens;
    std::int64_t count = (std::max<std::int64_t>(0, tokens - room) + kPageTokens - 1) / kPageTokens;
    copied[b] = room > 0 && s.pages.back().shared();  // forks write to a copy of the open page
    count += copied[b] ? 1 : 0;
    KV4_RETURN_IF_ERROR(pool->allocate(static_cast<std::size_t>(count), &fresh[b]));
  }
  jobs.clear();
  masked.assign(sequences.size() * static_cast<std::size_t>(tokens), 0);
  std::vector<PageList> pages(sequences.size());
  std::vector<int> last(sequences.size());
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const Sequence& s = sequences[b];
    pages[b] = s.pages;
    auto next = fresh[b].begin();
    int used = s.pages.empty() ? kPageTokens : s.last_page_tokens;
    if (copied[b]) {
      KV4_RETURN_IF_ERROR(backend->copy(next->data(), s.pages.back().data(), pool->page_bytes()));
      pages[b].replace_back(*next++);
    }
    std::uint8_t* skip = masked.data() + b * static_cast<std::size_t>(tokens);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (int h = 0; h < heads(); ++h)
        if (!finite(k.at(b, h, t), config.dtype, config.head_dim_k) || !finite(v.at(b, h, t), config.dtype, config.head_dim_v))
          skip[t] = 1;
    for (std::int64_t t = 0; t < tokens;) {
      if (used == kPageTokens) {
        KV4_RETURN_IF_ERROR(backend->clear(next->data(), pool->page_bytes()));
        pages[b].append(*next++);
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
  KV4_RETURN_IF_ERROR(backend->seal(spec, jobs));
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    sequences[b].pages = std::move(pages[b]);
    sequences[b].last_page_tokens = last[b];
  }
  return {};
}

}  // namespace kv4
