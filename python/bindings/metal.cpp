#include "metal.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "attention/arguments.h"
#include "attention/visibility.h"
#include "backend/backend.h"
#include "backend/spec.h"
#include "ledger.h"
#include "metal/layout.h"
#include "metal/order.h"
#include "metal/tables.h"
#include "values.h"

namespace kv4::python {
namespace {

using namespace nb::literals;

void create(Metal* self, nb::handle recipe, const std::string& dtype, int kv_heads, int head_dim_k, int head_dim_v,
            nb::handle matrix_k, nb::handle matrix_v) {
  const Recipe r = read_recipe(recipe, head_dim_k, head_dim_v);
  raise_if_error(validate(r));
  Metal made;
  made.dtype = read_dtype(dtype);
  made.kv_heads = kv_heads;
  made.dim = head_dim_k;
  made.seals = r.seal != SealMode::never;
  if (made.seals) {
    raise_if_error(validate(r, head_dim_k, head_dim_v));
    raise_if_error(expect_plain_pages(r, "on Metal"));
  }
  raise_if_error(make_sides(r, head_dim_k, head_dim_v, read_floats(matrix_k, "matrix_k"),
                            read_floats(matrix_v, "matrix_v"), &made.spec));
  made.spec.layout = apple::page_layout(made.spec);
  raise_if_error(apple::supports(made.spec));
  new (self) Metal(std::move(made));
}

// Bytes of one side of a page's slice, from its codes on, labelled by the token they hold; -1: by none.
std::vector<std::int8_t> tokens_of(const Metal& self, bool values) {
  const kv4_page_layout& l = self.spec.layout;
  const std::uint32_t dim = static_cast<std::uint32_t>(self.dim), from = values ? l.v_codes : 0,
                      to = values ? l.head_bytes : l.v_codes;
  std::vector<std::int8_t> out(to - from, -1);
  const std::uint32_t codes = values ? l.v_codes : l.k_codes, scales = values ? l.v_scales : l.k_scales;
  for (std::uint32_t token = 0; token < KV4_PAGE_TOKENS; ++token) {
    for (std::uint32_t c = 0; c < dim; c += 2)
      out[codes - from + (values ? apple::value_byte(token, c, dim) : apple::key_byte(token, c))] =
          static_cast<std::int8_t>(token);
    for (std::uint32_t i = 0; i < 2; ++i) out[scales - from + 2 * token + i] = static_cast<std::int8_t>(token);
  }
  return out;
}

// (page, first, count, skip, input, row, lambda row) of each; skip and the lambda row -1 where there is none. stride:
// of the rows' tensor [inputs, kv_heads, rows, dim], in elements.
using JobTuple =
    std::tuple<std::int32_t, std::int16_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
nb::object jobs_of(const Metal& self, const std::vector<JobTuple>& jobs, const std::vector<std::int64_t>& stride,
                   const std::string& dtype) {
  std::vector<std::int64_t> table;
  for (const auto& [page, first, count, skip, input, row, lambda] : jobs) {
    SealJob job;
    job.page = page;
    job.first = first;
    job.count = count;
    job.dtype = read_dtype(dtype);
    job.k_head_stride = stride.at(1);
    job.k_stride = stride.at(2);
    apple::add_job(&table, job, false,
                   {input * stride.at(0) + row * stride.at(2), skip,
                    lambda < 0 ? apple::kNowhere : lambda * self.kv_heads * self.dim});
  }
  return array(std::move(table));
}

// (ledger, sight, position below which it sees, rows of the keys' lambda or -1, index among the cache's rows) of each.
using SequenceTuple = std::tuple<const ledger::Ledger*, const Sight*, std::int64_t, std::int64_t, std::int64_t>;

// Pages in one array, whole or one side of each alone.
std::vector<std::int64_t> places_of(const Metal& self, std::int64_t head_stride = 0) {
  PageMemory pages;
  pages.head_stride = head_stride != 0 ? head_stride : self.spec.layout.head_bytes;
  pages.page_stride = pages.head_stride * self.kv_heads;
  return apple::page_table(pages);
}

nb::dict attend_tables(const Metal& self, const std::vector<std::int64_t>& q_shape,
                       const std::vector<std::int64_t>& q_stride, const std::string& q_dtype,
                       const std::optional<std::string>& out_dtype, const std::vector<std::int64_t>& out_stride,
                       const std::vector<SequenceTuple>& sequences, std::int64_t rows, bool lambda_v, double scale,
                       double softcap, bool sinks, bool causal, int general, const std::string& general_dtype,
                       const std::vector<std::int64_t>& general_stride, std::int64_t columns, std::int64_t offset,
                       int cores) {
  AttendJob job;
  AttendArgs& a = job.args;
  // The tables hold distances from these and nothing reads through them.
  alignas(16) static std::uint8_t base[16];
  static const float no_sinks[1] = {};
  a.q.data = base;
  a.q.dtype = read_dtype(q_dtype);
  for (std::size_t i = 0; i < 4; ++i) {
    a.q.shape[i] = q_shape.at(i);
    a.q.stride[i] = q_stride.at(i);
  }
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.sinks = sinks ? no_sinks : nullptr;
  a.mask.causal = causal;
  a.mask.kind = static_cast<Mask::General>(general);
  if (general != 0) {
    a.mask.general = base;
    a.mask.general_dtype = general == 2 ? read_dtype(general_dtype) : DType::f32;
    for (std::size_t i = 0; i < 4; ++i) a.mask.general_stride[i] = general_stride.at(i);
    a.mask.columns = columns;
  }
  a.mask.offset = offset;
  job.spec = self.seals ? &self.spec : nullptr;
  job.dtype = self.dtype;
  job.kv_heads = self.kv_heads;
  job.head_dim_k = job.head_dim_v = self.dim;
  if (out_dtype) {
    job.out.data = base;
    job.out.dtype = read_dtype(*out_dtype);
    for (std::size_t i = 0; i < 4; ++i) {
      job.out.shape[i] = q_shape.at(i);
      job.out.stride[i] = out_stride.at(i);
    }
  }
  const auto size = static_cast<std::uintptr_t>(size_of(self.dtype));
  const auto at = [](std::uintptr_t bytes) { return reinterpret_cast<std::uint8_t*>(bytes); };
  constexpr std::uintptr_t kBase = 4096;  // no null pointers
  const auto lambda_at = [&](std::int64_t row) {
    return row < 0 ? nullptr
                   : reinterpret_cast<const float*>(
                         kBase + static_cast<std::uintptr_t>(row * self.kv_heads * self.dim) * sizeof(float));
  };
  const std::int64_t head = rows * self.dim;
  const auto exact_at = [&](std::int64_t cache_row, std::int64_t first, const ledger::Rows& held) {
    const std::int64_t offset = cache_row * self.kv_heads * head + first * self.dim;
    std::uint8_t* const from = at(kBase + static_cast<std::uintptr_t>(offset) * size);
    return ExactRows{.k = from,
                     .v = from,
                     .k_head_stride = head,
                     .v_head_stride = head,
                     .k_stride = self.dim,
                     .v_stride = self.dim,
                     .position = held.begin,
                     .count = held.count()};
  };
  std::vector<SequenceView> views;
  std::vector<std::int32_t> starts, windows;
  for (const auto& [ledger, sight, upto, lambda_row, cache_row] : sequences) {
    const ledger::Extent& x = ledger->extent();
    const bool stepwise = sight->queries <= kPageTokens;
    if (!out_dtype) raise_if_error(ledger::check_upto(ledger->policy(), x, sight->queries, upto));
    // Runs of queries that read the same pages.
    std::int64_t end = 0;
    for (std::int64_t position = sight->first_query(); position < x.length; position = end) {
      end = std::min(x.length, ledger->view_end(position, stepwise));
      const ledger::View held = ledger->view(position, stepwise, upto);
      SequenceView& v = views.emplace_back();
      v.pages = ledger->pages().data();
      v.page_count = static_cast<std::int32_t>(held.pages);
      v.pages_position = held.pages > 0 ? held.pages_position : 0;
      v.last_page_tokens = held.last_page_tokens;
      v.input = static_cast<std::int32_t>(sight->input);
      v.input_row = sight->row + position - sight->first_query();
      v.query_count = end - position;
      v.query_position = position;
      v.lambda_k = lambda_at(lambda_row);
      v.lambda_v = lambda_at(lambda_v ? 0 : -1);
      v.exact[0] = exact_at(cache_row, 0, held.sinks);
      v.exact[1] = exact_at(cache_row, ledger->policy().sinks + held.window.begin - x.window_position, held.window);
      windows.push_back(sight->window);
      starts.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(sight->first_seen() - offset, INT32_MIN)));
    }
  }
  a.mask.start = starts.data();
  a.mask.window = windows.data();
  job.sequences.views = views;
  const apple::Bases bases = {at(kBase), at(kBase), lambda_at(0), lambda_at(0)};
  apple::AttendTables t = apple::attend_tables(job, bases, places_of(self), cores);
  nb::dict out;
  out["kernel"] = t.kernel;
  out["attend_grid"] = nb::make_tuple(t.attend_grid[0], t.attend_grid[1], t.attend_grid[2]);
  out["row_grid"] = nb::make_tuple(t.row_grid[0], t.row_grid[1], t.row_grid[2]);
  out["prepared_floats"] = t.prepared_floats;
  out["state_floats"] = t.state_floats;
  out["call"] = array(std::move(t.call));
  out["sequences"] = array(std::move(t.sequences));
  out["factors"] = array(std::move(t.factors));
  out["ids"] = array(std::move(t.ids));
  out["levels"] = array(std::move(t.levels));
  return out;
}

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

