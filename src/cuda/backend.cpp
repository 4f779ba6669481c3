#include "cuda/backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/spec.h"
#include "cuda/attend.h"
#include "cuda/attend_tuning.h"
#include "cuda/dequantise.h"
#include "cuda/matrices.h"
#include "cuda/memory.h"
#include "cuda/order.h"
#include "cuda/rows.h"
#include "cuda/scratch.h"
#include "cuda/seal.h"
#include "cuda/tables.h"

namespace kv4::cuda {
namespace {

Status supports_dim(int dim, const char* name) {
  return has_dim(dim) ? Status()
                      : error(StatusCode::unsupported, std::string("head_dim_") + name,
                              "64, 80, 96, 128 or 256 on CUDA", std::to_string(dim));
}
Status supports_dims(int k, int v) {
  KV4_RETURN_IF_ERROR(supports_dim(k, "k"));
  KV4_RETURN_IF_ERROR(supports_dim(v, "v"));
  return k == v ? Status()
                : error(StatusCode::unsupported, "head_dim_v", "head_dim_k, " + std::to_string(k) + ", on CUDA",
                        std::to_string(v));
}
Status supports_side(const SideSpec& side, const char* name) {
  if (side.groups == 1) return {};
  return error(StatusCode::unsupported, std::string("recipe.") + name + ".group", "one scale per vector on CUDA",
               std::to_string(side.group));
}

constexpr std::size_t kScratchZeros = kMostFused * sizeof(int);  // arrival counters

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device)
      : device_(device), name_("cuda:" + std::to_string(device)), memory_(device), rotations_(device) {
    const DeviceGuard guard(device_);
    chip_ = chip_of(device_);
  }
  const char* name() const override { return name_.c_str(); }
  bool host_memory() const override { return false; }
  void set_stream(void* stream) override { cuda::set_stream(static_cast<cudaStream_t>(stream)); }
  Status wait() override {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("stream", cudaStreamSynchronize(current_stream()));
    return {};
  }
  Status memory_in_use(std::size_t* bytes) {
    KV4_ON_DEVICE(device_);
    return memory_.in_use(bytes);
  }
  void limit_memory(long long times) { memory_.limit(times); }
  bool capturing() const override { return is_capturing(current_stream()); }
  int code_channels(int dim) const override { return pad_channels(dim); }

  // attend_main is compiled for some amounts of shared memory (room_of).
  Status supports_device() const {
    if (room_of(chip_) != Room::none) return {};
    if (chip_.code == 0)
      return error(StatusCode::unsupported, "device", "one that this build has CUDA code for", name_);
    const int needed = room_bytes(chip_.code >= 90 ? Room::large : Room::small) >> 10;
    return error(StatusCode::unsupported, "device",
                 std::to_string(needed) +
                     " KiB of shared memory for a block of threads, with code for compute capability " +
                     std::to_string(chip_.code / 10) + "." + std::to_string(chip_.code % 10),
                 std::to_string(chip_.shared >> 10) + " KiB on " + name_);
  }
  Status supports_codes(const Recipe& recipe) const override { return expect_plain_pages(recipe, "on CUDA", 2); }
  Status supports(const PageSpec& spec) const override {
    KV4_RETURN_IF_ERROR(supports_device());
    KV4_RETURN_IF_ERROR(supports_dims(spec.key.dim, spec.value.dim));
    KV4_RETURN_IF_ERROR(supports_side(spec.key, "k"));
    return supports_side(spec.value, "v");
  }
  Status supports_rows(int head_dim_k, int head_dim_v, DType dtype, SealMode /*seal*/) const override {
    KV4_RETURN_IF_ERROR(supports_device());
    KV4_RETURN_IF_ERROR(supports_dims(head_dim_k, head_dim_v));
    return dtype != DType::f32 ? Status()
                               : error(StatusCode::unsupported, "dtype", "float16 or bfloat16 on CUDA", "float32");
  }

