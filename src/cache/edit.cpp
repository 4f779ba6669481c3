// Crop and the dequantised view of what is held.
#include <algorithm>
#include <string>
#include <vector>

#include "cache/output.h"
#include "cache/state.h"

namespace kv4 {

Status Cache::State::crop(std::int64_t n) {
  if (n < 0 || n > length)
    return error(StatusCode::out_of_range, "length", "0 to " + std::to_string(length), std::to_string(n));
  if (n == length) return {};
  for (const Sequence& s : sequences) {
    const std::int64_t needed = std::max<std::int64_t>(0, n - config.sliding_window + 1);
    if (s.evicted > needed)
      return error(StatusCode::out_of_range, "length",
                   "at least " + std::to_string(s.evicted + config.sliding_window - 1) + " (older tokens left the sliding window), or 0 by reset",
                   std::to_string(n));
  }
  Draft draft(sequences);
  draft.make();
  for (Sequence& s : draft.sequences()) KV4_RETURN_IF_ERROR(crop_sequence(s, n));
  draft.commit();
  length = n;
  ++version;
  return {};
}

Status Cache::State::crop_sequence(Sequence& s, std::int64_t n) const {
  s.length = n;
  hear(s);
  std::erase_if(s.non_finite, [n](const NonFinite& x) { return x.position >= n; });
  if (!s.notes.empty()) KV4_RETURN_IF_ERROR(give_note(s));  // the old one may tell of what is gone, also later
  const bool open = s.query_energy.any();  // lambda is not fixed for good
  s.query_energy.crop(n);
  if (arrival()) {
    const std::int64_t kept = n - s.page_position(s.first_page);
    const std::int64_t pages = (kept + kPageTokens - 1) / kPageTokens;
    s.pages.truncate(static_cast<std::size_t>(pages));
    s.last_page_tokens = pages == 0 ? kPageTokens : static_cast<int>(kept - (pages - 1) * kPageTokens);
    return {};
  }
  if (!s.anchored || n >= s.window_position) {
    if (s.anchored) {
      // Pages with exact rows behind them go if one-by-one decoding would not have them yet.
      const std::int64_t keep = std::clamp(s.pages_due(n, config.recipe.window), s.released_pages(), s.page_end());
      s.pages.truncate(static_cast<std::size_t>(keep - s.first_page));
    }
    const std::int64_t rows = std::max<std::int64_t>(0, n - s.window_position);
    s.window_position = std::min(s.window_position, n);
    s.window.set_count(rows);
    s.seen.resize(static_cast<std::size_t>(rows));
  } else if (n >= s.body()) {
    const std::int64_t index = (n - s.body()) / kPageTokens, rows = (n - s.body()) % kPageTokens;
    KV4_RETURN_IF_ERROR(reopen_page(s, index, rows));
  } else {
    // Into the sinks, or before them: the sequence is no longer anchored.
    s.window = s.sinks;
    s.window_position = std::min(s.start, n);
    s.window.set_count(std::max<std::int64_t>(0, n - s.start));
    s.seen.assign(static_cast<std::size_t>(s.window.count()), Seen::visible);
    s.sinks.clear();
    s.pages.clear();
    s.first_page = 0;
    s.start = 0;
    s.anchored = false;
  }
  if (s.pages.empty() && open) s.lambda.reset();
  return {};
}

// Makes page `index` the window again: its first `rows` tokens, dequantised.
Status Cache::State::reopen_page(Sequence& s, std::int64_t index, std::int64_t rows) const {
  RowBuffer window;
  if (rows > 0) {
    const PageRef page = s.pages[static_cast<std::size_t>(index - s.first_page)];
    KV4_RETURN_IF_ERROR(window.reserve(*backend, shape, config.recipe.window + kPageTokens));
    std::vector<DequantiseJob> all;
    for (int h = 0; h < heads(); ++h) {
      DequantiseJob job;
      job.slice = slice(page, h);
      job.lambda_k = lambda_k(s, h);
      job.lambda_v = lambda_v(h);
      job.count = static_cast<int>(rows);
      job.dtype = config.dtype;
      job.k = window.key(h, 0);
      job.v = window.value(h, 0);
      job.k_stride = config.head_dim_k;
      job.v_stride = config.head_dim_v;
      all.push_back(job);
    }
    KV4_RETURN_IF_ERROR(backend->dequantise(spec, all));
    window.set_count(rows);
  }
  s.pages.truncate(static_cast<std::size_t>(index - s.first_page));
  s.window = std::move(window);
  s.window_position = s.page_position(index);
  s.seen.assign(static_cast<std::size_t>(rows), Seen::visible);
  return {};
}

Status Cache::State::dense(bool keys, std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  const int dim = keys ? config.head_dim_k : config.head_dim_v;
  if (first < 0 || count < 0 || first > length || count > length - first)
    return error(StatusCode::out_of_range, "first, count", "positions within 0 to " + std::to_string(length),
                 std::to_string(first) + ", " + std::to_string(count));
  for (const Sequence& s : sequences)
    if (count > 0 && first < s.evicted)
      return error(StatusCode::out_of_range, "first", "at least " + std::to_string(s.evicted) + " (older tokens left the sliding window)",
                   std::to_string(first));
  if (out.shape[0] != static_cast<std::int64_t>(sequences.size()) || out.shape[1] != heads() || out.shape[2] != count || out.shape[3] != dim)
    return invalid_argument("out",
                            "shape [" + std::to_string(sequences.size()) + ", " + std::to_string(heads()) + ", " + std::to_string(count) +
                                ", " + std::to_string(dim) + "]",
                            "[" + std::to_string(out.shape[0]) + ", " + std::to_string(out.shape[1]) + ", " + std::to_string(out.shape[2]) +
                                ", " + std::to_string(out.shape[3]) + "]");
  if (out.stride[3] != 1 && dim > 1) return invalid_argument("out", "channel stride 1", std::to_string(out.stride[3]));
  KV4_RETURN_IF_ERROR(check_dtype("out", out.dtype));
  KV4_RETURN_IF_ERROR(check_places(out, nullptr));
  std::vector<DequantiseJob> packed;
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const Sequence& s = sequences[b];
    const auto put_exact = [&](const RowBuffer* from, std::int64_t at, std::int64_t count_there) {
      const std::int64_t lo = std::max(at, first), hi = std::min(at + count_there, first + count);
      if (lo >= hi) return Status();
      ConvertJob job;
      if (from != nullptr) {
        const ExactRows rows = from->view(lo - at, hi - lo, lo);
        job.from = keys ? rows.k : rows.v;
        job.from_head_stride = keys ? rows.k_head_stride : rows.v_head_stride;
        job.from_stride = keys ? rows.k_stride : rows.v_stride;
      }
      job.from_dtype = config.dtype;
      job.to = out.at(static_cast<std::int64_t>(b), 0, lo - first);
      job.to_dtype = out.dtype;
      job.to_head_stride = out.stride[1];
      job.to_stride = out.stride[2];
      job.heads = heads();
      job.dim = dim;
      job.rows = hi - lo;
      return backend->convert(job);
    };
    // Padding that was dropped reads as 0.
    const std::int64_t held = s.anchored ? s.start : s.window_position;
    KV4_RETURN_IF_ERROR(put_exact(nullptr, 0, held));
    KV4_RETURN_IF_ERROR(put_exact(&s.sinks, s.start, s.sinks.count()));
    packed.clear();
    for (std::int64_t i = s.first_page; i < s.page_end(); ++i) {
      const std::int64_t at = s.page_position(i);
      const std::int64_t tokens = i + 1 == s.page_end() ? s.last_page_tokens : kPageTokens;
      const std::int64_t lo = std::max(at, first), hi = std::min(at + tokens, first + count);
      if (lo >= hi) continue;
      for (int h = 0; h < heads(); ++h) {
        DequantiseJob job;
        job.slice = slice(s.pages[static_cast<std::size_t>(i - s.first_page)], h);
        job.lambda_k = lambda_k(s, h);
        job.lambda_v = lambda_v(h);
        job.first = static_cast<int>(lo - at);
        job.count = static_cast<int>(hi - lo);
        job.dtype = out.dtype;
        (keys ? job.k : job.v) = out.at(static_cast<std::int64_t>(b), h, lo - first);
        job.k_stride = job.v_stride = out.stride[2];
        packed.push_back(job);
      }
    }
    KV4_RETURN_IF_ERROR(backend->dequantise(spec, packed));
    // Rows still exact win over pages sealed during the last call.
    KV4_RETURN_IF_ERROR(put_exact(&s.window, s.window_position, s.window.count()));
  }
  return {};
}

}  // namespace kv4
