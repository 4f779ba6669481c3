// Sequences whose memory a host owns, as tables of int32 in memory that kernels read, and what follows from them for each: a view for
// attention and for storing, a job for each page to be sealed or dequantised. One arithmetic for hosts and devices.
//
// Page i of a sequence and block i of its exact rows both hold positions 64 i ... 64 i + 63. Tokens below sealed[b] are read from pages, the
// others from rows; the first tokens of all are read from rows always, where sinks are kept.
#pragma once

#include "backend/backend.h"

namespace kv4 {

// Exact rows in blocks of kPageTokens: row r of block i, head h at k + i * k_block_stride + h * k_head_stride + r * k_stride elements.
struct RowMemory {
  void* k = nullptr;
  void* v = nullptr;
  std::int64_t k_block_stride = 0, v_block_stride = 0;
  std::int64_t k_head_stride = 0, v_head_stride = 0;
  std::int64_t k_stride = 0, v_stride = 0;
};

struct PagedBatch {
  int size = 0;                              // sequences
  const std::int32_t* queries = nullptr;     // [size + 1]: sequence b has the call's rows queries[b] ... queries[b + 1] - 1
  const std::int32_t* lengths = nullptr;     // [size] tokens, those of the call included
  const std::int32_t* sealed = nullptr;      // [size] tokens in pages: a multiple of kPageTokens, at most the length
  const std::int32_t* pages = nullptr;       // [size, pages_stride] ids of pages; those that nothing reads may be anything
  std::int64_t pages_stride = 0;
  const std::int32_t* blocks = nullptr;      // [size, blocks_stride] ids of blocks of exact rows, likewise
  std::int64_t blocks_stride = 0;
  const std::int32_t* sinks = nullptr;       // [size] the block that holds the first sink_tokens tokens once page 0 is sealed; or null
  std::int32_t sink_tokens = 0;
  std::int32_t window = 0;                   // queries see so many newest tokens, their own included; 0 = all
  PageMemory page_memory;
  RowMemory rows;
  DType dtype = DType::f16;                  // of the rows
  const float* lambda_k = nullptr;           // [kv_heads, head_dim_k] or null for 1
  const float* lambda_v = nullptr;
  std::int64_t lambda_k_stride = 0, lambda_v_stride = 0;  // floats between sequences; 0: one for all
};

// Pages of each sequence that hold the positions begin[b] ... end[b] - 1, multiples of kPageTokens; at most `most` of each.
struct SealRange {
  const std::int32_t* begin = nullptr;  // [size]
  const std::int32_t* end = nullptr;    // [size]
  int most = 0;
};

KV4_DEVICE inline const float* lambda_of(const float* lambda, std::int64_t stride, int b) { return lambda == nullptr ? nullptr : lambda + b * stride; }

KV4_DEVICE inline ExactRows rows_of(const PagedBatch& batch, const std::int32_t* blocks, std::int64_t position, std::int64_t count) {
  ExactRows out;
  const RowMemory& r = batch.rows;
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

// stored: the call's rows lie in their blocks already. What no query of the call sees, for the window, is left out by whole pages.
KV4_DEVICE inline SequenceView view_of(const PagedBatch& batch, int b, bool stored) {
  SequenceView view;
  const std::int64_t count = batch.queries[b + 1] - batch.queries[b], length = batch.lengths[b], sealed = batch.sealed[b];
  view.input_row = batch.queries[b];
  view.query_count = count;
  view.query_position = length - count;
  const std::int64_t first = batch.window > 0 ? view.query_position - batch.window + 1 : 0;  // that some query sees
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
  view.exact[1] = rows_of(batch, batch.blocks + b * batch.blocks_stride + held, held * kPageTokens, (stored ? length : length - count) - held * kPageTokens);
  view.lambda_k = lambda_of(batch.lambda_k, batch.lambda_k_stride, b);
  view.lambda_v = lambda_of(batch.lambda_v, batch.lambda_v_stride, b);
  return view;
}

// The n-th page of the range of sequence b: of Job, SealJob or DequantiseJob, all that the two have in common. page < 0: there is none.
template <class Job>
KV4_DEVICE inline Job page_job_of(const PagedBatch& batch, const SealRange& range, int b, int n) {
  Job job;
  const std::int64_t index = range.begin[b] / kPageTokens + n;
  job.page = -1;
  if (index >= range.end[b] / kPageTokens) return job;
  job.page = batch.pages[b * batch.pages_stride + index];
  const std::int64_t block = batch.blocks[b * batch.blocks_stride + index];
  const RowMemory& r = batch.rows;
  const std::int64_t size = static_cast<std::int64_t>(size_of(batch.dtype));
  job.k = static_cast<std::byte*>(r.k) + block * r.k_block_stride * size;
  job.v = static_cast<std::byte*>(r.v) + block * r.v_block_stride * size;
  job.dtype = batch.dtype;
  job.k_head_stride = r.k_head_stride;
  job.v_head_stride = r.v_head_stride;
  job.k_stride = r.k_stride;
  job.v_stride = r.v_stride;
  job.count = kPageTokens;
  job.lambda_k = lambda_of(batch.lambda_k, batch.lambda_k_stride, b);
  job.lambda_v = lambda_of(batch.lambda_v, batch.lambda_v_stride, b);
  return job;
}

KV4_DEVICE inline SealJob seal_job_of(const PagedBatch& batch, const SealRange& range, int b, int n) {
  SealJob job = page_job_of<SealJob>(batch, range, b, n);
  if (batch.sinks != nullptr && range.begin[b] == 0 && n == 0) job.hidden = static_cast<std::uint8_t>(batch.sink_tokens);
  return job;
}

}  // namespace kv4
