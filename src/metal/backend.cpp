// The backend of Apple GPUs. Memory is shared with the CPU, so the CPU backend stores rows, computes moments and
// converts; sealing, dequantising and attention are launches, which each call waits for. Queries, masks, outputs and
// rows for arrival sealing may be in any memory: they are copied. tables.h makes the arguments and tables of launches;
// only gpu.h deals with the device.
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

constexpr std::size_t kMinBytes = 64;  // bytes of a buffer

std::size_t round_up_16(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

// GPU memory of one call, freed at its end.
class Staging {
 public:
  explicit Staging(Gpu& gpu) : gpu_(gpu) {}
  ~Staging() {
    for (void* p : blocks_) gpu_.free(p);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Null where no memory is left, which status() then reports; later calls of allocate remain valid.
  template <class T>
  T* allocate(std::size_t count) {
    void* p = gpu_.alloc(std::max(count * sizeof(T), kMinBytes));
    if (p == nullptr) failed_ = true;
    else blocks_.push_back(p);
    return static_cast<T*>(p);
  }
  template <class T>
  const T* upload(const std::vector<T>& values) {
    T* p = allocate<T>(values.size());
    if (p != nullptr && !values.empty()) std::memcpy(p, values.data(), values.size() * sizeof(T));
    return p;
  }
  // p, or a dummy buffer: every argument of a launch has to be bound.
  const void* or_dummy(const void* p) { return p != nullptr ? p : allocate<float>(1); }
  Status status() const {
    return failed_ ? error(StatusCode::out_of_memory, "workspace", "free memory of the GPU", "none") : Status();
  }

 private:
  Gpu& gpu_;
  std::vector<void*> blocks_;
  bool failed_ = false;
};

// A rotation's matrices in GPU memory; empty for the identity. They live as long as the rotation and keep their GPU
// alive.
struct Matrices final : RotationTable {
  Matrices(std::shared_ptr<Gpu> on, const Rotation& rotation) : gpu(std::move(on)) {
    query = upload(query_matrix(rotation));
    output = upload(output_matrix(rotation));
    sealing = upload(sealing_matrix(rotation));
  }
  ~Matrices() override {
    for (void* p : {query, output, sealing})
      if (p != nullptr) gpu->free(p);
  }
  std::size_t bytes() const override { return held; }
  bool complete() const { return query != nullptr && output != nullptr && sealing != nullptr; }

  void* upload(const std::vector<float>& values) {
    const std::size_t size = std::max(values.size() * sizeof(float), kMinBytes);
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

  void* alloc(std::size_t bytes) override { return gpu_->alloc(std::max(bytes, kMinBytes)); }
  void free(void* p, std::size_t) override { gpu_->free(p); }
  Status copy(void* to, const void* from, std::size_t bytes) override { return cpu_.copy(to, from, bytes); }
  Status clear(void* p, std::size_t bytes) override { return cpu_.clear(p, bytes); }
  Status copy_lines(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t bytes,
                    int lines) override {
    return cpu_.copy_lines(to, to_pitch, from, from_pitch, bytes, lines);
  }
  Status store(const StoreJob& job) override { return cpu_.store(job); }
  Status convert(const ConvertJob& job) override { return cpu_.convert(job); }
  Status query_energies(const TensorView& q, int kv_heads, std::span<const EnergyJob> jobs) override {
    return cpu_.query_energies(q, kv_heads, jobs);
  }
  Status fix_lambda(const LambdaJob& job) override { return cpu_.fix_lambda(job); }
  const RotationTable* table_of(const Rotation& rotation) const override { return rotation.table_on(gpu_.get()); }

  // `resident` changes nothing: memory is shared, so the host reads what kernels read.
  Status seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs,
              bool resident) override;
  Status dequantise(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const DequantiseJob> jobs,
                    bool resident) const override;
  // None: a call allocates what its launches need and ignores the given workspace.
  std::size_t attend_workspace(const AttendJob& /*job*/) const override { return 0; }
  Status attend(const AttendJob& job) override;

  Status codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k,
                            std::uint8_t* v) const override {
    apple::codes_to_canonical(spec, slice, k, v);
    return {};
  }
  Status codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v,
                              std::uint8_t* slice) const override {
    apple::codes_from_canonical(spec, k, v, slice);
    return {};
  }

 private:
  // Distance on the GPU, in elements of `size` bytes.
  std::int64_t distance(const void* from, const void* to, std::size_t size) const {
    return static_cast<std::int64_t>(gpu_->address(to) - gpu_->address(from)) / static_cast<std::int64_t>(size);
  }
  // An address from which tables.h computes distances.
  template <class T>
  const T* on_gpu(const T* p) const {
    // NOLINTNEXTLINE(performance-no-int-to-ptr): never dereferenced
    return p == nullptr ? nullptr : reinterpret_cast<const T*>(gpu_->address(p));
  }

  // Distance of a job's lambda from the first job's, which is bound.
  std::int64_t lambda_at(const float** first, const float* given) const {
    if (given == nullptr) return kNowhere;
    if (*first == nullptr) *first = given;
    return distance(*first, given, sizeof(float));
  }
  // The page table of pages up to `most`, and the base that its distances start from.
  std::vector<std::int64_t> locate_pages(const PageMemory& pages, std::int32_t most, const void** bound) const {
    *bound = pages.data;
    if (pages.chunks == nullptr) return page_table(pages);
    const std::int32_t last = most >> pages.chunk_shift;
    *bound = pages.chunks[last];
    std::vector<std::int64_t> chunks;
    for (std::int32_t i = 0; i <= last; ++i) chunks.push_back(distance(*bound, pages.chunks[i], 1));
    return page_table(pages, chunks);
  }
  Status matrices(const Rotation& rotation, const Matrices** out) const;
  Status dequantise_side(const PageSpec& spec, const PageMemory& pages, int kv_heads, bool values,
                         std::span<const DequantiseJob> jobs) const;

  const std::shared_ptr<Gpu> gpu_;  // also identifies the device
  Backend& cpu_;
};

