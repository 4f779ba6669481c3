// kv4._core.SavedFormat: files of caches whose arrays Python holds. And files of Python for all who save.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "blob/contents.h"
#include "metal.h"
#include "metal/order.h"
#include "values.h"

namespace kv4::python {
namespace {

using namespace nb::literals;

// Calls f with a view of memory that does not outlive the call. What it raises is kept until the core has returned.
Status pass(const nb::callable& f, const void* data, std::size_t bytes, int access, std::exception_ptr* raised,
            nb::object* result) {
  nb::object view;
  try {
    auto* memory = static_cast<char*>(const_cast<void*>(data));
    view = nb::steal(PyMemoryView_FromMemory(memory, static_cast<Py_ssize_t>(bytes), access));
    if (!view.is_valid()) throw nb::python_error();
    *result = f(view);
    view.attr("release")();
    return {};
  } catch (...) {
    *raised = std::current_exception();
    // A traceback holds on to the view: it must not lead to memory that is gone.
    if (view.is_valid()) {
      const nb::object released = nb::steal(PyObject_CallMethod(view.ptr(), "release", nullptr));
      if (!released.is_valid()) PyErr_Clear();
    }
    return error(StatusCode::failed_precondition, "callback", "no exception", "one");
  }
}

struct FileFormat {
  blob::Format format;
  PageSpec spec;
};

void create(FileFormat* self, const PyCache& core, const Metal& tables) {
  const PageSpec spec = tables.seals ? tables.spec : PageSpec();
  new (self) FileFormat{blob::Format::of(core.cache->config(), spec), spec};
}

using Bytes = nb::ndarray<const std::uint8_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
// A ledger, its lambda, the position of the first query that is recorded (-1: none), (position, energies) of those that
// are, and exact rows, uint8 [kv_heads, rows, bytes of a row]: keys and values of the sinks, then of the window.
using Held = std::tuple<const ledger::Ledger*, std::optional<Floats>, std::int64_t,
                        std::vector<std::pair<std::int64_t, Floats>>, std::vector<Bytes>>;

std::vector<float> channels(const blob::Format& format, const Floats& x, const char* name) {
  if (x.size() != format.channels())
    raise_if_error(invalid_argument(name, std::to_string(format.channels()) + " values", std::to_string(x.size())));
  return {x.data(), x.data() + x.size()};
}

class ArraySource final : public blob::SaveSource {
 public:
  ArraySource(const FileFormat& f, const std::vector<Held>& sequences, const std::vector<ledger::PageId>& ids,
              const Bytes& pages)
      : f_(f), pages_(pages.data()) {
    if (pages.size() != ids.size() * page_bytes())
      raise_if_error(invalid_argument("pages", std::to_string(ids.size() * page_bytes()) + " bytes",
                                      std::to_string(pages.size())));
    for (std::size_t i = 0; i < ids.size(); ++i) at_.emplace(ids[i], i);
    for (const Held& held : sequences) {
      const auto& [ledger, lambda, first, recorded, rows] = held;
      const ledger::Extent& x = ledger->extent();
      if (rows.size() != 4) raise_if_error(invalid_argument("rows", "4 arrays", std::to_string(rows.size())));
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t wanted = static_cast<std::size_t>(f.format.kv_heads * (i < 2 ? x.sinks : x.window_rows())) *
                                   f.format.row_bytes(i % 2 == 0);
        if (rows[i].size() != wanted)
          raise_if_error(invalid_argument("rows", std::to_string(wanted) + " bytes of exact rows",
                                          std::to_string(rows[i].size())));
      }
      for (const ledger::PageId id : ledger->pages())
        if (!at_.contains(id)) raise_if_error(invalid_argument("ids", "every page's", "none of " + std::to_string(id)));
      blob::Learnt& learnt = learnt_.emplace_back();
      if (lambda) learnt.lambda = channels(f.format, *lambda, "lambda_");
      learnt.queries.first = first;
      for (const auto& [position, energies] : recorded) {
        const std::int64_t row = learnt.queries.row(position);
        if (row < 0 || row >= static_cast<std::int64_t>(f.format.queries) / ledger::kQueryStride)
          raise_if_error(invalid_argument("position", "one whose query counts", std::to_string(position)));
        const auto at = static_cast<std::size_t>(row);
        learnt.energies.resize(std::max(learnt.energies.size(), at + 1));
        learnt.energies[at] = channels(f.format, energies, "energies");
      }
      held_.push_back(&held);
    }
  }

