#include "cuda/backend.h"

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/attend.h"
#include "cuda/attend_tuning.h"
#include "cuda/order.h"
#include "cuda/pack.h"
#include "cuda/seal.h"

namespace kv4::cuda {
namespace {

thread_local cudaStream_t current_stream = nullptr;

Status failed(const char* what, cudaError_t e) {
  return error(e == cudaErrorMemoryAllocation ? StatusCode::out_of_memory : StatusCode::failed_precondition, what, "success",
               cudaGetErrorString(e));
}

#define KV4_RETURN_IF_CUDA(what, expr) \
  do {                                 \
    if (const cudaError_t kv4_cuda_ = (expr); kv4_cuda_ != cudaSuccess) return failed(what, kv4_cuda_); \
  } while (false)

// Device memory that grows; what it held is lost.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }
  cudaError_t reserve(std::size_t bytes) {
    if (bytes <= size_) return cudaSuccess;
    cudaFree(data_);
    data_ = nullptr;
    size_ = 0;
    if (const cudaError_t e = cudaMalloc(&data_, bytes); e != cudaSuccess) return e;
    size_ = bytes;
    return cudaSuccess;
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// A rotation's matrices in device memory; null for the identity.
struct Matrices {
  DeviceBuffer memory;
  const float* rotation_transpose = nullptr;  // R^T by rows
  const float* inverse_transpose = nullptr;   // (R^-1)^T by rows
  PackedMatrix inverse_packed, inverse_transpose_packed;
  const double* rotation_transpose_f64 = nullptr;
};

cudaError_t upload(const Rotation& rotation, Matrices* out) {
  if (rotation.kind() == RotationKind::identity) return cudaSuccess;
  const std::size_t d = static_cast<std::size_t>(rotation.dim()), n = d * d;
  const std::vector<double> forward = rotation.matrix_f64(), inverse = rotation.inverse_f64();
  std::vector<double> forward_transpose(n), inverse_transpose(n);
  for (std::size_t i = 0; i < d; ++i) {
    for (std::size_t c = 0; c < d; ++c) {
      forward_transpose[c * d + i] = forward[i * d + c];
      inverse_transpose[c * d + i] = inverse[i * d + c];
    }
  }
  const std::vector<float> narrow(forward_transpose.begin(), forward_transpose.end());
  const std::vector<float> narrow_inverse(inverse_transpose.begin(), inverse_transpose.end());
  const std::vector<std::uint32_t> packed = pack_matrix(inverse, rotation.dim(), &out->inverse_packed.scale);
  const std::vector<std::uint32_t> packed_transpose = pack_matrix(inverse_transpose, rotation.dim(), &out->inverse_transpose_packed.scale);
  if (const cudaError_t e = out->memory.reserve(n * 24); e != cudaSuccess) return e;
  auto* at = static_cast<std::byte*>(out->memory.data());
  const auto put = [&at](const auto& values) {
    const cudaError_t e = cudaMemcpy(at, values.data(), values.size() * sizeof(values[0]), cudaMemcpyHostToDevice);
    const std::byte* from = at;
    at += values.size() * sizeof(values[0]);
    return std::pair(e, from);
  };
  const auto [e0, doubles] = put(forward_transpose);
  const auto [e1, floats] = put(narrow);
  const auto [e2, inverse_floats] = put(narrow_inverse);
  const auto [e3, words] = put(packed);
  const auto [e4, transpose_words] = put(packed_transpose);
  for (cudaError_t e : {e0, e1, e2, e3, e4})
    if (e != cudaSuccess) return e;
  out->rotation_transpose_f64 = reinterpret_cast<const double*>(doubles);
  out->rotation_transpose = reinterpret_cast<const float*>(floats);
  out->inverse_transpose = reinterpret_cast<const float*>(inverse_floats);
  out->inverse_packed.words = reinterpret_cast<const uint4*>(words);
  out->inverse_transpose_packed.words = reinterpret_cast<const uint4*>(transpose_words);
  return cudaSuccess;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend() {
    if (cudaGetDevice(&device_) != cudaSuccess) device_ = 0;
    cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device_);
    cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_);
  }
  const char* name() const override { return "cuda"; }
  int code_channels(int dim) const override { return pad_channels(dim); }