Status MetalBackend::matrices(const Rotation& rotation, const Matrices** out) const {
  const RotationTable* table = rotation.table_on(gpu_.get(), [&]() -> std::unique_ptr<RotationTable> {
    auto made = std::make_unique<Matrices>(gpu_, rotation);
    if (!made->complete()) return nullptr;
    return made;
  });
  if (table == nullptr) return error(StatusCode::out_of_memory, "rotation", "free memory of the GPU", "none");
  *out = static_cast<const Matrices*>(table);
  return {};
}

// Copies a job's rows of one side from the caller's memory to GPU memory.
void stage_rows(SealJob* job, bool values, int kv_heads, int dim, std::uint8_t* to) {
  const auto size = static_cast<std::int64_t>(size_of(job->dtype)), row = dim * size;
  const void*& from = values ? job->v : job->k;
  std::int64_t &head_stride = values ? job->v_head_stride : job->k_head_stride,
               &stride = values ? job->v_stride : job->k_stride;
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (std::int64_t j = 0; j < job->count; ++j)
      std::memcpy(to + (h * job->count + j) * row,
                  static_cast<const std::uint8_t*>(from) + (h * head_stride + j * stride) * size,
                  static_cast<std::size_t>(row));
  from = to;
  head_stride = job->count * dim;
  stride = dim;
}

