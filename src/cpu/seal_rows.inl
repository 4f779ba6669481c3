// Rows on their way into sealing (seal.inl): what is subtracted from them and what they are multiplied with, and kLanes
// of them as [channel][lane] vectors.
#pragma once

#include "cpu/rotate_f64.h"
#include "cpu/trellis.inl"

namespace kv4::cpu::KV4_ISA {

struct SealScratch {
  float* x;             // [padded][kLanes]
  float* rotate;        // rotate_lanes_scratch(d)
  float* centre;        // [d] the mean, rounded to float
  float* weight;        // [d] lambda
  float* shift;         // [d] -lambda * (mean - centre)
  float* correction;    // [d] R(lambda * mean) - m'
  float* zeros;         // [d] the row that stands for masked ones, in any dtype
  double* mean;         // [d]
  double* rotate_f64;   // rotate_f64_scratch(d)
  std::int32_t* quads;  // quads.inl: [padded / 4][kPageTokens]
  float* left;          // [padded][kLanes] what first rows of codes leave, lane r of refined key r; if any is
  TrellisScratch trellis;
  std::size_t bytes;

  SealScratch(const SideSpec& spec, int lanes, bool refined, void* block)
      : SealScratch(spec, lanes, refined, Parts(block)) {}

 private:
  SealScratch(const SideSpec& spec, int lanes, bool refined, Parts parts)
      : trellis(pad_channels(spec.dim), spec.groups, lanes, spec.levels.is_trellis(), parts) {
    const int d = spec.dim;
    const std::size_t padded = static_cast<std::size_t>(pad_channels(d));
    x = parts.take<float>(padded * lanes);
    rotate = parts.take<float>(rotate_lanes_scratch(d));
    centre = parts.take<float>(padded);
    weight = parts.take<float>(padded);
    shift = parts.take<float>(padded);
    correction = parts.take<float>(padded);
    zeros = parts.take<float>(padded);
    mean = parts.take<double>(padded);
    rotate_f64 = parts.take<double>(rotate_f64_scratch(d));
    quads = parts.take<std::int32_t>(padded / 4 * kPageTokens);
    left = parts.take<float>(refined ? padded * lanes : 0);
    bytes = parts.used();
  }
};

// One side of a SealJob.
struct SealSide {
  const SideSpec* spec;
  bool keys;
  const std::byte* rows;
  std::int64_t stride;     // bytes
  const std::byte* after;  // rows that are sealed next
  DType dtype;
  const std::uint8_t* skip;
  int hidden;
  const float* lambda;
  int first, count;
  std::uint8_t* codes;
  std::byte* scales;
  std::byte* mean;

  KV4_INLINE bool used(int j) const { return j >= hidden && (skip == nullptr || skip[j] == 0); }
};

template <class Isa, DType kType>
KV4_INLINE typename Isa::F load_row(const std::byte* row, int c) {
  if constexpr (kType == DType::f32) return Isa::load(reinterpret_cast<const float*>(row) + c);
  if constexpr (kType == DType::f16) return Isa::load_f16(reinterpret_cast<const std::uint16_t*>(row) + c);
  if constexpr (kType == DType::bf16) return Isa::load_bf16(reinterpret_cast<const std::uint16_t*>(row) + c);
}

// Mean over the unmasked rows, in double: the stored mean is compared with a float64 definition.
template <class Isa, DType kType>
void row_mean(const SealSide& s, double* mean) {
  using D = SealOps::D;
  constexpr int L = Isa::kLanes;
  const int d = s.spec->dim;
  int used = 0;
  for (int j = 0; j < s.count; ++j) used += s.used(j);
  const double inverse = used > 0 ? 1.0 / used : 0.0;
  // Two blocks at a time, for four independent sums, or as many as are two or four lines of memory; blocks overlap at
  // the end rather than overrun.
  constexpr int kBlocks = L == 16 ? 4 : 2;
  for (int next = 0; next < d; next += kBlocks * L) {
    int c[kBlocks];
    for (int b = 0; b < kBlocks; ++b) c[b] = std::min(next + b * L, d - L);
    D sum[kBlocks][2] = {};
    for (int j = 0; j < s.count; ++j) {
      if (!s.used(j)) continue;
      KV4_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        D low, high;
        SealOps::widen(load_row<Isa, kType>(s.rows + j * s.stride, c[b]), low, high);
        sum[b][0] += low;
        sum[b][1] += high;
      }
    }
    for (int b = 0; b < kBlocks; ++b)
      for (int i = 0; i < 2; ++i) store_as(mean + c[b] + i * L / 2, sum[b][i] * inverse);
  }
}

