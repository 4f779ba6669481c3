// The backend of Apple GPUs. Their memory is the CPU's: taking rows in, moments and conversions are the CPU backend's; sealing,
// dequantising and attention are launches, and each call waits for its own. Queries, masks and outputs may be any memory:
// they are copied. What a launch is told, and every table, comes from tables.h; gpu.h is all that knows a device.
#include "backend/backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "format/finite.h"
#include "metal/arguments.h"
#include "metal/gpu.h"
#include "metal/order.h"
#include "metal/tables.h"

namespace kv4::apple {
namespace {

constexpr std::size_t kSmallest = 64;  // bytes of a buffer

// Memory of one call, given back with it.
class Staging {
 public:
  explicit Staging(Gpu& gpu) : gpu_(gpu) {}
  ~Staging() {
    for (void* p : held_) gpu_.free(p);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Null where there is no memory: full() then says so, and the call may go on with others.
  template <class T>
  T* room(std::size_t count) {
    void* p = gpu_.alloc(std::max(count * sizeof(T), kSmallest));
    if (p == nullptr) failed_ = true;
    else held_.push_back(p);
    return static_cast<T*>(p);
  }
  template <class T>
  const T* put(const std::vector<T>& values) {
    T* p = room<T>(values.size());
    if (p != nullptr && !values.empty()) std::memcpy(p, values.data(), values.size() * sizeof(T));
    return p;
  }
  Status full() const {
    return failed_ ? error(StatusCode::out_of_memory, "workspace", "free memory of the GPU", "none") : Status();
  }

 private:
  Gpu& gpu_;
  std::vector<void*> held_;
  bool failed_ = false;
};

// Matrices of a rotation where kernels read them; empty ones for the identity. They go with the rotation, and keep the GPU
// that their memory is of.
struct Matrices final : RotationTable {
  Matrices(std::shared_ptr<Gpu> on, const Rotation& rotation) : gpu(std::move(on)) {
    query = keep(query_matrix(rotation));
    output = keep(output_matrix(rotation));
    sealing = keep(sealing_matrix(rotation));
  }
  ~Matrices() override {
    for (void* p : {query, output, sealing})
      if (p != nullptr) gpu->free(p);
  }
  std::size_t bytes() const override { return held; }
  bool whole() const { return query != nullptr && output != nullptr && sealing != nullptr; }

  void* keep(const std::vector<float>& values) {
    const std::size_t size = std::max(values.size() * sizeof(float), kSmallest);
    void* p = gpu->alloc(size);
    if (p == nullptr) return p;
    if (!values.empty()) std::memcpy(p, values.data(), values.size() * sizeof(float));
    held += size;
    return p;
  }

  const std::shared_ptr<Gpu> gpu;
  std::size_t held = 0;
  void* query = nullptr;
  void* output = nullptr;
  void* sealing = nullptr;
};

class MetalBackend final : public Backend {
 public:
  explicit MetalBackend(std::unique_ptr<Gpu> gpu) : gpu_(std::move(gpu)), cpu_(*find_backend("cpu")) {}
  const char* name() const override { return "metal"; }
  int code_channels(int dim) const override { return dim; }
  Status supports(const PageSpec& spec) const override { return apple::supports(spec); }
  Status supports_rows(int head_dim_k, int head_dim_v, DType, SealMode) const override {
    return supports_dims(head_dim_k, head_dim_v);
  }

  void* alloc(std::size_t bytes) override { return gpu_->alloc(std::max(bytes, kSmallest)); }
  void free(void* p, std::size_t) override { gpu_->free(p); }
  Status copy(void* to, const void* from, std::size_t bytes) override { return cpu_.copy(to, from, bytes); }
  Status clear(void* p, std::size_t bytes) override { return cpu_.clear(p, bytes); }
  Status copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes, int lines) override {
    return cpu_.copy_lines(to, to_pitch, from, from_pitch, bytes, lines);
  }
  Status store(const StoreJob& job) override { return cpu_.store(job); }
  Status convert(const ConvertJob& job) override { return cpu_.convert(job); }
  Status query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) override {
    return cpu_.query_energies(q, kv_heads, jobs);
  }
  Status fix_lambda(const LambdaJob& job) override { return cpu_.fix_lambda(job); }
  const RotationTable* table_of(const Rotation& rotation) const override { return rotation.table_on(gpu_.get()); }

