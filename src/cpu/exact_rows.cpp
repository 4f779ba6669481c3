#include "cpu/exact_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "cpu/threads.h"
#include "format/convert.h"
#include "format/finite.h"
#include "kv4/cpu.h"
#include "moments/lambda.h"

namespace kv4::cpu {
namespace {

void load_row(const std::byte* from, DType dtype, float* to, int channels) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(channels) * 4);
    return;
  }
  const auto* half = reinterpret_cast<const std::uint16_t*>(from);
  for (int c = 0; c < channels; ++c) to[c] = dtype == DType::f16 ? f16_to_f32(half[c]) : bf16_to_f32(half[c]);
}

void store_row(std::byte* to, DType dtype, const float* from, int channels) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(channels) * 4);
    return;
  }
  auto* half = reinterpret_cast<std::uint16_t*>(to);
  for (int c = 0; c < channels; ++c) half[c] = dtype == DType::f16 ? f32_to_f16(from[c]) : f32_to_bf16(from[c]);
}

// Rows [begin, end) of one head of one side of one sequence, whose rows are x's from `input_row` on, stored, or only
// scanned; on_non_finite(t) is called for every row with NaN or infinity.
template <class OnNonFinite>
void store_rows(const TensorView& x, const SequenceView& s, bool keys, bool stored, std::int64_t head,
                std::int64_t begin, std::int64_t end, OnNonFinite on_non_finite) {
  const ExactRows& rows = s.exact[1];
  const std::int64_t size = static_cast<std::int64_t>(size_of(x.dtype));
  const int channels = static_cast<int>(x.shape[3]);
  const std::size_t bytes = static_cast<std::size_t>(channels) * size_of(x.dtype);
  for (std::int64_t t = begin; t < end; ++t) {
    const void* const from = x.at(s.input, head, s.input_row + t);
    std::byte* to = nullptr;
    if (stored) {
      to = static_cast<std::byte*>(const_cast<void*>(keys ? rows.k : rows.v)) +
           row_offset(rows, keys, head, rows.count + t) * size;
      std::memcpy(to, from, bytes);
    }
    if (finite(from, x.dtype, channels)) continue;
    if (stored) std::memset(to, 0, bytes);
    on_non_finite(t);
  }
}

// Rows of a prefill are copied by all threads: one core copies 10 to 15 GB a second, and new memory is cleared by the
// thread that first writes it, which takes as long again. Fewer bytes are not worth waking a thread.
constexpr std::int64_t kParallelBytes = 1 << 20, kRowsOfPiece = 512;

// All rows of a sequence. bad: [T], 1 key and 2 value; or empty: all are finite.
void store_sequence(const StoreJob& job, const SequenceView& s, std::vector<std::uint8_t>& bad) {
  const std::int64_t heads = job.k.shape[1], rows = s.query_count,
                     bytes = heads * rows * (job.k.shape[3] + job.v.shape[3]) *
                             static_cast<std::int64_t>(size_of(job.k.dtype));
  const int threads = bytes < kParallelBytes ? 1 : num_threads();
  const std::int64_t step = threads == 1 ? std::max<std::int64_t>(rows, 1) : kRowsOfPiece,
                     pieces = (rows + step - 1) / step;
  if (threads > 1) bad.resize(static_cast<std::size_t>(rows));  // no thread may throw
  std::mutex mutex;                                             // of bad, which is rarely written
  parallel_for(2 * heads * pieces, threads, [&](std::int64_t task, int) {
    const std::int64_t piece = task % pieces, head = task / pieces % heads;
    const bool keys = task / pieces < heads;
    store_rows(keys ? job.k : job.v, s, keys, job.skip == nullptr, head, piece * step,
               std::min(rows, (piece + 1) * step), [&](std::int64_t t) {
                 const std::lock_guard<std::mutex> lock(mutex);
                 if (bad.empty()) bad.resize(static_cast<std::size_t>(rows));
                 bad[static_cast<std::size_t>(t)] |= keys ? 1 : 2;
               });
  });
}

}  // namespace

