// Codes of a trellis (recipe/levels.h): the path through the states of a chain whose levels leave the least sum of
// squared errors (A. J. Viterbi, IEEE Trans. Inf. Theory 13, 1967), kLanes chains at a time.
//
// A place of a chain takes, for each of four next states, the 2^bits pairs of a state and a code that lead there:
// subtract, fma, a choice that puts the pair into the lowest bits of the sum, min: at 4 bits 256 instructions for
// kLanes values, at 3 128, at 2 64. At d = 128 that is 2,050 a vector with 16 lanes, where all of sealing without it
// takes 430; measured, one Zen 5 core, through the cache: 343 ns for 124. Pairs in six of a sum's 24 bits cost it 2^-18
// of itself a place.
#pragma once

#include "cpu/quads.inl"

namespace kv4::cpu::KV4_ISA {

constexpr std::int32_t kPair = 63;  // a state and a code: state << bits | code

// Where the values of a page stand while their chains run through its tokens.
struct TrellisScratch {
  float* x;            // [kPageTokens][padded] in units of each token's step
  float* step;         // [groups][kPageTokens]
  float *xl, *ll;      // [kPageTokens][kLanes] of a group
  std::int32_t* back;  // trellis_paths, of kPageTokens places or `padded`

  TrellisScratch(int padded, int groups, int lanes, bool any, Parts& parts) {
    const auto size = [any](int n) { return any ? static_cast<std::size_t>(n) : 0; };
    x = parts.take<float>(size(kPageTokens * padded));
    step = parts.take<float>(size(groups * kPageTokens));
    xl = parts.take<float>(size(kPageTokens * lanes));
    ll = parts.take<float>(size(kPageTokens * lanes));
    back = parts.take<std::int32_t>(size(std::max(kPageTokens, padded) * lanes));
  }
};

// Levels as kernels of sealing look them up.
template <class Isa>
struct TrellisTables {
  alignas(64) float level[2][Levels::kStates * 16] = {};
  ByteTable<Isa, 4> bytes[2] = {};

  explicit TrellisTables(const Levels& l) {
    if (!l.is_trellis()) return;
    for (int place = 0; place < 2; ++place) {
      std::uint8_t all[64];
      for (int pair = 0; pair < 64; ++pair) {
        const int found = l.level(place, pair / l.count() % Levels::kStates, pair % l.count());
        level[place][pair] = static_cast<float>(found);
        all[pair] = static_cast<std::uint8_t>(found);
      }
      bytes[place].set(all);
    }
  }
};

// One place, of parity kPlace: `cost` of the four states before becomes that of the states after; returns, in byte n of
// each lane, the pair that leads to state n.
template <class Isa, int kBits, int kPlace>
KV4_INLINE typename Isa::I trellis_place(const float* level, typename Isa::F x,
                                         typename Isa::F (&cost)[Levels::kStates]) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  constexpr int kCodes = 1 << (kBits - 2);                                 // of a state, that lead to one next
  constexpr bool kUpper = Levels::next_state(kBits, kPlace, 1 << 2) == 1;  // by the upper pair of their bits
  F after[Levels::kStates];
  I pairs{};
  KV4_UNROLL
  for (int next = 0; next < Levels::kStates; ++next) {
    F best[2];
    KV4_UNROLL
    for (int i = 0; i < Levels::kStates * kCodes; ++i) {
      const int state = i / kCodes, other = i % kCodes;
      const int code = kUpper ? next << 2 | other : other << 2 | next;
      const std::int32_t pair = state << kBits | code;
      const F error = x - Isa::set1(level[pair]);
      const F sum = (F)(((I)Isa::fma(error, error, cost[state]) & ~kPair) | pair);
      best[i % 2] = i < 2 ? sum : Isa::min(best[i % 2], sum);
    }
    after[next] = Isa::min(best[0], best[1]);
    pairs |= ((I)after[next] & kPair) << (8 * next);
  }
  KV4_UNROLL
  for (int n = 0; n < Levels::kStates; ++n) cost[n] = after[n];
  return pairs;
}

// Four chains of each lane: place j of chain i has x(4 j + i), for 4 j + i < count. put(j, pairs): byte i of each lane
// is the pair of a state and a code at place j of chain i, 0 where there is none; called once for each j, the last
// first. back: [(count + 3) / 4][4][kLanes] words of scratch.
template <class Isa, int kBits, class X, class Put>
KV4_INLINE void trellis_paths(const TrellisTables<Isa>& tables, int count, std::int32_t* back, X x, Put put) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes;
  const F never = Isa::set1(1e30f);
  I state[4];
  for (int i = 0; i < 4; ++i) {
    F cost[Levels::kStates] = {F{}, never, never, never};
    std::int32_t* to = back + i * L;
    for (int at = i; at < count; at += 8, to += 8 * L) {
      store_as(to, trellis_place<Isa, kBits, 0>(tables.level[0], x(at), cost));
      if (at + 4 < count) store_as(to + 4 * L, trellis_place<Isa, kBits, 1>(tables.level[1], x(at + 4), cost));
    }
    I last{};
    F best = cost[0];
    KV4_UNROLL
    for (int n = 1; n < Levels::kStates; ++n) {
      const I less = (I)(cost[n] < best);
      last = (last & ~less) | (less & n);
      best = Isa::min(best, cost[n]);
    }
    state[i] = last;
  }
  for (int j = (count + 3) / 4 - 1; j >= 0; --j) {
    I pairs{};
    for (int i = 0; i < 4 && 4 * j + i < count; ++i) {
      const I pair = load_as<I>(back + (4 * j + i) * L) >> (state[i] << 3) & kPair;
      state[i] = pair >> kBits;
      pairs |= pair << (8 * i);
    }
    put(j, pairs);
  }
}

// Adds the products x L and the squares L^2 of a quad of places, of which `valid` exist, to two sums.
template <class Isa, class X>
KV4_INLINE void add_fit(const TrellisTables<Isa>& tables, int place, typename Isa::I pairs, int valid, X x,
                        typename Isa::F& xl, typename Isa::F& ll) {
  const typename Isa::I level = tables.bytes[place % 2].lookup(pairs);
  for (int i = 0; i < valid; ++i) {
    const typename Isa::F one = Isa::to_float((level << (24 - 8 * i)) >> 24);
    xl = Isa::fma(x(i), one, xl);
    ll = Isa::fma(one, one, ll);
  }
}

// The pairs of quads of codes and of the quads before them in their chains, which stand at places whose parity is that
// of `odd` in each lane.
template <class I>
KV4_INLINE I trellis_pairs(int bits, I codes, I before, I odd) {
  if (bits == 4) return codes | (((before << 4 & ~odd) | (before << 2 & odd)) & 0x30303030);
  return codes | (before & 0x03030303) << bits;
}

}  // namespace kv4::cpu::KV4_ISA