  Status seal(const PageSpec& spec, std::span<const SealJob> jobs) override {
    // A launch has one distance between rows; jobs of one cache have it in common.
    for (std::size_t begin = 0; begin < jobs.size();) {
      std::size_t end = begin + 1;
      while (end < jobs.size() && jobs[end].dtype == jobs[begin].dtype && jobs[end].k_stride == jobs[begin].k_stride &&
             jobs[end].v_stride == jobs[begin].v_stride)
        ++end;
      KV4_RETURN_IF_ERROR(seal_alike(spec, jobs.subspan(begin, end - begin)));
      begin = end;
    }
    return {};
  }

  Status dequantise(const PageSpec& spec, std::span<const DequantiseJob> jobs) const override {
    for (const bool values : {false, true}) KV4_RETURN_IF_ERROR(dequantise_side(spec, values, jobs));
    return {};
  }

  Status attend(const AttendJob& job) override;

  Status codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v) const override {
    apple::codes_to_canonical(spec, slice, k, v);
    return {};
  }
  Status codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice) const override {
    apple::codes_from_canonical(spec, k, v, slice);
    return {};
  }

 private:
  // Distance on the GPU, in elements of `size` bytes.
  std::int64_t distance(const void* from, const void* to, std::size_t size) const {
    return static_cast<std::int64_t>(gpu_->address(to) - gpu_->address(from)) / static_cast<std::int64_t>(size);
  }
  // A place that tables.h may take distances of; nothing is read through it.
  template <class T>
  const T* on_gpu(const T* p) const {
    return p == nullptr ? nullptr : reinterpret_cast<const T*>(gpu_->address(p));
  }

  Status matrices(const Rotation& rotation, const Matrices** out) const;
  Status seal_alike(const PageSpec& spec, std::span<const SealJob> jobs) const;
  Status dequantise_side(const PageSpec& spec, bool values, std::span<const DequantiseJob> jobs) const;

  const std::shared_ptr<Gpu> gpu_;  // tells devices apart, too
  Backend& cpu_;
};

Status MetalBackend::matrices(const Rotation& rotation, const Matrices** out) const {
  const RotationTable* table = rotation.table_on(gpu_.get(), [&]() -> std::unique_ptr<RotationTable> {
    auto made = std::make_unique<Matrices>(gpu_, rotation);
    if (!made->whole()) return nullptr;
    return made;
  });
  if (table == nullptr) return error(StatusCode::out_of_memory, "rotation", "free memory of the GPU", "none");
  *out = static_cast<const Matrices*>(table);
  return {};
}

Status MetalBackend::seal_alike(const PageSpec& spec, std::span<const SealJob> jobs) const {
  Staging staging(*gpu_);
  std::vector<Launch> launches;
  for (const bool values : {false, true}) {
    const SideSpec& side = values ? spec.value : spec.key;
    const auto dim = static_cast<std::size_t>(side.dim);
    const auto rows_of = [values](const SealJob& j) { return values ? j.v : j.k; };
    const auto lambda_of = [values](const SealJob& j) { return values ? j.lambda_v : j.lambda_k; };
    const void* rows = rows_of(jobs[0]);
    const std::uint8_t* pages = jobs[0].slice;
    std::vector<std::int64_t> table;
    std::vector<std::uint8_t> skip;
    std::vector<float> lambda;
    for (const SealJob& j : jobs) {
      const auto fields = table.size();
      table.resize(fields + kv4_job_fields);
      std::int64_t* t = table.data() + fields;
      t[kv4_job_rows] = distance(rows, rows_of(j), size_of(j.dtype));
      t[kv4_job_slice] = distance(pages, j.slice, 1);
      t[kv4_job_skip] = j.skip == nullptr ? -1 : static_cast<std::int64_t>(skip.size());
      if (j.skip != nullptr) skip.insert(skip.end(), j.skip, j.skip + j.count);
      t[kv4_job_lambda] = lambda_of(j) == nullptr ? -1 : static_cast<std::int64_t>(lambda.size() / dim);
      if (lambda_of(j) != nullptr) lambda.insert(lambda.end(), lambda_of(j), lambda_of(j) + dim);
      t[kv4_job_first] = j.first;
      t[kv4_job_count] = j.count;
    }
    const Matrices* m = nullptr;
    KV4_RETURN_IF_ERROR(matrices(*side.rotation, &m));
    Launch launch;
    launch.kernel = "kv4_seal";
    launch.buffers = {rows, staging.put(skip), staging.put(lambda), m->sealing, staging.put(table),
                      staging.put(side_table(spec, values, jobs[0].dtype, values ? jobs[0].v_stride : jobs[0].k_stride)),
                      staging.put(level_table(side)), pages};
    launch.threads[0] = static_cast<std::uint32_t>(KV4_ROW_THREADS * jobs.size());
    launch.group = KV4_ROW_THREADS;
    launch.dim = side.dim;
    launches.push_back(std::move(launch));
  }
  KV4_RETURN_IF_ERROR(staging.full());
  return gpu_->run(launches);
}