  Status supports(const PageSpec& spec) const override {
    KV4_RETURN_IF_ERROR(supports_side(spec.key, "k"));
    KV4_RETURN_IF_ERROR(supports_side(spec.value, "v"));
    if (spec.key.dim != spec.value.dim)
      return error(StatusCode::unsupported, "head_dim_v", "head_dim_k, " + std::to_string(spec.key.dim), std::to_string(spec.value.dim));
    return {};
  }

  void* alloc(std::size_t bytes) override {
    void* p = nullptr;
    return cudaMalloc(&p, bytes) == cudaSuccess ? p : nullptr;
  }
  void free(void* p, std::size_t) override { cudaFree(p); }
  void copy(void* to, const void* from, std::size_t bytes) override { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, current_stream); }
  void clear(void* p, std::size_t bytes) override { cudaMemsetAsync(p, 0, bytes, current_stream); }

  Status seal(const PageSpec& spec, std::span<const SealJob> jobs) override {
    KV4_RETURN_IF_ERROR(supports(spec));
    thread_local DeviceBuffer memory;
    KV4_RETURN_IF_CUDA("workspace", memory.reserve(jobs.size_bytes()));
    KV4_RETURN_IF_CUDA("jobs", cudaMemcpyAsync(memory.data(), jobs.data(), jobs.size_bytes(), cudaMemcpyHostToDevice, current_stream));
    SealParams p;
    KV4_RETURN_IF_ERROR(sides(spec, &p.key, &p.value));
    p.jobs = static_cast<const SealJob*>(memory.data());
    p.count = static_cast<int>(jobs.size());
    KV4_RETURN_IF_CUDA("seal", launch_seal(p, current_stream));
    return {};
  }

  Status attend(const AttendJob& job) override {
    AttendParams p;
    KV4_RETURN_IF_ERROR(fill(job, &p));
    const AttendPlan plan = plan_attend(p, multiprocessors_, major_);
    // The sequences and their page tables, then the scratch.
    std::size_t pages = 0;
    for (const SequenceView& s : job.sequences) pages += static_cast<std::size_t>(s.page_count);
    const std::size_t views_bytes = job.sequences.size_bytes(), table_bytes = pages * sizeof(void*);
    const std::size_t head = (views_bytes + table_bytes + 255) / 256 * 256;
    thread_local DeviceBuffer memory;
    KV4_RETURN_IF_CUDA("workspace", memory.reserve(head + plan.scratch));
    auto* at = static_cast<std::byte*>(memory.data());
    thread_local std::vector<std::byte> staged;
    staged.resize(views_bytes + table_bytes);
    std::size_t used = 0;
    for (std::size_t b = 0; b < job.sequences.size(); ++b) {
      SequenceView view = job.sequences[b];
      const std::size_t bytes = static_cast<std::size_t>(view.page_count) * sizeof(void*);
      if (bytes > 0) std::memcpy(staged.data() + views_bytes + used, view.pages, bytes);
      view.pages = reinterpret_cast<const std::uint8_t* const*>(at + views_bytes + used);
      used += bytes;
      std::memcpy(staged.data() + b * sizeof(SequenceView), &view, sizeof(SequenceView));
    }
    KV4_RETURN_IF_CUDA("sequences", cudaMemcpyAsync(at, staged.data(), staged.size(), cudaMemcpyHostToDevice, current_stream));
    p.sequences = reinterpret_cast<const SequenceView*>(at);
    KV4_RETURN_IF_CUDA("attend", launch_attend(p, plan, at + head, current_stream));
    return {};
  }

