#include "metal/tables.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

namespace kv4::apple {
namespace {

constexpr int kBlockRows[] = {1, 2, 3, 4, 6, 8};
constexpr int kPagesPerSplit = 8;  // two per SIMD-group
constexpr int kExactRowsPerSplit = KV4_PAGE_TOKENS * KV4_ATTEND_THREADS / 32;
constexpr int kMaxSplits = 64;
constexpr int kThreadgroupsPerCore = 4;
constexpr std::int64_t kBeforeAll = -(std::int64_t{1} << 62);

std::vector<double> transposed(const std::vector<double>& matrix, std::size_t d) {
  std::vector<double> out(matrix.size());
  for (std::size_t i = 0; i < d; ++i)
    for (std::size_t c = 0; c < d; ++c) out[c * d + i] = matrix[i * d + c];
  return out;
}

Status supports_dim(int dim, const char* name) {
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), dim) == std::end(kHeadDims))
    return error(StatusCode::unsupported, std::string("head_dim_") + name, "64, 80, 96, 128 or 256 on Metal",
                 std::to_string(dim));
  return {};
}

Status supports_side(const SideSpec& side, const char* name) {
  KV4_RETURN_IF_ERROR(supports_dim(side.dim, name));
  if (side.groups != 1)
    return error(StatusCode::unsupported, std::string("recipe.") + name + ".group", "one scale per vector on Metal",
                 std::to_string(side.group));
  return {};
}