Status MetalBackend::seal(const PageSpec& spec, const PageMemory& pages, int kv_heads, std::span<const SealJob> jobs,
                          bool /*resident*/) {
  std::int32_t most = -1;
  for (const SealJob& j : jobs) most = std::max(most, j.page);
  if (most < 0) return {};
  Staging staging(*gpu_);
  const void* bound = nullptr;
  const std::vector<std::int64_t> page_places = locate_pages(pages, most, &bound);
  std::vector<Launch> launches;
  for (const bool values : {false, true}) {
    const SideSpec& side = values ? spec.value : spec.key;
    const void* rows = nullptr;
    const float* lambda = nullptr;
    std::vector<std::int64_t> table;
    std::vector<std::uint8_t> skip;
    const auto needs_staging = [&](const SealJob& j) {
      return j.page >= 0 && j.count > 0 && !gpu_->holds(values ? j.v : j.k);
    };
    std::size_t staged = 0;
    for (const SealJob& j : jobs)
      if (needs_staging(j))
        staged += round_up_16(static_cast<std::size_t>(kv_heads * j.count * side.dim) * size_of(j.dtype));
    auto* to = staged > 0 ? staging.allocate<std::uint8_t>(staged) : nullptr;
    if (staged > 0 && to == nullptr) return staging.status();
    for (const SealJob& given : jobs) {
      if (given.page < 0 || given.count == 0) continue;
      SealJob j = given;
      if (needs_staging(given)) {
        stage_rows(&j, values, kv_heads, side.dim, to);
        to += round_up_16(static_cast<std::size_t>(kv_heads * j.count * side.dim) * size_of(j.dtype));
      }
      const void* own = values ? j.v : j.k;
      if (rows == nullptr) rows = own;
      JobPlace place;
      place.rows = distance(rows, own, size_of(j.dtype));
      if (j.skip != nullptr) {
        place.skip = static_cast<std::int64_t>(skip.size());
        skip.insert(skip.end(), j.skip, j.skip + j.count);
      }
      place.lambda = lambda_at(&lambda, values ? j.lambda_v : j.lambda_k);
      add_job(&table, j, values, place);
    }
    if (table.empty()) return {};
    const Matrices* m = nullptr;
    KV4_RETURN_IF_ERROR(matrices(*side.rotation, &m));
    Launch launch;
    launch.kernel = "kv4_seal";
    launch.threads[0] = static_cast<std::uint32_t>(KV4_ROW_THREADS * (table.size() / kv4_job_fields));
    launch.threads[1] = static_cast<std::uint32_t>(kv_heads);
    launch.group = KV4_ROW_THREADS;
    launch.dim = side.dim;
    launch.buffers = {rows,
                      staging.upload(skip),
                      staging.or_dummy(lambda),
                      m->sealing,
                      staging.upload(table),
                      staging.upload(side_table(spec, values, page_places)),
                      staging.upload(level_table(side)),
                      bound};
    launches.push_back(std::move(launch));
  }
  KV4_RETURN_IF_ERROR(staging.status());
  return gpu_->run(launches);
}

Status MetalBackend::dequantise(const PageSpec& spec, const PageMemory& pages, int kv_heads,
                                std::span<const DequantiseJob> jobs, bool /*resident*/) const {
  for (const bool values : {false, true}) KV4_RETURN_IF_ERROR(dequantise_side(spec, pages, kv_heads, values, jobs));
  return {};
}

// Dequantises to temporary float rows, which are then converted to the destination.
Status MetalBackend::dequantise_side(const PageSpec& spec, const PageMemory& pages, int kv_heads, bool values,
                                     std::span<const DequantiseJob> jobs) const {
  const SideSpec& side = values ? spec.value : spec.key;
  const auto to_of = [values](const DequantiseJob& j) {
    return j.page < 0 || j.count == 0 ? nullptr : values ? j.v : j.k;
  };
  std::vector<std::int64_t> table;
  const float* lambda = nullptr;
  std::int32_t most_page = -1;
  std::int64_t rows = 0, most = 0;
  for (const DequantiseJob& j : jobs) {
    if (to_of(j) == nullptr) continue;
    DequantiseJob own = j;
    own.k_stride = own.v_stride = side.dim;
    own.k_head_stride = own.v_head_stride = j.count * side.dim;
    add_job(&table, own, values, {rows * side.dim, -1, lambda_at(&lambda, values ? j.lambda_v : j.lambda_k)});
    rows += kv_heads * j.count;
    most = std::max(most, j.count);
    most_page = std::max(most_page, j.page);
  }
  if (table.empty()) return {};
  const Matrices* m = nullptr;
  KV4_RETURN_IF_ERROR(matrices(*side.rotation, &m));
  Staging staging(*gpu_);
  const float* out = staging.allocate<float>(static_cast<std::size_t>(rows * side.dim));
  const void* bound = nullptr;
  const std::vector<std::int64_t> page_places = locate_pages(pages, most_page, &bound);
  Launch launch;
  launch.kernel = "kv4_dequantise";
  launch.threads[0] = static_cast<std::uint32_t>(KV4_ROW_THREADS * (table.size() / kv4_job_fields));
  launch.threads[1] = static_cast<std::uint32_t>(most);
  launch.threads[2] = static_cast<std::uint32_t>(kv_heads);
  launch.group = KV4_ROW_THREADS;
  launch.dim = side.dim;
  launch.buffers = {bound,
                    staging.or_dummy(lambda),
                    m->output,
                    staging.upload(table),
                    staging.upload(side_table(spec, values, page_places)),
                    staging.upload(level_table(side)),
                    out};
  KV4_RETURN_IF_ERROR(staging.status());
  KV4_RETURN_IF_ERROR(gpu_->run({&launch, 1}));
  for (const DequantiseJob& j : jobs) {
    if (to_of(j) == nullptr) continue;
    KV4_RETURN_IF_ERROR(cpu_.convert({.from = out,
                                      .from_head_stride = j.count * side.dim,
                                      .from_stride = side.dim,
                                      .to = to_of(j),
                                      .to_dtype = j.dtype,
                                      .to_head_stride = values ? j.v_head_stride : j.k_head_stride,
                                      .to_stride = values ? j.v_stride : j.k_stride,
                                      .heads = kv_heads,
                                      .dim = side.dim,
                                      .rows = j.count}));
    out += kv_heads * j.count * side.dim;
  }
  return {};
}

