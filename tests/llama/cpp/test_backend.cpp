// The device as ggml asks it: which tensors and operations it takes, and what comes of them beside the CPU's own. What
// it refused here, llama.cpp would abort on: a tensor in a backend's memory has no other place to be worked on.
#include "backend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "cache_tensors.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

namespace kv4::llama {
namespace {

constexpr std::int64_t kCells = 512;

ggml_backend_dev_t device() {
  static ggml_backend_dev_t const d = [] {
    ggml_backend_load_all_from_path(KV4_LLAMA_LIBRARIES);
    ggml_backend_reg_t reg = registry();
    return reg == nullptr ? nullptr : ggml_backend_reg_dev_get(reg, 0);
  }();
  return d;
}
ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

// All that was said so far: what is said once is said once in a process.
std::vector<std::string>& said() {
  static std::vector<std::string> lines;
  return lines;
}

// Keys and values in one device's memory, and a scheduler that works on them with that device before the CPU.
struct Machine {
  Machine(ggml_backend_dev_t d, const Geometry& geometry, std::int64_t streams_ = 1, ggml_type type = GGML_TYPE_F16)
      : g(geometry), streams(streams_) {
    if (d != cpu()) backends.emplace_back(ggml_backend_dev_init(d, nullptr));
    backends.emplace_back(ggml_backend_dev_init(cpu(), nullptr));
    cache.reset(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}));
    k = ggml_new_tensor_3d(cache.get(), type, g.kv_heads * g.head_dim_k, kCells, streams);
    v = ggml_new_tensor_3d(cache.get(), type, g.kv_heads * g.head_dim_v, kCells, streams);
    ggml_set_name(k, "cache_k_l0");
    ggml_set_name(v, "cache_v_l0");
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(cache.get(), ggml_backend_dev_buffer_type(d)));
    ggml_backend_buffer_clear(buffer.get(), 0);
    std::vector<ggml_backend_t> list;
    for (const ggml_backend_ptr& b : backends) list.push_back(b.get());
    sched.reset(ggml_backend_sched_new(list.data(), nullptr, static_cast<int>(list.size()), 64, false, false));
  }

  ggml_tensor* input(ggml_type type, std::initializer_list<std::int64_t> shape, const void* data) {
    std::vector<std::int64_t> ne(shape);
    ggml_tensor* t = ggml_new_tensor(context.get(), type, static_cast<int>(ne.size()), ne.data());
    ggml_set_input(t);
    inputs.emplace_back(t, data);
    return t;
  }
  // Builds a graph, runs it, and gives the f32 values of what it returned; null: nothing is wanted.
  std::vector<float> run(const std::function<ggml_tensor*(Machine&, ggml_cgraph*)>& build) {
    context.reset(ggml_init({ggml_tensor_overhead() * 128 + ggml_graph_overhead(), nullptr, true}));
    inputs.clear();
    ggml_cgraph* graph = ggml_new_graph(context.get());
    ggml_tensor* out = build(*this, graph);
    if (out != nullptr) {
      ggml_set_output(out);
      ggml_build_forward_expand(graph, out);
    }
    ggml_backend_sched_reset(sched.get());
    EXPECT_TRUE(ggml_backend_sched_alloc_graph(sched.get(), graph));
    for (const auto& [t, data] : inputs) ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    status = ggml_backend_sched_graph_compute(sched.get(), graph);
    std::vector<float> values;
    if (out != nullptr && status == GGML_STATUS_SUCCESS) {
      values.resize(static_cast<std::size_t>(ggml_nelements(out)));
      ggml_backend_tensor_get(out, values.data(), 0, ggml_nbytes(out));
    }
    return values;
  }

  // llama.cpp's nodes: rows of all heads into the cells that indices name.
  void store(ggml_cgraph* graph, const std::vector<float>& k_rows, const std::vector<float>& v_rows,
             const std::vector<std::int64_t>& ids) {
    const auto n = static_cast<std::int64_t>(ids.size());
    for (const auto& [side, rows] : {std::pair{k, &k_rows}, std::pair{v, &v_rows}}) {
      ggml_tensor* to = streams > 1 ? ggml_reshape_2d(context.get(), side, side->ne[0], kCells * streams) : side;
      ggml_build_forward_expand(graph,
                                ggml_set_rows(context.get(), to, input(GGML_TYPE_F32, {side->ne[0], n}, rows->data()),
                                              input(GGML_TYPE_I64, {n}, ids.data())));
    }
  }
  ggml_tensor* heads(ggml_tensor* side, int dim, std::int64_t cells, std::int64_t n_streams = 1,
                     std::int64_t first = 0) {
    const std::size_t row = ggml_row_size(side->type, side->ne[0]);
    ggml_tensor* view = ggml_view_4d(context.get(), side, dim, g.kv_heads, cells, n_streams,
                                     ggml_row_size(side->type, dim), row, row * kCells,
                                     row * kCells * static_cast<std::size_t>(first));
    return ggml_permute(context.get(), view, 0, 2, 1, 3);
  }
  // q [head_dim, q_heads, rows]; mask [cells, rows] or null.
  ggml_tensor* attend(const std::vector<float>& q, std::int64_t rows, const std::vector<ggml_fp16_t>* mask,
                      std::int64_t cells, std::int64_t n_streams = 1, float bias = 0, float cap = 0) {
    ggml_tensor* queries = input(GGML_TYPE_F32, {g.head_dim_k, g.q_heads, rows, n_streams}, q.data());
    ggml_tensor* m = mask == nullptr ? nullptr : input(GGML_TYPE_F16, {cells, rows, 1, n_streams}, mask->data());
    ggml_tensor* out = ggml_flash_attn_ext(
        context.get(), ggml_permute(context.get(), queries, 0, 2, 1, 3), heads(k, g.head_dim_k, cells, n_streams),
        heads(v, g.head_dim_v, cells, n_streams), m, 1 / std::sqrt(static_cast<float>(g.head_dim_k)), bias, cap);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    return out;
  }

  Geometry g;
  std::int64_t streams;
  std::vector<ggml_backend_ptr> backends;
  ggml_context_ptr cache, context;
  ggml_backend_buffer_ptr buffer;
  ggml_backend_sched_ptr sched;
  ggml_tensor *k = nullptr, *v = nullptr;
  std::vector<std::pair<ggml_tensor*, const void*>> inputs;
  ggml_status status = GGML_STATUS_SUCCESS;
};

