#include "paged.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kv4/paged.h"
#include "tensor.h"
#include "values.h"

namespace kv4::python {
namespace {

using namespace nb::literals;

struct PyFormat {
  std::unique_ptr<PageFormat> format;
  CacheConfig config;
  int device = kHost;  // where its tensors are
};

// A call's sequence tables and a layer's memory; keeps the Python objects they refer to alive.
struct PyTables {
  PagedBatch batch;
  int device = kHost;
  std::vector<nb::object> held;
};
struct PyMemory {
  PageMemory pages;
  RowMemory rows;
  std::int32_t page_count = 0, block_count = 0;
  const float* lambda_k = nullptr;
  const float* lambda_v = nullptr;
  int device = kHost;
  std::vector<nb::object> held;
};

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  raise_if_error(invalid_argument(name, expected, got));
  throw nb::value_error(name);  // not reached
}

std::string shape(std::initializer_list<std::string> axes) {
  std::string text = "shape [";
  for (const std::string& axis : axes) text += (text.back() == '[' ? "" : ", ") + axis;
  return text + "]";
}

const std::int32_t* integers(nb::handle x, const char* name, std::int64_t count, const PyFormat& self) {
  const Tensor t = tensor(x, name, self.device);
  check_vector(t, name, Element::i32, "int32", count);
  return static_cast<const std::int32_t*>(t.data);
}

// [sequences, entries], rows contiguous.
const std::int32_t* table(nb::handle x, const char* name, std::int64_t sequences, std::int64_t* stride,
                          const PyFormat& self) {
  const Tensor t = tensor(x, name, self.device);
  if (t.rank != 2 || t.shape[0] != sequences)
    refuse(name, shape({std::to_string(sequences), "entries"}), "shape " + shape_text(t));
  if (t.element != Element::i32)
    refuse(name, "dtype int32", t.element == Element::other ? t.element_name : name_of(t.element));
  if (t.shape[1] > 1 && t.stride[1] != 1)
    refuse(name, "entries of a row one after another", "stride " + std::to_string(t.stride[1]));
  *stride = sequences > 1 ? t.stride[0] : t.shape[1];
  if (*stride < t.shape[1]) refuse(name, "rows that do not overlap", "stride " + std::to_string(t.stride[0]));
  return static_cast<const std::int32_t*>(t.data);
}

void create(PyFormat* self, nb::handle recipe, const std::string& dtype, int kv_heads, int head_dim_k, int head_dim_v,
            nb::handle matrix_k, nb::handle matrix_v, const std::string& backend) {
  CacheConfig config;
  config.recipe = read_recipe(recipe, head_dim_k, head_dim_v);
  config.dtype = read_dtype(dtype);
  config.kv_heads = kv_heads;
  config.head_dim_k = head_dim_k;
  config.head_dim_v = head_dim_v;
  config.matrix_k = read_floats(matrix_k, "matrix_k");
  config.matrix_v = read_floats(matrix_v, "matrix_v");
  config.backend = backend;
  std::unique_ptr<PageFormat> format;
  raise_if_error(PageFormat::create(config, &format));
  new (self) PyFormat{std::move(format), std::move(config), device_of(backend)};
}

PyTables tables(const PyFormat& self, nb::object queries, nb::object lengths, nb::object sealed, nb::object pages,
                nb::object blocks, nb::object sinks, int sink_tokens, int window, std::int64_t most_queries,
                std::int64_t longest, std::int64_t all) {
  PyTables out;
  PagedBatch& b = out.batch;
  const Tensor counted = tensor(lengths, "lengths", self.device);
  if (counted.rank != 1) refuse("lengths", shape({"sequences"}), "shape " + shape_text(counted));
  b.size = static_cast<int>(counted.shape[0]);
  b.lengths = integers(lengths, "lengths", b.size, self);
  b.queries = integers(queries, "queries", b.size + 1, self);
  b.sealed = integers(sealed, "sealed", b.size, self);
  b.pages = table(pages, "pages", b.size, &b.pages_stride, self);
  b.blocks = table(blocks, "blocks", b.size, &b.blocks_stride, self);
  if (!sinks.is_none()) b.sinks = integers(sinks, "sinks", b.size, self);
  b.sink_tokens = sink_tokens;
  b.window = window;
  b.most_queries = most_queries;
  b.longest = longest;
  b.all = all;
  out.device = self.device;
  out.held = {std::move(queries), std::move(lengths), std::move(sealed),
              std::move(pages),   std::move(blocks),  std::move(sinks)};
  return out;
}

// [blocks, kv_heads, kPageTokens, dim]
void* rows(nb::handle x, const char* name, int dim, const PyFormat& self, std::int64_t* count, std::int64_t* block,
           std::int64_t* head, std::int64_t* row) {
  const Tensor t = writable_tensor(x, name, self.device);
  const TensorView v = float_view(t, name);
  if (v.dtype != self.config.dtype) refuse(name, std::string("dtype ") + name_of(self.config.dtype), name_of(v.dtype));
  if (v.shape[1] != self.config.kv_heads || v.shape[2] != kPageTokens || v.shape[3] != dim)
    refuse(name,
           shape({"blocks", std::to_string(self.config.kv_heads), std::to_string(kPageTokens), std::to_string(dim)}),
           "shape " + shape_text(t));
  if (v.stride[3] != 1) refuse(name, "channels one after another", "stride " + std::to_string(v.stride[3]));
  *count = v.shape[0];
  *block = v.stride[0];
  *head = v.stride[1];
  *row = v.stride[2];
  return t.data;
}

const float* lambda_of(nb::handle x, const char* name, int dim, const PyFormat& self) {
  if (x.is_none()) return nullptr;
  const Tensor t = tensor(x, name, self.device);
  check_vector(t, name, Element::f32, "float32", static_cast<std::int64_t>(self.config.kv_heads) * dim);
  return static_cast<const float*>(t.data);
}

PyMemory memory(const PyFormat& self, nb::object pages, nb::object k, nb::object v, nb::object lambda_k,
                nb::object lambda_v) {
  PyMemory out;
  constexpr std::int64_t kMostIds = 0x7fffffff;
  const std::int64_t head_bytes = static_cast<std::int64_t>(self.format->head_bytes());
  if (!pages.is_none()) {
    const Tensor t = writable_tensor(pages, "pages", self.device);
    if (t.element != Element::byte)
      refuse("pages", "dtype uint8", t.element == Element::other ? t.element_name : name_of(t.element));
    if (t.rank != 3 || t.shape[1] != self.config.kv_heads || t.shape[2] < head_bytes)
      refuse("pages", shape({"pages", std::to_string(self.config.kv_heads), std::to_string(head_bytes) + " or more"}),
             "shape " + shape_text(t));
    if (t.stride[2] != 1) refuse("pages", "bytes one after another", "stride " + std::to_string(t.stride[2]));
    out.pages.data = static_cast<std::uint8_t*>(t.data);
    out.pages.page_stride = t.stride[0];
    out.pages.head_stride = t.stride[1];
    out.page_count = static_cast<std::int32_t>(std::min(t.shape[0], kMostIds));
  }
  std::int64_t keys = 0, values = 0;
  RowMemory& r = out.rows;
  r.k = rows(k, "k", self.config.head_dim_k, self, &keys, &r.k_block_stride, &r.k_head_stride, &r.k_stride);
  r.v = rows(v, "v", self.config.head_dim_v, self, &values, &r.v_block_stride, &r.v_head_stride, &r.v_stride);
  out.block_count = static_cast<std::int32_t>(std::min({keys, values, kMostIds}));
  out.lambda_k = lambda_of(lambda_k, "lambda_k", self.config.head_dim_k, self);
  out.lambda_v = lambda_of(lambda_v, "lambda_v", self.config.head_dim_v, self);
  out.device = self.device;
  out.held = {std::move(pages), std::move(k), std::move(v), std::move(lambda_k), std::move(lambda_v)};
  return out;
}

PagedBatch join(const PyFormat& self, const PyTables& tables, const PyMemory& memory) {
  if (tables.device != self.device || memory.device != self.device)
    refuse(tables.device != self.device ? "tables" : "memory", "what this format, or one on its device, made",
           "that of another device");
  PagedBatch batch = tables.batch;
  batch.page_memory = memory.pages;
  batch.row_memory = memory.rows;
  batch.page_count = memory.page_count;
  batch.block_count = memory.block_count;
  batch.lambda_k = memory.lambda_k;
  batch.lambda_v = memory.lambda_v;
  return batch;
}

std::span<std::byte> space(nb::handle x, const PyFormat& self) {
  const Tensor t = writable_tensor(x, "workspace", self.device);
  check_vector(t, "workspace", Element::byte, "uint8", -1);
  std::int64_t bytes = 1;
  for (int i = 0; i < t.rank; ++i) bytes *= t.shape[i];
  return {static_cast<std::byte*>(t.data), static_cast<std::size_t>(bytes)};
}

Place place(std::uintptr_t stream) { return {.stream = reinterpret_cast<void*>(stream)}; }

template <class Call>
void unlocked(const Call& call) {
  Status status;
  {
    const nb::gil_scoped_release released;
    status = call();
  }
  raise_if_error(status);
}

void store(const PyFormat& self, const PyTables& tables, const PyMemory& memory, nb::handle k, nb::handle v,
           nb::handle workspace, std::uintptr_t stream) {
  const PagedBatch batch = join(self, tables, memory);
  const Tensor keys = tensor(k, "k", self.device), values = tensor(v, "v", self.device);
  const TensorView kv = float_view(keys, "k"), vv = float_view(values, "v");
  const std::span<std::byte> work = space(workspace, self);
  unlocked([&] { return self.format->store(batch, kv, vv, work, place(stream)); });
}

PageRange range_of(nb::handle begin, nb::handle end, int most, int sequences, const PyFormat& self) {
  PageRange range;
  range.begin = integers(begin, "begin", sequences, self);
  range.end = integers(end, "end", sequences, self);
  range.most = most;
  return range;
}

// kSeal: seals exact rows into pages; otherwise dequantises pages into exact rows.
template <bool kSeal>
void convert(const PyFormat& self, const PyTables& tables, const PyMemory& memory, nb::handle begin, nb::handle end,
             int most, nb::handle workspace, std::uintptr_t stream) {
  const PagedBatch batch = join(self, tables, memory);
  const PageRange range = range_of(begin, end, most, batch.size, self);
  const std::span<std::byte> work = space(workspace, self);
  unlocked([&] {
    return kSeal ? self.format->seal(batch, range, work, place(stream))
                 : self.format->dequantise(batch, range, work, place(stream));
  });
}

AttendArgs arguments(const PyFormat& self, const Tensor& q, const nb::handle& logits, double scale, double softcap) {
  AttendArgs args;
  args.q = float_view(q, "q");
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  if (!logits.is_none()) {
    const Tensor t = tensor(logits, "sink_logits", self.device);
    check_vector(t, "sink_logits", Element::f32, "float32", args.q.shape[1]);
    args.sinks = static_cast<const float*>(t.data);
  }
  return args;
}

void attend(const PyFormat& self, const PyTables& tables, const PyMemory& memory, nb::handle q, nb::handle out,
            nb::handle workspace, double scale, double softcap, nb::handle sink_logits, std::uintptr_t stream) {
  const PagedBatch batch = join(self, tables, memory);
  const Tensor queries = tensor(q, "q", self.device), result = writable_tensor(out, "out", self.device);
  const AttendArgs args = arguments(self, queries, sink_logits, scale, softcap);
  const MutableTensorView view = mutable_float_view(result, "out");
  const std::span<std::byte> work = space(workspace, self);
  unlocked([&] { return self.format->attend(batch, args, view, work, place(stream)); });
}

void step(const PyFormat& self, const PyTables& tables, const PyMemory& memory, nb::handle k, nb::handle v,
          nb::handle begin, nb::handle end, int most, nb::handle q, nb::handle out, nb::handle workspace, double scale,
          double softcap, nb::handle sink_logits, std::uintptr_t stream) {
  const PagedBatch batch = join(self, tables, memory);
  const PageRange range = range_of(begin, end, most, batch.size, self);
  const Tensor keys = tensor(k, "k", self.device), values = tensor(v, "v", self.device),
               queries = tensor(q, "q", self.device), result = writable_tensor(out, "out", self.device);
  const TensorView kv = float_view(keys, "k"), vv = float_view(values, "v");
  const AttendArgs args = arguments(self, queries, sink_logits, scale, softcap);
  const MutableTensorView view = mutable_float_view(result, "out");
  const std::span<std::byte> work = space(workspace, self);
  unlocked([&] { return self.format->step(batch, kv, vv, range, args, view, work, place(stream)); });
}

void attend_partial(const PyFormat& self, const PyTables& tables, const PyMemory& memory, nb::handle q, nb::handle o,
                    nb::handle m, nb::handle l, nb::handle workspace, double scale, double softcap,
                    std::uintptr_t stream) {
  const PagedBatch batch = join(self, tables, memory);
  const Tensor queries = tensor(q, "q", self.device);
  const AttendArgs args = arguments(self, queries, nb::none(), scale, softcap);
  const auto& s = args.q.shape;
  const std::int64_t rows = s[0] * s[1] * s[2];
  const Tensor ot = writable_tensor(o, "o", self.device), mt = writable_tensor(m, "m", self.device),
               lt = writable_tensor(l, "l", self.device);
  check_vector(ot, "o", Element::f32, "float32", rows * self.config.head_dim_v);
  check_vector(mt, "m", Element::f32, "float32", rows);
  check_vector(lt, "l", Element::f32, "float32", rows);
  const PartialState state{static_cast<float*>(ot.data), static_cast<float*>(mt.data), static_cast<float*>(lt.data)};
  const std::span<std::byte> work = space(workspace, self);
  unlocked([&] { return self.format->attend_partial(batch, args, state, work, place(stream)); });
}

void learn_lambda(const PyFormat& self, nb::handle q, nb::handle k, nb::handle out, std::uintptr_t stream) {
  const Tensor queries = tensor(q, "q", self.device), keys = tensor(k, "k", self.device),
               lambda = writable_tensor(out, "out", self.device);
  const TensorView qv = float_view(queries, "q"), kv = float_view(keys, "k");
  check_vector(lambda, "out", Element::f32, "float32",
               static_cast<std::int64_t>(self.config.kv_heads) * self.config.head_dim_k);
  unlocked([&] { return self.format->learn_lambda(qv, kv, static_cast<float*>(lambda.data), place(stream)); });
}

std::size_t workspace_bytes(const PyFormat& self, int sequences, int q_heads, int most_pages, std::int64_t most_queries,
                            std::int64_t longest, std::int64_t all) {
  std::size_t bytes = 0;
  const PageFormat::Limits limits{sequences, q_heads, most_pages, most_queries, longest, all};
  raise_if_error(self.format->workspace_bytes(limits, &bytes));
  return bytes;
}

}  // namespace

