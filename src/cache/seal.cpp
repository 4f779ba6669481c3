// When tokens are sealed, dropped and evicted. What sealing computes is the backend's.
#include <algorithm>

#include "cache/state.h"

namespace kv4 {

const float* Cache::State::lambda_k(const Sequence& s, int head) const {
  const std::shared_ptr<Block>& values = given_k ? given_k : s.lambda;
  return values == nullptr ? nullptr : values->as<float>() + static_cast<std::size_t>(head) * config.head_dim_k;
}

const float* Cache::State::lambda_v(int head) const {
  return given_v == nullptr ? nullptr : given_v->as<float>() + static_cast<std::size_t>(head) * config.head_dim_v;
}

Status Cache::State::seal() {
  Draft draft(sequences);
  KV4_RETURN_IF_ERROR(settle(draft));
  draft.commit();
  return {};
}

Status Cache::State::settle(Draft& draft) {
  if (std::none_of(sequences.begin(), sequences.end(), [this](const Sequence& s) { return seals_more(s, length, false) || releases(s) || evicts(s); })) return {};
  draft.make();
  std::vector<Sequence>& next = draft.sequences();
  if (seals() && !arrival()) KV4_RETURN_IF_ERROR(seal_until(next, length));
  for (Sequence& s : next) {
    if (seals() && !arrival() && s.anchored) {
      // Rows sealed while the last call was answered were kept until now: a crop of that call
      // reopens their pages.
      const std::int64_t due = std::min(s.page_end(), s.pages_due(length, config.recipe.window));
      KV4_RETURN_IF_ERROR(release_rows(s, s.page_position(due)));
      // A page that can no longer be undone has fixed lambda for good.
      if (s.lambda && s.released_pages() > 0) s.query_energy = QueryEnergy();
    }
    KV4_RETURN_IF_ERROR(evict(s));
  }
  return {};
}

// Whether seal_until(n) has something to do, or may have after a call told of masks, which moves the start of what is not anchored.
bool Cache::State::seals_more(const Sequence& s, std::int64_t n, bool told) const {
  if (!seals() || arrival()) return false;
  const std::int64_t start = told && !s.anchored ? s.window_position : s.presumed_start();
  return (n - start - s.sink_limit - config.recipe.window) / kPageTokens > s.page_end();
}

// Whether exact rows, or what lambda came from, wait for no crop any more.
bool Cache::State::releases(const Sequence& s) const {
  if (!seals() || arrival() || !s.anchored) return false;
  const std::int64_t due = std::min(s.page_end(), s.pages_due(length, config.recipe.window));
  return s.page_position(due) > s.window_position || (s.window.capacity() > decode_rows(s) && s.window.count() <= decode_rows(s)) ||
         (s.lambda && s.query_energy.any() && s.released_pages() > 0);
}

// Whether evict has something to do.
bool Cache::State::evicts(const Sequence& s) const {
  if (config.sliding_window == 0 || recording) return false;
  const std::int64_t needed = s.length - config.sliding_window + 1;
  if (needed <= s.first_held()) return false;
  const std::int64_t rows = std::min(needed - s.window_position, s.window.count());
  if (!seals()) return rows >= kPageTokens / 2;
  const bool page = s.page_position(s.first_page + 1) <= needed;
  if (arrival()) return s.pages.size() > 1 && page;
  if (!s.anchored) return needed >= s.presumed_start() + s.sink_limit + kPageTokens;
  return (needed >= s.body() && s.sinks.count() > 0) || (page && (!s.pages.empty() || rows >= kPageTokens));
}

// Exact rows that decoding one by one holds at most, and one more: the token whose call lets go of a page's rows lies behind them.
std::int64_t Cache::State::decode_rows(const Sequence& s) const {
  return config.recipe.window + kPageTokens + (s.anchored ? 0 : s.sink_limit) + 1;
}

Status Cache::State::anchor(Sequence& s) const {
  const std::int64_t start = s.presumed_start();
  const std::int64_t skip = start - s.window_position;
  const std::int64_t sinks = std::min<std::int64_t>(s.sink_limit, s.window.count() - skip);
  RowBuffer rows;
  if (sinks > 0) {
    KV4_RETURN_IF_ERROR(rows.reserve(*backend, shape, sinks));
    KV4_RETURN_IF_ERROR(rows.push_rows(s.window, skip, sinks));
  }
  s.sinks = std::move(rows);
  s.start = start;
  s.anchored = true;
  s.first_page = 0;
  s.drop_window_front(skip + std::max<std::int64_t>(0, sinks));
  return {};
}

Status Cache::State::release_rows(Sequence& s, std::int64_t position) const {
  s.drop_window_front(std::min(position - s.window_position, s.window.count()));
  // After a long prefill the buffer is far larger than decoding needs.
  return shrink(s, decode_rows(s));
}

// A window that was larger and needs `room` rows at most.
Status Cache::State::shrink(Sequence& s, std::int64_t room) const {
  if (s.window.capacity() <= room || s.window.count() > room) return {};
  KV4_RETURN_IF_ERROR(s.window.reserve(*backend, shape, room));
  s.seen.shrink_to_fit();
  return {};
}

// Tokens that no later query can see are dropped: whole pages, and exact rows by pages too so
// that page boundaries stay where they are.
Status Cache::State::evict(Sequence& s) const {
  if (config.sliding_window == 0 || recording) return {};
  const std::int64_t needed = s.length - config.sliding_window + 1;  // first position still visible
  if (needed <= s.first_held()) return {};
  const std::int64_t before = s.first_held();
  KV4_RETURN_IF_ERROR(evict_below(s, needed));
  if (s.first_held() > before) s.evicted = s.first_held();
  return {};
}

Status Cache::State::evict_below(Sequence& s, std::int64_t needed) const {
  if (!seals()) {
    // Rows go in batches, so that moving the rest costs less than a copy per token.
    const std::int64_t rows = std::min(needed - s.window_position, s.window.count());
    if (rows < kPageTokens / 2) return {};
    s.drop_window_front(rows);
    return shrink(s, config.sliding_window + kPageTokens);
  }
  if (arrival()) {
    while (s.pages.size() > 1 && s.page_position(s.first_page + 1) <= needed) {
      s.pages.drop_front();
      ++s.first_page;
    }
    return {};
  }
  if (!s.anchored) {
    if (needed < s.presumed_start() + s.sink_limit + kPageTokens) return {};
    KV4_RETURN_IF_ERROR(anchor(s));
  }
  if (needed >= s.body()) s.sinks.clear();
  while (!s.pages.empty() && s.page_position(s.first_page + 1) <= needed) {
    s.pages.drop_front();
    ++s.first_page;
  }
  if (s.pages.empty() && s.window_position <= s.page_position(s.first_page)) {
    const std::int64_t rows = std::min(needed - s.window_position, s.window.count()) / kPageTokens * kPageTokens;
    if (rows > 0) {
      s.drop_window_front(rows);
      s.first_page += rows / kPageTokens;
      return shrink(s, std::max<std::int64_t>(config.recipe.window, config.sliding_window) + kPageTokens + 1);
    }
  }
  return {};
}

// nonzero where a window row is masked, or held NaN or infinity (zeros that must not enter a mean).
void Cache::State::note_masked(const Sequence& s, std::int64_t first_row, std::int64_t rows) {
  masked.resize(static_cast<std::size_t>(rows));
  for (std::int64_t j = 0; j < rows; ++j)
    masked[static_cast<std::size_t>(j)] = s.seen[static_cast<std::size_t>(first_row + j)] == Seen::masked;
  for (const NonFinite& x : s.non_finite) {
    const std::int64_t j = x.position - s.window_position - first_row;
    if (j >= 0 && j < rows) masked[static_cast<std::size_t>(j)] = 1;
  }
}

// From all that one-by-one decoding holds when the first page is due: the queries so far that count, and the
// keys of that page and of the window behind it, each 64 about their own mean, as pages are.
Status Cache::State::fix_lambda(Sequence& s) {
  if (config.recipe.key.lambda != LambdaMode::automatic || s.lambda) return {};
  const std::int64_t row = s.page_position(s.page_end()) - s.window_position;
  const std::int64_t blocks = 1 + config.recipe.window / kPageTokens;
  note_masked(s, row, blocks * kPageTokens);
  // Pages of holes say nothing: the next one decides.
  if (std::find(masked.begin(), masked.end(), 0) == masked.end()) return {};
  std::shared_ptr<Block> values;
  KV4_RETURN_IF_ERROR(Block::make(*backend, "lambda", static_cast<std::size_t>(heads()) * config.head_dim_k * sizeof(float), &values));
  LambdaJob job;
  const ExactRows keys = s.window.view(row, blocks * kPageTokens, 0);
  job.k = keys.k;
  job.dtype = config.dtype;
  job.k_head_stride = keys.k_head_stride;
  job.k_stride = keys.k_stride;
  job.kv_heads = heads();
  job.dim = config.head_dim_k;
  job.blocks = static_cast<int>(blocks);
  job.skip = masked;
  std::vector<const float*> energies;
  for (const std::shared_ptr<Block>& row : s.query_energy.rows)
    if (row) energies.push_back(row->as<float>());
  job.energies = energies;
  job.lambda = values->as<float>();
  KV4_RETURN_IF_ERROR(backend->fix_lambda(job));
  s.lambda = std::move(values);
  return {};
}

// All sequences in one call of the backend: their pages are made first, and belong to them once that has been queued.
Status Cache::State::seal_until(std::vector<Sequence>& next, std::int64_t n) {
  struct Due {
    Sequence* sequence;
    std::vector<PageRef> pages;
    std::vector<std::uint8_t> masked;
    std::shared_ptr<Block> copied;  // of the flags, for kernels that read their own memory alone; where there are any
  };
  std::vector<Due> all;
  jobs.clear();
  for (Sequence& s : next) {
    const std::int64_t due = s.pages_due(n, config.recipe.window);
    if (due <= s.page_end() && s.anchored) continue;
    if (due == 0) continue;
    if (!s.anchored) KV4_RETURN_IF_ERROR(anchor(s));
    std::int64_t count = due - s.page_end();
    if (count <= 0) continue;
    // Lambda comes before eviction: it is that of the first page due, sealed or not.
    KV4_RETURN_IF_ERROR(fix_lambda(s));
    // Pages that no query will ever see again are not worth sealing.
    if (config.sliding_window > 0 && !recording && s.pages.empty() && s.window_position == s.page_position(s.first_page)) {
      const std::int64_t needed = s.length - config.sliding_window + 1;
      const std::int64_t gone = std::min((needed - s.window_position) / kPageTokens, count);
      if (needed > s.window_position && gone > 0 && n == length) {
        s.drop_window_front(gone * kPageTokens);
        s.first_page += gone;
        count -= gone;
        if (s.sinks.count() == 0) s.evicted = s.window_position;  // evict sees to those that still have sinks
        if (count == 0) continue;
      }
    }
    const std::int64_t first_row = s.page_position(s.page_end()) - s.window_position;
    note_masked(s, first_row, count * kPageTokens);
    Due& here = all.emplace_back(Due{&s, {}, masked, {}});
    KV4_RETURN_IF_ERROR(pool->allocate(static_cast<std::size_t>(count), &here.pages));
    const std::uint8_t* flags = here.masked.data();
    if (!backend->host_memory()) {
      const bool any = std::find(masked.begin(), masked.end(), 1) != masked.end();
      KV4_RETURN_IF_ERROR(Block::copy_of(*backend, "masked", flags, any ? masked.size() : 0, &here.copied));
      flags = any ? here.copied->as<std::uint8_t>() : nullptr;
    }
    for (std::int64_t p = 0; p < count; ++p) {
      for (int h = 0; h < heads(); ++h) {
        SealJob job;
        job.k = s.window.key(h, first_row + p * kPageTokens);
        job.v = s.window.value(h, first_row + p * kPageTokens);
        job.dtype = config.dtype;
        job.k_stride = config.head_dim_k;
        job.v_stride = config.head_dim_v;
        job.skip = flags == nullptr ? nullptr : flags + p * kPageTokens;
        job.lambda_k = lambda_k(s, h);
        job.lambda_v = lambda_v(h);
        job.slice = slice(here.pages[static_cast<std::size_t>(p)], h);
        jobs.push_back(job);
      }
    }
  }
  if (all.empty()) return {};
  KV4_RETURN_IF_ERROR(backend->seal(spec, jobs));
  for (Due& due : all) due.sequence->pages.append(std::move(due.pages));
  // A prefill's work lists are not kept for decoding, which needs them once in 64 tokens.
  std::vector<SealJob>().swap(jobs);
  std::vector<std::uint8_t>().swap(masked);
  return {};
}

}  // namespace kv4