Status MetalBackend::dequantise_side(const PageSpec& spec, bool values, std::span<const DequantiseJob> jobs) const {
  const SideSpec& side = values ? spec.value : spec.key;
  const auto dim = static_cast<std::size_t>(side.dim);
  const auto to_of = [values](const DequantiseJob& j) { return values ? j.v : j.k; };
  Staging staging(*gpu_);
  std::vector<std::int64_t> table;
  std::vector<float> lambda;
  const std::uint8_t* pages = nullptr;
  std::int64_t rows = 0;
  int most = 0;
  for (const DequantiseJob& j : jobs) {
    if (to_of(j) == nullptr || j.count == 0) continue;
    if (pages == nullptr) pages = j.slice;
    const float* given = values ? j.lambda_v : j.lambda_k;
    const auto fields = table.size();
    table.resize(fields + kv4_job_fields);
    std::int64_t* t = table.data() + fields;
    t[kv4_job_rows] = rows * side.dim;
    t[kv4_job_skip] = -1;
    t[kv4_job_slice] = distance(pages, j.slice, 1);
    t[kv4_job_lambda] = given == nullptr ? -1 : static_cast<std::int64_t>(lambda.size() / dim);
    if (given != nullptr) lambda.insert(lambda.end(), given, given + dim);
    t[kv4_job_first] = j.first;
    t[kv4_job_count] = j.count;
    rows += j.count;
    most = std::max(most, j.count);
  }
  if (pages == nullptr) return {};
  const Matrices* m = nullptr;
  KV4_RETURN_IF_ERROR(matrices(*side.rotation, &m));
  const float* out = staging.room<float>(static_cast<std::size_t>(rows) * dim);
  Launch launch;
  launch.kernel = "kv4_dequantise";
  launch.buffers = {pages, staging.put(lambda), m->output, staging.put(table), staging.put(side_table(spec, values, DType::f32, side.dim)),
                    staging.put(level_table(side)), out};
  launch.threads[0] = static_cast<std::uint32_t>(KV4_ROW_THREADS * (table.size() / kv4_job_fields));
  launch.threads[1] = static_cast<std::uint32_t>(most);
  launch.group = KV4_ROW_THREADS;
  launch.dim = side.dim;
  KV4_RETURN_IF_ERROR(staging.full());
  KV4_RETURN_IF_ERROR(gpu_->run({&launch, 1}));
  for (const DequantiseJob& j : jobs) {
    if (to_of(j) == nullptr || j.count == 0) continue;
    KV4_RETURN_IF_ERROR(cpu_.convert({.from = out, .from_stride = side.dim, .to = to_of(j), .to_dtype = j.dtype,
                                      .to_stride = values ? j.v_stride : j.k_stride, .heads = 1, .dim = side.dim, .rows = j.count}));
    out += static_cast<std::size_t>(j.count) * dim;
  }
  return {};
}

// The general mask in row order, broadcast axes left at one.
std::vector<std::uint8_t> mask_in_order(const AttendJob& job, std::array<std::int64_t, 4>* stride) {
  const Mask& m = job.args.mask;
  const std::size_t size = m.kind == Mask::General::boolean ? 1 : size_of(m.general_dtype);
  const std::int64_t extent[3] = {static_cast<std::int64_t>(job.sequences.size()), job.args.q.shape[1], job.query_count};
  const auto* from = static_cast<const std::uint8_t*>(m.general);
  from += job.query_begin * m.general_stride[2] * static_cast<std::int64_t>(size);
  std::int64_t n[3], step = m.columns;
  for (int i = 2; i >= 0; --i) {
    n[i] = m.general_stride[i] == 0 ? 1 : extent[i];
    (*stride)[i] = n[i] == 1 ? 0 : step;
    step *= n[i];
  }
  (*stride)[3] = 1;
  std::vector<std::uint8_t> out;
  out.reserve(static_cast<std::size_t>(step) * size);
  for (std::int64_t b = 0; b < n[0]; ++b)
    for (std::int64_t h = 0; h < n[1]; ++h)
      for (std::int64_t t = 0; t < n[2]; ++t)
        for (std::int64_t c = 0; c < m.columns; ++c) {
          const std::int64_t at = b * m.general_stride[0] + h * m.general_stride[1] + t * m.general_stride[2] + c * m.general_stride[3];
          out.insert(out.end(), from + at * static_cast<std::int64_t>(size), from + (at + 1) * static_cast<std::int64_t>(size));
        }
  return out;
}