class Backend : public SettingsTest {
 protected:
  void SetUp() override {
    SettingsTest::SetUp();
    ASSERT_NE(device(), nullptr);
    ggml_log_set([](ggml_log_level, const char* text, void*) { said().emplace_back(text); }, nullptr);
  }
  void TearDown() override {
    ggml_log_set(nullptr, nullptr);
    SettingsTest::TearDown();
  }
  std::vector<float> normals(std::int64_t n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& value : x) value = rows_.normal();
    return x;
  }
  static std::vector<std::int64_t> count(std::int64_t first, std::int64_t n) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) ids[static_cast<std::size_t>(i)] = first + i;
    return ids;
  }
  // Row t of `rows` sees the cells up to last + t.
  static std::vector<ggml_fp16_t> causal(std::int64_t cells, std::int64_t rows, std::int64_t last) {
    std::vector<ggml_fp16_t> mask;
    for (std::int64_t t = 0; t < rows; ++t)
      for (std::int64_t c = 0; c < cells; ++c) mask.push_back(ggml_fp32_to_fp16(c <= last + t ? 0.0f : -INFINITY));
    return mask;
  }
  static double apart(const std::vector<float>& a, const std::vector<float>& b) {
    EXPECT_EQ(a.size(), b.size());
    double power = 0, error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      power += static_cast<double>(a[i]) * a[i];
      error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    }
    return std::sqrt(error / power);
  }
  static int lines(const std::string& part) {
    int n = 0;
    for (const std::string& line : said()) n += line.find(part) != std::string::npos;
    return n;
  }
  static bool takes(ggml_tensor* op) { return ggml_backend_dev_supports_op(device(), op); }

  CacheLayer rows_;
};

