// Sealed tokens as rows in the model's own basis: X R^-1 / lambda, X a slice's levels times the tokens' scales, plus
// the mean. For crops, for models that read keys themselves, and where many queries read pages as a host's own rows.
//
// A CTA keeps its columns of R^-1 in registers, 16 a warp, and multiplies one slice after another by mma.m16n8k16:
// levels become 16-bit floats below the normal ones (Halves8), exactly, and the scale of a token, which a row has once,
// multiplies its sums. Means of sixteen slices are one more operand of 16 rows. The matrix is in digits of 12 bits
// (seal_digits.h): rows of 16 bits take the first alone, whose rounding is as large as their own (2^-12.3 of a row's
// typical element, at random), float32 rows two, the second read again for every slice.
//
// Count for d = 128 and a slice (64 tokens of one side, 4,224 bytes read, 16,384 written in 16 bits: 650 cycles of a
// multiprocessor at a copy's speed): 512 products of 4 cycles or, as mma.sync reaches them, 6.5 of a scheduler: 830
// cycles; operands 16 KiB written and, by each of 8 warps, read: 1,150.
//
// 32 / 8 / 128, 65,536 tokens: 198 us, 41 % of a copy's speed, shared memory busy in 73 % of the cycles (ncu). Both
// digits for all rows 254; operands whose rows are padded, not turned, and 16 columns of four row tiles unrolled 270; a
// thread a channel, with the matrix from L2, 2,400. 32 columns a warp halve what is read of operands, and spill
// registers.
#include "cuda/dequantise.h"

#include <algorithm>
#include <cstdint>

#include "cuda/codes.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace kv4::cuda {
namespace {

constexpr int kBatch = 16;  // slices whose means are multiplied together

// How rows are stored: four elements of one type at a time or, where they lie otherwise, one.
enum class Store { single, f16, bf16, f32 };

// A slice and where its rows go.
struct Slice {
  const std::uint8_t* data = nullptr;
  unsigned char* rows = nullptr;
  const float* lambda = nullptr;
  std::int64_t stride = 0;   // elements
  int first = 0, count = 0;  // tokens
  DType dtype = DType::f32;
  Store store = Store::single;
};

template <int D>
struct RowsShape {
  static constexpr int kColumns = D < 128 ? D : 128, kParts = D / kColumns;  // of the output channels, a CTA's
  static constexpr int kTiles = kColumns / 16, kSteps = D / 16;
  static constexpr int kTokenParts = kTiles <= 4 ? 2 : 1;  // that warps share out too
  static constexpr int kThreads = kTiles * kTokenParts * kLanes, kCtasPerMultiprocessor = D == 256 ? 1 : 2;
  static constexpr int kRowTiles = kPageTokens / 16 / kTokenParts;
  // Operands in shared memory, rows of so many bytes: keys and means by tokens, values by channels. Of eight pieces of
  // 16 bytes in row r, piece c lies at c ^ turn(r).
  static constexpr int kPitch = (D + 63) / 64 * 128, kValuePitch = kPageTokens * 2;
  static constexpr int kOperand = std::max(kPageTokens * kPitch, D* kValuePitch);
  static constexpr int kMeansAt = 2 * kOperand, kScalesAt = kMeansAt + kBatch * kColumns * 4,
                       kWeightsAt = kScalesAt + 2 * kPageTokens * 4, kSlicesAt = kWeightsAt + 2 * kColumns * 4,
                       kShared = kSlicesAt + kBatch * static_cast<int>(sizeof(Slice));
  static constexpr int kBlocks32 = pad_channels(D) / 32;
  static constexpr int kWords = 32 * std::max(2 * kBlocks32, D / 16), kLoads = (kWords + kThreads - 1) / kThreads;
  static_assert(kThreads >= kPageTokens && kThreads >= kColumns && kOperand % 128 == 0);
};

// No bank twice where eight rows are read at one piece, nor where lanes 4g + t write: 8 bytes at piece t / 2 of rows g
// of tokens, 16 bytes at piece t of rows g of channels.
__device__ constexpr int turn_of_token(int row) { return row % 4 * 2 + row / 4 % 2; }
__device__ constexpr int turn_of_channel(int row) { return row % 2 * 4 + row / 2 % 4; }

template <int D, bool kValues>
struct Dequantiser {
  using S = RowsShape<D>;
  static constexpr int kCodes = (kValues ? D / 16 : 2 * S::kBlocks32) * kLanes;  // a slice's codes, by four words
  const DequantiseJobs& p;
  const SideParams& side;
  const DigitFragments& inverse;
  unsigned char* const memory;
  const Tables tables;
  const bool even;
  const int lane, warp, tile, token_part, first_channel;  // of the CTA