// Signs and roots of unity of butterfly.h.
std::vector<float> butterfly_table(const Rotation& rotation) {
  std::vector<float> t = rotation.scaled_signs();
  const int d = rotation.dim();
  for (int n = 0; n < d; ++n) {
    const double angle = -2 * std::numbers::pi * n / d;
    t.push_back(static_cast<float>(std::cos(angle)));
    t.push_back(static_cast<float>(std::sin(angle)));
  }
  return t;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

Status supports_dims(int head_dim_k, int head_dim_v) {
  KV4_RETURN_IF_ERROR(supports_dim(head_dim_k, "k"));
  KV4_RETURN_IF_ERROR(supports_dim(head_dim_v, "v"));
  if (head_dim_k != head_dim_v)
    return error(StatusCode::unsupported, "head_dim_v", "head_dim_k, " + std::to_string(head_dim_k),
                 std::to_string(head_dim_v));
  return {};
}

Status supports(const PageSpec& spec) {
  KV4_RETURN_IF_ERROR(supports_side(spec.key, "k"));
  KV4_RETURN_IF_ERROR(supports_side(spec.value, "v"));
  return supports_dims(spec.key.dim, spec.value.dim);
}

kv4_page_layout page_layout(const PageSpec& spec) {
  const auto k = static_cast<std::uint32_t>(spec.key.dim), v = static_cast<std::uint32_t>(spec.value.dim);
  return kv4_make_page_layout(k, v, 1, 1, spec.key.mean, k, v);
}

int rotated(const Rotation& rotation) {
  return rotation.kind() == RotationKind::identity ? KV4_ROTATED_NONE
         : rotation.kind() == RotationKind::srft   ? KV4_ROTATED_BUTTERFLY
                                                   : KV4_ROTATED_MATRIX;
}

std::vector<float> query_matrix(const Rotation& rotation) {
  if (rotated(rotation) == KV4_ROTATED_NONE) return {};
  if (rotated(rotation) == KV4_ROTATED_BUTTERFLY) return butterfly_table(rotation);
  const std::vector<double> m = rotation.inverse_f64();
  return {m.begin(), m.end()};
}

std::vector<float> output_matrix(const Rotation& rotation) {
  if (rotated(rotation) == KV4_ROTATED_NONE) return {};
  if (rotated(rotation) == KV4_ROTATED_BUTTERFLY) return butterfly_table(rotation);
  const std::vector<double> m = transposed(rotation.inverse_f64(), static_cast<std::size_t>(rotation.dim()));
  return {m.begin(), m.end()};
}

std::vector<float> sealing_matrix(const Rotation& rotation) {
  if (rotation.kind() == RotationKind::identity) return {};
  const std::vector<double> m = transposed(rotation.matrix_f64(), static_cast<std::size_t>(rotation.dim()));
  std::vector<float> out(m.begin(), m.end());
  for (std::size_t i = 0; i < m.size(); ++i) out.push_back(static_cast<float>(m[i] - static_cast<double>(out[i])));
  return out;
}

std::vector<std::int64_t> page_table(const PageMemory& pages, std::span<const std::int64_t> chunks) {
  std::vector<std::int64_t> t(kv4_pages_chunks);
  t[kv4_pages_page_stride] = pages.page_stride;
  t[kv4_pages_head_stride] = pages.head_stride;
  t[kv4_pages_chunk_shift] = chunks.empty() ? KV4_ONE_CHUNK : pages.chunk_shift;
  if (chunks.empty()) t.push_back(0);
  t.insert(t.end(), chunks.begin(), chunks.end());
  return t;
}

std::vector<std::int64_t> side_table(const PageSpec& spec, bool values, std::span<const std::int64_t> pages) {
  const SideSpec& side = values ? spec.value : spec.key;
  std::vector<std::int64_t> t(kv4_side_pages);
  t[kv4_side_dim] = side.dim;
  t[kv4_side_codes] = values ? spec.layout.v_codes : spec.layout.k_codes;
  t[kv4_side_scales] = values ? spec.layout.v_scales : spec.layout.k_scales;
  t[kv4_side_mean] = spec.layout.k_mean;
  t[kv4_side_has_mean] = side.mean;
  t[kv4_side_abs_max] = side.scale == ScaleRule::abs_max;
  t[kv4_side_negative_base] = side.levels.negative_base;
  t[kv4_side_rotated] = rotated(*side.rotation);
  t[kv4_side_values] = values;
  t.insert(t.end(), pages.begin(), pages.end());
  return t;
}

template <class Job>
void add_job(std::vector<std::int64_t>* jobs, const Job& job, bool values, const JobPlace& place) {
  jobs->resize(jobs->size() + kv4_job_fields);
  std::int64_t* t = jobs->data() + jobs->size() - kv4_job_fields;
  t[kv4_job_page] = job.page;
  t[kv4_job_first] = job.first;
  t[kv4_job_count] = job.count;
  if constexpr (requires { job.hidden; }) t[kv4_job_hidden] = job.hidden;
  t[kv4_job_skip] = place.skip;
  t[kv4_job_rows] = place.rows;
  t[kv4_job_stride_head] = values ? job.v_head_stride : job.k_head_stride;
  t[kv4_job_stride] = values ? job.v_stride : job.k_stride;
  t[kv4_job_dtype] = static_cast<std::int64_t>(job.dtype);
  t[kv4_job_lambda] = place.lambda;
}
template void add_job(std::vector<std::int64_t>*, const SealJob&, bool, const JobPlace&);
template void add_job(std::vector<std::int64_t>*, const DequantiseJob&, bool, const JobPlace&);

std::vector<float> level_table(const SideSpec& side) {
  std::vector<float> t(kv4_level_fields);
  const StepRule step = step_rule(side.levels, side.scale, side.group);
  t[step.by_largest ? kv4_level_of_largest : kv4_level_of_rms] = step.factor;
  for (std::size_t i = 0; i < 7; ++i)
    t[kv4_level_threshold + i] = static_cast<float>(side.levels.twice_threshold[i]) * 0.5f;
  for (std::size_t i = 0; i < 16; ++i) t[kv4_level_table + i] = side.levels.table[i];
  return t;
}

Bases bases_of(std::span<const SequenceView> sequences) {
  Bases out;
  for (const SequenceView& s : sequences) {
    if (out.lambda_k == nullptr) out.lambda_k = s.lambda_k;
    if (out.lambda_v == nullptr) out.lambda_v = s.lambda_v;
    for (const ExactRows& x : s.exact) {
      if (x.count <= 0 || out.exact_k != nullptr) continue;
      out.exact_k = x.k;
      out.exact_v = x.v;
    }
  }
  for (const void** x : {&out.exact_k, &out.exact_v})
    *x = static_cast<const std::byte*>(*x) - reinterpret_cast<std::uintptr_t>(*x) % 16;
  return out;
}

AttendTables attend_tables(const AttendJob& job, const Bases& bases, std::span<const std::int64_t> pages, int cores) {
  const AttendArgs& a = job.args;
  AttendTables t;
  const std::span<const SequenceView> views = job.sequences.views;
  const int batch = static_cast<int>(views.size()), group = static_cast<int>(a.q.shape[1]) / job.kv_heads;
  std::int64_t queries = 0, most_exact = 0;
  int most_pages = 0;
  for (const SequenceView& s : views) {
    queries = std::max(queries, s.query_count);
    most_pages = std::max(most_pages, s.page_count);
    most_exact = std::max(most_exact, s.exact[0].count + s.exact[1].count);
  }
  t.dim = job.head_dim_k;
  t.rows = group * static_cast<int>(queries);
  t.block_rows = *std::find_if(std::begin(kBlockRows), std::end(kBlockRows) - 1, [&](int r) { return r >= t.rows; });
  t.blocks = ceil_div(t.rows, t.block_rows);
  const int groups = std::max(1, batch * job.kv_heads * t.blocks);
  const int wanted = std::clamp(ceil_div(cores * kThreadgroupsPerCore, groups), 1, kMaxSplits);
  const int exact_splits =
      std::clamp(static_cast<int>((most_exact + kExactRowsPerSplit - 1) / kExactRowsPerSplit), 1, wanted);
  const int page_splits = most_pages == 0 ? 0 : std::clamp(ceil_div(most_pages, kPagesPerSplit), 1, wanted);
  t.splits = exact_splits + page_splits;
  t.prepared_floats = std::size_t{2} * static_cast<std::size_t>(batch) * static_cast<std::size_t>(job.kv_heads) *
                      static_cast<std::size_t>(t.rows) * static_cast<std::size_t>(t.dim);
  t.state_floats = static_cast<std::size_t>(groups) * static_cast<std::size_t>(t.splits * t.block_rows) *
                   static_cast<std::size_t>(t.dim + 2);

  t.call.assign(kv4_call_pages, 0);
  std::vector<std::int64_t>& c = t.call;
  c[kv4_call_dim] = t.dim;
  c[kv4_call_kv_heads] = job.kv_heads;
  c[kv4_call_group] = group;
  c[kv4_call_queries] = queries;
  c[kv4_call_block_rows] = t.block_rows;
  c[kv4_call_blocks] = t.blocks;
  c[kv4_call_exact_splits] = exact_splits;
  c[kv4_call_page_splits] = page_splits;
  t.levels.assign(32, 0);
  if (job.spec != nullptr) {
    const kv4_page_layout& l = job.spec->layout;
    c[kv4_call_k_scales] = l.k_scales;
    c[kv4_call_k_mean] = l.k_mean;
    c[kv4_call_v_codes] = l.v_codes;
    c[kv4_call_v_scales] = l.v_scales;
    c[kv4_call_has_mean] = job.spec->key.mean;
    c[kv4_call_key_rotated] = most_pages > 0 ? rotated(*job.spec->key.rotation) : KV4_ROTATED_NONE;
    c[kv4_call_value_rotated] = most_pages > 0 ? rotated(*job.spec->value.rotation) : KV4_ROTATED_NONE;
    for (std::size_t i = 0; i < 16; ++i) {
      t.levels[i] = job.spec->key.levels.table[i];
      t.levels[16 + i] = job.spec->value.levels.table[i];
    }
  }
  c[kv4_call_exact_dtype] = static_cast<std::int64_t>(job.dtype);
  c[kv4_call_causal] = a.mask.causal;
  c[kv4_call_general_kind] = static_cast<std::int64_t>(a.mask.kind);
  c[kv4_call_general_dtype] = static_cast<std::int64_t>(a.mask.general_dtype);
  for (std::size_t i = 0; i < 4; ++i) c[kv4_call_general_stride_batch + i] = a.mask.general_stride[i];
  c[kv4_call_general_columns] = a.mask.columns;
  c[kv4_call_general_offset] = a.mask.offset;
  c[kv4_call_q_dtype] = static_cast<std::int64_t>(a.q.dtype);
  for (std::size_t i = 0; i < 3; ++i) c[kv4_call_q_stride_batch + i] = a.q.stride[i];
  if (job.out.data != nullptr) {
    c[kv4_call_out_dtype] = static_cast<std::int64_t>(job.out.dtype);
    for (std::size_t i = 0; i < 3; ++i) c[kv4_call_out_stride_batch + i] = job.out.stride[i];
  } else {
    c[kv4_call_out_dtype] = KV4_OUT_PARTIAL;
    const std::int64_t row = t.dim + 2;
    c[kv4_call_out_stride_query] = row;
    c[kv4_call_out_stride_head] = row * a.q.shape[2];
    c[kv4_call_out_stride_batch] = c[kv4_call_out_stride_head] * a.q.shape[1];
  }
  c[kv4_call_has_sinks] = a.sinks != nullptr;
  c[kv4_call_batch] = batch;
  c.insert(c.end(), pages.begin(), pages.end());

  constexpr double kLog2e = 1.4426950408889634;
  const double scale = a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<double>(t.dim));
  t.factors.assign(kv4_factor_fields, 0.0f);
  t.factors[kv4_factor_scale] = static_cast<float>(a.softcap > 0 ? scale / a.softcap : scale * kLog2e);
  t.factors[kv4_factor_cap] = static_cast<float>(a.softcap * kLog2e);

  const auto size = static_cast<std::int64_t>(size_of(job.dtype));
  const auto rows_from = [size](const void* base, const void* p) {
    return (static_cast<const std::byte*>(p) - static_cast<const std::byte*>(base)) / size;
  };
  const auto from = [](const float* base, const float* p) { return p == nullptr ? kNowhere : p - base; };
  const auto ids_of = [&t](const std::int32_t* ids, std::int64_t count) {
    const auto at = static_cast<std::int64_t>(t.ids.size());
    t.ids.insert(t.ids.end(), ids, ids + count);
    return at;
  };
  t.sequences.assign(static_cast<std::size_t>(batch) * kv4_sequence_fields, 0);
  for (int b = 0; b < batch; ++b) {
    const SequenceView& s = views[static_cast<std::size_t>(b)];
    std::int64_t* out = t.sequences.data() + static_cast<std::size_t>(b) * kv4_sequence_fields;
    out[kv4_sequence_queries] = s.query_count;
    out[kv4_sequence_query_position] = s.query_position;
    out[kv4_sequence_input] = s.input;
    out[kv4_sequence_input_row] = s.input_row;
    out[kv4_sequence_page_count] = s.page_count;
    out[kv4_sequence_last_page_tokens] = s.last_page_tokens;
    out[kv4_sequence_pages_position] = s.pages_position;
    out[kv4_sequence_pages_hidden] = s.pages_hidden;
    out[kv4_sequence_ids] = ids_of(s.pages, s.page_count);
    out[kv4_sequence_start] = a.mask.start != nullptr ? a.mask.offset + a.mask.start[b] : kBeforeAll;
    out[kv4_sequence_window] = a.mask.window != nullptr ? a.mask.window[b] : job.window;
    out[kv4_sequence_lambda_k] = from(bases.lambda_k, s.lambda_k);
    out[kv4_sequence_lambda_v] = from(bases.lambda_v, s.lambda_v);
    for (int set = 0; set < 2; ++set) {
      const ExactRows& x = s.exact[set];
      std::int64_t* e = out + kv4_sequence_exact + set * kv4_exact_fields;
      if (x.count <= 0) continue;
      e[kv4_exact_position] = x.position;
      e[kv4_exact_count] = x.count;
      e[kv4_exact_ids] = x.blocks == nullptr ? -1 : ids_of(x.blocks, (x.count + kPageTokens - 1) / kPageTokens);
      e[kv4_exact_k_offset] = rows_from(bases.exact_k, x.k);
      e[kv4_exact_k_stride_head] = x.k_head_stride;
      e[kv4_exact_k_stride] = x.k_stride;
      e[kv4_exact_k_stride_block] = x.k_block_stride;
      e[kv4_exact_v_offset] = rows_from(bases.exact_v, x.v);
      e[kv4_exact_v_stride_head] = x.v_head_stride;
      e[kv4_exact_v_stride] = x.v_stride;
      e[kv4_exact_v_stride_block] = x.v_block_stride;
    }
  }
  t.kernel = "kv4_attend_d" + std::to_string(t.dim) + "_r" + std::to_string(t.block_rows);
  t.attend_grid = {static_cast<std::uint32_t>(KV4_ATTEND_THREADS * t.splits),
                   static_cast<std::uint32_t>(job.kv_heads * t.blocks), static_cast<std::uint32_t>(batch)};
  t.row_grid = {static_cast<std::uint32_t>(KV4_ROW_THREADS * a.q.shape[1] / job.kv_heads),
                static_cast<std::uint32_t>(queries), static_cast<std::uint32_t>(batch * job.kv_heads)};
  return t;
}

}  // namespace kv4::apple
