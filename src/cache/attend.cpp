// One call of attention: lambda's statistics, which pages each query sees, and the jobs that the backend runs.
#include <algorithm>
#include <string>

#include "attention/arguments.h"
#include "attention/visibility.h"
#include "cache/state.h"

namespace kv4 {
namespace {

std::string up_to(std::int64_t n) { return "0 to " + std::to_string(n); }

// rows: expected size of axis 0; most: limit of axis 2.
Status check_queries(const Setup& setup, const AttendArgs& args, std::int64_t rows, std::int64_t most) {
  const TensorView& q = args.q;
  const bool shape_ok = q.shape[0] == rows && q.shape[1] >= setup.heads() && q.shape[1] % setup.heads() == 0 &&
                        q.shape[2] >= 1 && q.shape[2] <= most && q.shape[3] == setup.config.head_dim_k;
  if (!shape_ok)
    return invalid_argument("q",
                            "shape [" + std::to_string(rows) + ", a multiple of " + std::to_string(setup.heads()) +
                                ", 1 to " + std::to_string(most) + ", " + std::to_string(setup.config.head_dim_k) + "]",
                            shape_text(q.shape));
  return check_arguments(args);
}

class Attend {
 public:
  Attend(CacheState& c, const AttendArgs& args)
      : c_(c), setup_(*c.setup), args_(args), readable_(args), draft_(setup_, c.pool.get()) {
    if (setup_.backend->host_memory()) return;
    readable_.mask.general = args.mask.host_general;
    readable_.mask.general_stride = args.mask.host_general_stride;
  }

  Status run(const MutableTensorView* out, const PartialState* partial) {
    KV4_RETURN_IF_ERROR(check_seen());
    KV4_RETURN_IF_ERROR(make_tables(c_));  // a clone or a loaded cache has none yet
    if (setup_.policy.seals()) {
      KV4_RETURN_IF_ERROR(learn());
      KV4_RETURN_IF_ERROR(seal());
    }
    for (std::size_t i = 0; partial != nullptr && i < c_.parts.size(); ++i)
      KV4_RETURN_IF_ERROR(ledger::check_upto(setup_.policy, now(i).extent, c_.parts[i].tokens, c_.parts[i].upto));
    return answer(out, partial);
  }

  void commit() noexcept {
    for (std::size_t i = 0; i < c_.parts.size() && mask_readable(); ++i)
      if (draft_.find(i) == nullptr && !sequence(i).ledger.marks().empty()) sequence(i).ledger.mark_seen(0, sight(i));
    for (auto& [part, energy] : energies_)
      if (draft_.find(part) == nullptr) std::swap(sequence(part).body.energy, energy);
    draft_.commit();
  }

 private:
  // Which exact rows are seen by some query of the call; queried in order of position.
  struct Sight {
    Visibility visibility;
    const std::vector<std::int64_t>* hidden;  // null where visibility depends on the position alone
    std::size_t at = 0;
    bool operator()(std::int64_t position) {
      if (hidden == nullptr) return visibility.seen(position);
      while (at < hidden->size() && (*hidden)[at] < position) ++at;
      return at == hidden->size() || (*hidden)[at] != position;
    }
  };

  Sequence& sequence(std::size_t i) const { return c_.sequences[c_.parts[i].row]; }
  std::int64_t window() const { return args_.mask.causal ? setup_.policy.sliding_window : 0; }
  Visibility visibility(std::size_t i) const {
    const Part& part = c_.parts[i];
    return {readable_, {i, part.input, part.input_row, part.tokens, window()}, sequence(i).length()};
  }
  Sight sight(std::size_t i) const { return {visibility(i), hidden_.empty() ? nullptr : &hidden_[i]}; }
  // Whether the host can compute what queries see.
  bool mask_readable() const { return readable_.mask.kind == Mask::General::none || readable_.mask.general != nullptr; }
  static bool stepwise(const Part& part) { return part.tokens <= kPageTokens; }

  // Non-finite tokens that some query sees.
  Status check_seen() {
    for (std::size_t i = 0; i < c_.parts.size(); ++i) {
      Sequence& s = sequence(i);
      s.poll_notes();
      if (s.ledger.non_finite().empty()) continue;
      Sight seen{visibility(i), nullptr};
      std::vector<std::int64_t> hidden;
      if (!seen.visibility.simple()) {
        for (const NonFinite& x : s.ledger.non_finite()) hidden.push_back(x.position);
        seen.visibility.leave_hidden(&hidden);
        seen.hidden = &hidden;
      }
      for (const NonFinite& x : s.ledger.non_finite())
        if (seen(x.position))
          return error(StatusCode::non_finite, x.key ? "k" : "v", "finite values in tokens that a query sees",
                       "NaN or infinity at sequence " + std::to_string(c_.parts[i].row) + ", position " +
                           std::to_string(x.position));
    }
    return {};
  }