  const ledger::Ledger& ledger(std::size_t b) const override { return *std::get<0>(*held_[b]); }
  Status learnt(std::size_t b, blob::Learnt* out) const override {
    *out = learnt_[b];
    return {};
  }
  Status rows(std::size_t b, bool sinks, std::int64_t first, std::int64_t tokens,
              std::span<std::byte> out) const override {
    const ledger::Extent& x = ledger(b).extent();
    const auto total = static_cast<std::size_t>(sinks ? x.sinks : x.window_rows());
    std::byte* to = out.data();
    for (const bool key : {true, false}) {
      const std::uint8_t* from = std::get<4>(*held_[b])[(sinks ? 0 : 2) + (key ? 0 : 1)].data();
      const std::size_t row = f_.format.row_bytes(key), bytes = static_cast<std::size_t>(tokens) * row;
      for (int h = 0; h < f_.format.kv_heads; ++h, to += bytes)
        std::memcpy(to, from + (static_cast<std::size_t>(h) * total + static_cast<std::size_t>(first)) * row, bytes);
    }
    return {};
  }
  Status page(ledger::PageId id, std::span<std::byte> out) const override {
    const kv4_page_layout &here = f_.spec.layout, &there = f_.format.slice;
    const std::uint8_t* held = pages_ + at_.at(id) * page_bytes();
    auto* put = reinterpret_cast<std::uint8_t*>(out.data());
    for (int h = 0; h < f_.format.kv_heads; ++h, held += here.head_bytes, put += there.head_bytes) {
      apple::codes_to_canonical(f_.spec, held, put + there.k_codes, put + there.v_codes);
      KV4_RETURN_IF_ERROR(blob::copy_scales(put, there, held, here, copy));
    }
    return {};
  }

  static Status copy(void* to, const void* from, std::size_t bytes) {
    std::memcpy(to, from, bytes);
    return {};
  }

 private:
  std::size_t page_bytes() const { return static_cast<std::size_t>(f_.format.kv_heads) * f_.spec.layout.head_bytes; }

  const FileFormat& f_;
  const std::uint8_t* pages_;
  std::unordered_map<ledger::PageId, std::size_t> at_;
  std::vector<const Held*> held_;
  std::vector<blob::Learnt> learnt_;
};

void write(const FileFormat& self, const nb::callable& file, bool recording, const std::vector<Held>& sequences,
           const std::vector<ledger::PageId>& ids, const Bytes& pages) {
  const ArraySource source(self, sequences, ids, pages);
  write_to(file, [&](const Sink& sink) { return blob::write(self.format, sequences.size(), recording, source, sink); });
}

class ArrayTarget final : public blob::LoadTarget {
 public:
  explicit ArrayTarget(const FileFormat& f) : f_(f) {}

  Status rows(std::size_t b, bool sinks, std::int64_t /*first*/, std::int64_t tokens, std::int64_t /*total*/,
              std::span<const std::byte> block) override {
    if (b >= parts_.size()) parts_.resize(b + 1);
    const std::byte* from = block.data();
    for (const bool key : {true, false}) {
      const std::size_t bytes = static_cast<std::size_t>(f_.format.kv_heads * tokens) * f_.format.row_bytes(key);
      parts_[b][sinks ? 0 : 1][key ? 0 : 1].push_back({tokens, std::vector(from, from + bytes)});
      from += bytes;
    }
    return {};
  }
  Status page(std::int64_t number, std::int64_t /*count*/, std::span<const std::byte> block) override {
    const kv4_page_layout &here = f_.spec.layout, &there = f_.format.slice;
    const std::size_t bytes = static_cast<std::size_t>(f_.format.kv_heads) * here.head_bytes;
    pages_.resize(static_cast<std::size_t>(number + 1) * bytes);
    std::uint8_t* put = pages_.data() + static_cast<std::size_t>(number) * bytes;
    const auto* got = reinterpret_cast<const std::uint8_t*>(block.data());
    for (int h = 0; h < f_.format.kv_heads; ++h, put += here.head_bytes, got += there.head_bytes) {
      apple::codes_from_canonical(f_.spec, got + there.k_codes, got + there.v_codes, put);
      KV4_RETURN_IF_ERROR(blob::copy_scales(put, here, got, there, ArraySource::copy));
    }
    return {};
  }

  // uint8 [kv_heads, rows, bytes of a row]: keys and values of the sinks, then of the window.
  nb::list rows_of(std::size_t b) {
    if (b >= parts_.size()) parts_.resize(b + 1);
    nb::list all;
    for (const bool sinks : {true, false})
      for (const bool key : {true, false}) all.append(joined(parts_[b][sinks ? 0 : 1][key ? 0 : 1], key));
    return all;
  }
  nb::object pages() {
    const std::size_t bytes = static_cast<std::size_t>(f_.format.kv_heads) * f_.spec.layout.head_bytes;
    const std::size_t count = bytes == 0 ? 0 : pages_.size() / bytes;
    return array(std::move(pages_), {count, bytes});
  }