TEST_F(Backend, TheDeviceIsOneThatLlamaGivesTheCacheTo) {
  ggml_backend_dev_props props;
  ggml_backend_dev_get_props(device(), &props);
  EXPECT_EQ(props.type, GGML_BACKEND_DEVICE_TYPE_IGPU);
  EXPECT_TRUE(props.caps.mmap_support);
  EXPECT_GT(props.memory_free, 0u);
  EXPECT_GE(props.memory_total, props.memory_free);
  EXPECT_EQ(ggml_backend_dev_host_buffer_type(device()), nullptr);
  EXPECT_TRUE(ggml_backend_dev_supports_buft(device(), ggml_backend_dev_buffer_type(device())));
  EXPECT_TRUE(ggml_backend_dev_supports_buft(device(), ggml_backend_cpu_buffer_type()));
}

TEST_F(Backend, EveryOperationOnTheCacheIsTaken) {
  Machine m(device(), {2, 1, 64, 64}, 2);
  m.context.reset(ggml_init({ggml_tensor_overhead() * 64, nullptr, true}));
  ggml_context* c = m.context.get();
  ggml_tensor* view = ggml_view_2d(c, m.k, 64, 10, m.k->nb[1], 0);
  ggml_tensor* rows = ggml_new_tensor_2d(c, GGML_TYPE_F32, 64, 10);
  ggml_tensor* elements = ggml_new_tensor_2d(c, GGML_TYPE_F32, 1, 640);
  ggml_tensor* places = ggml_new_tensor_1d(c, GGML_TYPE_I32, 10);
  ggml_tensor* three = ggml_view_3d(c, m.k, 64, 1, kCells, m.k->nb[1], m.k->nb[1], 0);
  ggml_tensor* shift = ggml_new_tensor_1d(c, GGML_TYPE_I32, kCells);
  ggml_tensor* ops[] = {
      m.k,
      view,
      ggml_reshape_2d(c, m.k, 64, kCells * 2),
      ggml_permute(c, view, 1, 0, 2, 3),
      ggml_transpose(c, view),
      ggml_set_rows(c, view, rows, ggml_new_tensor_1d(c, GGML_TYPE_I64, 10)),
      ggml_set_rows(c, view, rows, places),
      ggml_set_rows(c, ggml_reshape_2d(c, m.v, 1, ggml_nelements(m.v)), elements,
                    ggml_new_tensor_1d(c, GGML_TYPE_I64, 640)),
      ggml_cpy(c, rows, view),
      ggml_cpy(c, view, rows),
      ggml_cast(c, view, GGML_TYPE_F32),
      ggml_cont(c, ggml_transpose(c, view)),
      ggml_rope_ext_inplace(c, three, shift, nullptr, 64, GGML_ROPE_TYPE_NEOX, 0, 10000, 1, 0, 1, 0, 0),
      ggml_rope_ext(c, three, shift, nullptr, 64, GGML_ROPE_TYPE_NORMAL, 0, 10000, 1, 0, 1, 0, 0),
      ggml_get_rows(c, view, places),
      ggml_mul_mat(c, view, rows),
      ggml_scale(c, view, 2),
  };
  for (ggml_tensor* op : ops) EXPECT_TRUE(takes(op)) << ggml_op_desc(op);
  for (const int streams : {1, 2}) {
    ggml_tensor* q = ggml_new_tensor_4d(c, GGML_TYPE_F32, 64, 3, 2, streams);
    EXPECT_TRUE(takes(
        ggml_flash_attn_ext(c, q, m.heads(m.k, 64, 256, streams), m.heads(m.v, 64, 256, streams), nullptr, 1, 0, 0)));
  }
}