  // What a thread holds of the slice to come.
  struct Codes {
    uint4 words[S::kLoads];  // of narrow codes pairs, pairs, signs
    unsigned short scale;
    float lambda;
  };

  __device__ __forceinline__ Dequantiser(const DequantiseJobs& params, unsigned char* shared)
      : p(params), side(kValues ? p.value : p.key), inverse(kValues ? p.inverse_v : p.inverse_k), memory(shared),
        tables(make_tables(side.levels)), even(even_levels(tables)), lane(threadIdx.x % kLanes),
        warp(threadIdx.x / kLanes), tile(warp % S::kTiles), token_part(warp / S::kTiles),
        first_channel(blockIdx.z * S::kColumns) {}

  __device__ __forceinline__ Slice slice_of(int i) const {
    Slice s;
    const DequantiseJob& job = p.jobs[i / p.heads];
    void* const out = kValues ? job.v : job.k;
    if (job.page < 0 || out == nullptr) return s;
    const int head = i % p.heads, size = job.dtype == DType::f32 ? 4 : 2;
    s.data = slice_at(p.pages, job.page, head);
    s.rows = static_cast<unsigned char*>(out) + head * (kValues ? job.v_head_stride : job.k_head_stride) * size;
    s.lambda = kValues ? job.lambda_v : job.lambda_k;
    if (s.lambda != nullptr) s.lambda += head * D;
    s.stride = kValues ? job.v_stride : job.k_stride;
    s.first = job.first;
    s.count = static_cast<int>(job.count);
    s.dtype = job.dtype;
    if (reinterpret_cast<uintptr_t>(s.rows) % (4 * size) == 0 && s.stride % 4 == 0)
      s.store = job.dtype == DType::f32 ? Store::f32 : job.dtype == DType::bf16 ? Store::bf16 : Store::f16;
    return s;
  }

  __device__ __forceinline__ Codes load(const Slice& s) const {
    Codes codes = {};
    if (s.count == 0) return codes;
    const std::uint8_t* const from = s.data + side.codes;
#pragma unroll
    for (int i = 0; i < S::kLoads; ++i) {
      const int at = threadIdx.x + i * S::kThreads;
      if (at >= kCodes) break;
      if (is_narrow(side.bits)) {
        NarrowGroup group = {};
        if (side.bits == 2) group.template load<2>(from, at / kLanes, lane);
        else group.template load<3>(from, at / kLanes, lane);
        codes.words[i] = {group.pairs.x, group.pairs.y, group.signs, 0};
      } else {
        codes.words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + at);
      }
    }
    const int thread = threadIdx.x;
    if (thread < kPageTokens) codes.scale = reinterpret_cast<const unsigned short*>(s.data + side.scales)[thread];
    codes.lambda = s.lambda != nullptr && thread < S::kColumns ? s.lambda[first_channel + thread] : 1.0f;
    return codes;
  }