 private:
  struct Part {
    std::int64_t tokens;
    std::vector<std::byte> bytes;  // [kv_heads][tokens] rows
  };
  using Parts = std::vector<Part>;

  nb::object joined(const Parts& parts, bool key) const {
    const std::size_t row = f_.format.row_bytes(key), heads = static_cast<std::size_t>(f_.format.kv_heads);
    std::size_t total = 0;
    for (const Part& part : parts) total += static_cast<std::size_t>(part.tokens);
    std::vector<std::uint8_t> out;
    out.reserve(heads * total * row);
    for (std::size_t h = 0; h < heads; ++h)
      for (const Part& part : parts) {
        const std::size_t bytes = static_cast<std::size_t>(part.tokens) * row;
        const auto* from = reinterpret_cast<const std::uint8_t*>(part.bytes.data()) + h * bytes;
        out.insert(out.end(), from, from + bytes);
      }
    return array(std::move(out), {heads, total, row});
  }

  const FileFormat& f_;
  std::vector<std::array<std::array<Parts, 2>, 2>> parts_;
  std::vector<std::uint8_t> pages_;
};

nb::tuple read(const FileFormat& self, const nb::callable& file) {
  ArrayTarget target(self);
  blob::Contents contents;
  read_from(file, [&](const Source& source) { return blob::read(self.format, source, target, &contents); });
  const std::size_t heads = static_cast<std::size_t>(self.format.kv_heads);
  const std::vector<std::size_t> shape = {heads, self.format.channels() / heads};
  nb::list sequences;
  for (std::size_t b = 0; b < contents.sequences.size(); ++b) {
    auto& [ledger, learnt] = contents.sequences[b];
    nb::list recorded;
    for (std::size_t i = 0; i < learnt.energies.size(); ++i)
      if (!learnt.energies[i].empty())
        recorded.append(nb::make_tuple(learnt.queries.position(static_cast<std::int64_t>(i)),
                                       array(std::move(learnt.energies[i]), shape)));
    nb::object lambda = nb::none();
    if (!learnt.lambda.empty()) lambda = array(std::move(learnt.lambda), shape);
    sequences.append(nb::make_tuple(std::move(ledger), lambda, learnt.queries.first, recorded, target.rows_of(b)));
  }
  return nb::make_tuple(contents.recording, sequences, target.pages());
}

}  // namespace

void write_to(const nb::callable& write, const std::function<Status(const Sink&)>& call) {
  std::exception_ptr raised;
  nb::object ignored;
  const Status status = call(
      [&](std::span<const std::byte> x) { return pass(write, x.data(), x.size(), PyBUF_READ, &raised, &ignored); });
  if (raised) std::rethrow_exception(raised);
  raise_if_error(status);
}

void read_from(const nb::callable& readinto, const std::function<Status(const Source&)>& call) {
  std::exception_ptr raised;
  const Status status = call([&](std::span<std::byte> x) -> Status {
    while (!x.empty()) {
      nb::object count;
      KV4_RETURN_IF_ERROR(pass(readinto, x.data(), x.size(), PyBUF_WRITE, &raised, &count));
      std::size_t got = 0;
      if (!nb::try_cast(count, got) || got == 0 || got > x.size())
        return error(StatusCode::data_loss, "readinto", std::to_string(x.size()) + " bytes more",
                     got == 0 ? "the end of the file" : std::to_string(got));
      x = x.subspan(got);
    }
    return {};
  });
  if (raised) std::rethrow_exception(raised);
  raise_if_error(status);
}

void bind_saved(nb::module_& m) {
  nb::class_<FileFormat>(
      m, "SavedFormat",
      "Files of one layer's caches, as Cache.save writes and Cache.load reads them, for a host whose "
      "pages lie as the Metal kernels read them.")
      .def("__init__", &create, "core"_a, "tables"_a, "core: a Cache of the same configuration; it is not kept.")
      .def(
          "write", &write, "write"_a, "recording"_a, "sequences"_a, "ids"_a, "pages"_a,
          "sequences: (ledger, lambda or None, position of the first query that counts or -1, [(position, energies)], "
          "rows) of each; rows uint8\n"
          "[kv_heads, rows, bytes of a row]: keys and values of the sinks, then of the window. pages: uint8 [len(ids), "
          "page_bytes].")
      .def("read", &read, "readinto"_a,
           "(recording, sequences, pages), as write takes them; ledgers have pages by their place in pages. Errors: as "
           "Cache.load.");
}

}  // namespace kv4::python