  void* alloc(std::size_t bytes) override {
    const DeviceGuard guard(device_);
    void* memory = nullptr;
    return guard.error() == cudaSuccess && memory_.alloc("memory", bytes, &memory).ok() ? memory : nullptr;
  }
  void free(void* p, std::size_t) override {
    const DeviceGuard guard(device_);
    memory_.free(p);
  }
  Status copy(void* to, const void* from, std::size_t bytes) override {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, current_stream()));
    // From and to pinned memory a copy is queued like any other.
    cudaPointerAttributes there, here;
    KV4_RETURN_IF_CUDA("copy", cudaPointerGetAttributes(&there, to));
    KV4_RETURN_IF_CUDA("copy", cudaPointerGetAttributes(&here, from));
    if (there.type == cudaMemoryTypeHost || there.type == cudaMemoryTypeUnregistered || here.type == cudaMemoryTypeHost)
      KV4_RETURN_IF_CUDA("copy", cudaStreamSynchronize(current_stream()));
    return {};
  }
  Status clear(void* p, std::size_t bytes) override {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("clear", cudaMemsetAsync(p, 0, bytes, current_stream()));
    return {};
  }
  Status upload(void* to, const void* from, std::size_t bytes) override {
    KV4_ON_DEVICE(device_);
    return memory_.upload(to, from, bytes);
  }
  Status copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes,
                    int lines) override {
    KV4_ON_DEVICE(device_);
    const auto* first = static_cast<const std::byte*>(from);
    const bool overlap = to<from&& static_cast<std::byte*>(to) + bytes> first;
    KV4_RETURN_IF_CUDA("copy of rows",
                       overlap
                           ? launch_move_lines(to, to_pitch, from, from_pitch, bytes, lines, current_stream())
                           : cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, static_cast<std::size_t>(lines),
                                               cudaMemcpyDeviceToDevice, current_stream()));
    return {};
  }
  Status alloc_note(LateNote** out) override {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("note", memory_.notes.alloc(out));
    return {};
  }
  void free_note(LateNote* note) override {
    const DeviceGuard guard(device_);
    memory_.notes.free(note);
  }
  const RotationTable* table_of(const Rotation& rotation) const override { return rotations_.made(rotation); }
  Status make_tables(std::unique_ptr<DeviceTables>* out) override {
    *out = std::make_unique<CacheTables>(device_, memory_, scratch_);
    return {};
  }
  Status foresee(DeviceTables* tables, std::span<const SequenceView> sequences,
                 int /*tokens: each has its own*/) override {
    KV4_ON_DEVICE(device_);
    auto& held = static_cast<CacheTables&>(*tables);
    KV4_RETURN_IF_ERROR(held.sync(sequences));
    held.expect();
    return {};
  }

  Status store(const StoreJob& job) override {
    KV4_ON_DEVICE(device_);
    StoreParams p = store_params(job.k, job.v);
    p.skip = job.skip;
    Temporary views(memory_);
    auto* const tables = static_cast<CacheTables*>(job.tables);
    const bool captured = tables != nullptr && capturing();  // what the tables hold counts, whatever the host knows
    p.batch = static_cast<int>(captured ? tables->batch() : job.sequences.views.size());
    p.most = static_cast<int>(
        (captured || job.sequences.resident) && job.sequences.most_queries == 0 ? p.rows : most_queries(job.sequences));
    if (tables == nullptr) {
      KV4_RETURN_IF_ERROR(device_views(job.sequences, &views, &p.sequences));
    } else {
      if (!captured) KV4_RETURN_IF_ERROR(tables->sync(job.sequences.views));
      p.sequences = tables->sequences();
    }
    // One CTA per sequence updates the counts. If it stores more rows than there is room for, the next sync reports it.
    p.count = tables != nullptr && p.most == 1 && p.skip == nullptr;
    p.in_order = job.in_order;
    KV4_RETURN_IF_CUDA("store", launch_store(p, current_stream()));
    if (p.count && !captured) tables->expect();
    return {};
  }

  Status begin_step(const PagedBatch& batch, const Step& step) override {
    KV4_ON_DEVICE(device_);
    if (batch.most_queries > kMostStepRows) return Backend::begin_step(batch, step);
    StepParams p;
    p.store = store_params(step.k, step.v);
    p.store.batch = batch.size;
    p.store.most = static_cast<int>(batch.most_queries);
    p.batch = batch;
    p.range = step.range;
    p.dtype = step.dtype;
    p.views = step.views;
    p.jobs = step.jobs;
    KV4_RETURN_IF_CUDA("step", launch_step(p, current_stream()));
    return {};
  }
  Status end_step(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs) override {
    return seal(spec, pages, kv_heads, jobs, true, chip_.code >= 90);
  }

  Status convert(const ConvertJob& job) override {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("convert", launch_convert(job, current_stream()));
    return {};
  }

  Status query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) override {
    KV4_ON_DEVICE(device_);
    EnergyParams p;
    p.q = q.data;
    p.dtype = q.dtype;
    for (std::size_t i = 0; i < 3; ++i) p.stride[i] = q.stride[i];
    p.kv_heads = kv_heads;
    p.group = static_cast<int>(q.shape[1]) / kv_heads;
    p.dim = static_cast<int>(q.shape[3]);
    for (std::size_t first = 0; first < jobs.size(); first += EnergyParams::kJobs) {
      p.jobs = static_cast<int>(std::min<std::size_t>(EnergyParams::kJobs, jobs.size() - first));
      std::copy_n(jobs.begin() + static_cast<std::ptrdiff_t>(first), p.jobs, p.job);
      KV4_RETURN_IF_CUDA("query energies", launch_energies(p, current_stream()));
    }
    return {};
  }

  Status fix_lambda(const LambdaJob& job) override {
    KV4_ON_DEVICE(device_);
    Temporary skip(memory_), energies(memory_);
    KV4_RETURN_IF_ERROR(skip.upload("lambda", job.skip.data(), job.skip.size()));
    KV4_RETURN_IF_ERROR(energies.upload("lambda", job.energies.data(), job.energies.size_bytes()));
    LambdaParams p;
    p.k = job.k;
    p.bf16 = job.dtype == DType::bf16;
    p.k_head_stride = job.k_head_stride;
    p.k_stride = job.k_stride;
    p.kv_heads = job.kv_heads;
    p.dim = job.dim;
    p.blocks = job.blocks;
    p.skip = skip.as<const std::uint8_t>();
    p.energies = energies.as<const float* const>();
    p.queries = static_cast<int>(job.energies.size());
    p.lambda = job.lambda;
    KV4_RETURN_IF_CUDA("lambda", launch_lambda(p, current_stream()));
    return {};
  }

  Status seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs,
              bool resident) override {
    return seal(spec, pages, kv_heads, jobs, resident, false);
  }
  Status seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs, bool resident,
              bool beside) {
    KV4_RETURN_IF_ERROR(supports(spec));
    KV4_ON_DEVICE(device_);
    Temporary memory(memory_);
    SealParams p;
    KV4_RETURN_IF_ERROR(device_jobs(jobs, resident, &memory, &p.jobs));
    KV4_RETURN_IF_ERROR(sides(spec, &p.key, &p.value));
    p.pages = pages;
    p.heads = kv_heads;
    p.count = static_cast<int>(jobs.size()) * kv_heads;
    p.beside = beside;
    p.halves = resident || std::all_of(jobs.begin(), jobs.end(),
                                       [](const SealJob& job) { return job.page < 0 || job.dtype != DType::f32; });
    KV4_RETURN_IF_CUDA("seal", launch_seal(p, current_stream()));
    return {};
  }

  Status dequantise(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const DequantiseJob> jobs,
                    bool resident) const override {
    if (jobs.empty()) return {};
    KV4_ON_DEVICE(device_);
    Temporary memory(memory_);
    DequantiseJobs p;
    KV4_RETURN_IF_ERROR(device_jobs(jobs, resident, &memory, &p.jobs));
    KV4_RETURN_IF_ERROR(sides(spec, &p.key, &p.value));
    p.inverse_k = rotations_.find(spec.key.rotation)->inverse_digits;
    p.inverse_v = rotations_.find(spec.value.rotation)->inverse_digits;
    p.pages = pages;
    p.heads = kv_heads;
    p.count = static_cast<int>(jobs.size()) * kv_heads;
    KV4_RETURN_IF_CUDA("dequantise", launch_dequantise_jobs(p, device_, current_stream()));
    return {};
  }

  Status make_views(const PagedBatch& batch, bool stored, SequenceView* out) override {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("sequences", launch_views(batch, stored, out, chip_.code >= 90, current_stream()));
    return {};
  }
  Status make_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, SealJob* out) override {
    return make_jobs_of(batch, dtype, range, out);
  }
  Status make_jobs(const PagedBatch& batch, DType dtype, const PageRange& range, DequantiseJob* out) override {
    return make_jobs_of(batch, dtype, range, out);
  }

  std::size_t attend_workspace(const AttendJob& job) const override {
    const DeviceGuard guard(device_);
    AttendParams p;
    return guard.error() == cudaSuccess && fill(job, &p).ok() ? most_scratch(p, chip_) : 0;
  }

  Status attend(const AttendJob& job) override {
    KV4_ON_DEVICE(device_);
    const bool captured = capturing();
    AttendParams p;
    KV4_RETURN_IF_ERROR(fill(job, &p));
    if (captured && job.tables != nullptr) {  // what the tables hold counts, whatever the host knows
      p.batch = static_cast<int>(static_cast<CacheTables&>(*job.tables).batch());
      if (job.sequences.most_queries == 0) p.queries = static_cast<int>(p.rows);
    }
    if (p.batch == 0 || p.queries == 0) return {};
    Temporary views(memory_);
    if (job.tables != nullptr) {
      auto& tables = static_cast<CacheTables&>(*job.tables);
      if (!captured) KV4_RETURN_IF_ERROR(tables.sync(job.sequences.views));
      p.sequences = tables.sequences();
      KV4_RETURN_IF_ERROR(tables.limits(CacheTables::kStart, job.args.mask.start, captured, &p.mask.start));
      KV4_RETURN_IF_ERROR(tables.limits(CacheTables::kWindow, job.args.mask.window, captured, &p.mask.window));
    } else {
      KV4_RETURN_IF_ERROR(device_views(job.sequences, &views, &p.sequences));
    }
    const AttendPlan plan = plan_attend(p, chip_, load_of(job.sequences, job.spec != nullptr));
    if (p.batch > plan.most_sequences)
      return error(StatusCode::unsupported, "q",
                   "at most " + std::to_string(plan.most_sequences) + " sequences of these heads on this device",
                   std::to_string(p.batch));
    if (!job.workspace.empty()) {
      if (job.workspace.size() < plan.scratch ||
          reinterpret_cast<std::uintptr_t>(job.workspace.data()) % alignof(uint4) != 0)
        return invalid_argument(
            "workspace",
            "at least " + std::to_string(plan.scratch) + " bytes, on a multiple of " + std::to_string(alignof(uint4)),
            std::to_string(job.workspace.size()));
      KV4_RETURN_IF_CUDA("attend", launch_attend(p, plan, job.workspace.data(), current_stream()));
      return {};
    }
    if (job.tables == nullptr) {
      Temporary scratch(memory_);
      KV4_RETURN_IF_ERROR(scratch.make("scratch", plan.scratch, kScratchZeros));
      KV4_RETURN_IF_CUDA("attend", launch_attend(p, plan, scratch.as<void>(), current_stream()));
      return {};
    }
    Scratch::Held of_graph, *scratch = captured ? &of_graph : static_cast<CacheTables&>(*job.tables).scratch();
    KV4_RETURN_IF_ERROR(captured ? scratch_.capture(plan.scratch, scratch) : scratch_.share(plan.scratch, scratch));
    const std::lock_guard<std::mutex> lock((*scratch)->queueing);
    KV4_RETURN_IF_CUDA("attend", launch_attend(p, plan, (*scratch)->data, current_stream()));
    return {};
  }

  Status fill(const AttendJob& job, AttendParams* p) const {
    KV4_RETURN_IF_ERROR(supports_device());
    const AttendArgs& a = job.args;
    bool any_exact = job.sequences.resident;
    if (!any_exact)
      for (const SequenceView& s : job.sequences.views)
        any_exact = any_exact || s.exact[0].count + s.exact[1].count > 0;
    if (any_exact && job.dtype == DType::f32)
      return error(StatusCode::unsupported, "dtype", "float16 or bfloat16 on CUDA", "float32");
    KV4_RETURN_IF_ERROR(supports_dims(job.head_dim_k, job.head_dim_v));
    p->batch = static_cast<int>(job.sequences.views.size());
    p->kv_heads = job.kv_heads;
    p->group = static_cast<int>(a.q.shape[1]) / job.kv_heads;
    p->queries = static_cast<int>(most_queries(job.sequences));
    p->rows = a.q.shape[2];
    p->window = job.window;
    p->pages.data = job.pages.data;
    p->pages.chunks = job.pages.chunks;
    p->pages.page_stride = static_cast<std::uint32_t>(job.pages.page_stride);
    p->pages.head_stride = static_cast<std::uint32_t>(job.pages.head_stride);
    p->pages.shift = job.pages.chunks != nullptr ? static_cast<std::uint32_t>(job.pages.chunk_shift) : 31;
    p->dim = job.head_dim_k;
    p->bf16 = job.dtype == DType::bf16;
    if (job.spec != nullptr) {
      KV4_RETURN_IF_ERROR(supports(*job.spec));
      const kv4_page_layout& l = job.spec->layout;
      p->mean = job.spec->key.mean;
      p->k_copy_bytes = l.k_mean + (p->mean ? l.head_dim_k * 2 : 0);  // codes, scales, mean
      p->v_copy_bytes = l.v_code_bytes + kPageTokens * 2;
      p->v_codes = l.v_codes;
      p->value_scales = l.v_scales - l.v_codes;
      p->key_scales = l.k_scales;
      const auto tables = [](const Levels& levels) {
        return is_narrow(levels.bits) ? cuda::make_narrow_tables(levels.table.data(), levels.bits)
                                      : cuda::make_tables(levels.table.data());
      };
      p->key_bits = job.spec->key.levels.bits;
      p->value_bits = job.spec->value.levels.bits;
      p->key = tables(job.spec->key.levels);
      p->value = tables(job.spec->value.levels);
      p->even_levels = cuda::even_levels(p->key) && cuda::even_levels(p->value);
      const Matrices* k = rotations_.find(job.spec->key.rotation);
      const Matrices* v = rotations_.find(job.spec->value.rotation);
      if (k == nullptr || v == nullptr)
        return error(StatusCode::out_of_memory, "rotation", "free device memory", "none");
      p->dual = k->inverse_packed;
      p->inverse_transpose = v->inverse_transpose_packed;
    }
    constexpr double kLog2e = 1.4426950408889634;
    const double scale = a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<double>(job.head_dim_k));
    p->cap = static_cast<float>(a.softcap * kLog2e);
    p->factor = static_cast<float>(a.softcap > 0 ? scale / a.softcap : scale * kLog2e);
    p->mask = a.mask;
    p->q = a.q.data;
    p->q_dtype = a.q.dtype;
    for (int i = 0; i < 3; ++i) p->q_stride[i] = a.q.stride[static_cast<std::size_t>(i)];
    if (job.out.data != nullptr) {
      p->out = job.out.data;
      p->out_dtype = job.out.dtype;
      for (int i = 0; i < 3; ++i) p->out_stride[i] = job.out.stride[static_cast<std::size_t>(i)];
      p->sinks = a.sinks;
    } else {
      p->partial = job.partial;
    }
    return {};
  }

  Status codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k,
                            std::uint8_t* v) const override {
    std::vector<std::uint8_t> host;
    KV4_RETURN_IF_ERROR(download(spec, slice, &host));
    cuda::codes_to_canonical(spec, host.data(), k, v);
    return {};
  }
  Status codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v,
                              std::uint8_t* slice) const override {
    std::vector<std::uint8_t> host;
    KV4_RETURN_IF_ERROR(download(spec, slice, &host));
    cuda::codes_from_canonical(spec, k, v, host.data());
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("codes",
                       cudaMemcpyAsync(slice, host.data(), host.size(), cudaMemcpyHostToDevice, current_stream()));
    KV4_RETURN_IF_CUDA("codes", cudaStreamSynchronize(current_stream()));
    return {};
  }

 private:
  StoreParams store_params(const TensorView& k, const TensorView& v) const {
    StoreParams p;
    p.heads = static_cast<int>(k.shape[1]);
    p.rows = k.shape[2];
    p.dim = static_cast<int>(k.shape[3]);
    p.bf16 = k.dtype == DType::bf16;
    p.k = k.data;
    p.v = v.data;
    for (std::size_t i = 0; i < 3; ++i) {
      p.k_stride[i] = k.stride[i];
      p.v_stride[i] = v.stride[i];
    }
    p.early = chip_.code >= 90;
    return p;
  }
  Status download(const PageSpec& spec, const std::uint8_t* slice, std::vector<std::uint8_t>* host) const {
    KV4_ON_DEVICE(device_);
    host->resize(spec.layout.head_bytes);
    KV4_RETURN_IF_CUDA("codes",
                       cudaMemcpyAsync(host->data(), slice, host->size(), cudaMemcpyDeviceToHost, current_stream()));
    KV4_RETURN_IF_CUDA("codes", cudaStreamSynchronize(current_stream()));
    return {};
  }

  // Sequences of a call without tables, for as long as it runs. Nobody counts in those of a caller.
  template <class View>
  static Status device_views(const Sequences& sequences, Temporary* memory, View** out) {
    if (!sequences.resident)
      KV4_RETURN_IF_ERROR(memory->upload("sequences", sequences.views.data(), sequences.views.size_bytes()));
    *out = sequences.resident ? const_cast<SequenceView*>(sequences.views.data()) : memory->as<SequenceView>();
    return {};
  }
  template <class Job>
  static Status device_jobs(std::span<const Job> jobs, bool resident, Temporary* memory, const Job** out) {
    if (!resident) KV4_RETURN_IF_ERROR(memory->upload("jobs", jobs.data(), jobs.size_bytes()));
    *out = resident ? jobs.data() : memory->as<const Job>();
    return {};
  }
  template <class Job>
  Status make_jobs_of(const PagedBatch& batch, DType dtype, const PageRange& range, Job* out) {
    KV4_ON_DEVICE(device_);
    KV4_RETURN_IF_CUDA("jobs", launch_jobs(batch, dtype, range, out, chip_.code >= 90, current_stream()));
    return {};
  }

  Status sides(const PageSpec& spec, SideParams* key, SideParams* value) const {
    const kv4_page_layout& l = spec.layout;
    const auto one = [&](const SideSpec& side, SideParams* out) {
      const Matrices* m = rotations_.find(side.rotation);
      if (m == nullptr) return error(StatusCode::out_of_memory, "rotation", "free device memory", "none");
      out->dim = side.dim;
      out->group = side.group;
      out->groups = side.groups;
      out->mean = side.mean;
      out->abs_max = side.scale == ScaleRule::abs_max;
      out->step = step_rule(side.levels, side.scale, side.group);
      out->bits = static_cast<std::int8_t>(side.levels.bits);
      const int half = side.levels.half();
      out->negative_base = side.levels.negative_base + 8 - half;
      for (int i = 0; i < 7; ++i)
        out->thresholds[i] = i < half - 1 ? side.levels.twice_threshold[static_cast<std::size_t>(i)] * 0.5f : INFINITY;
      std::memcpy(out->levels + 8 - half, side.levels.table.data(), static_cast<std::size_t>(2 * half));
      out->rotation_transpose = m->rotation_transpose;
      out->rotation_transpose_f64 = m->rotation_transpose_f64;
      out->rotation_digits = m->rotation_digits;
      out->digit_unit = m->digit_unit;
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

  const int device_;
  const std::string name_;
  Chip chip_;
  mutable Memory memory_;
  Scratch scratch_{memory_, kScratchZeros};
  const Rotations rotations_;
};

bool usable(int device) {
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || device >= count) {
    cudaGetLastError();
    return false;
  }
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

Status no_device() {
  return error(StatusCode::unsupported, "device", "a CUDA device of compute capability 8.0 or later", "none");
}

CudaBackend* the_backend(int device) {
  // Never destroyed: the driver may be gone before a static object is.
  static std::mutex* const mutex = new std::mutex();
  static auto* const backends = new std::map<int, CudaBackend*>();
  const std::lock_guard<std::mutex> lock(*mutex);
  if (const auto it = backends->find(device); it != backends->end()) return it->second;
  return (*backends)[device] = usable(device) ? new CudaBackend(device) : nullptr;
}

}  // namespace

Backend* backend(int device) { return the_backend(device); }

Status memory_in_use(int device, std::size_t* bytes) {
  CudaBackend* const backend = the_backend(device);
  if (backend == nullptr) return no_device();
  return backend->memory_in_use(bytes);
}

Status limit_memory(int device, long long times) {
  CudaBackend* const backend = the_backend(device);
  if (backend == nullptr) return no_device();
  backend->limit_memory(times);
  return {};
}

Status attend_params(const AttendJob& job, AttendParams* params) {
  if (the_backend(0) == nullptr) return no_device();
  KV4_ON_DEVICE(0);
  return the_backend(0)->fill(job, params);
}

}  // namespace kv4::cuda