  Status fill(const AttendJob& job, AttendParams* p) const {
    const AttendArgs& a = job.args;
    bool any_exact = false;
    for (const SequenceView& s : job.sequences) any_exact = any_exact || s.exact[0].count + s.exact[1].count > 0;
    if (any_exact && job.dtype == DType::f32)
      return error(StatusCode::unsupported, "dtype", "float16 or bfloat16 on CUDA", "float32");
    if (job.head_dim_k != job.head_dim_v)
      return error(StatusCode::unsupported, "head_dim_v", "head_dim_k, " + std::to_string(job.head_dim_k), std::to_string(job.head_dim_v));
    if (!has_dim(job.head_dim_k)) return error(StatusCode::unsupported, "head_dim_k", "64, 80, 96, 128 or 256 on CUDA", std::to_string(job.head_dim_k));
    p->batch = static_cast<int>(job.sequences.size());
    p->kv_heads = job.kv_heads;
    p->group = static_cast<int>(a.q.shape[1]) / job.kv_heads;
    p->queries = static_cast<int>(job.query_count);
    p->dim = job.head_dim_k;
    p->bf16 = job.dtype == DType::bf16;
    if (job.spec != nullptr) {
      KV4_RETURN_IF_ERROR(supports(*job.spec));
      const kv4_page_layout& l = job.spec->layout;
      p->mean = job.spec->key.mean;
      p->head_bytes = l.head_bytes;
      p->k_copy_bytes = l.k_mean + (p->mean ? l.head_dim_k * 2 : 0);  // codes, scales, mean
      p->v_copy_bytes = l.v_code_bytes + kPageTokens * 2;
      p->v_codes = l.v_codes;
      p->value_scales = l.v_scales - l.v_codes;
      p->key = make_tables(job.spec->key.levels.table.data());
      p->value = make_tables(job.spec->value.levels.table.data());
      const Matrices* k = matrices(job.spec->key);
      const Matrices* v = matrices(job.spec->value);
      if (k == nullptr || v == nullptr) return error(StatusCode::out_of_memory, "rotation", "free device memory", "none");
      p->dual = k->inverse_packed;
      p->inverse_transpose = v->inverse_transpose_packed;
    }
    constexpr double kLog2e = 1.4426950408889634;
    const double scale = a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<double>(job.head_dim_k));
    p->cap = static_cast<float>(a.softcap * kLog2e);
    p->factor = static_cast<float>(a.softcap > 0 ? scale / a.softcap : scale * kLog2e);
    p->mask = a.mask;
    const std::int64_t size = static_cast<std::int64_t>(size_of(a.q.dtype));
    p->q = static_cast<const std::byte*>(a.q.data) + job.query_begin * a.q.stride[2] * size;
    p->q_dtype = a.q.dtype;
    for (int i = 0; i < 3; ++i) p->q_stride[i] = a.q.stride[static_cast<std::size_t>(i)];
    if (a.mask.kind != Mask::General::none) {
      const std::int64_t bytes = a.mask.kind == Mask::General::boolean ? 1 : static_cast<std::int64_t>(size_of(a.mask.general_dtype));
      p->mask.general = static_cast<const std::byte*>(a.mask.general) + job.query_begin * a.mask.general_stride[2] * bytes;
    }
    if (job.out.data != nullptr) {
      p->out = static_cast<std::byte*>(job.out.data) + job.query_begin * job.out.stride[2] * static_cast<std::int64_t>(size_of(job.out.dtype));
      p->out_dtype = job.out.dtype;
      for (int i = 0; i < 3; ++i) p->out_stride[i] = job.out.stride[static_cast<std::size_t>(i)];
      p->sinks = a.sinks;
    } else {
      p->partial = job.partial;
      p->partial_queries = static_cast<int>(a.q.shape[2]);
      p->partial_begin = static_cast<int>(job.query_begin);
    }
    return {};
  }

  void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) const override {
    const std::vector<std::uint8_t> host = download(spec, slice);
    cuda::codes_to_canonical(spec, host.data(), k, v);
  }
  void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) const override {
    std::vector<std::uint8_t> host = download(spec, slice);
    cuda::codes_from_canonical(spec, k, v, host.data());
    cudaMemcpyAsync(slice, host.data(), host.size(), cudaMemcpyHostToDevice, current_stream);
  }
  void dequantise(const PageSpec& spec, const std::uint8_t* slice, const float* lambda_k, const float* lambda_v, int first, int count,
                  float* k, float* v) const override {
    DequantiseParams p;
    if (!sides(spec, &p.key, &p.value).ok()) return;
    p.slice = slice;
    p.lambda_k = lambda_k;
    p.lambda_v = lambda_v;
    p.inverse_k = matrices(spec.key)->inverse_transpose;
    p.inverse_v = matrices(spec.value)->inverse_transpose;
    p.first = first;
    p.count = count;
    p.k = k;
    p.v = v;
    launch_dequantise(p, current_stream);
  }

 private:
  static Status supports_side(const SideSpec& side, const char* name) {
    if (has_dim(side.dim) && side.groups == 1) return {};
    if (has_dim(side.dim))
      return error(StatusCode::unsupported, std::string("recipe.") + name + ".group", "one scale per vector on CUDA", std::to_string(side.group));
    return error(StatusCode::unsupported, std::string("head_dim_") + name, "64, 80, 96, 128 or 256 on CUDA", std::to_string(side.dim));
  }

  static std::vector<std::uint8_t> download(const PageSpec& spec, const std::uint8_t* slice) {
    std::vector<std::uint8_t> host(spec.layout.head_bytes);
    cudaMemcpyAsync(host.data(), slice, host.size(), cudaMemcpyDeviceToHost, current_stream);
    cudaStreamSynchronize(current_stream);
    return host;
  }

  // The device's copy of a rotation, kept while anyone holds the rotation; null where memory ran out.
  const Matrices* matrices(const SideSpec& side) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = rotations_.begin(); it != rotations_.end();) it = it->second.first.expired() ? rotations_.erase(it) : std::next(it);
    auto& entry = rotations_[side.rotation.get()];
    if (entry.second == nullptr) {
      entry.first = side.rotation;
      auto made = std::make_unique<Matrices>();
      if (upload(*side.rotation, made.get()) != cudaSuccess) return nullptr;
      entry.second = std::move(made);
    }
    return entry.second.get();
  }

  Status sides(const PageSpec& spec, SideParams* key, SideParams* value) const {
    const kv4_page_layout& l = spec.layout;
    const auto one = [&](const SideSpec& side, SideParams* out) {
      const Matrices* m = matrices(side);
      if (m == nullptr) return error(StatusCode::out_of_memory, "rotation", "free device memory", "none");
      out->dim = side.dim;
      out->group = side.group;
      out->groups = side.groups;
      out->mean = side.mean;
      out->abs_max = side.scale == ScaleRule::abs_max;
      out->gain = side.levels.gain;
      out->top = side.levels.magnitude[7];
      out->negative_base = side.levels.negative_base;
      for (int i = 0; i < 7; ++i) out->thresholds[i] = side.levels.twice_threshold[static_cast<std::size_t>(i)] * 0.5f;
      std::memcpy(out->levels, side.levels.table.data(), 16);
      out->rotation_transpose = m->rotation_transpose;
      out->rotation_transpose_f64 = m->rotation_transpose_f64;
      return Status();
    };
    KV4_RETURN_IF_ERROR(one(spec.key, key));
    KV4_RETURN_IF_ERROR(one(spec.value, value));
    key->codes = l.k_codes;
    key->scales = l.k_scales;
    key->mean_at = l.k_mean;
    value->codes = l.v_codes;
    value->scales = l.v_scales;
    return {};
  }

  int device_ = 0, multiprocessors_ = 1, major_ = 8;
  mutable std::mutex mutex_;
  mutable std::map<const Rotation*, std::pair<std::weak_ptr<const Rotation>, std::unique_ptr<Matrices>>> rotations_;
};

bool usable() {
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return false;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major >= 8;
}

CudaBackend* the_backend() {
  static const bool there = usable();
  if (!there) return nullptr;
  static CudaBackend backend;
  return &backend;
}

}  // namespace

Backend* backend() { return the_backend(); }

Status attend_params(const AttendJob& job, AttendParams* params) {
  if (the_backend() == nullptr)
    return error(StatusCode::unsupported, "device", "a CUDA device of compute capability 8.0 or later", "none");
  return the_backend()->fill(job, params);
}

void set_stream(cudaStream_t stream) { current_stream = stream; }

}  // namespace kv4::cuda