  // Levels as the operand `to`; factors of its tokens and channels.
  __device__ __forceinline__ void put(const Codes& codes, unsigned char* to, int slot) const {
    if (side.bits == 2) put_levels<true, 2>(codes, to);
    else if (side.bits == 3) put_levels<true, 3>(codes, to);
    else if (even) put_levels<true, 4>(codes, to);
    else put_levels<false, 4>(codes, to);
    const int thread = threadIdx.x;
    if (thread < kPageTokens)
      reinterpret_cast<float*>(memory + S::kScalesAt)[slot * kPageTokens + thread] = from_half(codes.scale) *
                                                                                     inverse.unit * 0x1p24f;
    if (thread < S::kColumns)
      reinterpret_cast<float*>(memory + S::kWeightsAt)[slot * S::kColumns + thread] = reciprocal(codes.lambda);
  }
  template <bool kEven, int kBits>
  __device__ __forceinline__ void put_levels(const Codes& codes, unsigned char* to) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < S::kLoads; ++i) {
      const int at = threadIdx.x + i * S::kThreads;
      if (at >= kCodes) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int f = at / kLanes * 4 + e;
        uint32_t word = word_of(codes.words[i], e);
        if constexpr (is_narrow(kBits)) {
          const uint4& planes = codes.words[i];
          word = as_four_bits<kBits>(NarrowGroup{{planes.x, planes.y}, planes.z}.template word<kBits>(e));
          if (!kValues) f = narrow_key_at(f, pad_channels(D));
        }
        const Halves8<kEven> halves(word, tables);
        if constexpr (kValues) {
          *reinterpret_cast<uint4*>(to + (f / 2 * 8 + g) * S::kValuePitch +
                                    ((f % 2 * 4 + t) ^ turn_of_channel(g)) * 16) = halves.even_first();
        } else {
          const uint4 eight = halves.in_order();
          const int block = f % S::kBlocks32;
          unsigned char* const row = to + (f / S::kBlocks32 * 8 + g) * S::kPitch + t % 2 * 8;
          const auto piece = [&](int i) {
            return reinterpret_cast<uint2*>(row + ((block * 4 + 2 * i + t / 2) ^ turn_of_token(g)) * 16);
          };
          *piece(0) = {eight.x, eight.y};
          if (D % 32 == 0 || block * 32 + 16 < D) *piece(1) = {eight.z, eight.w};
        }
      }
    }
  }

  // The warp's columns of R^-1 by steps of 16 channels, the first digit.
  struct Matrix {
    uint4 of[S::kSteps];
  };
  __device__ __forceinline__ const uint4* digit_at(int step, int digit) const {
    return inverse.words + (((first_channel / 16 + tile) * S::kSteps + step) * 2 + digit) * kLanes + lane;
  }
  __device__ __forceinline__ void load_matrix(Matrix& m) const {
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      if (inverse.words != nullptr) {
        m.of[s] = __ldg(digit_at(s, 0));
      } else {  // ones where channel and column are the same
        const int g = lane / 4, t = lane % 4;
        const auto pair = [&](int second, int upper) -> uint32_t {
          const int column = g / 2 * 4 + second * 2 + g % 2, channel = upper * 8 + 2 * t;
          if (s != first_channel / 16 + tile) return 0;
          return column == channel ? 0x3c00u : column == channel + 1 ? 0x3c000000u : 0u;
        };
        m.of[s] = {pair(0, 0), pair(0, 1), pair(1, 0), pair(1, 1)};
      }
    }
  }

  // Sums of kRows times 16 rows and the warp's 16 channels, rows g and g + 8 of each, four channels from 4t on: two in
  // either half.
  template <bool kByChannels, int kDigits, int kRows>
  __device__ __forceinline__ void multiply(float (&y)[kRows][2][4], uint32_t operand, int row_tile,
                                           const Matrix& m) const {
    const int i = lane / 8, j = lane % 8;
    uint32_t from[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      from[r] = kByChannels
                    ? operand + (i / 2 * 8 + j) * S::kValuePitch +
                          (((row_tile + r) * 2 + i % 2) ^ turn_of_channel(j)) * 16
                    : operand + ((row_tile + r) * 16 + i % 2 * 8 + j) * S::kPitch + ((i / 2) ^ turn_of_token(j)) * 16;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int e = 0; e < 8; ++e) y[r][e / 4][e % 4] = 0;
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      uint4 a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        a[r] = load_matrices<kByChannels>(kByChannels ? from[r] + s * 16 * S::kValuePitch
                                                      : (from[r] ^ s % 4 * 32) + s / 4 * 128);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        mma_halves(false, y[r][0], a[r], m.of[s].x, m.of[s].y);
        mma_halves(false, y[r][1], a[r], m.of[s].z, m.of[s].w);
      }
      if (kDigits == 1 || inverse.words == nullptr) continue;
      const uint4 second = __ldg(digit_at(s, 1));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        mma_halves(false, y[r][0], a[r], second.x, second.y);
        mma_halves(false, y[r][1], a[r], second.z, second.w);
      }
    }
  }

  // The means of `count` slices, rotated back, to `means`.
  __device__ __forceinline__ void rotate_means(const Slice* slices, int count, const Matrix& m, float* means) const {
    for (int i = threadIdx.x; i < kBatch * (D / 8); i += S::kThreads) {
      const int row = i / (D / 8), piece = i % (D / 8);
      uint4 mean = {};
      if (row < count && slices[row].count > 0)
        mean = reinterpret_cast<const uint4*>(slices[row].data + side.mean_at)[piece];
      *reinterpret_cast<uint4*>(memory + row * S::kPitch + (piece ^ turn_of_token(row % 8)) * 16) = mean;
    }
    __syncthreads();
    if (token_part == 0) {
      float y[1][2][4];
      multiply<false, 2>(y, shared_address(memory), 0, m);
      const int g = lane / 4, c = tile * 16 + lane % 4 * 4;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float4*>(means + (g + 8 * r) * S::kColumns + c) = {
            y[0][0][2 * r] * inverse.unit, y[0][0][2 * r + 1] * inverse.unit, y[0][1][2 * r] * inverse.unit,
            y[0][1][2 * r + 1] * inverse.unit};
    }
    __syncthreads();
  }

  // Four elements of a row.
  template <Store kStore>
  static __device__ __forceinline__ void store(unsigned char* rows, DType dtype, std::int64_t at, float4 x) {
    if constexpr (kStore == Store::single) {
      put_element(rows, dtype, at, x.x);
      put_element(rows, dtype, at + 1, x.y);
      put_element(rows, dtype, at + 2, x.z);
      put_element(rows, dtype, at + 3, x.w);
    } else if constexpr (kStore == Store::f32) {
      *reinterpret_cast<float4*>(rows + at * 4) = x;
    } else if constexpr (kStore == Store::bf16) {
      *reinterpret_cast<uint2*>(rows + at * 2) = {pack_halves(true, x.x, x.y), pack_halves(true, x.z, x.w)};
    } else {
      const auto pair = [](float a, float b) {
        const __half2 most = __half2half2(__ushort_as_half(0x7bff));
        const __half2 two = __hmin2(__hmax2(__floats2half2_rn(a, b), __hneg2(most)), most);
        return *reinterpret_cast<const uint32_t*>(&two);
      };
      *reinterpret_cast<uint2*>(rows + at * 2) = {pair(x.x, x.y), pair(x.z, x.w)};
    }
  }

  template <Store kStore>
  __device__ __forceinline__ void store_rows(const Slice& s, int slot, const Matrix& m, const float* mean) const {
    const uint32_t operand = shared_address(memory) + slot * S::kOperand;
    const auto* scales = reinterpret_cast<const float*>(memory + S::kScalesAt) + slot * kPageTokens;
    const int c = tile * 16 + lane % 4 * 4, first = s.first, count = s.count;
    const std::int64_t stride = s.stride;
    unsigned char* const rows = s.rows;
    const DType dtype = s.dtype;
    const float4 weights = *reinterpret_cast<const float4*>(memory + S::kWeightsAt + (slot * S::kColumns + c) * 4);
    float4 of_mean = {};
    if (side.mean) of_mean = *reinterpret_cast<const float4*>(mean + c);
#pragma unroll 1
    for (int i = 0; i < S::kRowTiles; i += 2) {
      const int row_tile = token_part * S::kRowTiles + i;
      float y[2][2][4];
      constexpr int kDigits = kStore == Store::f16 || kStore == Store::bf16 ? 1 : 2;
      multiply<kValues, kDigits>(y, operand, row_tile, m);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = row_tile * 16 + lane / 4 + 8 * r, token = kValues ? token_of(at) : at, row = token - first;
        const float scale = scales[token];
        if (static_cast<unsigned>(row) >= static_cast<unsigned>(count)) continue;
        const float(&its)[2][4] = y[r / 2];
        const int e = r % 2 * 2;
        store<kStore>(
            rows, dtype, row * stride + first_channel + c,
            {fmaf(its[0][e], scale, of_mean.x) * weights.x, fmaf(its[0][e + 1], scale, of_mean.y) * weights.y,
             fmaf(its[1][e], scale, of_mean.z) * weights.z, fmaf(its[1][e + 1], scale, of_mean.w) * weights.w});
      }
    }
  }

  // Slices `begin` up to `end`.
  __device__ __forceinline__ void run(int begin, int end) const {
    Matrix m;
    load_matrix(m);
    auto* const slices = reinterpret_cast<Slice*>(memory + S::kSlicesAt);
    auto* const means = reinterpret_cast<float*>(memory + S::kMeansAt);
#pragma unroll 1
    for (; begin < end; begin += kBatch) {
      const int count = min(kBatch, end - begin);
      if (threadIdx.x < count) slices[threadIdx.x] = slice_of(begin + threadIdx.x);
      __syncthreads();
      Codes codes = load(slices[0]);
      if (side.mean) rotate_means(slices, count, m, means);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const Slice& s = slices[i];
        if (s.count > 0) put(codes, memory + i % 2 * S::kOperand, i % 2);
        if (i + 1 < count) codes = load(slices[i + 1]);
        __syncthreads();  // of the other operand all have read what they need: it is the next one's
        if (s.count == 0) continue;
        const float* const mean = means + i * S::kColumns;
        if (s.store == Store::bf16) store_rows<Store::bf16>(s, i % 2, m, mean);
        else if (s.store == Store::f16) store_rows<Store::f16>(s, i % 2, m, mean);
        else if (s.store == Store::f32) store_rows<Store::f32>(s, i % 2, m, mean);
        else store_rows<Store::single>(s, i % 2, m, mean);
      }
      __syncthreads();
    }
  }
};