nb::object learn_lambda(const Floats& keys, const nb::bytes& skip, const std::vector<Floats>& energies) {
  if (keys.ndim() != 3 || keys.shape(1) != skip.size() || skip.size() % kPageTokens != 0)
    raise_if_error(invalid_argument("keys", "[kv_heads, rows, dim], whole pages and a byte of skip for each row",
                                    std::to_string(skip.size()) + " bytes"));
  const std::size_t heads = keys.shape(0), dim = keys.shape(2);
  std::vector<const float*> rows;
  for (const Floats& each : energies) {
    if (each.size() != heads * dim)
      raise_if_error(
          invalid_argument("energies", std::to_string(heads * dim) + " values", std::to_string(each.size())));
    rows.push_back(each.data());
  }
  std::vector<float> lambda(heads * dim);
  LambdaJob job;
  job.k = keys.data();
  job.k_head_stride = static_cast<std::int64_t>(skip.size() * dim);
  job.k_stride = static_cast<std::int64_t>(dim);
  job.kv_heads = static_cast<int>(heads);
  job.dim = static_cast<int>(dim);
  job.blocks = static_cast<int>(skip.size() / kPageTokens);
  job.skip = {static_cast<const std::uint8_t*>(skip.data()), skip.size()};
  job.energies = rows;
  job.lambda = lambda.data();
  raise_if_error(find_backend("cpu")->fix_lambda(job));
  return array(std::move(lambda), {heads, dim});
}

