#include "ledger.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "ledger/ledger.h"
#include "metal.h"
#include "tensor.h"

namespace kv4::python {
namespace {

using namespace nb::literals;
using ledger::Extent;
using ledger::Ledger;
using ledger::Plan;
using ledger::Rows;
using ledger::View;

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

Plan attend(const Ledger& self, std::int64_t queries, nb::bytes seen) {
  const Extent& x = self.extent();
  if (queries < 1 || queries > x.length)
    raise_if_error(
        error(StatusCode::out_of_range, "queries", "1 to " + std::to_string(x.length), std::to_string(queries)));
  const auto rows = self.marks().size();
  if (seen.size() != 0 && seen.size() != rows)
    raise_if_error(
        invalid_argument("seen", "no bytes, or " + std::to_string(rows), std::to_string(seen.size()) + " bytes"));
  Plan plan;
  self.plan_attend(queries, {static_cast<const std::uint8_t*>(seen.data()), seen.size()}, &plan);
  return plan;
}

Plan crop(const Ledger& self, std::int64_t length) {
  Plan plan;
  raise_if_error(self.plan_crop(length, &plan));
  return plan;
}

void commit(Ledger& self, Plan& plan, const std::vector<ledger::PageId>& ids) {
  if (!self.current(plan))
    raise_if_error(error(StatusCode::failed_precondition, "plan", "one of the ledger as it is",
                         "one that is committed or outdated"));
  if (static_cast<std::int64_t>(ids.size()) != plan.new_pages)
    raise_if_error(invalid_argument("ids", std::to_string(plan.new_pages) + " new pages", std::to_string(ids.size())));
  self.make_room(plan);
  self.commit(plan, ids);
}

View view(const Ledger& self, std::int64_t position, bool stepwise, std::int64_t upto) {
  const std::int64_t length = self.extent().length;
  for (const auto& [name, value] : {std::pair{"position", position}, std::pair{"upto", upto}})
    if (value < 0 || value > length)
      raise_if_error(error(StatusCode::out_of_range, name, "0 to " + std::to_string(length), std::to_string(value)));
  return self.view(position, stepwise, upto);
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
  nb::class_<Plan>(
      m, "Plan",
      "What a call has to do, in positions (begin, end), before the ledger is told with commit (src/ledger/ledger.h).")
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
  nb::class_<View>(m, "View", "Which of what is held a query reads (src/ledger/ledger.h).")
      .def_prop_ro("sinks", [](const View& v) { return pair(v.sinks); })
      .def_ro("pages", &View::pages)
      .def_ro("pages_position", &View::pages_position)
      .def_ro("last_page_tokens", &View::last_page_tokens)
      .def_prop_ro("window", [](const View& v) { return pair(v.window); });
  nb::class_<Ledger>(m, "Ledger",
                     "The policy of one sequence: which of its tokens are exact, sealed, due or evicted. Calls are "
                     "planned, carried out by whoever "
                     "holds the arrays, then committed; planning changes nothing. Errors: ValueError, IndexError, "
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
      .def("attend", &attend, "queries"_a, "seen"_a = nb::bytes("", 0),
           "seen: a byte for each of extent.window_rows rows, nonzero where some query sees it; none where that is not "
           "known.")
      .def("crop", &crop, "length"_a)
      .def("commit", &commit, "plan"_a, "ids"_a = std::vector<ledger::PageId>())
      .def("view", &view, "position"_a, "stepwise"_a, "upto"_a)
      .def("view_end", &Ledger::view_end, "position"_a, "stepwise"_a,
           "The first query position behind `position` that reads other pages.")
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
