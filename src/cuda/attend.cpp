#include "cuda/attend.h"

#include <algorithm>

#include "cuda/attend_tuning.h"
#include "cuda/attend_wide.h"

namespace kv4::cuda {
namespace {

// Blocks of a KV head's rows, rounded up to whole segments.
int blocks_of_rows(const AttendParams& p, int segment_blocks) {
  const int segment_rows = kBlockRows * segment_blocks;
  return (p.group * p.queries + segment_rows - 1) / segment_rows * segment_blocks;
}

// Two blocks of a segment share a page that was read. One is faster where it leaves enough multiprocessors for every
// segment, since more warps read, with more registers for each row; times in docs/notes/cuda.md.
int segment_blocks(const AttendParams& p, const Chip& chip) {
  if (most_segment_blocks(p.dim) == 1 || p.group * p.queries <= kBlockRows) return 1;
  return 4 * p.batch * p.kv_heads * blocks_of_rows(p, 1) <= 3 * chip.multiprocessors ? 1 : 2;
}

std::size_t round_up(std::size_t n) { return (n + 255) / 256 * 256; }

struct Scratch {
  std::size_t arrived, item_offsets, operands, row_scale, states, bytes;
  std::size_t wide_slot;  // a state's number
};

Scratch lay_out(const AttendParams& p, const AttendPlan& plan) {
  const std::size_t blocks = static_cast<std::size_t>(p.batch) * p.kv_heads * p.blocks;
  const std::size_t rows = static_cast<std::size_t>(plan.segment_blocks) * kBlockRows;
  const std::size_t segments = blocks / plan.segment_blocks;
  const std::size_t slots = static_cast<std::size_t>(plan.ctas) * plan.readers_per_cta + 2 * segments;
  Scratch s{};
  s.wide_slot = slots;
  s.arrived = 0;
  s.item_offsets = kMostFused * sizeof(int);
  if (plan.fused_ctas > 0) {
    s.states = s.item_offsets;
    s.bytes = s.states +
              segments * 2 * plan.fused_ctas * fused_state_floats(p.dim, plan.segment_blocks) * sizeof(float);
    return s;
  }
  s.operands = s.item_offsets + round_up((static_cast<std::size_t>(p.batch) + 1) * sizeof(int));
  s.row_scale = s.operands + round_up(blocks * operand_words(p.dim) * sizeof(uint4));
  s.states = s.row_scale + round_up(blocks * 2 * kBlockRows * sizeof(float));
  s.bytes = s.states + round_up((slots + segments * static_cast<std::size_t>(plan.wide_splits)) * rows *
                                (static_cast<std::size_t>(p.dim) + 2) * sizeof(float));
  return s;
}

int items_of(const ExactRows& x) { return static_cast<int>((x.count + kExactTokens - 1) / kExactTokens); }

// Sets plan.fused_ctas, where one kernel that takes whole segments is estimated to finish before three that divide all
// items evenly, and plan.teams: whether warps read alone or in teams.
template <int D>
void plan_readers(const AttendParams& p, int segments, const Load& load, AttendPlan* plan) {
  const auto rounds = [](long long items, long long readers) { return (items + readers - 1) / readers; };
  // A team is faster than a warp on its first items and slower, by as much, on those that follow.
  constexpr long long kTeamRounds = 2;
  const long long all = load.all * (segments / p.batch);
  const bool one_kernel = plan->room == Room::large && segments <= plan->ctas && segments <= kMostFused;
  const int ctas = plan->ctas / segments;
  const auto readers = [&](Readers kind) {
    return static_cast<long long>(fused_fit<D>(kind, plan->segment_blocks).readers);
  };
  if (D >= kLargeDim) {
    // The fused kernel's matrices, 256 KB each for every CTA, cost more than launches unless one segment has the whole
    // device.
    if (one_kernel && segments == 1 && rounds(load.longest, ctas * readers(Readers::twos)) > 1) plan->fused_ctas = ctas;
    else
      plan->teams = main_has_teams(D, plan->room) &&
                    rounds(all, static_cast<long long>(plan->ctas) * kTwos) <= 2 * kTeamRounds;
    return;
  }
  if (!one_kernel) return;
  const long long warps = readers(Readers::warps);
  plan->teams = rounds(load.longest, ctas * readers(Readers::fours)) <= kTeamRounds;
  // Two launches and the waits between them cost about as much as four rounds of warps.
  constexpr long long kSaved = 4;
  if (plan->teams || rounds(load.longest, ctas * warps) <= rounds(all, plan->ctas * warps) + kSaved)
    plan->fused_ctas = ctas;
}

}  // namespace

bool takes_wide(const AttendParams& p, const Chip& chip) {
  return chip.wgmma && p.k_copy_bytes > 0 && !has_narrow(p) && p.dim <= 128 && p.mask.kind == Mask::General::none &&
         p.group * p.queries >= kWideFrom && p.batch * p.kv_heads * p.group * p.queries >= kWideAll;
}

int wide_splits(const AttendParams& p, const Chip& chip) {
  const int tiles = p.batch * p.kv_heads * ((p.group * p.queries + kWideRows - 1) / kWideRows);
  return std::max(1, chip.multiprocessors / tiles);
}

long long most_queries(const Sequences& sequences) {
  long long most = sequences.most_queries;
  if (most == 0 && !sequences.resident)
    for (const SequenceView& s : sequences.views) most = std::max(most, static_cast<long long>(s.query_count));
  return most;
}

Load load_of(const Sequences& sequences, bool sealed) {
  Load load;
  if (sequences.resident || sequences.longest > 0) {
    // A sequence with pages has at most two pages' worth of exact rows, and sinks.
    constexpr long long kExactItems = 2 * kPageTokens / kExactTokens + 1;
    const long long each = sealed ? kPageTokens : kExactTokens, more = sealed ? kExactItems : 1;
    load.longest = sequences.longest / each + more;
    load.all = sequences.all / each + more * static_cast<long long>(sequences.views.size());
    return load;
  }
  for (const SequenceView& s : sequences.views) {
    const long long items = items_of(s.exact[0]) + items_of(s.exact[1]) + s.page_count;
    load.longest = std::max(load.longest, items);
    load.all += items;
  }
  return load;
}

namespace {

AttendPlan plan_segments(const AttendParams& p, const Chip& chip, const Load& load, int segment_blocks) {
  AttendPlan plan;
  plan.room = room_of(chip);
  plan.early = chip.code >= 90;
  plan.segment_blocks = segment_blocks;
  plan.ctas = chip.multiprocessors;
  AttendParams sized = p;
  sized.blocks = blocks_of_rows(p, plan.segment_blocks);
  const int segments = p.batch * p.kv_heads * (sized.blocks / plan.segment_blocks);
  if (load.longest >= kWideItems && takes_wide(p, chip)) plan.wide_splits = wide_splits(p, chip);
  with_dim(p.dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    if (plan.wide_splits == 0) plan_readers<kDim>(p, segments, load, &plan);
    const Readers kind = plan.fused_ctas == 0 && plan.teams ? Readers::twos : Readers::warps;
    const Fit used = fit<kDim>(plan.room, plan.segment_blocks, kind);
    plan.readers_per_cta = used.readers;
    const int left = room_bytes(plan.room) - main_shared<kDim>(kind, used.readers, used.depth, plan.segment_blocks);
    plan.most_sequences = used.readers > 0 ? left / static_cast<int>(sizeof(int)) - 1 : 0;
    return true;
  });
  plan.scratch = lay_out(sized, plan).bytes;
  return plan;
}

}  // namespace

