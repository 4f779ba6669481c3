// kv4._core: the C++ API for Python. Conversions and exceptions only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <span>
#include <tuple>
#include <type_traits>
#include <variant>

#include "cpu/measure.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"
#include "kv4/version.h"
#include "ledger.h"
#include "ledger/extent.h"
#include "metal.h"
#include "paged.h"
#include "recipe/levels.h"
#include "tensor.h"
#include "values.h"

namespace kv4::python {
namespace {

using namespace nb::literals;

template <std::size_t N>
int choice(nb::handle object, const char* attribute, const char* field, const char* const (&names)[N]) {
  const std::string value = text(object.attr(attribute));
  std::string all;
  for (std::size_t i = 0; i < N; ++i) {
    if (value == names[i]) return static_cast<int>(i);
    all += (i > 0 ? ", " : "") + std::string(names[i]);
  }
  raise_if_error(invalid_argument(std::string("recipe.") + field, "one of " + all, "'" + value + "'"));
  return 0;
}

// A number, or True or False, as T says.
template <class T>
T value_of(nb::handle object, const char* attribute, const char* field) {
  T value{};
  if (!nb::try_cast<T>(object.attr(attribute), value))
    raise_if_error(invalid_argument(std::string("recipe.") + field,
                                    std::is_same_v<T, bool> ? "True or False" : "an integer in range",
                                    text(nb::repr(object.attr(attribute)))));
  return value;
}

SideRecipe side(nb::handle s, const std::string& which) {
  const auto field = [&](const char* name) { return which + "." + name; };
  SideRecipe out;
  out.rotation = static_cast<RotationKind>(
      choice(s, "rotation", field("rotation").c_str(), {"identity", "srft", "srht", "householder", "dense"}));
  out.reflectors = value_of<int>(s, "reflectors", field("reflectors").c_str());
  out.seed = value_of<std::uint64_t>(s, "seed", field("seed").c_str());
  out.group = value_of<int>(s, "group", field("group").c_str());
  out.bits = value_of<int>(s, "bits", field("bits").c_str());
  out.levels =
      static_cast<LevelKind>(choice(s, "levels", field("levels").c_str(), {"lloyd_max", "uniform", "trellis"}));
  out.scale = static_cast<ScaleRule>(choice(s, "scale", field("scale").c_str(), {"least_squares", "abs_max"}));
  out.mean = value_of<bool>(s, "mean", field("mean").c_str());
  out.lambda = static_cast<LambdaMode>(choice(s, "lambda_", field("lambda_").c_str(), {"none", "auto", "given"}));
  return out;
}

}  // namespace

Recipe read_recipe(nb::handle r) {
  if (!nb::hasattr(r, "key") || !nb::hasattr(r, "value"))
    raise_if_error(invalid_argument("recipe", "a kv4.Recipe", text(nb::repr(r))));
  Recipe out;
  out.key = side(r.attr("key"), "key");
  out.value = side(r.attr("value"), "value");
  out.seal = static_cast<SealMode>(choice(r, "seal", "seal", {"page", "arrival", "never"}));
  out.sinks = value_of<int>(r, "sinks", "sinks");
  out.window = value_of<int>(r, "window", "window");
  out.refined = value_of<int>(r, "refined", "refined");
  return out;
}

Recipe read_recipe(nb::handle r, int head_dim_k, int head_dim_v) {
  const nb::object budget = nb::getattr(r, "bits", nb::none());
  return budget.is_none() ? read_recipe(r) : read_recipe(r.attr("at")(head_dim_k, head_dim_v));
}

std::vector<float> read_floats(nb::handle x, const char* name) {
  if (x.is_none()) return {};
  const Tensor t = tensor(x, name);
  check_vector(t, name, Element::f32, "float32", -1);
  std::int64_t count = 1;
  for (int i = 0; i < t.rank; ++i) count *= t.shape[i];
  const auto* data = static_cast<const float*>(t.data);
  return {data, data + count};
}

DType read_dtype(const std::string& name) {
  for (DType t : {DType::f32, DType::f16, DType::bf16})
    if (name == kv4::name_of(t)) return t;
  raise_if_error(invalid_argument("dtype", "float32, float16 or bfloat16", name));
  return DType::f32;
}

namespace {

// A call's arguments, with the tensors they point into.
struct Call {
  AttendArgs args;
  Tensor q, sinks, start, window, mask, host_mask;
};

void read_mask(Call* call, nb::handle mask, nb::handle host_mask, std::int64_t batch, std::int64_t heads,
               std::int64_t queries, int device) {
  call->mask = tensor(mask, "mask", device);
  const Tensor& t = call->mask;
  Mask& m = call->args.mask;
  if (t.rank != 4)
    raise_if_error(
        invalid_argument("mask", "4 axes [batch or 1, q_heads or 1, T or 1, columns]", "shape " + shape_text(t)));
  const std::array<std::int64_t, 3> full{batch, heads, queries};
  for (int i = 0; i < 3; ++i) {
    if (t.shape[i] != full[i] && t.shape[i] != 1)
      raise_if_error(invalid_argument("mask",
                                      "shape [" + std::to_string(batch) + " or 1, " + std::to_string(heads) +
                                          " or 1, " + std::to_string(queries) + " or 1, columns]",
                                      shape_text(t)));
    m.general_stride[i] = t.shape[i] == 1 ? 0 : t.stride[i];
  }
  m.general_stride[3] = t.stride[3];
  m.columns = t.shape[3];
  m.general = t.data;
  if (!host_mask.is_none()) {
    call->host_mask = tensor(host_mask, "host_mask");
    const Tensor& copy = call->host_mask;
    if (copy.rank != 4 || copy.shape != t.shape || copy.element != t.element)
      raise_if_error(
          invalid_argument("host_mask", "the shape and dtype of mask, " + shape_text(t), "shape " + shape_text(copy)));
    m.host_general = copy.data;
    for (int i = 0; i < 4; ++i) m.host_general_stride[i] = i < 3 && copy.shape[i] == 1 ? 0 : copy.stride[i];
  }
  switch (t.element) {
    case Element::boolean: m.kind = Mask::General::boolean; return;
    case Element::f32: m.general_dtype = DType::f32; break;
    case Element::f16: m.general_dtype = DType::f16; break;
    case Element::bf16: m.general_dtype = DType::bf16; break;
    default:
      raise_if_error(invalid_argument("mask", "dtype bool, float32, float16 or bfloat16",
                                      t.element == Element::other ? t.element_name : name_of(t.element)));
  }
  m.kind = Mask::General::additive;
}

// (row, tokens) of some sequences; None: all, with equal counts.
using Named = std::optional<std::vector<std::pair<std::int64_t, std::int64_t>>>;
using Positions = std::variant<std::int64_t, std::vector<std::int64_t>>;

std::vector<RowCount> row_counts(const Named& rows) {
  std::vector<RowCount> counts;
  if (!rows) return counts;
  for (const auto& [row, tokens] : *rows) counts.push_back({row, tokens});
  return counts;
}

void read_call(Call* call, nb::handle q, double scale, double softcap, nb::handle sinks, bool causal,
               std::int64_t offset, nb::handle start, nb::handle window, nb::handle mask, nb::handle host_mask,
               int device, const Named& rows = std::nullopt) {
  AttendArgs& a = call->args;
  call->q = tensor(q, "q", device);
  a.q = float_view(call->q, "q");
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.mask.causal = causal;
  a.mask.offset = offset;
  const std::int64_t batch = a.q.shape[0], heads = a.q.shape[1];
  const std::int64_t sequences = rows.has_value() ? static_cast<std::int64_t>(rows->size()) : batch;
  if (!sinks.is_none()) {
    call->sinks = tensor(sinks, "sinks", device);
    check_vector(call->sinks, "sinks", Element::f32, "float32", heads);
    a.sinks = static_cast<const float*>(call->sinks.data);
    for (std::int64_t h = 0; h < heads && device == kHost; ++h)
      if (!(a.sinks[h] <= std::numeric_limits<float>::max()))  // -infinity is no sink
        raise_if_error(invalid_argument("sinks", "numbers, or -infinity", std::to_string(a.sinks[h])));
  }
  if (!start.is_none()) {
    call->start = tensor(start, "start");
    check_vector(call->start, "start", Element::i32, "int32", sequences);
    a.mask.start = static_cast<const std::int32_t*>(call->start.data);
  }
  if (!window.is_none()) {
    call->window = tensor(window, "window");
    check_vector(call->window, "window", Element::i32, "int32", sequences);
    a.mask.window = static_cast<const std::int32_t*>(call->window.data);
  }
  if (!mask.is_none()) read_mask(call, mask, host_mask, batch, heads, a.q.shape[2], device);
}

void create(PyCache* self, nb::handle recipe, const std::string& dtype, int kv_heads, int head_dim_k, int head_dim_v,
            int sliding_window, nb::handle lambda_k, nb::handle lambda_v, nb::handle matrix_k, nb::handle matrix_v,
            const std::string& backend) {
  CacheConfig config;
  config.recipe = read_recipe(recipe, head_dim_k, head_dim_v);
  config.dtype = read_dtype(dtype);
  config.kv_heads = kv_heads;
  config.head_dim_k = head_dim_k;
  config.head_dim_v = head_dim_v;
  config.sliding_window = sliding_window;
  config.lambda_k = read_floats(lambda_k, "lambda_k");
  config.lambda_v = read_floats(lambda_v, "lambda_v");
  config.matrix_k = read_floats(matrix_k, "matrix_k");
  config.matrix_v = read_floats(matrix_v, "matrix_v");
  config.backend = backend;
  std::unique_ptr<Cache> cache;
  raise_if_error(Cache::create(config, &cache));
  new (self) PyCache{std::move(cache), device_of(backend)};
}

void append(PyCache& self, nb::handle k, nb::handle v, const Named& rows) {
  const Tensor keys = tensor(k, "k", self.device), values = tensor(v, "v", self.device);
  const TensorView key_view = float_view(keys, "k"), value_view = float_view(values, "v");
  const std::vector<RowCount> counts = row_counts(rows);
  Status status;
  {
    const nb::gil_scoped_release unlocked;
    status = rows ? self.cache->append(counts, key_view, value_view) : self.cache->append(key_view, value_view);
  }
  raise_if_error(status);
}

void attend(PyCache& self, nb::handle q, nb::handle out, double scale, double softcap, nb::handle sinks, bool causal,
            std::int64_t offset, nb::handle start, nb::handle window, nb::handle mask, nb::handle host_mask,
            const Named& rows) {
  Call call;
  read_call(&call, q, scale, softcap, sinks, causal, offset, start, window, mask, host_mask, self.device, rows);
  const std::vector<RowCount> counts = row_counts(rows);
  const Tensor result = writable_tensor(out, "out", self.device);
  const MutableTensorView view = mutable_float_view(result, "out");
  Status status;
  {
    const nb::gil_scoped_release unlocked;
    status = rows ? self.cache->attend(counts, call.args, view) : self.cache->attend(call.args, view);
  }
  raise_if_error(status);
}

void attend_partial(PyCache& self, nb::handle q, nb::handle o, nb::handle m, nb::handle l, const Positions& upto,
                    double scale, double softcap, nb::handle sinks, bool causal, std::int64_t offset, nb::handle start,
                    nb::handle window, nb::handle mask, nb::handle host_mask, const Named& rows) {
  Call call;
  read_call(&call, q, scale, softcap, sinks, causal, offset, start, window, mask, host_mask, self.device, rows);
  const std::vector<RowCount> counts = row_counts(rows);
  const std::vector<std::int64_t> uptos =
      std::holds_alternative<std::int64_t>(upto) ? std::vector(1, std::get<std::int64_t>(upto)) : std::get<1>(upto);
  if (!rows && uptos.size() != 1)
    raise_if_error(invalid_argument("upto", "one position, where no rows are named", std::to_string(uptos.size())));
  const auto& s = call.args.q.shape;
  const std::int64_t states = s[0] * s[1] * s[2];
  const Tensor ot = writable_tensor(o, "o", self.device), mt = writable_tensor(m, "m", self.device),
               lt = writable_tensor(l, "l", self.device);
  check_vector(ot, "o", Element::f32, "float32", states * self.cache->config().head_dim_v);
  check_vector(mt, "m", Element::f32, "float32", states);
  check_vector(lt, "l", Element::f32, "float32", states);
  const PartialState state{static_cast<float*>(ot.data), static_cast<float*>(mt.data), static_cast<float*>(lt.data)};
  Status status;
  {
    const nb::gil_scoped_release unlocked;
    status = rows ? self.cache->attend_partial(counts, call.args, uptos, state)
                  : self.cache->attend_partial(call.args, uptos[0], state);
  }
  raise_if_error(status);
}

template <bool kKeys>
void dense(const PyCache& self, std::int64_t first, std::int64_t count, nb::handle out) {
  const Tensor t = writable_tensor(out, "out", self.device);
  const MutableTensorView view = mutable_float_view(t, "out");
  raise_if_error(kKeys ? self.cache->dense_keys(first, count, view) : self.cache->dense_values(first, count, view));
}

}  // namespace
}  // namespace kv4::python