extern __shared__ __align__(128) unsigned char dequantise_memory[];

template <int D, bool kValues>
__device__ __forceinline__ void dequantise_side(const DequantiseJobs& p) {
  const Dequantiser<D, kValues> side(p, dequantise_memory);
  const auto count = static_cast<std::int64_t>(p.count);
  const int begin = static_cast<int>(count * blockIdx.x / gridDim.x),
            end = static_cast<int>(count * (blockIdx.x + 1) / gridDim.x);
  side.run(begin, end);
}

// Grid: ranges of slices, sides, parts of the channels.
template <int D>
__global__ void __launch_bounds__(RowsShape<D>::kThreads, RowsShape<D>::kCtasPerMultiprocessor)
    dequantise_jobs(const __grid_constant__ DequantiseJobs p) {
  if (blockIdx.y == 0) dequantise_side<D, false>(p);
  else dequantise_side<D, true>(p);
}

template <int D>
cudaError_t launch(const DequantiseJobs& p, int device, cudaStream_t stream) {
  using S = RowsShape<D>;
  static SharedMost most;
  int multiprocessors = 1;
  if (const cudaError_t e = prepare_persistent(most, dequantise_jobs<D>, S::kShared, device, &multiprocessors);
      e != cudaSuccess)
    return e;
  const int ctas = std::clamp(multiprocessors * S::kCtasPerMultiprocessor / (2 * S::kParts), 1, p.count);
  return queue(dequantise_jobs<D>, dim3(static_cast<unsigned>(ctas), 2, S::kParts), S::kThreads, S::kShared, stream, p);
}

}  // namespace

cudaError_t launch_dequantise_jobs(const DequantiseJobs& p, int device, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  switch (p.key.dim) {
    case 64: return launch<64>(p, device, stream);
    case 80: return launch<80>(p, device, stream);
    case 96: return launch<96>(p, device, stream);
    case 128: return launch<128>(p, device, stream);
    default: return launch<256>(p, device, stream);
  }
}

}  // namespace kv4::cuda