AttendPlan plan_attend(const AttendParams& p, const Chip& chip, const Load& load) {
  return plan_segments(p, chip, load, segment_blocks(p, chip));
}

std::size_t most_scratch(const AttendParams& p, const Chip& chip) {
  std::size_t most = 0;
  // In one kernel or three; what each of these needs grows with the number of segments.
  for (int blocks = 1; blocks <= most_segment_blocks(p.dim); ++blocks) {
    AttendPlan plan =
        plan_segments(p, chip, {1ll << 30, 1ll << 40}, blocks);  // by warps, which leave more states than teams
    AttendParams sized = p;
    sized.blocks = blocks_of_rows(p, blocks);
    plan.fused_ctas = 0;
    // Of calls with fewer rows more parts may leave states, of no more tiles than there are multiprocessors.
    plan.wide_splits = takes_wide(p, chip) ? 1 : 0;
    const std::size_t more = plan.wide_splits * static_cast<std::size_t>(plan.ctas) * kWideRows *
                             (static_cast<std::size_t>(p.dim) + 2) * sizeof(float);
    most = std::max(most, lay_out(sized, plan).bytes + more);
    const std::size_t states = 2 * static_cast<std::size_t>(plan.ctas) * fused_state_floats(p.dim, blocks) *
                               sizeof(float);
    most = std::max(most, kMostFused * sizeof(int) + states);
  }
  return most;
}

cudaError_t launch_attend(AttendParams& p, const AttendPlan& plan, void* scratch, cudaStream_t stream) {
  p.segment_blocks = plan.segment_blocks;
  p.blocks = blocks_of_rows(p, plan.segment_blocks);
  p.readers = plan.ctas * plan.readers_per_cta;
  // Few segments: their rows are spread over more CTAs, each of which reads its part of the rotation's matrix. Many: a
  // CTA fills the rows of a product with those of several.
  const int segments = p.batch * p.kv_heads * (p.blocks / plan.segment_blocks), parts = segments * merge_columns(p.dim);
  const int rows = std::min(p.group * p.queries, kBlockRows);
  const bool many = segments > 2 * plan.ctas;
  p.merge_rows = parts * 2 >= plan.ctas ? kBlockRows * plan.segment_blocks : parts * 4 >= plan.ctas ? 2 : 1;
  p.merge_segments = p.prepare_blocks = 1;
  if (many && plan.segment_blocks == 1) {
    p.merge_rows = rows;
    p.merge_segments = kBlockRows / rows;
    while (p.prepare_blocks * 2 * rows <= kBlockRows) p.prepare_blocks *= 2;
  }
  const Scratch s = lay_out(p, plan);
  auto* memory = static_cast<unsigned char*>(scratch);
  p.arrived = reinterpret_cast<int*>(memory + s.arrived);
  p.item_offsets = reinterpret_cast<int*>(memory + s.item_offsets);
  p.operands = reinterpret_cast<uint4*>(memory + s.operands);
  p.row_scale = reinterpret_cast<float*>(memory + s.row_scale);
  p.states = reinterpret_cast<float*>(memory + s.states);
  p.wide_splits = plan.wide_splits;
  p.wide_slot = s.wide_slot;
  return with_dim(p.dim, [&](auto d) { return launch_dim<decltype(d)::value>(p, plan, stream); });
}

}  // namespace kv4::cuda
