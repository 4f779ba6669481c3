// What follows from the tables of a paged batch (kv4/paged.h) for each sequence: a view for attention and for storing,
// a job for each page to be sealed or dequantised. One arithmetic for hosts and devices.
//
// Jobs of a range are a list of size * most entries: those of the sequences after one another, then page < 0.
#pragma once

#include <type_traits>

#include "backend/backend.h"

namespace kv4 {

KV4_DEVICE inline const float* lambda_of(const float* lambda, std::int64_t stride, int b) {
  return lambda == nullptr ? nullptr : lambda + b * stride;
}

KV4_DEVICE inline ExactRows rows_of(const PagedBatch& batch, const std::int32_t* blocks, std::int64_t position,
                                    std::int64_t count) {
  ExactRows out;
  const RowMemory& r = batch.row_memory;
  out.k = r.k;
  out.v = r.v;
  out.k_head_stride = r.k_head_stride;
  out.v_head_stride = r.v_head_stride;
  out.k_stride = r.k_stride;
  out.v_stride = r.v_stride;
  out.blocks = blocks;
  out.k_block_stride = r.k_block_stride;
  out.v_block_stride = r.v_block_stride;
  out.position = position;
  out.count = count > 0 ? count : 0;
  return out;
}

// stored: the call's rows are in their blocks already. Whole pages that the sliding window hides from all of the call's
// queries are left out.
KV4_DEVICE inline SequenceView view_of(const PagedBatch& batch, int b, bool stored) {
  SequenceView view;
  const std::int64_t count = batch.queries[b + 1] - batch.queries[b], length = batch.lengths[b],
                     sealed = batch.sealed[b];
  view.input_row = batch.queries[b];
  view.query_count = count;
  view.query_position = length - count;
  const std::int64_t first = batch.window > 0 ? view.query_position - batch.window + 1 : 0;  // first visible position
  const std::int64_t unseen = first > 0 ? first / kPageTokens : 0, packed = sealed / kPageTokens;
  const std::int64_t begin = unseen < packed ? unseen : packed;
  view.pages = batch.pages + b * batch.pages_stride + begin;
  view.page_count = static_cast<std::int32_t>(packed - begin);
  view.pages_position = begin * kPageTokens;
  if (batch.sinks != nullptr && packed > 0 && batch.sink_tokens > 0) {
    if (begin == 0) view.pages_hidden = batch.sink_tokens;
    view.exact[0] = rows_of(batch, batch.sinks + b, 0, first < batch.sink_tokens ? batch.sink_tokens : 0);
  }
  const std::int64_t held = unseen > packed ? unseen : packed;
  view.exact[1] = rows_of(batch, batch.blocks + b * batch.blocks_stride + held, held * kPageTokens,
                          (stored ? length : length - count) - held * kPageTokens);
  view.lambda_k = lambda_of(batch.lambda_k, batch.lambda_k_stride, b);
  view.lambda_v = lambda_of(batch.lambda_v, batch.lambda_v_stride, b);
  if (batch.non_finite != nullptr) view.note = reinterpret_cast<LateNote*>(batch.non_finite + 2 * b);
  return view;
}

// Pages of the range that are of sequence b.
KV4_DEVICE inline int pages_of(const PageRange& range, int b) {
  const int pages = range.end[b] / kPageTokens - range.begin[b] / kPageTokens;
  return pages < 0 ? 0 : pages < range.most ? pages : range.most;
}

// The n-th page of the range of sequence b, n < pages_of(range, b), as SealJob or DequantiseJob.
template <class Job>
KV4_DEVICE inline Job job_of(const PagedBatch& batch, DType dtype, const PageRange& range, int b, int n) {
  Job job;
  const std::int64_t index = range.begin[b] / kPageTokens + n;
  job.page = batch.pages[b * batch.pages_stride + index];
  const std::int64_t block = batch.blocks[b * batch.blocks_stride + index];
  const RowMemory& r = batch.row_memory;
  const std::int64_t size = static_cast<std::int64_t>(size_of(dtype));
  job.k = static_cast<std::byte*>(r.k) + block * r.k_block_stride * size;
  job.v = static_cast<std::byte*>(r.v) + block * r.v_block_stride * size;
  job.dtype = dtype;
  job.k_head_stride = r.k_head_stride;
  job.v_head_stride = r.v_head_stride;
  job.k_stride = r.k_stride;
  job.v_stride = r.v_stride;
  job.count = kPageTokens;
  job.lambda_k = lambda_of(batch.lambda_k, batch.lambda_k_stride, b);
  job.lambda_v = lambda_of(batch.lambda_v, batch.lambda_v_stride, b);
  if constexpr (std::is_same_v<Job, SealJob>)
    if (batch.sinks != nullptr && range.begin[b] == 0 && n == 0)
      job.hidden = static_cast<std::uint8_t>(batch.sink_tokens);
  return job;
}

}  // namespace kv4