Status MetalBackend::attend(const AttendJob& job) {
  const AttendArgs& a = job.args;
  const auto batch = static_cast<std::int64_t>(job.sequences.size());
  const std::int64_t heads = a.q.shape[1], count = job.query_count, total = a.q.shape[2], dim = job.head_dim_k;
  const std::size_t row_bytes = static_cast<std::size_t>(dim) * size_of(a.q.dtype);
  Staging staging(*gpu_);

  // Rows with NaN or infinity are asked as zeros, and refused where they see a token.
  auto* q = staging.room<std::uint8_t>(static_cast<std::size_t>(batch * heads * count) * row_bytes);
  if (q == nullptr) return staging.full();
  std::vector<std::int64_t> refused;
  for (std::int64_t row = 0; row < batch * heads * count; ++row) {
    const void* from = a.q.at(row / (heads * count), row / count % heads, job.query_begin + row % count);
    std::uint8_t* to = q + static_cast<std::size_t>(row) * row_bytes;
    std::memcpy(to, from, row_bytes);
    if (finite(to, a.q.dtype, job.head_dim_k)) continue;
    std::memset(to, 0, row_bytes);
    refused.push_back(row);
  }

  AttendJob own = job;
  own.query_begin = 0;
  own.out = {};
  own.args.sinks = nullptr;
  own.args.q.shape[2] = count;
  own.args.q.stride = {heads * count * dim, count * dim, dim, 1};
  std::vector<std::uint8_t> mask;
  if (a.mask.kind != Mask::General::none) mask = mask_in_order(job, &own.args.mask.general_stride);

  std::vector<SequenceView> views(job.sequences.begin(), job.sequences.end());
  std::vector<std::vector<const std::uint8_t*>> tables(views.size());
  std::vector<float> lambda_k, lambda_v;
  const std::uint8_t* pages = nullptr;
  const void *exact_k = nullptr, *exact_v = nullptr;
  bool any_lambda = false;
  for (const SequenceView& s : views) any_lambda = any_lambda || s.lambda_k != nullptr || s.lambda_v != nullptr;
  for (std::size_t b = 0; b < views.size(); ++b) {
    SequenceView& s = views[b];
    for (int p = 0; p < s.page_count; ++p) {
      if (pages == nullptr) pages = s.pages[p];
      if (const std::int64_t units = distance(pages, s.pages[p], KV4_PAGE_UNIT);
          units < std::numeric_limits<std::int32_t>::min() || units > std::numeric_limits<std::int32_t>::max())
        return error(StatusCode::unsupported, "pages", "pages within 128 GiB of each other", std::to_string(units * KV4_PAGE_UNIT) + " bytes");
      tables[b].push_back(on_gpu(s.pages[p]));
    }
    s.pages = tables[b].data();
    for (ExactRows& x : s.exact) {
      if (x.count == 0) continue;
      if (exact_k == nullptr) exact_k = x.k, exact_v = x.v;
      x.k = on_gpu(static_cast<const std::uint8_t*>(x.k));
      x.v = on_gpu(static_cast<const std::uint8_t*>(x.v));
    }
    const auto width = static_cast<std::size_t>(job.kv_heads * dim);
    for (const auto& [given, to] : {std::pair{s.lambda_k, &lambda_k}, std::pair{s.lambda_v, &lambda_v}}) {
      if (!any_lambda) continue;
      if (given != nullptr) to->insert(to->end(), given, given + width);
      else to->resize(to->size() + width, 1.0f);
    }
  }
  own.sequences = views;
  const auto base = [this](const void* p) { return on_gpu(static_cast<const std::uint8_t*>(p)); };
  const AttendTables t = attend_tables(own, {base(pages), base(exact_k), base(exact_v)}, gpu_->cores());

  const Matrices *key = nullptr, *value = nullptr;
  const void* nothing = staging.room<float>(1);
  if (job.spec != nullptr) {
    KV4_RETURN_IF_ERROR(matrices(*job.spec->key.rotation, &key));
    KV4_RETURN_IF_ERROR(matrices(*job.spec->value.rotation, &value));
  }
  const void *call = staging.put(t.call), *sequences = staging.put(t.sequences), *factors = staging.put(t.factors);
  const void* prepared = staging.room<float>(t.prepared_floats);
  const void* states = staging.room<float>(t.state_floats);
  const float* state = staging.room<float>(static_cast<std::size_t>(batch * heads * count * (dim + 2)));
  const auto or_nothing = [nothing](const void* p) { return p != nullptr ? p : nothing; };
  const auto u32 = [](std::int64_t x) { return static_cast<std::uint32_t>(x); };
  const std::uint32_t row_grid[3] = {u32(KV4_ROW_THREADS * heads / job.kv_heads), u32(count), u32(batch * job.kv_heads)};
  Launch launches[3];
  launches[0] = {"kv4_prepare", {q, key == nullptr ? nothing : key->query, staging.put(lambda_k), sequences, call, factors, prepared},
                 {row_grid[0], row_grid[1], row_grid[2]}, KV4_ROW_THREADS, t.dim};
  launches[1] = {"kv4_attend_d" + std::to_string(t.dim) + "_r" + std::to_string(t.block_rows),
                 {prepared, or_nothing(pages), staging.put(t.pages), or_nothing(exact_k), or_nothing(exact_v), staging.put(mask),
                  staging.put(t.levels), sequences, call, factors, states},
                 {u32(KV4_ATTEND_THREADS * t.splits), u32(std::int64_t{job.kv_heads} * t.blocks), u32(batch)}, KV4_ATTEND_THREADS, t.dim};
  launches[2] = {"kv4_merge", {states, value == nullptr ? nothing : value->output, staging.put(lambda_v), nothing, sequences, call, state},
                 {row_grid[0], row_grid[1], row_grid[2]}, KV4_ROW_THREADS, t.dim};
  KV4_RETURN_IF_ERROR(staging.full());
  KV4_RETURN_IF_ERROR(gpu_->run(launches));

  const auto sum = [&](std::int64_t row) { return state[row * (dim + 2) + dim + 1]; };
  for (const std::int64_t row : refused)
    if (sum(row) > 0.0f) return error(StatusCode::non_finite, "q", "finite values in queries that see a token", "NaN or infinity");
  const std::int64_t rows = batch * heads * count;
  std::vector<float> o, m, l;
  const bool partial = job.out.data == nullptr;
  if (!partial) {
    o.resize(static_cast<std::size_t>(rows * dim));
    m.resize(static_cast<std::size_t>(rows));
    l.resize(static_cast<std::size_t>(rows));
  }
  const PartialState to = partial ? job.partial : PartialState{o.data(), m.data(), l.data()};
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* from = state + row * (dim + 2);
    const std::int64_t at = partial ? row / count * total + job.query_begin + row % count : row;
    std::copy_n(from, dim, to.o + at * dim);
    to.m[at] = from[dim];
    to.l[at] = from[dim + 1];
  }
  if (partial) return {};
  MutableTensorView out = job.out;
  out.data = job.out.at(0, 0, job.query_begin);
  out.shape[2] = count;
  finish(to, a.sinks, out);
  return {};
}

}  // namespace

std::unique_ptr<Backend> make_backend(std::unique_ptr<Gpu> gpu) { return std::make_unique<MetalBackend>(std::move(gpu)); }

std::string library_text(std::string_view kernels, int dim) {
  const std::string every = "template [[host_name(\"kv4_attend_d", wanted = every + std::to_string(dim) + "_";
  std::string out;
  out.reserve(kernels.size());
  while (!kernels.empty()) {
    const std::size_t end = kernels.find('\n');
    const std::string_view line = kernels.substr(0, end == std::string_view::npos ? kernels.size() : end + 1);
    if (!line.starts_with(every) || line.starts_with(wanted)) out.append(line);
    kernels.remove_prefix(line.size());
  }
  return out;
}

}  // namespace kv4::apple