  // Which exact tokens the call sees, where that does not depend on the position alone, and the energies of the first
  // queries that lambda is learnt from. Not visible to others before commit.
  Status learn() {
    if (readable_.mask.kind != Mask::General::none && readable_.mask.general != nullptr && !visibility(0).simple()) {
      for (std::size_t i = 0; i < c_.parts.size(); ++i) {
        const ledger::Ledger& held = sequence(i).ledger;
        std::vector<std::int64_t>& hidden = hidden_.emplace_back();
        for (std::size_t j = 0; j < held.marks().size(); ++j)
          if (held.marks()[j] != ledger::Seen::visible)
            hidden.push_back(held.extent().window_position + static_cast<std::int64_t>(j));
        visibility(i).leave_hidden(&hidden);
      }
    }
    return setup_.policy.learns ? learn_energies() : Status();
  }

  Status learn_energies() {
    std::vector<EnergyJob> jobs;
    for (std::size_t i = 0; i < c_.parts.size(); ++i) {
      const Sequence& s = sequence(i);
      const Part& part = c_.parts[i];
      const Visibility sees = visibility(i);
      const std::int64_t first_query = s.length() - part.tokens;
      QueryEnergy at = s.body.energy;
      const std::size_t before = jobs.size();
      KV4_RETURN_IF_ERROR(at.record(
          s.ledger, part.tokens, [&](std::int64_t position) { return sees.visible(position - first_query, position); },
          [&](std::int64_t position, std::int64_t at_row) -> Status {
            const auto row = static_cast<std::size_t>(at_row);
            if (row >= at.rows.size()) at.rows.resize(row + 1);
            KV4_RETURN_IF_ERROR(
                Block::make(*setup_.backend, "query energies", setup_.channels() * sizeof(float), &at.rows[row]));
            jobs.push_back({part.input, part.input_row + position - first_query, at.rows[row]->as<float>()});
            return {};
          }));
      if (jobs.size() > before || at.first != s.body.energy.first) energies_.emplace_back(i, std::move(at));
    }
    return jobs.empty() ? Status() : setup_.backend->query_energies(args_.q, setup_.heads(), jobs);
  }

  // Sealing depends on which tokens the call sees, and the call sees sealed pages.
  Status seal() {
    for (std::size_t i = 0; i < c_.parts.size(); ++i) {
      Sequence& s = sequence(i);
      if (!s.ledger.may_seal(c_.parts[i].tokens)) continue;
      Change& change = draft_.add(i, s);
      std::vector<std::uint8_t> seen;
      if (mask_readable()) {
        Sight sees = sight(i);
        for (std::int64_t p = s.ledger.extent().window_position; p < s.length(); ++p) seen.push_back(sees(p) ? 1 : 0);
      }
      s.ledger.plan_attend(c_.parts[i].tokens, seen, &change.plan);
      for (const auto& [part, energy] : energies_)
        if (part == i) change.next.energy = energy;
    }
    return draft_.carry_out();
  }

  struct Now {
    const ledger::Extent& extent;
    const Body& body;
  };
  Now now(std::size_t i) {
    const Change* const change = draft_.find(i);
    return change != nullptr ? Now{change->plan.after, change->next}
                             : Now{sequence(i).ledger.extent(), sequence(i).body};
  }

  // Each job takes from every sequence the longest run of queries that see the same pages.
  Status answer(const MutableTensorView* out, const PartialState* partial) {
    c_.views.resize(c_.parts.size());
    for (bool more = true; more;) {
      more = false;
      for (std::size_t i = 0; i < c_.parts.size(); ++i) {
        Part& part = c_.parts[i];
        const Now held = now(i);
        const std::int64_t first_query = held.extent.length - part.tokens,
                           position = first_query + std::min(part.done, part.tokens - 1);
        const std::int64_t end =
            std::min(part.tokens, ledger::view_end(setup_.policy, held.extent, position, stepwise(part)) - first_query);
        SequenceView& view = c_.views[i] =
            view_of(setup_, held.extent, held.body,
                    ledger::view(setup_.policy, held.extent, position, stepwise(part), part.upto), sequence(i).note());
        view.input = part.input;
        view.input_row = part.input_row + part.done;
        view.query_count = end - part.done;
        view.query_position = first_query + part.done;
        part.done = end;
        more = more || end < part.tokens;
      }
      AttendJob job = attend_job(c_, args_);
      if (out != nullptr) job.out = *out;
      if (partial != nullptr) job.partial = *partial;
      KV4_RETURN_IF_ERROR(setup_.backend->attend(job));
    }
    return {};
  }

