#include "cache/draft.h"

#include <algorithm>

namespace kv4 {

using ledger::Extent;
using ledger::Plan;

SequenceView view_of(const Setup& setup, const Extent& x, const Body& body, const ledger::View& v, LateNote* note) {
  SequenceView out;
  out.exact[0] = body.sinks.view(0, v.sinks.count(), v.sinks.begin);
  out.exact[1] = body.window.view(v.window.begin - x.window_position, v.window.count(), v.window.begin);
  if (v.pages > 0) {
    out.pages = body.table.data();
    out.page_count = static_cast<std::int32_t>(v.pages);
    out.pages_position = v.pages_position;
    out.last_page_tokens = v.last_page_tokens;
  }
  out.lambda_k = setup.lambda_k(body.lambda);
  out.lambda_v = setup.lambda_v();
  out.note = note;
  return out;
}

Change* Draft::find(std::size_t at) {
  const auto change =
      std::lower_bound(changes_.begin(), changes_.end(), at, [](const Change& c, std::size_t i) { return c.at < i; });
  return change != changes_.end() && change->at == at ? &*change : nullptr;
}

void Draft::add_append(std::size_t at, Sequence& s, std::int64_t tokens, bool recording) {
  // After a long prefill the buffer is far larger than decoding needs.
  const std::int64_t most = setup_.most_rows(s.ledger.extent());
  const bool spare = s.body.window.capacity() > most && s.body.window.count() <= most;
  if (!spare && !setup_.policy.arrival() && s.ledger.idle(recording)) return;
  Plan plan;
  s.ledger.plan_append(tokens, recording, &plan);
  if (spare || !s.ledger.only_stores(plan)) add(at, s).plan = std::move(plan);
}

Status Draft::prepare(const Arriving* arriving) {
  for (Change& c : changes_) KV4_RETURN_IF_ERROR(prepare(c, arriving));
  return {};
}

Status Draft::seal() {
  return jobs_.empty() ? Status() : setup_.backend->seal(setup_.spec, pool_->memory(), setup_.heads(), jobs_, false);
}

Status Draft::prepare(Change& c, const Arriving* arriving) {
  if (!c.plan.lambda.empty()) KV4_RETURN_IF_ERROR(learn(c));
  if (!c.plan.sealed.empty()) KV4_RETURN_IF_ERROR(plan_pages(c, arriving));
  KV4_RETURN_IF_ERROR(move_rows(c));
  if (pool_ != nullptr)
    KV4_RETURN_IF_ERROR(c.next.table.change(*setup_.backend, c.sequence->ledger.pages(), c.plan.kept, c.replaced,
                                            c.fresh.ids().first(static_cast<std::size_t>(c.plan.new_pages))));
  c.sequence->ledger.make_room(c.plan);
  return {};
}

// Learns lambda from the energies collected so far and the plan's keys, 64 at a time about their own mean, as in pages.
Status Draft::learn(Change& c) const {
  std::shared_ptr<Block> values;
  KV4_RETURN_IF_ERROR(Block::make(*setup_.backend, "lambda", setup_.channels() * sizeof(float), &values));
  const ledger::Rows& keys = c.plan.lambda;
  const ExactRows rows =
      c.sequence->body.window.view(keys.begin - c.sequence->ledger.extent().window_position, keys.count(), keys.begin);
  LambdaJob job;
  job.k = rows.k;
  job.dtype = setup_.config.dtype;
  job.k_head_stride = rows.k_head_stride;
  job.k_stride = rows.k_stride;
  job.kv_heads = setup_.heads();
  job.dim = setup_.config.head_dim_k;
  job.blocks = static_cast<int>(keys.count() / kPageTokens);
  job.skip = c.plan.lambda_skip;
  std::vector<const float*> energies;
  for (const std::shared_ptr<Block>& row : c.next.energy.rows)
    if (row) energies.push_back(row->as<float>());
  job.energies = energies;
  job.lambda = values->as<float>();
  KV4_RETURN_IF_ERROR(setup_.backend->fix_lambda(job));
  c.next.lambda = std::move(values);
  return {};
}

// Rows excluded from means: those that the plan flags and, with arrival sealing, those with NaN or infinity.
Status Draft::flag(Change& c, const Arriving* arriving) const {
  Backend& backend = *setup_.backend;
  c.skip = std::move(c.plan.skip);
  if (c.plan.sealed.begin >= c.sequence->length()) return flag_arriving(c, *arriving);
  if (std::find(c.skip.begin(), c.skip.end(), 1) == c.skip.end()) c.skip.clear();
  return backend.host_memory() ? Status()
                               : Block::copy_of(backend, "masked", c.skip.data(), c.skip.size(), &c.skip_on_device);
}

// Starts with no row flagged. A device sets its flags asynchronously.
Status Draft::flag_arriving(Change& c, const Arriving& arriving) const {
  Backend& backend = *setup_.backend;
  const Part& part = arriving.parts[c.at];
  const auto rows_of = [&part](const TensorView& x) {
    return TensorView{x.at(part.input, 0, part.input_row), x.dtype, {1, x.shape[1], part.tokens, x.shape[3]}, x.stride};
  };
  SequenceView view;
  view.query_count = part.tokens;
  view.note = c.sequence->note();
  view.exact[1].position = c.sequence->length();
  std::vector<NonFinite>* const found = &arriving.non_finite[c.at];
  StoreJob job;
  job.k = rows_of(arriving.k);
  job.v = rows_of(arriving.v);
  job.sequences.views = {&view, 1};
  job.found = &found;
  job.skip = c.skip.data();
  if (!backend.host_memory()) {
    KV4_RETURN_IF_ERROR(Block::make(backend, "masked", c.skip.size(), &c.skip_on_device));
    KV4_RETURN_IF_ERROR(backend.clear(c.skip_on_device->as<void>(), c.skip.size()));
    job.skip = c.skip_on_device->as<std::uint8_t>();
  }
  KV4_RETURN_IF_ERROR(backend.store(job));
  if (found->empty()) c.skip.clear();
  return {};
}

// Jobs for the pages of plan.sealed: whole ones or, with arrival sealing, the part that is added to the open page.
Status Draft::plan_pages(Change& c, const Arriving* arriving) {
  const Plan& plan = c.plan;
  const ledger::Ledger& ledger = c.sequence->ledger;
  const Extent &before = ledger.extent(), &after = plan.after;
  const bool copies = plan.fills_last(before) && pool_->shared(ledger.pages().back());
  KV4_RETURN_IF_ERROR(c.fresh.allocate(plan.new_pages + (copies ? 1 : 0)));
  if (copies) {
    c.replaced = c.fresh.ids().back();
    KV4_RETURN_IF_ERROR(
        setup_.backend->copy(pool_->page(c.replaced), pool_->page(ledger.pages().back()), pool_->page_bytes()));
  }
  KV4_RETURN_IF_ERROR(flag(c, arriving));
  SealJob job;
  job.dtype = setup_.config.dtype;
  job.lambda_k = setup_.lambda_k(c.next.lambda);
  job.lambda_v = setup_.lambda_v();
  const std::int64_t old_end = after.page_end() - plan.new_pages;
  const std::uint8_t* const skip = c.skip_on_device ? c.skip_on_device->as<std::uint8_t>()
                                   : c.skip.empty() ? nullptr
                                                    : c.skip.data();
  std::int64_t position = plan.sealed.begin;
  for (std::int64_t index = plan.first_sealed; position < plan.sealed.end; ++index, position += job.count) {
    const std::int64_t begin = after.page_position(ledger.policy(), index);
    job.first = static_cast<std::int16_t>(position - begin);
    job.count = std::min(begin + kPageTokens, plan.sealed.end) - position;
    job.page = index >= old_end ? c.fresh.ids()[static_cast<std::size_t>(index - old_end)]
               : copies         ? c.replaced
                                : ledger.pages().back();
    if (index >= old_end && job.count < kPageTokens)
      KV4_RETURN_IF_ERROR(setup_.backend->clear(pool_->page(job.page), pool_->page_bytes()));
    job.skip = skip == nullptr ? nullptr : skip + (position - plan.sealed.begin);
    if (position >= before.length) {
      const Part& part = arriving->parts[c.at];
      const std::int64_t row = part.input_row + position - before.length;
      const TensorView &k = arriving->k, &v = arriving->v;
      set_rows(job, {k.at(part.input, 0, row), v.at(part.input, 0, row), k.stride[1], v.stride[1], k.stride[2],
                     v.stride[2]});
    } else {
      set_rows(job, c.sequence->body.window.view(position - before.window_position, job.count, position));
    }
    jobs_.push_back(job);
  }
  return {};
}

// Sinks and window as they are after the plan, but for what it stores.
Status Draft::move_rows(Change& c) const {
  const Plan& plan = c.plan;
  const RowBuffer& held = c.sequence->body.window;
  Backend& backend = *setup_.backend;
  const Extent &before = c.sequence->ledger.extent(), &after = plan.after;
  Body& next = c.next;
  const std::int64_t rows = after.window_rows() - plan.stored.count(),
                     gone = after.window_position - before.window_position;
  if (gone < 0) {  // into pages or sinks
    RowBuffer window = plan.unsunk.empty() ? RowBuffer() : next.sinks;
    if (!plan.reopened.empty()) KV4_RETURN_IF_ERROR(reopen(c, &window));
    next.window = std::move(window);
  } else if (!plan.erased.empty()) {
    const std::int64_t first = plan.erased.begin - before.window_position,
                       behind = plan.erased.end - before.window_position;
    RowBuffer window;
    KV4_RETURN_IF_ERROR(
        window.reserve(backend, setup_.shape, std::max(rows, std::min(held.capacity(), setup_.most_rows(after)))));
    KV4_RETURN_IF_ERROR(window.push_rows(held, gone, first - gone));
    KV4_RETURN_IF_ERROR(window.push_rows(held, behind, held.count() - behind));
    next.window = std::move(window);
  } else {
    next.window.drop_front(std::min(gone, next.window.count()));
  }
  if (after.sinks == 0) {
    next.sinks.clear();
  } else if (!plan.sinks.empty()) {
    RowBuffer sinks;
    KV4_RETURN_IF_ERROR(sinks.reserve(backend, setup_.shape, after.sinks));
    KV4_RETURN_IF_ERROR(sinks.push_rows(held, plan.sinks.begin - before.window_position, after.sinks));
    next.sinks = std::move(sinks);
  }
  next.window.set_count(std::max<std::int64_t>(rows, 0));
  const std::int64_t most = setup_.most_rows(after);
  return next.window.capacity() > most && next.window.count() <= most ? next.window.reserve(backend, setup_.shape, most)
                                                                      : Status();
}

// The first tokens of a page, dequantised, as rows of their own.
Status Draft::reopen(const Change& c, RowBuffer* rows) const {
  const Extent& before = c.sequence->ledger.extent();
  const std::int64_t count = c.plan.reopened.count();
  KV4_RETURN_IF_ERROR(rows->reserve(*setup_.backend, setup_.shape, setup_.policy.window + kPageTokens));
  DequantiseJob job;
  job.page = c.sequence->ledger.pages()[static_cast<std::size_t>(c.plan.reopened_page - before.first_page)];
  job.dtype = setup_.config.dtype;
  job.count = count;
  job.lambda_k = setup_.lambda_k(c.sequence->body.lambda);
  job.lambda_v = setup_.lambda_v();
  set_rows(job, rows->view(0, count, 0));
  return setup_.backend->dequantise(setup_.spec, pool_->memory(), setup_.heads(), {&job, 1}, false);
}

void Draft::commit() noexcept {
  for (Change& c : changes_) {
    Sequence& s = *c.sequence;
    const bool copied = c.replaced >= 0;
    const PageId shared = copied ? s.ledger.replace_last(c.replaced) : -1;
    s.ledger.commit(c.plan, c.fresh.ids().first(static_cast<std::size_t>(c.plan.new_pages)), c.next.energy.any());
    c.fresh.hand_over();
    if (copied) s.pool->release({&shared, 1});
    if (!c.plan.released.empty()) s.pool->release(c.plan.released);
    s.body = std::move(c.next);
    s.body.window.settle();
    if (c.plan.stored.count() > 0) s.body.window.set_count(s.ledger.extent().window_rows());
    if (c.renoted) s.begin_note(std::move(c.note));
    s.settle_lambda();
  }
  changes_.clear();
}

}  // namespace kv4
