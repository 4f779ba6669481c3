// The one list of head dims: for each the warps of a CTA that read the cache and the slots of each one's queue, for up
// to 8 query rows of a KV head and for more. A new head dim is a line here and a file attend_<head dim>.cu.
//
// 11 warps and the one that fills their queues are three to a scheduler, which leaves 168 registers a thread; 7 and one
// leave 255, which two blocks of rows need. Slots fill what shared memory is left. Where a CTA may have less of it than
// on 9.0, slots are left out down to two, the keys and the values of a page, then warps.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "cuda/attend.h"

namespace kv4::cuda {

template <int D>
struct Tuning;
template <>
struct Tuning<64> {
  static constexpr int kWarps[2] = {11, 7}, kDepth[2] = {8, 8}, kFused = 11;
};
template <>
struct Tuning<80> {
  static constexpr int kWarps[2] = {11, 7}, kDepth[2] = {5, 6}, kFused = 11;
};
template <>
struct Tuning<96> {
  static constexpr int kWarps[2] = {11, 7}, kDepth[2] = {5, 6}, kFused = 11;
};
template <>
struct Tuning<128> {
  static constexpr int kWarps[2] = {11, 7}, kDepth[2] = {4, 7}, kFused = 11;
};
template <>
struct Tuning<256> {
  static constexpr int kWarps[1] = {11}, kDepth[1] = {2}, kFused = 10;
};

template <int D>
struct Shape {
  static constexpr int kTiles = operand_bytes_tiles(D);  // of 32 key channels
  static constexpr int kKeyCodeBytes = kPageTokens * pad_channels(D) / 2;
  // A copy's rows lie as they do in a cache, so that it is one; ldmatrix meets bank conflicts, which cost a warp less
  // than the copies of 16 rows cost the one that asks for them. Where warps copy by themselves 16 bytes keep it free of
  // them.
  static constexpr int kExactPitch = D * 2 + (kBulkCopies ? 0 : 16);
  static constexpr int kMeanAt = kKeyCodeBytes + kPageTokens * 2;  // in a slot of keys
  static constexpr int kPackedBytes = kMeanAt + D * 2;
  static constexpr bool kKept = D <= 128;  // whether a warp keeps the operands of its queries for exact rows
  static constexpr int kExactBytes = kExactTokens * (D * 2 + 16);  // on any architecture
  static constexpr int kSlotBytes = ((kPackedBytes > kExactBytes ? kPackedBytes : kExactBytes) + 127) / 128 * 128;
};

// How the query rows of a segment fill the products' 8 rows. Up to 4 rows are stored twice, so that no lane is idle:
// rows 0 ... 3 take the even groups of 8 tokens, rows 4 ... 7 are the same queries and take the odd ones, and the two
// partial states are added at the end.
enum class Rows { four, eight, sixteen };
constexpr int blocks_of(Rows rows) { return rows == Rows::sixteen ? 2 : 1; }
// From kLargeDim on registers do not hold the operands of one block, and two were slower for any number of queries.
constexpr int kLargeDim = 256;
constexpr int most_segment_blocks(int dim) { return dim >= kLargeDim ? 1 : 2; }

// The codes of a page that a kernel reads: of 4 bits, or of 2, 3 or 4, of each side as the call says.
enum class Codes { fours, any };

// Who reads: warps, each for itself; two warps or four, a team, who share tokens and channels (attend_team.cuh).
enum class Readers { warps, twos, fours };
constexpr int members_of(Readers readers) { return readers == Readers::fours ? 4 : readers == Readers::twos ? 2 : 1; }
constexpr int team_exchange_bytes(int members, int blocks) {
  return blocks * (4 * kLanes * 16 + members * kBlockRows * 12);
}

// Shared memory of one reader's queue: its slots, then two barriers for each.
constexpr int queue_bytes(int depth, int slot_bytes) { return (depth * slot_bytes + depth * 16 + 127) / 128 * 128; }
// Of a CTA of attend_main but for the item counts: queues, then each team's operands of pages and what it hands round.
template <int D>
constexpr int main_shared(Readers kind, int readers, int depth, int blocks) {
  const int of_team =
      kind == Readers::warps ? 0 : blocks * page_operand_words(D) * 16 + team_exchange_bytes(members_of(kind), blocks);
  return readers * (queue_bytes(depth, Shape<D>::kSlotBytes) + of_team);
}
constexpr int kOffsetsBytes = 4096;  // left for the item counts at least: 1,023 sequences

// Bytes that a CTA may ask for: on 9.0 and 10.0; on 8.0 and 8.7; on 8.6 and 8.9.
constexpr int room_bytes(Room room) {
  return room == Room::large ? 227 << 10 : room == Room::middle ? 163 << 10 : room == Room::small ? 99 << 10 : 0;
}
// Code for 9.0 and later, whose queues another warp fills, is compiled for the large room alone, that before for the
// others.
constexpr Room room_of(const Chip& chip) {
  if (chip.code >= 90) return chip.shared >= room_bytes(Room::large) ? Room::large : Room::none;
  if (chip.code < 80) return Room::none;
  return chip.shared >= room_bytes(Room::middle) && chip.code != 86 && chip.code != 89 ? Room::middle
         : chip.shared >= room_bytes(Room::small)                                      ? Room::small
                                                                                       : Room::none;
}
// Whether code for compute capability `code` may be run with such room. Code for 8.0 runs on 8.6 and 8.9 too.
constexpr bool runs_in(Room room, int code) {
  if (code >= 90) return room == Room::large;
  return room == Room::small || (room == Room::middle && code != 86 && code != 89);
}

// From kLargeDim on a rotation's matrix is 256 KB, and a page takes one warp so long that teams also read short calls
// of attend_main (with the large shared memory).
constexpr int kTwos = 4;  // 9 warps leave a thread 168 registers, as 12 would
constexpr bool main_has_teams(int dim, Room room) { return dim >= kLargeDim && room == Room::large; }

// Parts of the channels that attend_merge rotates back, each by a CTA of its own, whose warps ask for one tile of the
// matrix each.
constexpr int merge_columns(int dim) { return dim >= kLargeDim ? 2 : 1; }

struct Fit {
  int readers, depth;
};
template <int D>
constexpr Fit fit(Room room, int segment_blocks, Readers kind = Readers::warps) {
  using T = Tuning<D>;
  const int most = room_bytes(room) - kOffsetsBytes, i = segment_blocks - 1;
  const bool teams = kind != Readers::warps;
  for (int readers = teams ? kTwos : T::kWarps[i]; readers > 0; --readers)
    for (int depth = teams ? 6 : T::kDepth[i]; depth >= 2; --depth)
      if (main_shared<D>(kind, readers, depth, segment_blocks) <= most) return {readers, depth};
  return {0, 0};
}

template <int D>
constexpr int main_warps(Room room, int segment_blocks, Readers kind) {
  return fit<D>(room, segment_blocks, kind).readers * members_of(kind) + 1;
}

// attend_fused, in the large room alone: readers, and one warp that fills their queues; from kLargeDim on teams of two.
// Beside the queues a CTA has the operands of its segment's queries, a rotation's operands, rows of floats, one partial
// state, and what each team hands round.
constexpr int kFours = 3;  // 13 warps leave a thread 128 registers, as 16 would
constexpr int fused_pitch(int dim) { return dim + 8; }
// Of a reader's partial state.
constexpr int reader_state_floats(int dim, int blocks) { return blocks * kBlockRows * (fused_pitch(dim) + 2); }
template <int D>
constexpr int fused_shared(Readers kind, int readers, int depth, int blocks) {
  return readers * (queue_bytes(depth, Shape<D>::kSlotBytes) +
                    (kind == Readers::warps ? 0 : team_exchange_bytes(members_of(kind), blocks))) +
         blocks * (operand_words(D) + D / 16 * kLanes) * 16 + blocks * kBlockRows * fused_pitch(D) * 4 +
         reader_state_floats(D, blocks) * 4;
}
constexpr int kFusedStaticBytes = 1024;  // left for what has a fixed size, at least
// Readers and the slots of each one's queue: of a team at least as many as it has warps, the keys of as many exact
// items.
template <int D>
constexpr Fit fused_fit(Readers kind, int segment_blocks) {
  const bool teams = kind != Readers::warps;
  const int readers = kind == Readers::fours  ? kFours
                      : kind == Readers::twos ? kTwos
                      : segment_blocks == 1   ? Tuning<D>::kFused
                                              : Tuning<D>::kWarps[segment_blocks - 1];
  for (int depth = teams ? 12 : Tuning<D>::kDepth[segment_blocks - 1]; depth >= (teams ? members_of(kind) : 2); --depth)
    if (fused_shared<D>(kind, readers, depth, segment_blocks) <= room_bytes(Room::large) - kFusedStaticBytes)
      return {readers, depth};
  return {0, 0};
}
constexpr int fused_warps(Readers kind, int readers) { return readers * members_of(kind) + 1; }
// Floats of a partial state in device memory. A segment's CTAs leave one each over exact rows or over pages, or both.
constexpr int fused_state_floats(int dim, int blocks) { return blocks * kBlockRows * (dim + 2); }

template <int D>
cudaError_t launch_dim(const AttendParams& p, const AttendPlan& plan, cudaStream_t stream);
template <>
cudaError_t launch_dim<64>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <>
cudaError_t launch_dim<80>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <>
cudaError_t launch_dim<96>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <>
cudaError_t launch_dim<128>(const AttendParams&, const AttendPlan&, cudaStream_t);
template <>
cudaError_t launch_dim<256>(const AttendParams&, const AttendPlan&, cudaStream_t);

// Calls f with the head dim as a constant; a default result for one that is not in the list.
template <class F>
auto with_dim(int dim, F f) -> decltype(f(std::integral_constant<int, 64>())) {
  switch (dim) {
    case 64: return f(std::integral_constant<int, 64>());
    case 80: return f(std::integral_constant<int, 80>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    case 256: return f(std::integral_constant<int, 256>());
    default: return {};
  }
}
inline bool has_dim(int dim) {
  return with_dim(dim, [](auto) { return true; });
}

}  // namespace kv4::cuda
