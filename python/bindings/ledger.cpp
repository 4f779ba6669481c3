#include "ledger.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ledger/queries.h"
#include "values.h"

namespace kv4::python {
namespace {

using namespace nb::literals;
using ledger::Extent;
using ledger::Ledger;
using ledger::Plan;
using ledger::Rows;

using Pair = std::pair<std::int64_t, std::int64_t>;
Pair pair(const Rows& rows) { return {rows.begin, rows.end}; }
nb::bytes bytes(const std::vector<std::uint8_t>& x) {
  return nb::bytes(reinterpret_cast<const char*>(x.data()), x.size());
}

void create(Ledger* self, nb::handle recipe, std::int64_t sliding_window) {
  const Recipe r = read_recipe(recipe);
  raise_if_error(validate(r));
  if (sliding_window < 0)
    raise_if_error(invalid_argument("sliding_window", "0 (none) or more", std::to_string(sliding_window)));
  new (self) Ledger(ledger::Policy::of(r, sliding_window));
}

Plan append(const Ledger& self, std::int64_t tokens, bool recording) {
  if (tokens < 0 || tokens > kMostTokens - self.extent().length)
    raise_if_error(error(StatusCode::out_of_range, "tokens",
                         "0 to " + std::to_string(kMostTokens - self.extent().length), std::to_string(tokens)));
  Plan plan;
  self.plan_append(tokens, recording, &plan);
  return plan;
}

void see(Sight* self, std::int64_t length, std::int64_t input, const Pair& span, bool causal,
         std::optional<std::int32_t> start, std::int32_t window, std::optional<Sight::Seen> general,
         std::int64_t offset) {
  const std::int64_t queries = span.second - span.first;
  if (span.first < 0 || queries < 0 || queries > length)
    raise_if_error(invalid_argument("span", "rows of at most " + std::to_string(length) + " queries",
                                    std::to_string(span.first) + " to " + std::to_string(span.second)));
  if (general && static_cast<std::int64_t>(general->shape(0)) < span.second)
    raise_if_error(
        invalid_argument("general", std::to_string(span.second) + " rows or more", std::to_string(general->shape(0))));
  new (self) Sight(length, input, span.first, queries);
  self->start = start.value_or(0);
  self->window = window;
  self->general = std::move(general);
  Mask& mask = self->args.mask;
  mask.causal = causal;
  mask.offset = offset;
  if (start) mask.start = &self->start;
  mask.window = &self->window;
  self->args.q.shape = {1, 1, queries, 1};
  if (self->general) {
    mask.kind = Mask::General::boolean;
    mask.general = self->general->data();
    mask.columns = static_cast<std::int64_t>(self->general->shape(1));
    mask.general_stride = {0, 0, mask.columns, 1};
  }
  self->visibility.emplace(self->args, Visibility::Queries{.input_row = span.first, .count = queries}, length);
}

void check_sight(const Ledger& self, const Sight& sight) {
  const std::int64_t length = self.extent().length;
  if (sight.length != length || sight.queries < 1)
    raise_if_error(invalid_argument("sight", "one of queries of " + std::to_string(length) + " tokens",
                                    std::to_string(sight.queries) + " of " + std::to_string(sight.length)));
}

Plan attend(const Ledger& self, const Sight& sight) {
  check_sight(self, sight);
  const Extent& x = self.extent();
  std::vector<std::uint8_t> seen;
  if (self.policy().seals()) {
    std::vector<std::int64_t> hidden;
    for (std::int64_t p = x.window_position; p < x.length; ++p)
      if (!sight.visibility->simple() || !sight.visibility->seen(p)) hidden.push_back(p);
    if (!sight.visibility->simple()) sight.visibility->leave_hidden(&hidden);
    seen.assign(static_cast<std::size_t>(x.window_rows()), 1);
    for (const std::int64_t p : hidden) seen[static_cast<std::size_t>(p - x.window_position)] = 0;
  }
  Plan plan;
  self.plan_attend(sight.queries, seen, &plan);
  return plan;
}

std::pair<std::int64_t, std::vector<std::int64_t>> record(const Ledger& self, std::int64_t first, const Sight& sight) {
  check_sight(self, sight);
  ledger::Queries queries{first};
  std::vector<std::int64_t> positions;
  const std::int64_t first_query = sight.first_query();
  raise_if_error(queries.record(
      self, sight.queries, [&](std::int64_t p) { return sight.visibility->visible(p - first_query, p); },
      [&](std::int64_t p, std::int64_t) {
        positions.push_back(p);
        return Status();
      }));
  return {queries.first, std::move(positions)};
}

Plan crop(const Ledger& self, std::int64_t length) {
  Plan plan;
  raise_if_error(self.plan_crop(length, &plan));
  return plan;
}

void commit(Ledger& self, Plan& plan, const std::vector<ledger::PageId>& ids, bool taught) {
  if (!self.current(plan))
    raise_if_error(error(StatusCode::failed_precondition, "plan", "one of the ledger as it is",
                         "one that is committed or outdated"));
  if (static_cast<std::int64_t>(ids.size()) != plan.new_pages)
    raise_if_error(invalid_argument("ids", std::to_string(plan.new_pages) + " new pages", std::to_string(ids.size())));
  self.make_room(plan);
  self.commit(plan, ids, taught);
}

const char* lambda_name(const Extent& x) {
  return x.lambda == ledger::Lambda::open ? "open" : x.lambda == ledger::Lambda::learnt ? "learnt" : "fixed";
}

}  // namespace

void bind_ledger(nb::module_& m) {
  nb::class_<Extent>(
      m, "Extent", "Where the tokens of one sequence are: dropped padding, sinks, pages, window (src/ledger/extent.h).")
      .def_ro("length", &Extent::length)
      .def_ro("start", &Extent::start)
      .def_ro("anchored", &Extent::anchored)
      .def_ro("sinks", &Extent::sinks)
      .def_ro("first_page", &Extent::first_page)
      .def_ro("pages", &Extent::pages)
      .def_ro("last_page_tokens", &Extent::last_page_tokens)
      .def_ro("window_position", &Extent::window_position)
      .def_ro("evicted", &Extent::evicted)
      .def_prop_ro("window_rows", &Extent::window_rows)
      .def_prop_ro("sealed_tokens", &Extent::sealed_tokens)
      .def_prop_ro(
          "lambda_", [](const Extent& x) { return lambda_name(x); },
          "'open', 'learnt' (a crop may undo it) or 'fixed'.");
  nb::class_<Plan>(m, "Plan", "What a call has to do, in positions (begin, end), before commit (src/ledger/ledger.h).")
      .def_prop_ro("sinks", [](const Plan& p) { return pair(p.sinks); })
      .def_prop_ro("lambda_", [](const Plan& p) { return pair(p.lambda); })
      .def_prop_ro("lambda_skip", [](const Plan& p) { return bytes(p.lambda_skip); })
      .def_prop_ro("sealed", [](const Plan& p) { return pair(p.sealed); })
      .def_ro("first_sealed", &Plan::first_sealed)
      .def_prop_ro("skip", [](const Plan& p) { return bytes(p.skip); })
      .def_ro("new_pages", &Plan::new_pages)
      .def_ro("reopened_page", &Plan::reopened_page)
      .def_prop_ro("reopened", [](const Plan& p) { return pair(p.reopened); })
      .def_prop_ro("unsunk", [](const Plan& p) { return pair(p.unsunk); })
      .def_prop_ro("stored", [](const Plan& p) { return pair(p.stored); })
      .def_ro("released", &Plan::released)
      .def_ro("after", &Plan::after);
  nb::class_<Sight>(m, "Sight",
                    "Which tokens a sequence's queries of a call see. input, span: its rows of the call. start: a "
                    "column, window: a number of tokens (0 = all), general: bool [rows, columns], what a general mask "
                    "lets any head see; column j is position j + offset.")
      .def("__init__", &see, "length"_a, "input"_a, "span"_a, "causal"_a, "start"_a.none(), "window"_a,
           "general"_a.none(), "offset"_a)
      .def_ro("input", &Sight::input)
      .def_ro("row", &Sight::row)
      .def_ro("queries", &Sight::queries)
      .def_prop_ro("first_query", &Sight::first_query, "Position of the first query.");
  nb::class_<Ledger>(m, "Ledger",
                     "The policy of one sequence: which of its tokens are exact, sealed, due or evicted. Calls are "
                     "planned, carried out by the owner of "
                     "the arrays, then committed; planning changes nothing. Errors: ValueError, IndexError, "
                     "RuntimeError naming the argument.")
      .def("__init__", &create, "recipe"_a, "sliding_window"_a = 0)
      .def_prop_ro("extent", [](const Ledger& l) { return l.extent(); })
      .def_prop_ro(
          "pages", [](const Ledger& l) { return std::vector<ledger::PageId>(l.pages().begin(), l.pages().end()); },
          "Ids, in order of position.")
      .def("append", &append, "tokens"_a, "recording"_a = false)
      .def(
          "settle",
          [](const Ledger& l, bool recording) {
            Plan p;
            l.plan_settle(recording, &p);
            return p;
          },
          "recording"_a = false)
      .def("attend", &attend, "sight"_a)
      .def("record", &record, "first"_a, "sight"_a,
           "Queries whose energies teach lambda: first, the position of the first that counts (-1: none so far), with "
           "the call's,\nand the positions among the call's.")
      .def("crop", &crop, "length"_a)
      .def("commit", &commit, "plan"_a, "ids"_a = std::vector<ledger::PageId>(), "taught"_a = true,
           "taught: whether queries are recorded, which lambda was learnt from.")
      .def("replace_last", &Ledger::replace_last, "id"_a,
           "The last page becomes a copy that nobody else has. Returns the id it had.")
      .def(
          "moved",
          [](const Ledger& l, std::vector<ledger::PageId> pages) {
            if (pages.size() != l.pages().size())
              raise_if_error(
                  invalid_argument("pages", std::to_string(l.pages().size()) + " ids", std::to_string(pages.size())));
            Ledger copy = l;
            copy.take_pages(std::move(pages));
            return copy;
          },
          "pages"_a, "A copy whose pages have these ids, in order of position.")
      .def("fork", [](const Ledger& l) { return Ledger(l); }, "A copy; its pages count as one more reference each.");
}

}  // namespace kv4::python