void store(const StoreJob& job) {
  std::vector<std::uint8_t> bad;  // [T] 1 key, 2 value; or empty: all are finite
  for (std::size_t b = 0; b < job.sequences.views.size(); ++b) {
    const SequenceView& s = job.sequences.views[b];
    bad.clear();
    store_sequence(job, s, bad);
    for (std::size_t t = 0; t < bad.size(); ++t) {
      if (bad[t] == 0) continue;
      if (job.skip != nullptr) job.skip[s.input * job.k.shape[2] + s.input_row + static_cast<std::int64_t>(t)] = 1;
      const NonFinite row{s.exact[1].position + s.exact[1].count + static_cast<std::int64_t>(t), (bad[t] & 1) != 0,
                          (bad[t] & 2) != 0};
      if (job.found != nullptr) job.found[b]->push_back(row);
      if (s.note == nullptr) continue;
      if (row.key) s.note->key = std::max(std::int64_t{s.note->key}, row.position + 1);
      if (row.value) s.note->value = std::max(std::int64_t{s.note->value}, row.position + 1);
    }
  }
}

void convert(const ConvertJob& job) {
  constexpr int kChunk = 256;  // channels at a time
  float row[kChunk] = {};
  const std::int64_t from_size = static_cast<std::int64_t>(size_of(job.from_dtype)),
                     to_size = static_cast<std::int64_t>(size_of(job.to_dtype));
  for (int h = 0; h < job.heads; ++h) {
    for (std::int64_t j = 0; j < job.rows; ++j) {
      const std::int64_t from = h * job.from_head_stride + j * job.from_stride,
                         to = h * job.to_head_stride + j * job.to_stride;
      for (int c = 0; c < job.dim; c += kChunk) {
        const int count = std::min(kChunk, job.dim - c);
        if (job.from != nullptr)
          load_row(static_cast<const std::byte*>(job.from) + (from + c) * from_size, job.from_dtype, row, count);
        store_row(static_cast<std::byte*>(job.to) + (to + c) * to_size, job.to_dtype, row, count);
      }
    }
  }
}

void copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes,
                int lines) {
  for (int i = 0; i < lines; ++i)
    std::memmove(static_cast<std::byte*>(to) + to_pitch * static_cast<std::size_t>(i),
                 static_cast<const std::byte*>(from) + from_pitch * static_cast<std::size_t>(i), bytes);
}

void query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) {
  const std::int64_t group = q.shape[1] / kv_heads, dim = q.shape[3], row_size = kv_heads * dim;
  for (const EnergyJob& job : jobs) {
    const std::span<float> row(job.energies, static_cast<std::size_t>(row_size));
    std::fill(row.begin(), row.end(), 0.0f);
    for (std::int64_t h = 0; h < q.shape[1]; ++h)
      add_energy(q.at(job.sequence, h, job.query), q.dtype,
                 row.subspan(static_cast<std::size_t>(h / group * dim), static_cast<std::size_t>(dim)));
  }
}

void fix_lambda(const LambdaJob& job) {
  const std::size_t dim = static_cast<std::size_t>(job.dim);
  std::vector<double> query(dim), key(dim), block(dim);
  for (int h = 0; h < job.kv_heads; ++h) {
    std::fill(key.begin(), key.end(), 0.0);
    for (int b = 0; b < job.blocks; ++b) {
      const std::int64_t first = b * kPageTokens;
      const auto* rows = static_cast<const std::byte*>(job.k) +
                         (h * job.k_head_stride + first * job.k_stride) * static_cast<std::int64_t>(size_of(job.dtype));
      const int used = centred_energy(rows, job.dtype, job.k_stride, job.skip.data() + first, kPageTokens, block);
      for (std::size_t c = 0; c < dim; ++c) key[c] += used * block[c];
    }
    std::fill(query.begin(), query.end(), 0.0);
    for (const float* row : job.energies) {
      const float* energy = row + static_cast<std::size_t>(h) * dim;
      for (std::size_t c = 0; c < dim; ++c)
        if (std::isfinite(energy[c])) query[c] += energy[c];
    }
    lambda_from_energies(query, key, std::span<float>(job.lambda + static_cast<std::size_t>(h) * dim, dim));
  }
}

}  // namespace kv4::cpu