NB_MODULE(_core, m) {
  using namespace kv4::python;
  using namespace nb::literals;
  m.doc() = "The kv4 core: an int4 key/value cache and its attention.";
  m.attr("PAGE_TOKENS") = kv4::kPageTokens;
  m.attr("QUERY_STRIDE") = kv4::ledger::kQueryStride;

  // Caches that modules still hold at interpreter exit are no leak to report.
  nb::set_leak_warnings(false);

  nb::class_<PyCache>(m, "Cache", "The cache of one attention layer; see kv4/cache.h.")
      .def("__init__", &create, "recipe"_a.none(), nb::kw_only(), "dtype"_a = "float32", "kv_heads"_a, "head_dim_k"_a,
           "head_dim_v"_a, "sliding_window"_a = 0, "lambda_k"_a = nb::none(), "lambda_v"_a = nb::none(),
           "matrix_k"_a = nb::none(), "matrix_v"_a = nb::none(), "backend"_a = "cpu",
           "dtype: of appended and exact tokens. lambda_*: float32 [kv_heads, head_dim]; matrix_*: float32 [head_dim, "
           "head_dim].")
      .def("append", &append, "k"_a.none(), "v"_a.none(), nb::kw_only(), "rows"_a = nb::none(),
           "k [batch, kv_heads, T, head_dim_k], v alike with head_dim_v: T tokens to each sequence; T may be 0.\n"
           "rows: (row, tokens) of some sequences, in any order, whose tokens follow each other on the T axis of one "
           "batch.")
      .def("attend", &attend, "q"_a.none(), "out"_a.none(), nb::kw_only(), "scale"_a = 0.0, "softcap"_a = 0.0,
           "sinks"_a = nb::none(), "causal"_a = true, "offset"_a = 0, "start"_a = nb::none(), "window"_a = nb::none(),
           "mask"_a = nb::none(), "host_mask"_a = nb::none(), "rows"_a = nb::none(),
           "q [batch, q_heads, T, head_dim_k], the newest T positions; out [batch, q_heads, T, head_dim_v] is written "
           "in place: it\n"
           "can be written to, has a place of its own for every element, and shares none with q.\n"
           "sinks float32 [q_heads]; start, window int32 [batch], always on the CPU; mask bool or float, 4 axes; "
           "column j is position\n"
           "j + offset. host_mask: a copy of a device's mask on the CPU, so that hidden tokens stay out of means and "
           "scales.\n"
           "rows: (row, tokens) of some sequences, whose newest positions follow each other on the T axis of one "
           "batch; start and window\n"
           "then are int32 [len(rows)].")
      .def("attend_partial", &attend_partial, "q"_a.none(), "o"_a.none(), "m"_a.none(), "l"_a.none(), nb::kw_only(),
           "upto"_a, "scale"_a = 0.0, "softcap"_a = 0.0, "sinks"_a = nb::none(), "causal"_a = true, "offset"_a = 0,
           "start"_a = nb::none(), "window"_a = nb::none(), "mask"_a = nb::none(), "host_mask"_a = nb::none(),
           "rows"_a = nb::none(),
           "The partial state over positions below upto: o float32 [batch, q_heads, T, head_dim_v], m and l [batch, "
           "q_heads, T]. With\n"
           "rows as attend has them, upto has a position for each and the states of their queries follow each other on "
           "the T axis.")
      .def(
          "set_stream", [](PyCache& c, std::uintptr_t stream) { c.cache->set_stream(reinterpret_cast<void*>(stream)); },
          "stream"_a,
          "The CUDA stream of the calls that follow, as torch's Stream.cuda_stream; 0 is the default stream. The CPU "
          "has none.")
      .def(
          "reserve", [](PyCache& c, std::int64_t tokens) { raise_if_error(c.cache->reserve(tokens)); }, "tokens"_a,
          "Room for that many more tokens, so that steps of one token allocate nothing until then.")
      .def(
          "advance", [](PyCache& c) { raise_if_error(c.cache->advance()); },
          "Before each replay of a captured step: seals what is due and counts the token that the replay appends.")
      .def(
          "seal", [](PyCache& c) { raise_if_error(c.cache->seal()); },
          "Seals what is due now instead of at the next append.")
      .def(
          "crop",
          [](PyCache& c, std::int64_t length, std::optional<int> row) {
            raise_if_error(row ? c.cache->crop(*row, length) : c.cache->crop(length));
          },
          "length"_a, "row"_a = nb::none(),
          "Keeps the first `length` positions of every sequence that is longer, or of one.")
      .def(
          "erase",
          [](PyCache& c, int row, std::int64_t first, std::int64_t count) {
            raise_if_error(c.cache->erase(row, first, count));
          },
          "row"_a, "first"_a, "count"_a,
          "Takes positions out of a sequence; those behind move up: for keys that carry no position of their own. "
          "IndexError where they\n"
          "are not all exact and behind the sinks, or a sliding window no longer holds what would be seen.")
      .def(
          "add", [](PyCache& c, int count) { raise_if_error(c.cache->add(count)); }, "count"_a,
          "Empty sequences more, behind the others.")
      .def(
          "remove", [](PyCache& c, const std::vector<std::int64_t>& rows) { raise_if_error(c.cache->remove(rows)); },
          "rows"_a, "Drops sequences; the others keep their order.")
      .def(
          "extend", [](PyCache& c, const PyCache& other) { raise_if_error(c.cache->extend(*other.cache)); }, "other"_a,
          "The sequences of another cache of the same configuration go on here too. Pages are shared between clones, "
          "else copied.")
      .def(
          "select", [](PyCache& c, const std::vector<std::int64_t>& rows) { raise_if_error(c.cache->select(rows)); },
          "rows"_a)
      .def(
          "repeat", [](PyCache& c, int times) { raise_if_error(c.cache->repeat(times)); }, "times"_a)
      .def("reset", [](PyCache& c) { c.cache->reset(); })
      .def("clone",
           [](const PyCache& c) {
             PyCache fork{nullptr, c.device};
             raise_if_error(c.cache->clone(&fork.cache));
             return fork;
           })
      .def(
          "save",
          [](const PyCache& c, const nb::callable& write) {
            write_to(write, [&](const kv4::Sink& sink) { return c.cache->save(sink); });
          },
          "write"_a, "Passes the cache, block by block, to write(memoryview), which has to take all of it.")
      .def(
          "load",
          [](const PyCache& c, const nb::callable& readinto) {
            read_from(readinto, [&](const kv4::Source& source) { return c.cache->load(source); });
          },
          "readinto"_a,
          "Takes a saved cache of the same configuration from readinto(memoryview) -> bytes read, as files have it, "
          "into this empty\n"
          "one. ValueError: another configuration, by its field, or bytes that are no intact saved cache; the cache "
          "then is empty.")
      .def(
          "record_past", [](PyCache& c, bool on) { c.cache->record_past(on); }, "on"_a)
      .def("dense_keys", &dense<true>, "first"_a, "count"_a, "out"_a.none())
      .def("dense_values", &dense<false>, "first"_a, "count"_a, "out"_a.none())
      .def(
          "nbytes", [](const PyCache& c) { return c.cache->nbytes(); }, "Every byte held, with what shared() lists.")
      .def(
          "shared",
          [](const PyCache& c) {
            std::vector<std::tuple<std::uintptr_t, std::size_t, bool>> all;
            for (const kv4::SharedMemory& memory : c.cache->shared())
              all.emplace_back(reinterpret_cast<std::uintptr_t>(memory.identity), memory.bytes, memory.on_device);
            return all;
          },
          "(identity, bytes, on_device) of the part of nbytes() that other caches may hold as well: who adds up caches "
          "counts an\n"
          "identity once.")
      .def_prop_ro("batch", [](const PyCache& c) { return c.cache->batch(); })
      .def_prop_ro(
          "length", [](const PyCache& c) { return c.cache->length(); }, "Of the longest sequence.")
      .def_prop_ro(
          "lengths",
          [](const PyCache& c) {
            std::vector<std::int64_t> lengths;
            for (int b = 0; b < c.cache->batch(); ++b) lengths.push_back(c.cache->length(b));
            return lengths;
          },
          "Of each sequence.")
      .def_prop_ro("first", [](const PyCache& c) { return c.cache->first(); })
      .def_prop_ro("version", [](const PyCache& c) { return c.cache->version(); })
      .def(
          "lambda_fixed", [](const PyCache& c, int row) { return c.cache->lambda_fixed(c.row(row)); }, "row"_a,
          "Whether the row's lambda changes no more; also where none is learnt.")
      .def(
          "sealed_tokens", [](const PyCache& c, int row) { return c.cache->sealed_tokens(c.row(row)); }, "row"_a)
      .def(
          "exact_tokens", [](const PyCache& c, int row) { return c.cache->exact_tokens(c.row(row)); }, "row"_a)
      .def(
          "lambda_",
          [](const PyCache& c, int row) {
            std::vector<float> values;
            raise_if_error(c.cache->lambda(c.row(row), &values));
            return values;
          },
          "row"_a, "Flat [kv_heads * head_dim_k]; empty before it is fixed.")
      .def(
          "page_count", [](const PyCache& c, int row) { return c.cache->page_count(c.row(row)); }, "row"_a)
      .def(
          "page_codes",
          [](const PyCache& c, int row, int index, int head) {
            const auto& config = c.cache->config();
            const auto codes = [](const kv4::SideRecipe& side, int dim) {
              return std::string(static_cast<std::size_t>(kv4::kPageTokens) / 8 * side.bits * dim, '\0');
            };
            std::string k = codes(config.recipe.key, config.head_dim_k),
                        v = codes(config.recipe.value, config.head_dim_v);
            raise_if_error(c.cache->page_codes(row, index, head, {reinterpret_cast<std::uint8_t*>(k.data()), k.size()},
                                               {reinterpret_cast<std::uint8_t*>(v.data()), v.size()}));
            return nb::make_tuple(nb::bytes(k.data(), k.size()), nb::bytes(v.data(), v.size()));
          },
          "row"_a, "index"_a, "head"_a, "Codes of a sealed head slice in canonical order: (keys, values) as bytes.")
      .def(
          "page_second_rows",
          [](const PyCache& c, int row, int index, int head) {
            kv4::SecondRows rows;
            raise_if_error(c.cache->page_second_rows(row, index, head, &rows));
            return nb::make_tuple(rows.places, nb::bytes(rows.codes.data(), rows.codes.size()),
                                  nb::bytes(rows.scales.data(), 2 * rows.scales.size()));
          },
          "row"_a, "index"_a, "head"_a,
          "Refined keys of a sealed head slice: (their tokens, 4-bit codes [row][channel], fp16 scales [row][group]).");

  bind_ledger(m);
  bind_metal(m);
  bind_saved(m);
  bind_paged(m);

  m.def(
      "validate",
      [](nb::handle recipe, std::optional<int> head_dim_k, std::optional<int> head_dim_v) {
        const kv4::Recipe r = read_recipe(recipe);
        raise_if_error(head_dim_k && head_dim_v ? kv4::validate(r, *head_dim_k, *head_dim_v) : kv4::validate(r));
      },
      "recipe"_a, "head_dim_k"_a = nb::none(), "head_dim_v"_a = nb::none(), "Head dims: both or none.");
  m.def(
      "step_rule",
      [](nb::handle s, int group) {
        if (group < 1) raise_if_error(kv4::invalid_argument("group", "at least 1", std::to_string(group)));
        const kv4::SideRecipe r = side(s, "side");
        const kv4::StepRule found = kv4::step_rule(kv4::levels(r.levels, r.bits), r.scale, group);
        return std::pair(found.by_largest, found.factor);
      },
      "side"_a, "group"_a,
      "(whether by the largest, factor): codes of a group of values x are the levels nearest to x / step, where step "
      "is factor * max |x|, or factor * rms(x).");
  m.def(
      "trellis_levels",
      [](int bits) {
        kv4::SideRecipe r;
        r.levels = kv4::LevelKind::trellis;
        r.bits = bits;
        raise_if_error(kv4::validate(kv4::Recipe{.key = r}));
        const kv4::Levels& levels = kv4::levels(r.levels, bits);
        std::vector<std::vector<int>> found;
        for (int state = 0; state < kv4::Levels::kStates; ++state) {
          std::vector<int>& row = found.emplace_back();
          for (int code = 0; code < levels.count(); ++code) row.push_back(levels.level(1, state, code));
        }
        return found;
      },
      "bits"_a,
      "Levels of a trellis, [state][code] at odd places, where a state is the two lower bits of the code before.");
  m.def("backends", &kv4::backends, "Those that are built in and find a device.");
  m.def("why_not", &kv4::why_not, "backend"_a, "Why a backend is not among them; empty where it is.");
  m.def("num_threads", &kv4::cpu::num_threads);
  m.def("set_num_threads", [](int n) { raise_if_error(kv4::cpu::set_num_threads(n)); }, "n"_a);
  m.def("operand_bits", &kv4::cpu::operand_bits);
  m.def(
      "set_operand_bits", [](int bits) { raise_if_error(kv4::cpu::set_operand_bits(bits)); }, "bits"_a,
      "Bits of queries and weights where they meet packed codes, 8 or 16: kv4/cpu.h.");
  m.def("isa", &kv4::cpu::active_isa,
        "The instruction set in use; empty where KV4_CPU_ISA names one that is not here: see why_no_isa.");
  m.def(
      "why_no_isa", [] { return kv4::cpu::check_isa().message(); },
      "Why no instruction set is in use; empty where one is.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> usable;
        for (const std::string& name : kv4::cpu::compiled_isas())
          if (kv4::cpu::supported(name)) usable.push_back(name);
        return usable;
      },
      "Those that this build and machine have, best first.");
  m.def("force_isa", [](const std::string& name) { raise_if_error(kv4::cpu::force_isa(name)); }, "name"_a);
  m.def(
      "bench_seal",
      [](int dim, const std::string& rotation, std::int64_t vectors, int repeats) {
        static constexpr const char* kNames[] = {"identity", "srft", "srht", "householder"};
        for (int i = 0; i < 4; ++i) {
          if (rotation != kNames[i]) continue;
          std::vector<double> ns;
          raise_if_error(kv4::cpu::measure_seal(dim, static_cast<kv4::RotationKind>(i), vectors, repeats, &ns));
          return ns;
        }
        raise_if_error(kv4::invalid_argument("rotation", "identity, srft, srht or householder", rotation));
        return std::vector<double>();
      },
      "dim"_a, "rotation"_a, "vectors"_a, "repeats"_a,
      "Nanoseconds per vector of sealing alone, one figure per repeat.");
  m.def(
      "bench_read",
      [](std::size_t bytes, int repeats) {
        std::vector<double> speed;
        raise_if_error(kv4::cpu::measure_read(bytes, repeats, &speed));
        return speed;
      },
      "bytes"_a, "repeats"_a, "Bytes per second of reading memory in order on all threads, one figure per repeat.");
  m.def("version", [] { return KV4_VERSION; });
}