TEST_F(Backend, WeightsAndWhatIsDoneWithThemStayWithTheCpu) {
  const ggml_context_ptr context(ggml_init({ggml_tensor_overhead() * 64, nullptr, true}));
  ggml_context* c = context.get();
  ggml_tensor* a = ggml_new_tensor_2d(c, GGML_TYPE_F32, 64, 64);
  ggml_tensor* row = ggml_new_tensor_1d(c, GGML_TYPE_F32, 64);
  ggml_tensor* ids = ggml_new_tensor_1d(c, GGML_TYPE_I32, 64);
  ggml_tensor* three = ggml_new_tensor_3d(c, GGML_TYPE_F32, 64, 1, 64);
  ggml_tensor* cached = ggml_new_tensor_2d(c, GGML_TYPE_F16, 64, 64);
  ggml_set_name(cached, "cache_k_l0");  // of another device
  for (ggml_tensor* op : {ggml_mul_mat(c, a, a), ggml_get_rows(c, a, ids), ggml_add(c, a, row), ggml_mul(c, a, row),
                          ggml_rms_norm(c, a, 1e-6f), ggml_rope(c, three, ids, 64, 0), ggml_set_rows(c, cached, a, ids),
                          ggml_flash_attn_ext(c, three, three, three, nullptr, 1, 0, 0)})
    EXPECT_FALSE(takes(op)) << ggml_op_desc(op);
}

TEST_F(Backend, RecurrentStateLiesInTheCpusOwnMemory) {
  const ggml_context_ptr context(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}));
  ggml_tensor* r = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, 64, 4);
  ggml_tensor* s = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, 64, 4);
  ggml_set_name(r, "cache_r_l0");
  ggml_set_name(s, "cache_s_l0");
  const ggml_backend_buffer_ptr buffer(
      ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_dev_buffer_type(device())));
  ASSERT_NE(buffer, nullptr);
  EXPECT_TRUE(ggml_backend_buffer_is_host(buffer.get()));
  std::memset(r->data, 1, ggml_nbytes(r));
}

// One stream of cells written and read as a prompt and then token by token; the same on the CPU's memory.
TEST_F(Backend, AttentionIsTheCpusOwnToWhatPackingLeaves) {
  const int before = lines("kv4: not packed");
  for (const Geometry& g :
       {Geometry{4, 1, 256, 256}, Geometry{6, 2, 64, 64}, Geometry{4, 4, 80, 80}, Geometry{2, 1, 128, 64}}) {
    Machine own(cpu(), g), ours(device(), g);
    double worst = 0;
    for (std::int64_t begin = 0; begin < 330;) {
      const std::int64_t n = begin == 0 ? 300 : 1;
      const std::vector<float> k = normals(n * g.kv_heads * g.head_dim_k), v = normals(n * g.kv_heads * g.head_dim_v),
                               q = normals(n * g.q_heads * g.head_dim_k);
      const std::vector<std::int64_t> ids = count(begin, n);
      const std::vector<ggml_fp16_t> mask = causal(384, n, begin);
      std::vector<float> results[2];
      for (Machine* m : {&own, &ours})
        results[m == &ours] = m->run([&](Machine& on, ggml_cgraph* graph) {
          on.store(graph, k, v, ids);
          return on.attend(q, n, &mask, 384);
        });
      const double error = apart(results[0], results[1]);
      // A prompt's rows are exact until the next write: f16 against f32 weights and sums.
      if (begin == 0) EXPECT_LT(error, 4 * std::exp2(-11)) << g.head_dim_k;
      else worst = std::max(worst, error);
      begin += n;
    }
    // Values bring in .0095 of their power, keys as much again by the weights that they change.
    EXPECT_LT(worst, std::sqrt(2 * 0.0095) * 1.2) << g.head_dim_k;
    EXPECT_GT(worst, 0.01) << g.head_dim_k;
  }
  EXPECT_EQ(lines("kv4: not packed"), before);
}