// Sides that rotate_real.inl rotates.
template <class Isa>
bool real_sides(const Rotation& r) {
  return Isa::kLanes == 16 && r.kind() == RotationKind::srft && has_real_transform(r.dim());
}

// The SRFT begins by scaling each channel, as lambda does: one product serves both.
inline void fold_scale(const Rotation& rotation, const SealScratch& scratch, bool mean, float times) {
  if (rotation.kind() != RotationKind::srft) return;
  const float* scale = Tables<float>(rotation).scaled_signs;
  for (int c = 0; c < rotation.dim(); ++c) {
    scratch.weight[c] *= times * scale[c];
    if (mean) scratch.shift[c] *= times * scale[c];
  }
}

// Fetches rows a line at a time, so that they come while arithmetic goes on: a burst would wait for line buffers.
struct RowFetch {
  const std::byte* row;
  std::int64_t stride, bytes, at = 0;

  // The next n lines, into L1, and those of a block later into L2.
  KV4_INLINE void lines(int n) {
    for (int i = 0; i < n; ++i) {
      __builtin_prefetch(row + at + 64 * i);
      __builtin_prefetch(row + at + 64 * i + 16 * stride, 0, 2);
    }
    at += 64 * n;
    if (at < bytes) return;
    at = 0;
    row += stride;
  }
};

// How a row becomes the rotation's input: (row - centre) * weight + shift, or row * weight without a mean.
template <class Isa>
void prepare_rows(const SealSide& s, const SealScratch& scratch) {
  const int d = s.spec->dim;
  for (int c = 0; c < d; ++c) scratch.weight[c] = s.lambda != nullptr ? s.lambda[c] : 1.0f;
  if (!s.spec->mean) return;
  switch (s.dtype) {
    case DType::f32: row_mean<Isa, DType::f32>(s, scratch.mean); break;
    case DType::f16: row_mean<Isa, DType::f16>(s, scratch.mean); break;
    case DType::bf16: row_mean<Isa, DType::bf16>(s, scratch.mean); break;
  }
  // A key may lie a thousand spreads from 0: row - centre is exact or rounds relative to its own size,
  // and what is common to all rows is rotated once, in double.
  for (int c = 0; c < d; ++c) {
    const double mean = scratch.mean[c], weight = scratch.weight[c];
    scratch.centre[c] = static_cast<float>(mean);
    scratch.shift[c] = static_cast<float>(weight * (scratch.centre[c] - mean));
    scratch.mean[c] = weight * mean;
  }
  rotate_f64(*s.spec->rotation, Map::forward, scratch.mean, scratch.rotate_f64);
  for (int c = 0; c < d; ++c) scratch.correction[c] = static_cast<float>(scratch.mean[c]);
  auto* const stored = reinterpret_cast<std::uint16_t*>(scratch.zeros);
  float* const rounded = scratch.x;
  for (int next = 0; next < d; next += Isa::kLanes) {
    const int c = std::min(next, d - Isa::kLanes);
    Isa::store_f16(stored + c, Isa::load(scratch.correction + c));
    Isa::store(rounded + c, Isa::load_f16(stored + c));
  }
  std::memcpy(s.mean, stored, static_cast<std::size_t>(d) * sizeof *stored);
  for (int c = 0; c < d; ++c) scratch.correction[c] = static_cast<float>(scratch.mean[c] - rounded[c]);
}

template <class Isa, DType kType, bool kMean>
void load_block(const std::byte* const (&rows)[Isa::kLanes], int d, const SealScratch& scratch, RowFetch&, int) {
  using F = typename Isa::F;
  constexpr int L = Isa::kLanes;
  for (int next = 0; next < d; next += L) {
    const int c = next + L <= d ? next : d - L;
    const F weight = Isa::load(scratch.weight + c);
    F r[L];
    if constexpr (kMean) {
      const F centre = Isa::load(scratch.centre + c), shift = Isa::load(scratch.shift + c);
      KV4_UNROLL
      for (int i = 0; i < L; ++i) r[i] = Isa::fma(load_row<Isa, kType>(rows[i], c) - centre, weight, shift);
    } else {
      KV4_UNROLL
      for (int i = 0; i < L; ++i) r[i] = load_row<Isa, kType>(rows[i], c) * weight;
    }
    Isa::transpose(r);
    KV4_UNROLL
    for (int i = 0; i < L; ++i) Isa::store(scratch.x + (c + i) * L, r[i]);
  }
}