  CacheState& c_;
  const Setup& setup_;
  const AttendArgs& args_;
  AttendArgs readable_;  // masks as the host can read them
  Draft draft_;
  std::vector<std::pair<std::size_t, QueryEnergy>> energies_;  // of parts, including this call's queries
  std::vector<std::vector<std::int64_t>>
      hidden_;  // of each part: rows that no query of this or an earlier call has seen
};

}  // namespace

// Checks all arguments but the output.
AttendJob attend_job(CacheState& c, const AttendArgs& args) {
  const Setup& setup = *c.setup;
  AttendJob job;
  job.args = args;
  if (setup.seals()) {
    job.spec = &setup.spec;
    job.pages = c.pool->memory();
  }
  job.dtype = setup.config.dtype;
  job.kv_heads = setup.heads();
  job.head_dim_k = setup.config.head_dim_k;
  job.head_dim_v = setup.config.head_dim_v;
  job.sequences.views = c.views;
  job.tables = c.tables.get();
  job.window = args.mask.causal ? static_cast<std::int32_t>(setup.policy.sliding_window) : 0;
  return job;
}

Status attend_captured(CacheState& c, const AttendArgs& args, const MutableTensorView* out) {
  if (args.q.shape[2] != 1 || out == nullptr)
    return error(StatusCode::failed_precondition, "q", "one token in a captured step, and all that is held",
                 out == nullptr ? "a part of it" : std::to_string(args.q.shape[2]) + " tokens");
  if (!c.tables) return error(StatusCode::failed_precondition, "q", "a step that was not captured before it", "none");
  c.views.resize(c.sequences.size());
  AttendJob job = attend_job(c, args);
  job.out = *out;
  KV4_RETURN_IF_ERROR(c.backend().attend(job));
  c.captured = job.pages.chunks;
  return {};
}

// Of the parts that the call has.
Status set_upto(CacheState& c, bool ragged, std::span<const std::int64_t> upto) {
  if (ragged && upto.size() != c.parts.size())
    return invalid_argument("upto", std::to_string(c.parts.size()) + " positions, one for each of rows",
                            std::to_string(upto.size()));
  for (std::size_t i = 0; i < c.parts.size(); ++i) {
    Part& part = c.parts[i];
    part.upto = upto[ragged ? i : 0];
    const std::int64_t length = ragged ? c.sequences[part.row].length() : c.longest();
    if (part.upto < 0 || part.upto > length)
      return error(StatusCode::out_of_range, "upto", up_to(length), std::to_string(part.upto));
  }
  return {};
}

Status attend(CacheState& c, const RowCounts* rows, const AttendArgs& args, std::span<const std::int64_t> upto,
              const MutableTensorView* out, const PartialState* partial) {
  const Setup& setup = *c.setup;
  if (c.sequences.empty())
    return error(StatusCode::failed_precondition, "q", "a cache that holds tokens", "an empty cache");
  KV4_RETURN_IF_ERROR(
      check_queries(setup, args, rows != nullptr ? 1 : c.batch(), rows != nullptr ? kMostTokens : c.shortest()));
  KV4_RETURN_IF_ERROR(check_output(args, setup.config.head_dim_v, out, partial));
  if (c.backend().capturing()) {
    if (rows != nullptr)
      return error(StatusCode::failed_precondition, "rows", "all sequences in a captured step", "some of them");
    return attend_captured(c, args, out);
  }
  if (rows == nullptr) {
    make_parts(c.sequences.size(), args.q.shape[2], &c.parts);
  } else {
    KV4_RETURN_IF_ERROR(make_parts(c, *rows, args.q.shape[2], "q"));
    for (const Part& part : c.parts) {
      const std::int64_t length = c.sequences[part.row].length();
      if (part.tokens < 1 || part.tokens > length)
        return error(StatusCode::out_of_range, "rows",
                     "1 to " + std::to_string(length) + " queries of sequence " + std::to_string(part.row),
                     std::to_string(part.tokens));
    }
  }
  if (partial != nullptr) KV4_RETURN_IF_ERROR(set_upto(c, rows != nullptr, upto));
  Attend call(c, args);
  KV4_RETURN_IF_ERROR(call.run(out, partial));
  call.commit();
  return {};
}

}  // namespace kv4