TEST_F(Backend, TheExactRecipesAttentionIsTheCpusOwnToTheByte) {
  settings().exact = true;
  const Geometry g{6, 2, 64, 64};
  for (const std::int64_t streams : {1, 2}) {
    Machine own(cpu(), g, streams), ours(device(), g, streams);
    std::vector<std::int64_t> ids = count(0, 200);
    if (streams == 2)
      for (std::size_t i = 100; i < 200; ++i) ids[i] += kCells - 100;
    const std::vector<float> k = normals(200 * 128), v = normals(200 * 128), q = normals(streams * 6 * 64);
    std::vector<float> results[2];
    for (Machine* m : {&own, &ours})
      results[m == &ours] = m->run([&](Machine& on, ggml_cgraph* graph) {
        on.store(graph, k, v, ids);
        return on.attend(q, 1, nullptr, streams == 1 ? 200 : 100, streams);
      });
    EXPECT_EQ(results[0], results[1]);
  }
}

TEST_F(Backend, RowsComeBackAsTheyWereSetAndAsAttentionSeesThemOnceTheyArePacked) {
  const Geometry g{2, 1, 64, 64};
  Machine m(device(), g);
  // Any range of bytes, over and over.
  std::vector<std::uint16_t> rows(kCells * 64);
  for (int i = 0; i < 200; ++i) {
    const auto first = static_cast<std::size_t>(rows_.random.bits() % rows.size()),
               n = static_cast<std::size_t>(rows_.random.bits() % (rows.size() - first));
    for (std::size_t j = first; j < first + n; ++j)
      rows[j] = ggml_fp32_to_fp16(static_cast<float>(rows_.random.bits() % 100));
    ggml_backend_tensor_set(m.k, rows.data() + first, first * 2, n * 2);
  }
  std::vector<std::uint16_t> back(rows.size());
  ggml_backend_tensor_get(m.k, back.data(), 0, back.size() * 2);
  EXPECT_EQ(back, rows);
  ggml_backend_tensor_set(m.v, rows.data(), 0, rows.size() * 2);
  const std::vector<float> q = normals(2 * 64), row = normals(64);
  const std::vector<std::int64_t> id = {511};
  for (int i = 0; i < 2; ++i)
    m.run([&](Machine& on, ggml_cgraph* graph) {
      on.store(graph, row, row, id);
      return on.attend(q, 1, nullptr, kCells);
    });
  const Cells* cells = cells_of(m.k);
  ASSERT_NE(cells->layer, nullptr);
  EXPECT_EQ(cells->layer->packed()[3], 1);
  ggml_backend_tensor_get(m.k, back.data(), 0, back.size() * 2);
  EXPECT_NE(std::memcmp(back.data() + 3 * 64 * 64, rows.data() + 3 * 64 * 64, 64 * 64 * 2), 0);
  // In pieces the same as at once, across blocks and within them.
  std::vector<std::uint16_t> pieces(rows.size());
  for (std::size_t at = 0; at < rows.size(); at += 1111)
    ggml_backend_tensor_get(m.k, pieces.data() + at, at * 2, std::min<std::size_t>(1111, rows.size() - at) * 2);
  EXPECT_EQ(pieces, back);
  // What is written into a packed block is there, and what lies beside it is what it was.
  for (std::size_t i = 0; i < 100; ++i) back[3 * 64 * 64 + 77 + i] = pieces[3 * 64 * 64 + 77 + i] = 0x3c00;
  ggml_backend_tensor_set(m.k, pieces.data() + 3 * 64 * 64 + 77, (3 * 64 * 64 + 77) * 2, 200);
  EXPECT_EQ(cells->layer->packed()[3], 0);
  ggml_backend_tensor_get(m.k, pieces.data(), 0, pieces.size() * 2);
  EXPECT_EQ(pieces, back);
  ggml_backend_tensor_memset(m.k, 0, 64 * 128, 128);
  ggml_backend_tensor_get(m.k, pieces.data(), 0, pieces.size() * 2);
  EXPECT_EQ(pieces[64 * 64 + 63], 0);
  ggml_backend_buffer_clear(m.buffer.get(), 0);
  ggml_backend_tensor_get(m.k, pieces.data(), 0, pieces.size() * 2);
  EXPECT_EQ(pieces, std::vector<std::uint16_t>(rows.size(), 0));
}