// The general mask in row order, broadcast axes left at one.
std::vector<std::uint8_t> mask_in_order(const AttendJob& job, std::array<std::int64_t, 4>* stride) {
  const Mask& m = job.args.mask;
  const std::size_t size = m.kind == Mask::General::boolean ? 1 : size_of(m.general_dtype);
  const std::array<std::int64_t, 4>& extent = job.args.q.shape;
  const auto* from = static_cast<const std::uint8_t*>(m.general);
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
          const std::int64_t at = b * m.general_stride[0] + h * m.general_stride[1] + t * m.general_stride[2] +
                                  c * m.general_stride[3];
          out.insert(out.end(), from + at * static_cast<std::int64_t>(size),
                     from + (at + 1) * static_cast<std::int64_t>(size));
        }
  return out;
}

Status MetalBackend::attend(const AttendJob& job) {
  const AttendArgs& a = job.args;
  const std::int64_t heads = a.q.shape[1], rows = a.q.shape[2], dim = job.head_dim_k, states_of = heads * rows;
  const std::size_t row_bytes = static_cast<std::size_t>(dim) * size_of(a.q.dtype);
  Staging staging(*gpu_);

  // Views with GPU addresses.
  std::vector<SequenceView> views(job.sequences.views.begin(), job.sequences.views.end());
  const Bases bases = bases_of(views);
  std::int32_t most_page = -1;
  std::int64_t queries = 0;
  for (SequenceView& s : views) {
    for (int p = 0; p < s.page_count; ++p) most_page = std::max(most_page, s.pages[p]);
    queries = std::max(queries, s.query_count);
    s.lambda_k = on_gpu(s.lambda_k);
    s.lambda_v = on_gpu(s.lambda_v);
    for (ExactRows& x : s.exact) {
      if (x.count <= 0) continue;
      x.k = on_gpu(static_cast<const std::uint8_t*>(x.k));
      x.v = on_gpu(static_cast<const std::uint8_t*>(x.v));
    }
  }
  if (queries == 0) return {};

  // Query rows with NaN or infinity are replaced by zeros, and refused where they see a token.
  auto* q = staging.allocate<std::uint8_t>(static_cast<std::size_t>(a.q.shape[0] * states_of) * row_bytes);
  if (q == nullptr) return staging.status();
  std::vector<std::int64_t> refused;
  for (const SequenceView& s : views)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = s.input_row; t < s.input_row + s.query_count; ++t) {
        const std::int64_t row = s.input * states_of + h * rows + t;
        std::uint8_t* to = q + static_cast<std::size_t>(row) * row_bytes;
        std::memcpy(to, a.q.at(s.input, h, t), row_bytes);
        if (finite(to, a.q.dtype, job.head_dim_k)) continue;
        std::memset(to, 0, row_bytes);
        refused.push_back(row);
      }

  AttendJob own = job;
  own.out = {};
  own.args.sinks = nullptr;
  own.args.q.stride = {states_of * dim, rows * dim, dim, 1};
  own.sequences.views = views;
  std::vector<std::uint8_t> mask;
  if (a.mask.kind != Mask::General::none) mask = mask_in_order(job, &own.args.mask.general_stride);
  const void* pages = nullptr;
  const std::vector<std::int64_t> page_places = most_page < 0 ? page_table({})
                                                              : locate_pages(job.pages, most_page, &pages);
  const auto base = [this](const void* p) { return on_gpu(static_cast<const std::uint8_t*>(p)); };
  const AttendTables t =
      attend_tables(own, {base(bases.exact_k), base(bases.exact_v), on_gpu(bases.lambda_k), on_gpu(bases.lambda_v)},
                    page_places, gpu_->cores());

  const Matrices *key = nullptr, *value = nullptr;
  if (job.spec != nullptr) {
    KV4_RETURN_IF_ERROR(matrices(*job.spec->key.rotation, &key));
    KV4_RETURN_IF_ERROR(matrices(*job.spec->value.rotation, &value));
  }
  const void *call = staging.upload(t.call), *sequences = staging.upload(t.sequences),
             *factors = staging.upload(t.factors);
  const void* prepared = staging.allocate<float>(t.prepared_floats);
  const void* states = staging.allocate<float>(t.state_floats);
  const float* state = staging.allocate<float>(static_cast<std::size_t>(a.q.shape[0] * states_of * (dim + 2)));
  const void* dummy = staging.or_dummy(nullptr);
  const auto or_dummy = [dummy](const void* p) { return p != nullptr ? p : dummy; };
  Launch launches[3];
  launches[0] = {"kv4_prepare",
                 {q, key == nullptr ? dummy : key->query, or_dummy(bases.lambda_k), sequences, call, factors, prepared},
                 t.row_grid,
                 KV4_ROW_THREADS,
                 t.dim};
  launches[1] = {t.kernel,
                 {prepared, or_dummy(pages), staging.upload(t.ids), or_dummy(bases.exact_k), or_dummy(bases.exact_v),
                  staging.upload(mask), staging.upload(t.levels), sequences, call, factors, states},
                 t.attend_grid,
                 KV4_ATTEND_THREADS,
                 t.dim};
  launches[2] = {
      "kv4_merge",
      {states, value == nullptr ? dummy : value->output, or_dummy(bases.lambda_v), dummy, sequences, call, state},
      t.row_grid,
      KV4_ROW_THREADS,
      t.dim};
  KV4_RETURN_IF_ERROR(staging.status());
  KV4_RETURN_IF_ERROR(gpu_->run(launches));

  for (const std::int64_t row : refused)
    if (state[row * (dim + 2) + dim + 1] > 0.0f)
      return error(StatusCode::non_finite, "q", "finite values in queries that see a token", "NaN or infinity");
  // One head of one sequence at a time: its rows follow each other.
  std::vector<float> o(static_cast<std::size_t>(queries * dim)), m(static_cast<std::size_t>(queries)), l(m);
  for (const SequenceView& s : views)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t first = s.input * states_of + h * rows + s.input_row;
      const bool partial = job.out.data == nullptr;
      const PartialState to =
          partial ? PartialState{job.partial.o + first * dim, job.partial.m + first, job.partial.l + first}
                  : PartialState{o.data(), m.data(), l.data()};
      for (std::int64_t t = 0; t < s.query_count; ++t) {
        const float* from = state + (first + t) * (dim + 2);
        std::copy_n(from, dim, to.o + t * dim);
        to.m[t] = from[dim];
        to.l[t] = from[dim + 1];
      }
      if (partial || s.query_count == 0) continue;
      MutableTensorView out = job.out;
      out.data = job.out.at(s.input, h, s.input_row);
      out.shape = {1, 1, s.query_count, dim};
      finish(to, a.sinks == nullptr ? nullptr : a.sinks + h, out);
    }
  return {};
}

}  // namespace

std::unique_ptr<Backend> make_backend(std::unique_ptr<Gpu> gpu) {
  return std::make_unique<MetalBackend>(std::move(gpu));
}

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