template <class Isa, DType kType>
KV4_INLINE typename Isa::F load_halves(const std::byte* a, const std::byte* b, int c) {
  using Half = const std::uint16_t*;
  if constexpr (kType == DType::f32)
    return Isa::load_halves(reinterpret_cast<const float*>(a) + c, reinterpret_cast<const float*>(b) + c);
  if constexpr (kType == DType::f16)
    return Isa::load_halves_f16(reinterpret_cast<Half>(a) + c, reinterpret_cast<Half>(b) + c);
  if constexpr (kType == DType::bf16)
    return Isa::load_halves_bf16(reinterpret_cast<Half>(a) + c, reinterpret_cast<Half>(b) + c);
}
// Eight channels of 16 rows from c on.
template <class Isa, DType kType, bool kMean>
KV4_INLINE void load_eight(const std::byte* const (&rows)[Isa::kLanes], int c, const SealScratch& scratch,
                           typename Isa::F (&r)[8]) {
  using F = typename Isa::F;
  const auto twice = [&](const float* p) KV4_INLINE_LAMBDA { return Isa::load_halves(p + c, p + c); };
  const F weight = twice(scratch.weight);
  // Read again each time: GCC would keep sixteen addresses in vector registers, and move them by the ports of shuffles.
  const std::byte* const* row = rows;
  asm("" : "+r"(row));
  KV4_UNROLL
  for (int i = 0; i < 8; ++i) {
    const F x = load_halves<Isa, kType>(row[i + i / 4 * 4], row[i + i / 4 * 4 + 4], c);
    if constexpr (kMean) r[i] = Isa::fma(x - twice(scratch.centre), weight, twice(scratch.shift));
    else r[i] = x * weight;
  }
  Isa::transpose_halves(r);
}

// The same, folded for real_transform: additions stand beside the shuffles of the next channels.
template <class Isa, DType kType, bool kMean>
void load_folded(const std::byte* const (&rows)[Isa::kLanes], int d, const SealScratch& scratch, RowFetch& next,
                 int lines) {
  using F = typename Isa::F;
  const int quarter = d / 4;
  float* const to = scratch.rotate;
  for (int g = 0; g < quarter; g += 8) {
    F even[8];
    KV4_UNROLL
    for (int q = 0; q < 2; ++q) {
      F a[8], b[8];
      load_eight<Isa, kType, kMean>(rows, g + q * quarter, scratch, a);
      next.lines(lines);
      load_eight<Isa, kType, kMean>(rows, g + (q + 2) * quarter, scratch, b);
      next.lines(lines);
      KV4_UNROLL
      for (int i = 0; i < 8; ++i) {
        store_channel<Isa>(to, g + i + (q + 2) * quarter, a[i] - b[i]);
        const F sum = a[i] + b[i];
        if (q == 0) {
          even[i] = sum;
        } else {
          store_channel<Isa>(to, g + i, even[i] + sum);
          store_channel<Isa>(to, g + i + quarter, even[i] - sum);
        }
      }
    }
  }
}

// One of load_block, or of load_folded.
template <class Isa, DType kType>
auto load_of(bool mean, bool folded) {
  if constexpr (Isa::kLanes == 16)
    if (folded) return mean ? load_folded<Isa, kType, true> : load_folded<Isa, kType, false>;
  return mean ? load_block<Isa, kType, true> : load_block<Isa, kType, false>;
}
template <class Isa>
auto load_of(DType dtype, bool mean, bool folded) {
  return dtype == DType::f32   ? load_of<Isa, DType::f32>(mean, folded)
         : dtype == DType::f16 ? load_of<Isa, DType::f16>(mean, folded)
                               : load_of<Isa, DType::bf16>(mean, folded);
}

}  // namespace kv4::cpu::KV4_ISA