TEST_F(Backend, AStreamIsCopiedByItsTensors) {
  const Geometry g{2, 1, 64, 64};
  Machine m(device(), g, 2);
  const std::vector<float> k = normals(300 * 64), q = normals(2 * 2 * 64);
  const std::vector<std::int64_t> ids = count(0, 300), next = {300};
  for (const std::vector<std::int64_t>* cells : {&ids, &next})
    m.run([&](Machine& on, ggml_cgraph* graph) {
      on.store(graph, k, k, *cells);
      return on.attend(q, 1, nullptr, kCells, 2);
    });
  ASSERT_EQ(cells_of(m.k)->layer->packed()[2], 1);
  // As llama.cpp copies a sequence from one stream to another.
  const auto copy = [&] {
    m.context.reset(ggml_init({ggml_tensor_overhead() * 8, nullptr, true}));
    for (ggml_tensor* side : {m.k, m.v}) {
      ggml_tensor* from = ggml_view_2d(m.context.get(), side, 64, kCells, side->nb[1], 0);
      ggml_tensor* to = ggml_view_2d(m.context.get(), side, 64, kCells, side->nb[1], side->nb[2]);
      for (ggml_tensor* view : {from, to}) ggml_backend_view_init(view);
      ggml_backend_tensor_copy(from, to);
    }
  };
  copy();
  const std::vector<float> out =
      m.run([&](Machine& on, ggml_cgraph*) { return on.attend(q, 1, nullptr, 300 - 300 % 64, 2); });
  std::vector<float> again = q;
  std::copy(q.begin(), q.begin() + 128, again.begin() + 128);
  const std::vector<float> same =
      m.run([&](Machine& on, ggml_cgraph*) { return on.attend(again, 1, nullptr, 256, 2); });
  ASSERT_EQ(same.size(), 256u);
  for (std::size_t i = 0; i < 128; ++i) EXPECT_EQ(same[i], same[128 + i]);
  for (std::size_t i = 0; i < 128; ++i) EXPECT_EQ(same[i], out[i]);
}

TEST_F(Backend, KeysAreTurnedAsTheCpuTurnsThem) {
  const Geometry g{2, 1, 64, 64};
  for (const bool exact : {true, false}) {
    settings().exact = exact;
    Machine own(cpu(), g), ours(device(), g);
    const std::vector<float> k = normals(400 * 64), v = normals(400 * 64), q = normals(2 * 64);
    const std::vector<std::int64_t> ids = count(0, 400);
    const std::vector<std::int32_t> shift(kCells, -64);
    std::vector<float> results[2];
    for (Machine* m : {&own, &ours}) {
      for (int i = 0; i < 2; ++i)
        m->run([&](Machine& on, ggml_cgraph* graph) {
          on.store(graph, k, v, ids);
          return on.attend(q, 1, nullptr, 384);
        });
      m->run([&](Machine& on, ggml_cgraph* graph) {
        ggml_tensor* view = ggml_view_3d(on.context.get(), on.k, 64, 1, kCells, on.k->nb[1], on.k->nb[1], 0);
        ggml_build_forward_expand(
            graph, ggml_rope_ext_inplace(on.context.get(), view, on.input(GGML_TYPE_I32, {kCells}, shift.data()),
                                         nullptr, 64, GGML_ROPE_TYPE_NEOX, 0, 10000, 1, 0, 1, 0, 0));
        return static_cast<ggml_tensor*>(nullptr);
      });
      EXPECT_EQ(m->status, GGML_STATUS_SUCCESS);
      results[m == &ours] = m->run([&](Machine& on, ggml_cgraph*) { return on.attend(q, 1, nullptr, 384); });
    }
    if (exact) EXPECT_EQ(results[0], results[1]);
    else EXPECT_LT(apart(results[0], results[1]), std::sqrt(2 * 0.0095) * 1.2);
  }
}

