// Operations on a host's memory: checks, views and jobs in the workspace, one call of the backend.
//
// A workspace starts with the backend's scratch for attention, which persists between calls (a device's counters), and
// ends with the views and jobs of one call.
#include <algorithm>
#include <string>

#include "attention/arguments.h"
#include "backend/backend.h"
#include "backend/batch.h"
#include "backend/spec.h"
#include "format/guarded.h"
#include "kv4/cpu.h"
#include "kv4/paged.h"
#include "paged/tables.h"

namespace kv4 {
namespace {

constexpr std::size_t kAlignment = 256;
std::size_t rounded(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Lends the host's threads to the library for the duration of a call.
class Lent {
 public:
  explicit Lent(cpu::Executor* executor) : lent_(executor != nullptr) {
    if (lent_) before_ = cpu::set_executor(executor);
  }
  ~Lent() {
    if (lent_) cpu::set_executor(before_);
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

 private:
  const bool lent_;
  cpu::Executor* before_ = nullptr;
};

// Carves `count` objects of T from the workspace's end; `rest` is what lies before them.
template <class T>
Status at_end(std::span<std::byte> workspace, std::size_t count, T** out, std::span<std::byte>* rest) {
  const std::size_t bytes = count * sizeof(T),
                    misplaced = reinterpret_cast<std::uintptr_t>(workspace.data() + workspace.size()) % kAlignment;
  if (workspace.size() < misplaced + rounded(bytes))
    return invalid_argument(
        "workspace", "the bytes of workspace_bytes, " + std::to_string(rounded(bytes) + kAlignment) + " and more",
        std::to_string(workspace.size()));
  const std::size_t begin = workspace.size() - misplaced - rounded(bytes);
  *out = reinterpret_cast<T*>(workspace.data() + begin);
  *rest = workspace.first(begin);
  return {};
}

Status no_room(std::span<std::byte> workspace) {
  return invalid_argument("workspace", "the bytes of workspace_bytes", std::to_string(workspace.size()));
}

}  // namespace

struct PageFormat::State {
  CacheConfig config;
  Backend* backend = nullptr;
  PageSpec spec;

  static Status create(const CacheConfig& config, std::unique_ptr<PageFormat>* out);
  bool readable() const { return backend->host_memory(); }
  // Checks the tables of a call of `rows` rows where the host can read them, else the limits that replace them.
  Status check(PagedBatch* batch, Use use, std::int64_t rows) const {
    if (readable()) return check_tables(batch, use, rows);
    return batch->most_queries > 0 ? Status() : invalid_argument("batch.most_queries", "1 or more on a device", "0");
  }
  // A call of which only the limits are known.
  AttendJob sized(int q_heads) const {
    AttendJob job;
    job.args.q.shape = {1, q_heads, 0, config.head_dim_k};
    job.spec = &spec;
    job.dtype = config.dtype;
    job.kv_heads = config.kv_heads;
    job.head_dim_k = config.head_dim_k;
    job.head_dim_v = config.head_dim_v;
    return job;
  }
  Status check_rows(const TensorView& x, const char* name, int dim) const;
  // q [1, a multiple of kv_heads, rows, head_dim_k] with at least `least` rows; `rows` describes them in the error.
  Status check_queries(const TensorView& q, const char* rows, std::int64_t least) const;
  Status open(const PagedBatch& batch, const Place& place) const;
  template <class Job, class Run>
  Status on_pages(const PagedBatch& batch, const PageRange& range, std::span<std::byte> workspace, const Place& place,
                  Run run) const;
  Status check_new_rows(const TensorView& k, const TensorView& v) const;
  Status check_call(const AttendArgs& args, const MutableTensorView* out, const PartialState* partial) const;
  Status attend(const PagedBatch& given, const AttendArgs& args, const MutableTensorView* out,
                const PartialState* partial, std::span<std::byte> workspace, const Place& place) const;
  // views: of the batch, with the call's rows stored.
  AttendJob job_of(const PagedBatch& batch, const AttendArgs& args, const MutableTensorView* out,
                   const PartialState* partial, const SequenceView* views, std::span<std::byte> workspace) const;
  Status step(const PagedBatch& given, const Backend::Step& rows, const AttendArgs& args, const MutableTensorView& out,
              std::span<std::byte> workspace, const Place& place) const;
};

PageFormat::PageFormat(std::unique_ptr<State> state) : state_(std::move(state)) {}
PageFormat::~PageFormat() = default;

Status PageFormat::create(const CacheConfig& config, std::unique_ptr<PageFormat>* out) {
  return guarded("format", [&] { return State::create(config, out); });
}

Status PageFormat::State::create(const CacheConfig& config, std::unique_ptr<PageFormat>* out) {
  auto state = std::make_unique<State>();
  state->config = config;
  if (config.recipe.seal != SealMode::page)
    return error(StatusCode::unsupported, "recipe.seal", "page: a host's pages are sealed whole",
                 config.recipe.seal == SealMode::arrival ? "arrival" : "never");
  KV4_RETURN_IF_ERROR(make_spec(config, &state->backend, &state->spec));
  out->reset(new PageFormat(std::move(state)));
  return {};
}

std::size_t PageFormat::head_bytes() const { return state_->spec.layout.head_bytes; }
std::size_t PageFormat::page_bytes() const { return head_bytes() * static_cast<std::size_t>(state_->config.kv_heads); }
std::size_t PageFormat::block_bytes() const {
  const CacheConfig& c = state_->config;
  return static_cast<std::size_t>(kPageTokens) * static_cast<std::size_t>(c.kv_heads) *
         static_cast<std::size_t>(c.head_dim_k + c.head_dim_v) * size_of(c.dtype);
}

Status PageFormat::workspace_bytes(const Limits& limits, std::size_t* out, const Place& place) const {
  const auto positive = [](const char* name, std::int64_t value, std::int64_t least) {
    return value >= least ? Status()
                          : invalid_argument(std::string("limits.") + name, std::to_string(least) + " or more",
                                             std::to_string(value));
  };
  KV4_RETURN_IF_ERROR(positive("sequences", limits.sequences, 1));
  KV4_RETURN_IF_ERROR(positive("most_pages", limits.most_pages, 0));
  KV4_RETURN_IF_ERROR(positive("most_queries", limits.most_queries, 1));
  KV4_RETURN_IF_ERROR(positive("longest", limits.longest, 0));
  KV4_RETURN_IF_ERROR(positive("all", limits.all, 0));
  if (limits.q_heads < 1 || limits.q_heads % state_->config.kv_heads != 0)
    return invalid_argument("limits.q_heads", "a multiple of " + std::to_string(state_->config.kv_heads),
                            std::to_string(limits.q_heads));
  const Lent lent(place.executor);
  const auto sequences = static_cast<std::size_t>(limits.sequences);
  AttendJob job = state_->sized(limits.q_heads);
  job.sequences = {.views = {static_cast<const SequenceView*>(nullptr), sequences},
                   .resident = true,
                   .most_queries = limits.most_queries,
                   .longest = limits.longest,
                   .all = limits.all};
  const std::size_t jobs = sequences * static_cast<std::size_t>(limits.most_pages) *
                           std::max(sizeof(SealJob), sizeof(DequantiseJob));
  *out = rounded(state_->backend->attend_workspace(job)) + rounded(sequences * sizeof(SequenceView)) + rounded(jobs) +
         kAlignment;
  return {};
}

Status PageFormat::State::check_rows(const TensorView& x, const char* name, int dim) const {
  if (x.dtype != config.dtype)
    return invalid_argument(name, std::string("dtype ") + name_of(config.dtype), name_of(x.dtype));
  if (x.shape[0] != 1 || x.shape[1] != config.kv_heads || x.shape[2] < 0 || x.shape[3] != dim)
    return invalid_argument(name,
                            "shape [1, " + std::to_string(config.kv_heads) + ", rows, " + std::to_string(dim) + "]",
                            shape_text(x.shape));
  if (x.stride[3] != 1 && dim > 1) return invalid_argument(name, "channel stride 1", std::to_string(x.stride[3]));
  return x.data == nullptr && x.shape[2] > 0 ? invalid_argument(name, "data", "a null pointer") : Status();
}

Status PageFormat::State::check_queries(const TensorView& q, const char* rows, std::int64_t least) const {
  const auto& x = q.shape;
  if (x[0] == 1 && x[1] >= config.kv_heads && x[1] % config.kv_heads == 0 && x[2] >= least && x[3] == config.head_dim_k)
    return {};
  return invalid_argument("q",
                          "shape [1, a multiple of " + std::to_string(config.kv_heads) + ", " + rows + ", " +
                              std::to_string(config.head_dim_k) + "]",
                          shape_text(x));
}

Status PageFormat::State::check_new_rows(const TensorView& k, const TensorView& v) const {
  KV4_RETURN_IF_ERROR(check_rows(k, "k", config.head_dim_k));
  KV4_RETURN_IF_ERROR(check_rows(v, "v", config.head_dim_v));
  return v.shape[2] == k.shape[2]
             ? Status()
             : invalid_argument("v", "the rows of k, " + std::to_string(k.shape[2]), std::to_string(v.shape[2]));
}

Status PageFormat::State::check_call(const AttendArgs& args, const MutableTensorView* out,
                                     const PartialState* partial) const {
  KV4_RETURN_IF_ERROR(check_arguments(args));
  return check_output(args, config.head_dim_v, out, partial);
}

Status PageFormat::State::open(const PagedBatch& batch, const Place& place) const {
  KV4_RETURN_IF_ERROR(check_batch(batch));
  backend->set_stream(place.stream);
  return {};
}

Status PageFormat::prepare(std::span<std::byte> workspace, const Place& place) const {
  state_->backend->set_stream(place.stream);
  return workspace.empty() ? Status() : state_->backend->clear(workspace.data(), workspace.size());
}

Status PageFormat::store(const PagedBatch& given, const TensorView& k, const TensorView& v,
                         std::span<std::byte> workspace, const Place& place) const {
  const State& s = *state_;
  PagedBatch batch = given;
  KV4_RETURN_IF_ERROR(s.open(batch, place));
  KV4_RETURN_IF_ERROR(s.check_new_rows(k, v));
  if (batch.size == 0 || k.shape[2] == 0) return {};
  KV4_RETURN_IF_ERROR(s.check(&batch, Use::store, k.shape[2]));
  SequenceView* views = nullptr;
  std::span<std::byte> rest;
  KV4_RETURN_IF_ERROR(at_end(workspace, static_cast<std::size_t>(batch.size), &views, &rest));
  KV4_RETURN_IF_ERROR(s.backend->make_views(batch, false, views));
  StoreJob job;
  job.k = k;
  job.v = v;
  job.in_order = true;
  job.sequences = {
      .views = {views, static_cast<std::size_t>(batch.size)}, .resident = true, .most_queries = batch.most_queries};
  return s.backend->store(job);
}

// run(jobs): one job for each page of the range.
template <class Job, class Run>
Status PageFormat::State::on_pages(const PagedBatch& batch, const PageRange& range, std::span<std::byte> workspace,
                                   const Place& place, Run run) const {
  KV4_RETURN_IF_ERROR(open(batch, place));
  KV4_RETURN_IF_ERROR(check_range(batch, range, readable()));
  const std::size_t count = static_cast<std::size_t>(batch.size) * static_cast<std::size_t>(range.most);
  if (count == 0) return {};
  const Lent lent(place.executor);
  Job* jobs = nullptr;
  std::span<std::byte> rest;
  KV4_RETURN_IF_ERROR(at_end(workspace, count, &jobs, &rest));
  KV4_RETURN_IF_ERROR(backend->make_jobs(batch, config.dtype, range, jobs));
  return run(std::span<const Job>(jobs, count));
}

Status PageFormat::seal(const PagedBatch& batch, const PageRange& range, std::span<std::byte> workspace,
                        const Place& place) const {
  const State& s = *state_;
  return s.on_pages<SealJob>(batch, range, workspace, place, [&](auto jobs) {
    return s.backend->seal(s.spec, batch.page_memory, s.config.kv_heads, jobs, true);
  });
}

Status PageFormat::dequantise(const PagedBatch& batch, const PageRange& range, std::span<std::byte> workspace,
                              const Place& place) const {
  const State& s = *state_;
  return s.on_pages<DequantiseJob>(batch, range, workspace, place, [&](auto jobs) {
    return s.backend->dequantise(s.spec, batch.page_memory, s.config.kv_heads, jobs, true);
  });
}

Status PageFormat::State::attend(const PagedBatch& given, const AttendArgs& args, const MutableTensorView* out,
                                 const PartialState* partial, std::span<std::byte> workspace,
                                 const Place& place) const {
  PagedBatch batch = given;
  KV4_RETURN_IF_ERROR(open(batch, place));
  const auto& shape = args.q.shape;
  KV4_RETURN_IF_ERROR(check_queries(args.q, "rows", 0));
  if (batch.size == 0 || shape[2] == 0) return {};
  KV4_RETURN_IF_ERROR(check_call(args, out, partial));
  KV4_RETURN_IF_ERROR(check(&batch, Use::attend, shape[2]));
  const Lent lent(place.executor);
  SequenceView* views = nullptr;
  std::span<std::byte> rest;
  KV4_RETURN_IF_ERROR(at_end(workspace, static_cast<std::size_t>(batch.size), &views, &rest));
  if (rest.empty()) return no_room(workspace);
  KV4_RETURN_IF_ERROR(backend->make_views(batch, true, views));
  return backend->attend(job_of(batch, args, out, partial, views, rest));
}

AttendJob PageFormat::State::job_of(const PagedBatch& batch, const AttendArgs& args, const MutableTensorView* out,
                                    const PartialState* partial, const SequenceView* views,
                                    std::span<std::byte> workspace) const {
  AttendJob job = sized(static_cast<int>(args.q.shape[1]));
  job.workspace = workspace;
  job.args = args;
  job.pages = batch.page_memory;
  job.window = batch.window;
  job.sequences = {.views = {views, static_cast<std::size_t>(batch.size)},
                   .resident = true,
                   .most_queries = batch.most_queries,
                   .longest = batch.longest,
                   .all = batch.all};
  if (out != nullptr) job.out = *out;
  if (partial != nullptr) job.partial = *partial;
  return job;
}

Status PageFormat::State::step(const PagedBatch& given, const Backend::Step& rows, const AttendArgs& args,
                               const MutableTensorView& out, std::span<std::byte> workspace, const Place& place) const {
  PagedBatch batch = given;
  Backend::Step step = rows;
  KV4_RETURN_IF_ERROR(open(batch, place));
  KV4_RETURN_IF_ERROR(check_new_rows(step.k, step.v));
  KV4_RETURN_IF_ERROR(check_queries(args.q, std::to_string(step.k.shape[2]).c_str(), step.k.shape[2]));
  if (args.q.shape[2] != step.k.shape[2])
    return invalid_argument("q", "the rows of k, " + std::to_string(step.k.shape[2]), std::to_string(args.q.shape[2]));
  KV4_RETURN_IF_ERROR(check_call(args, &out, nullptr));
  if (batch.size == 0) return {};
  KV4_RETURN_IF_ERROR(check(&batch, Use::store, step.k.shape[2]));
  KV4_RETURN_IF_ERROR(check(&batch, Use::attend, step.k.shape[2]));
  if (step.range.most != 0) {
    KV4_RETURN_IF_ERROR(check_range(batch, step.range, readable()));
    if (readable()) KV4_RETURN_IF_ERROR(check_unread(batch, step.range));
  }
  const Lent lent(place.executor);
  const auto sequences = static_cast<std::size_t>(batch.size);
  const std::size_t jobs = sequences * static_cast<std::size_t>(step.range.most);
  std::span<std::byte> rest;
  KV4_RETURN_IF_ERROR(at_end(workspace, jobs, &step.jobs, &rest));
  KV4_RETURN_IF_ERROR(at_end(rest, sequences, &step.views, &rest));
  const AttendJob job = job_of(batch, args, &out, nullptr, step.views, rest);
  if (rest.empty() || rest.size() < backend->attend_workspace(job)) return no_room(workspace);
  step.dtype = config.dtype;
  KV4_RETURN_IF_ERROR(backend->begin_step(batch, step));
  KV4_RETURN_IF_ERROR(backend->attend(job));
  if (jobs == 0) return {};
  return backend->end_step(spec, batch.page_memory, config.kv_heads, {step.jobs, jobs});
}

Status PageFormat::step(const PagedBatch& batch, const TensorView& k, const TensorView& v, const PageRange& range,
                        const AttendArgs& args, const MutableTensorView& out, std::span<std::byte> workspace,
                        const Place& place) const {
  Backend::Step rows;
  rows.k = k;
  rows.v = v;
  rows.range = range;
  return state_->step(batch, rows, args, out, workspace, place);
}

Status PageFormat::attend(const PagedBatch& batch, const AttendArgs& args, const MutableTensorView& out,
                          std::span<std::byte> workspace, const Place& place) const {
  return state_->attend(batch, args, &out, nullptr, workspace, place);
}
Status PageFormat::attend_partial(const PagedBatch& batch, const AttendArgs& args, const PartialState& out,
                                  std::span<std::byte> workspace, const Place& place) const {
  return state_->attend(batch, args, nullptr, &out, workspace, place);
}

// Uses the energy of all queries together, and that of the keys about the mean of each page.
Status PageFormat::learn_lambda(const TensorView& q, const TensorView& k, float* lambda, const Place& place) const {
  const State& s = *state_;
  const CacheConfig& c = s.config;
  KV4_RETURN_IF_ERROR(s.check_rows(k, "k", c.head_dim_k));
  if (k.shape[2] == 0 || k.shape[2] % kPageTokens != 0)
    return invalid_argument("k", "rows of whole pages, a multiple of " + std::to_string(kPageTokens),
                            std::to_string(k.shape[2]));
  KV4_RETURN_IF_ERROR(s.check_queries(q, "1 or more", 1));
  AttendArgs args;
  args.q = q;
  KV4_RETURN_IF_ERROR(check_arguments(args));
  if (lambda == nullptr) return invalid_argument("lambda", "a pointer", "null");
  s.backend->set_stream(place.stream);
  const std::size_t row = static_cast<std::size_t>(c.kv_heads) * static_cast<std::size_t>(c.head_dim_k),
                    queries = static_cast<std::size_t>(q.shape[2]);
  const std::size_t bytes = row * queries * sizeof(float);
  float* const energies = static_cast<float*>(s.backend->alloc(bytes));
  if (energies == nullptr)
    return error(StatusCode::out_of_memory, "energies", std::to_string(bytes) + " free bytes", "none");
  const auto learn = [&]() -> Status {
    std::vector<EnergyJob> jobs(queries);
    std::vector<const float*> rows(queries);
    for (std::size_t i = 0; i < queries; ++i) {
      jobs[i] = {0, static_cast<std::int64_t>(i), energies + i * row};
      rows[i] = jobs[i].energies;
    }
    KV4_RETURN_IF_ERROR(s.backend->query_energies(q, c.kv_heads, jobs));
    const std::vector<std::uint8_t> skip(static_cast<std::size_t>(k.shape[2]), 0);
    LambdaJob job;
    job.k = k.data;
    job.dtype = c.dtype;
    job.k_head_stride = k.stride[1];
    job.k_stride = k.stride[2];
    job.kv_heads = c.kv_heads;
    job.dim = c.head_dim_k;
    job.blocks = static_cast<int>(k.shape[2] / kPageTokens);
    job.skip = skip;
    job.energies = rows;
    job.lambda = lambda;
    KV4_RETURN_IF_ERROR(s.backend->fix_lambda(job));
    return s.backend->wait();
  };
  const Status status = guarded("lambda", learn);
  s.backend->free(energies, bytes);
  return status;
}

}  // namespace kv4
