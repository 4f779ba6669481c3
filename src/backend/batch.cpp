// Views and jobs of a paged batch where the backend's memory is the host's.
#include "backend/batch.h"

namespace kv4 {
namespace {

template <class Job>
Status list_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, Job* out) {
  Job* const behind = out + static_cast<std::ptrdiff_t>(batch.size) * range.most;
  for (int b = 0; b < batch.size; ++b)
    for (int n = 0; n < pages_of(range, b); ++n) *out++ = job_of<Job>(batch, dtype, range, b, n);
  for (; out < behind; ++out) out->page = -1;
  return {};
}

}  // namespace

Status Backend::make_views(const PagedBatch& batch, bool stored, SequenceView* out) {
  for (int b = 0; b < batch.size; ++b) out[b] = view_of(batch, b, stored);
  return {};
}

Status Backend::make_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, SealJob* out) {
  return list_jobs(batch, dtype, range, out);
}

Status Backend::make_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, DequantiseJob* out) {
  return list_jobs(batch, dtype, range, out);
}

Status Backend::begin_step(const PagedBatch& batch, const Step& step) {
  KV4_RETURN_IF_ERROR(make_views(batch, false, step.views));
  StoreJob job;
  job.k = step.k;
  job.v = step.v;
  job.in_order = true;
  job.sequences = {.views = {step.views, static_cast<std::size_t>(batch.size)},
                   .resident = true,
                   .most_queries = batch.most_queries};
  KV4_RETURN_IF_ERROR(store(job));
  KV4_RETURN_IF_ERROR(make_views(batch, true, step.views));
  return step.range.most > 0 ? make_jobs(batch, step.dtype, step.range, step.jobs) : Status();
}

}  // namespace kv4