TEST_F(Backend, AttentionWithoutFlashAttentionReadsWhatWasWrittenByElements) {
  const Geometry g{2, 1, 64, 64};
  Machine own(cpu(), g), ours(device(), g);
  const std::vector<float> k = normals(128 * 64), v = normals(128 * 64), q = normals(2 * 64);
  const std::vector<std::int64_t> ids = count(0, 128);
  std::vector<std::int64_t> elements;
  for (std::int64_t t = 0; t < 128; ++t)
    for (std::int64_t c = 0; c < 64; ++c) elements.push_back(c * kCells + t);
  std::vector<float> results[2];
  for (Machine* m : {&own, &ours})
    results[m == &ours] = m->run([&](Machine& on, ggml_cgraph* graph) {
      ggml_context* c = on.context.get();
      ggml_build_forward_expand(graph, ggml_set_rows(c, on.k, on.input(GGML_TYPE_F32, {64, 128}, k.data()),
                                                     on.input(GGML_TYPE_I64, {128}, ids.data())));
      ggml_build_forward_expand(graph, ggml_set_rows(c, ggml_reshape_2d(c, on.v, 1, ggml_nelements(on.v)),
                                                     on.input(GGML_TYPE_F32, {1, 128 * 64}, v.data()),
                                                     on.input(GGML_TYPE_I64, {128 * 64}, elements.data())));
      ggml_tensor* keys = ggml_view_2d(c, on.k, 64, 128, on.k->nb[1], 0);
      ggml_tensor* values = ggml_view_2d(c, on.v, 128, 64, kCells * 2, 0);
      return ggml_mul_mat(c, values,
                          ggml_soft_max(c, ggml_mul_mat(c, keys, on.input(GGML_TYPE_F32, {64, 2}, q.data()))));
    });
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(lines("kv4: flash attention is off: the cache stays exact; -fa on packs it"), 1);
}

TEST_F(Backend, WhatIsNotPackedIsTheCpusOwnToTheByteAndNamed) {
  struct Case {
    Geometry g;
    ggml_type type;
    float bias;
    const char* reason;
  };
  const Case cases[] = {
      {{2, 1, 16, 16}, GGML_TYPE_F16, 0, "head_dim"},
      {{2, 1, 64, 64}, GGML_TYPE_F16, 8, "ALiBi, a bias that grows with distance"},
      {{2, 1, 64, 64}, GGML_TYPE_Q8_0, 0, "cache type: expected f16 or bf16; got q8_0"},
  };
  for (const Case& c : cases) {
    Machine own(cpu(), c.g, 1, c.type), ours(device(), c.g, 1, c.type);
    const std::vector<float> k = normals(300 * c.g.head_dim_k), q = normals(2 * c.g.head_dim_k);
    const std::vector<std::int64_t> ids = count(0, 300);
    const std::vector<ggml_fp16_t> mask = causal(512, 1, 290);
    for (int i = 0; i < 2; ++i) {
      std::vector<float> results[2];
      for (Machine* m : {&own, &ours})
        results[m == &ours] = m->run([&](Machine& on, ggml_cgraph* graph) {
          on.store(graph, k, k, ids);
          return on.attend(q, 1, &mask, 512, 1, c.bias);
        });
      EXPECT_EQ(results[0], results[1]) << c.reason;
    }
    EXPECT_EQ(lines(std::string("kv4: not packed, stays exact: ") + c.reason), 1) << c.reason;
  }
}