void check_attention(double scale, double softcap, std::int64_t offset, bool start,
                     std::optional<std::int64_t> columns) {
  static const std::int32_t first = 0;  // stands for what is not read
  AttendArgs args;
  args.q.data = &first;
  args.q.stride[3] = 1;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.mask.offset = offset;
  if (start) args.mask.start = &first;
  if (columns) {
    args.mask.kind = Mask::General::boolean;
    args.mask.general = &first;
    args.mask.columns = *columns;
  }
  raise_if_error(check_arguments(args));
}

}  // namespace

void bind_metal(nb::module_& m) {
  m.attr("METAL_HEAD_DIMS") = nb::cast(std::vector<int>(std::begin(apple::kHeadDims), std::end(apple::kHeadDims)));
  m.attr("METAL_ATTEND_THREADS") = static_cast<int>(KV4_ATTEND_THREADS);
  m.attr("METAL_ROW_THREADS") = static_cast<int>(KV4_ROW_THREADS);
  nb::class_<Metal>(m, "MetalTables",
                    "Arguments of the Metal kernels for a recipe and a head dim; see src/metal/arguments.h.")
      .def("__init__", &create, "recipe"_a, nb::kw_only(), "dtype"_a, "kv_heads"_a, "head_dim_k"_a, "head_dim_v"_a,
           "matrix_k"_a = nb::none(), "matrix_v"_a = nb::none(),
           "Raises NotImplementedError with the reason where no Metal kernel serves it.")
      .def_prop_ro("head_bytes", [](const Metal& s) { return s.spec.layout.head_bytes; })
      .def_prop_ro("page_bytes",
                   [](const Metal& s) { return s.spec.layout.head_bytes * static_cast<std::uint32_t>(s.kv_heads); })
      .def_prop_ro(
          "rotations",
          [](const Metal& s) {
            std::vector<std::tuple<std::uintptr_t, std::size_t>> both;
            for (const SideSpec* side : {&s.spec.key, &s.spec.value})
              both.emplace_back(reinterpret_cast<std::uintptr_t>(side->rotation.get()), side->rotation->bytes());
            return both;
          },
          "(identity, bytes) of the rotations of keys and of values; equal ones are one object while anybody holds "
          "them.")
      .def(
          "query_matrix",
          [](const Metal& s, bool values) {
            return array(apple::query_matrix(*(values ? s.spec.value : s.spec.key).rotation));
          },
          "values"_a = false, "Empty for the identity.")
      .def(
          "output_matrix",
          [](const Metal& s, bool values) {
            return array(apple::output_matrix(*(values ? s.spec.value : s.spec.key).rotation));
          },
          "values"_a)
      .def(
          "sealing_matrix",
          [](const Metal& s, bool values) {
            return array(apple::sealing_matrix(*(values ? s.spec.value : s.spec.key).rotation));
          },
          "values"_a)
      .def(
          "side", [](const Metal& s, bool values) { return array(apple::side_table(s.spec, values, places_of(s))); },
          "values"_a)
      .def(
          "side_alone",
          [](const Metal& s, bool values) {
            Metal alone = s;  // where the side's part of a slice is all that is written
            const std::uint32_t from = values ? s.spec.layout.v_codes : 0,
                                bytes = (values ? s.spec.layout.head_bytes : s.spec.layout.v_codes) - from;
            alone.spec.layout.v_codes -= from;
            alone.spec.layout.v_scales -= from;
            return array(apple::side_table(alone.spec, values, places_of(s, bytes)));
          },
          "values"_a, "Of slices that hold this side alone.")
      .def(
          "tokens", [](const Metal& s, bool values) { return array(tokens_of(s, values)); }, "values"_a,
          "int8, for each byte of a slice that holds this side alone: the token it belongs to, -1 where to none or "
          "all.")
      .def("jobs", &jobs_of, "jobs"_a, nb::kw_only(), "stride"_a, "dtype"_a)
      .def(
          "levels",
          [](const Metal& s, bool values) { return array(apple::level_table(values ? s.spec.value : s.spec.key)); },
          "values"_a)
      .def("attend", &attend_tables, nb::kw_only(), "q_shape"_a, "q_stride"_a, "q_dtype"_a, "out_dtype"_a,
           "out_stride"_a, "sequences"_a, "rows"_a, "lambda_v"_a, "scale"_a, "softcap"_a, "sinks"_a, "causal"_a,
           "general"_a, "general_dtype"_a, "general_stride"_a, "columns"_a, "offset"_a, "cores"_a,
           "Tables and launch sizes of one call. rows: exact ones that a head of the cache's arrays has, first the "
           "sinks, "
           "then the window's.")
      .def(
          "canonical",
          [](const Metal& s, const nb::bytes& slice) {
            if (slice.size() != s.spec.layout.head_bytes)
              raise_if_error(invalid_argument("slice", std::to_string(s.spec.layout.head_bytes) + " bytes",
                                              std::to_string(slice.size())));
            std::string k(static_cast<std::size_t>(kPageTokens) * s.dim / 2, '\0'), v(k.size(), '\0');
            apple::codes_to_canonical(s.spec, reinterpret_cast<const std::uint8_t*>(slice.c_str()),
                                      reinterpret_cast<std::uint8_t*>(k.data()),
                                      reinterpret_cast<std::uint8_t*>(v.data()));
            return nb::make_tuple(nb::bytes(k.data(), k.size()), nb::bytes(v.data(), v.size()));
          },
          "slice"_a, "Codes of a head slice in canonical order: (keys, values) as bytes.");

  m.def(
      "learn_lambda", &learn_lambda, "keys"_a, "skip"_a, "energies"_a,
      "Lambda, float32 [kv_heads, dim], from keys float32 [kv_heads, rows, dim], whole pages of them, a byte for each "
      "row, nonzero where it\nstays out, and energies [kv_heads, dim] of queries.");
  m.def("check_attention", &check_attention, "scale"_a, "softcap"_a, "offset"_a, "start"_a, "columns"_a,
        "Raises for what no call of attention may say. start: whether the mask has one; columns: of a general one.");
  m.def(
      "hidden_by", [](const std::string& dtype) { return hidden_by(read_dtype(dtype)); }, "dtype"_a,
      "An additive mask of this dtype hides what is not above this.");
}

}  // namespace kv4::python
