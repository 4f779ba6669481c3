#include "metal.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "backend/backend.h"
#include "backend/spec.h"
#include "metal/order.h"
#include "metal/tables.h"
#include "moments/lambda.h"
#include "tensor.h"

namespace kv4::python {
namespace {

using namespace nb::literals;

template <class T>
nb::object array(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

// Both sides' settings and the layout of a page, for a head dim.
struct Metal {
  PageSpec spec;
  DType dtype = DType::f32;
  int kv_heads = 0;
  int dim = 0;
  bool seals = true;
};

void create(Metal* self, nb::handle recipe, const std::string& dtype, int kv_heads, int head_dim_k, int head_dim_v, nb::handle matrix_k,
            nb::handle matrix_v) {
  const Recipe r = read_recipe(recipe);
  raise_if_error(validate(r));
  Metal made;
  made.dtype = read_dtype(dtype);
  made.kv_heads = kv_heads;
  made.dim = head_dim_k;
  made.seals = r.seal != SealMode::never;
  if (r.seal == SealMode::arrival)
    raise_if_error(error(StatusCode::unsupported, "recipe.seal", "page or never on Metal", "arrival"));
  if (made.seals) raise_if_error(validate(r, head_dim_k, head_dim_v));
  raise_if_error(make_sides(r, head_dim_k, head_dim_v, read_floats(matrix_k, "matrix_k"), read_floats(matrix_v, "matrix_v"), &made.spec));
  made.spec.layout = apple::page_layout(made.spec);
  raise_if_error(apple::supports(made.spec));
  new (self) Metal(std::move(made));
}

// (pages, pages_position, last_page_tokens, query_position, start, window, has_lambda, exact rows); exact rows of both sets are
// (position, count, k_offset, k_stride_head, k_stride, v_offset, v_stride_head, v_stride) in elements.
using ExactTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using SequenceTuple = std::tuple<std::vector<std::int64_t>, std::int64_t, int, std::int64_t, std::int64_t, std::int32_t, bool, std::vector<ExactTuple>>;

nb::dict attend_tables(const Metal& self, const std::vector<std::int64_t>& q_shape, const std::vector<std::int64_t>& q_stride,
                       const std::string& q_dtype, const std::optional<std::string>& out_dtype,
                       const std::vector<std::int64_t>& out_stride, const std::vector<SequenceTuple>& sequences, double scale, double softcap,
                       bool sinks, bool causal, int general, const std::string& general_dtype,
                       const std::vector<std::int64_t>& general_stride, std::int64_t columns, std::int64_t offset, int cores) {
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
  job.query_count = q_shape.at(2);
  if (out_dtype) {
    job.out.data = base;
    job.out.dtype = read_dtype(*out_dtype);
    for (std::size_t i = 0; i < 4; ++i) {
      job.out.shape[i] = q_shape.at(i);
      job.out.stride[i] = out_stride.at(i);
    }
  }
  const auto page_bytes = static_cast<std::uintptr_t>(self.spec.layout.head_bytes) * static_cast<std::uintptr_t>(self.kv_heads);
  const auto size = static_cast<std::uintptr_t>(size_of(self.dtype));
  const auto at = [](std::uintptr_t bytes) { return reinterpret_cast<std::uint8_t*>(bytes); };
  constexpr std::uintptr_t kBase = 4096;  // no null pointers
  std::vector<SequenceView> views(sequences.size());
  std::vector<std::vector<const std::uint8_t*>> pages(sequences.size());
  std::vector<std::int32_t> starts(sequences.size()), windows(sequences.size());
  constexpr float kOne[1] = {1.0f};
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const auto& [table, pages_position, last, query_position, start, window, lambda, exact] = sequences[b];
    SequenceView& v = views[b];
    for (const std::int64_t page : table) pages[b].push_back(at(kBase + static_cast<std::uintptr_t>(page) * page_bytes));
    v.pages = pages[b].data();
    v.page_count = static_cast<int>(table.size());
    v.pages_position = pages_position;
    v.last_page_tokens = last;
    v.query_position = query_position;
    v.lambda_k = lambda ? kOne : nullptr;
    windows[b] = window;
    starts[b] = static_cast<std::int32_t>(std::max<std::int64_t>(start - offset, INT32_MIN));
    for (std::size_t i = 0; i < 2 && i < exact.size(); ++i) {
      const auto& [position, count, k_offset, k_head, k_row, v_offset, v_head, v_row] = exact[i];
      v.exact[i] = {at(kBase + static_cast<std::uintptr_t>(k_offset) * size), at(kBase + static_cast<std::uintptr_t>(v_offset) * size),
                    k_head, v_head, k_row, v_row, position, count};
    }
  }
  a.mask.start = starts.data();
  a.mask.window = windows.data();
  job.sequences = views;
  apple::Bases bases;
  bases.pages = at(kBase);
  bases.exact_k = bases.exact_v = at(kBase);
  apple::AttendTables t = apple::attend_tables(job, bases, cores);
  nb::dict out;
  out["dim"] = t.dim;
  out["block_rows"] = t.block_rows;
  out["rows"] = t.rows;
  out["blocks"] = t.blocks;
  out["splits"] = t.splits;
  out["prepared_floats"] = t.prepared_floats;
  out["state_floats"] = t.state_floats;
  out["call"] = array(std::move(t.call));
  out["sequences"] = array(std::move(t.sequences));
  out["factors"] = array(std::move(t.factors));
  out["pages"] = array(std::move(t.pages));
  out["levels"] = array(std::move(t.levels));
  return out;
}

}  // namespace

void bind_metal(nb::module_& m) {
  nb::class_<Metal>(m, "MetalTables", "What the Metal kernels are told about a recipe and a head dim; see src/metal/arguments.h.")
      .def("__init__", &create, "recipe"_a, nb::kw_only(), "dtype"_a, "kv_heads"_a, "head_dim_k"_a, "head_dim_v"_a,
           "matrix_k"_a = nb::none(), "matrix_v"_a = nb::none(),
           "Raises NotImplementedError with the reason where no Metal kernel serves it.")
      .def_prop_ro("head_bytes", [](const Metal& s) { return s.spec.layout.head_bytes; })
      .def_prop_ro("page_bytes", [](const Metal& s) { return s.spec.layout.head_bytes * static_cast<std::uint32_t>(s.kv_heads); })
      .def_prop_ro("rotations", [](const Metal& s) {
        std::vector<std::tuple<std::uintptr_t, std::size_t>> both;
        for (const SideSpec* side : {&s.spec.key, &s.spec.value})
          both.emplace_back(reinterpret_cast<std::uintptr_t>(side->rotation.get()), side->rotation->bytes());
        return both;
      }, "(identity, bytes) of the rotations of keys and of values; equal ones are one object while anybody holds them.")
      .def("query_matrix", [](const Metal& s, bool values) {
        return array(apple::query_matrix(*(values ? s.spec.value : s.spec.key).rotation));
      }, "values"_a = false, "Empty for the identity.")
      .def("output_matrix", [](const Metal& s, bool values) {
        return array(apple::output_matrix(*(values ? s.spec.value : s.spec.key).rotation));
      }, "values"_a)
      .def("sealing_matrix", [](const Metal& s, bool values) {
        return array(apple::sealing_matrix(*(values ? s.spec.value : s.spec.key).rotation));
      }, "values"_a)
      .def("side", [](const Metal& s, bool values, std::int64_t stride) { return array(apple::side_table(s.spec, values, s.dtype, stride)); },
           "values"_a, "stride"_a)
      .def("levels", [](const Metal& s, bool values) { return array(apple::level_table(values ? s.spec.value : s.spec.key)); }, "values"_a)
      .def("attend", &attend_tables, nb::kw_only(), "q_shape"_a, "q_stride"_a, "q_dtype"_a, "out_dtype"_a, "out_stride"_a, "sequences"_a,
           "scale"_a, "softcap"_a, "sinks"_a, "causal"_a, "general"_a, "general_dtype"_a, "general_stride"_a, "columns"_a, "offset"_a,
           "cores"_a, "Tables and launch sizes of one call.")
      .def("canonical", [](const Metal& s, const nb::bytes& slice) {
        if (slice.size() != s.spec.layout.head_bytes)
          raise_if_error(invalid_argument("slice", std::to_string(s.spec.layout.head_bytes) + " bytes", std::to_string(slice.size())));
        std::string k(static_cast<std::size_t>(kPageTokens) * s.dim / 2, '\0'), v(k.size(), '\0');
        apple::codes_to_canonical(s.spec, reinterpret_cast<const std::uint8_t*>(slice.c_str()), reinterpret_cast<std::uint8_t*>(k.data()),
                                  reinterpret_cast<std::uint8_t*>(v.data()));
        return nb::make_tuple(nb::bytes(k.data(), k.size()), nb::bytes(v.data(), v.size()));
      }, "slice"_a, "Codes of a head slice in canonical order: (keys, values) as bytes.");

  m.def("lambda_from_energies", [](const std::vector<double>& query, const std::vector<double>& key) {
    if (query.size() != key.size())
      raise_if_error(invalid_argument("key", std::to_string(query.size()) + " energies, as query has", std::to_string(key.size())));
    std::vector<float> lambda(query.size());
    lambda_from_energies(query, key, lambda);
    return array(std::move(lambda));
  }, "query"_a, "key"_a, "Lambda of one KV head, float32 [dim], from energies of its channels.");
}

}  // namespace kv4::python