void bind_paged(nb::module_& m) {
  nb::class_<PyTables>(m, "PagedTables", "The sequences of a call, as PageFormat.tables makes them.");
  nb::class_<PyMemory>(m, "PagedMemory", "A layer's pages and exact rows, as PageFormat.memory makes them.");
  nb::class_<PyFormat>(
      m, "PageFormat",
      "A layer's pages in memory that a host owns; see kv4/paged.h. Every tensor is on the backend's device.")
      .def("__init__", &create, "recipe"_a, nb::kw_only(), "dtype"_a, "kv_heads"_a, "head_dim_k"_a, "head_dim_v"_a,
           "matrix_k"_a = nb::none(), "matrix_v"_a = nb::none(), "backend"_a = "cpu", "dtype: of exact rows.")
      .def_prop_ro("head_bytes", [](const PyFormat& f) { return f.format->head_bytes(); })
      .def_prop_ro("page_bytes", [](const PyFormat& f) { return f.format->page_bytes(); })
      .def_prop_ro("block_bytes", [](const PyFormat& f) { return f.format->block_bytes(); })
      .def("workspace_bytes", &workspace_bytes, nb::kw_only(), "sequences"_a, "q_heads"_a, "most_pages"_a,
           "most_queries"_a, "longest"_a, "all"_a,
           "Of calls of up to so many sequences, pages of one to seal, rows of one, tokens of one, and tokens of all.")
      .def(
          "prepare",
          [](const PyFormat& f, nb::handle workspace, std::uintptr_t stream) {
            raise_if_error(f.format->prepare(space(workspace, f), place(stream)));
          },
          "workspace"_a, nb::kw_only(), "stream"_a = 0, "Before the first use of a workspace: uint8, contiguous.")
      .def("tables", &tables, "queries"_a, "lengths"_a, "sealed"_a, "pages"_a, "blocks"_a, nb::kw_only(),
           "sinks"_a = nb::none(), "sink_tokens"_a = 0, "window"_a = 0, "most_queries"_a = 0, "longest"_a = 0,
           "all"_a = 0,
           "int32: queries [n + 1] cumulative rows, lengths and sealed [n] tokens, pages and blocks [n, entries] ids "
           "by position, sinks [n] the\n"
           "block of the first sink_tokens tokens once page 0 is sealed. window: newest tokens that a query sees, 0 "
           "for all. What they hold is read\n"
           "by the calls that take them; on a device most_queries, longest and all bound it.")
      .def("memory", &memory, "pages"_a.none(), "k"_a, "v"_a, nb::kw_only(), "lambda_k"_a = nb::none(),
           "lambda_v"_a = nb::none(),
           "pages uint8 [pages, kv_heads, head_bytes or more], or None where nothing is sealed; k [blocks, kv_heads, "
           "64, head_dim_k], v alike; lambda\n"
           "float32 [kv_heads, head_dim] or None for 1.")
      .def("store", &store, "tables"_a, "memory"_a, "k"_a, "v"_a, "workspace"_a, nb::kw_only(), "stream"_a = 0,
           "k [1, kv_heads, rows, head_dim_k], v alike: the rows of the call into their blocks.")
      .def("seal", &convert<true>, "tables"_a, "memory"_a, "begin"_a, "end"_a, "most"_a, "workspace"_a, nb::kw_only(),
           "stream"_a = 0,
           "Positions begin[b] to end[b] of each sequence, int32 [n], multiples of 64, at most `most` pages of one: "
           "from blocks into pages.")
      .def("dequantise", &convert<false>, "tables"_a, "memory"_a, "begin"_a, "end"_a, "most"_a, "workspace"_a,
           nb::kw_only(), "stream"_a = 0, "The same, from pages into blocks.")
      .def("attend", &attend, "tables"_a, "memory"_a, "q"_a, "out"_a, "workspace"_a, nb::kw_only(), "scale"_a = 0.0,
           "softcap"_a = 0.0, "sink_logits"_a = nb::none(), "stream"_a = 0,
           "Causal. q [1, q_heads, rows, head_dim_k], out [1, q_heads, rows, head_dim_v]; sink_logits float32 "
           "[q_heads].")
      .def("step", &step, "tables"_a, "memory"_a, "k"_a, "v"_a, "begin"_a, "end"_a, "most"_a, "q"_a, "out"_a,
           "workspace"_a, nb::kw_only(), "scale"_a = 0.0, "softcap"_a = 0.0, "sink_logits"_a = nb::none(),
           "stream"_a = 0,
           "store, attend, then seal, in one call; no query reads the pages that it seals: sealed[b] <= begin[b] where "
           "there are any.")
      .def("attend_partial", &attend_partial, "tables"_a, "memory"_a, "q"_a, "o"_a, "m"_a, "l"_a, "workspace"_a,
           nb::kw_only(), "scale"_a = 0.0, "softcap"_a = 0.0, "stream"_a = 0,
           "As attend: o float32 [1, q_heads, rows, head_dim_v], m and l [1, q_heads, rows], contiguous.")
      .def("learn_lambda", &learn_lambda, "q"_a, "k"_a, "out"_a, nb::kw_only(), "stream"_a = 0,
           "Of q [1, q_heads, any, head_dim_k] and k [1, kv_heads, n * 64, head_dim_k]: out float32 [kv_heads, "
           "head_dim_k].");
}

}  // namespace kv4::python