TEST_F(Backend, ValuesThatAreAPartOfTheKeysAreTheCpusOwn) {
  const Geometry g{2, 1, 96, 64};
  std::vector<float> results[2];
  const std::vector<float> k = normals(200 * 96), q = normals(2 * 96);
  const std::vector<std::int64_t> ids = count(0, 200);
  for (const bool packing : {false, true}) {
    Machine m(packing ? device() : cpu(), g);
    results[packing] = m.run([&](Machine& on, ggml_cgraph* graph) {
      ggml_context* c = on.context.get();
      ggml_build_forward_expand(graph, ggml_set_rows(c, on.k, on.input(GGML_TYPE_F32, {96, 200}, k.data()),
                                                     on.input(GGML_TYPE_I64, {200}, ids.data())));
      ggml_tensor* queries = on.input(GGML_TYPE_F32, {96, 2, 1}, q.data());
      ggml_tensor* keys = on.heads(on.k, 96, 192);
      ggml_tensor* values = ggml_view_4d(c, keys, 64, keys->ne[1], 1, 1, keys->nb[1], keys->nb[2], keys->nb[3], 0);
      ggml_tensor* out = ggml_flash_attn_ext(c, ggml_permute(c, queries, 0, 2, 1, 3), keys, values, nullptr, 1, 0, 0);
      ggml_prec_set_acc(out, GGML_PREC_F32);
      return out;
    });
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(lines("values that are a part of the keys"), 1);
}

TEST_F(Backend, AQueryThatIsNotANumberGivesNoneAndHarmsNothing) {
  const Geometry g{2, 1, 64, 64};
  Machine m(device(), g);
  const std::vector<float> k = normals(300 * 64), good = normals(2 * 64);
  const std::vector<std::int64_t> ids = count(0, 300);
  std::vector<float> bad = good;
  bad[7] = NAN;
  const auto ask = [&](const std::vector<float>& q, bool store) {
    return m.run([&](Machine& on, ggml_cgraph* graph) {
      if (store) on.store(graph, k, k, ids);
      return on.attend(q, 1, nullptr, 256);
    });
  };
  const std::vector<float> first = ask(good, true);
  const std::vector<float> none = ask(bad, false);
  EXPECT_EQ(m.status, GGML_STATUS_SUCCESS);
  EXPECT_TRUE(std::isnan(none[0]));
  EXPECT_EQ(ask(good, false), first);
}

// Keys whose RoPE pairs neighbouring channels do not match a lambda in the other order.
TEST_F(Backend, RotaryPairsAreKnownFromWhatIsWritten) {
  for (const int mode : {GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX}) {
    Machine m(device(), {2, 1, 64, 64});
    m.context.reset(ggml_init({ggml_tensor_overhead() * 16, nullptr, true}));
    ggml_context* c = m.context.get();
    ggml_tensor* positions = ggml_new_tensor_1d(c, GGML_TYPE_I32, 3);
    ggml_tensor* rotated = ggml_rope(c, ggml_new_tensor_3d(c, GGML_TYPE_F32, 64, 1, 3), positions, 48, mode);
    EXPECT_TRUE(takes(ggml_set_rows(c, m.k, ggml_view_2d(c, rotated, 64, 3, rotated->nb[2], 0),
                                    ggml_new_tensor_1d(c, GGML_TYPE_I64, 3))));
    EXPECT_EQ(cells_of(m.k)->neighbours, mode == GGML_ROPE_TYPE_NORMAL ? 48 : 0);
  }
}

// Layers of some models have no keys of their own: the node before their attention is on the CPU, and the cache
// another's.
TEST_F(Backend, ALayerThatReadsAnothersCacheReadsTheSame) {
  const Geometry g{2, 1, 64, 64};
  Machine m(device(), g);
  const std::vector<float> q = normals(2 * 64);
  for (std::int64_t begin = 0; begin < 480; begin += 160) {
    const std::vector<float> k = normals(160 * 64);
    const std::vector<std::int64_t> ids = count(begin, 160);
    const std::vector<float> out = m.run([&](Machine& on, ggml_cgraph* graph) {
      on.store(graph, k, k, ids);
      ggml_tensor* first = on.attend(q, 1, nullptr, begin + 160);
      ggml_tensor* second = on.attend(q, 1, nullptr, begin + 160);
      ggml_build_forward_expand(graph, first);
      return ggml_sub(on.context.get(), first, second);
    });
    for (const float x : out) EXPECT_EQ(x, 0.0f) << begin;
  }
  EXPECT_GT(cells_of(m.k)->layer->packed()[1], 0);
}

}  // namespace
}  // namespace kv4::llama
