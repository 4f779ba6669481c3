// Second rows of codes, those of refined keys (docs/format.md): which tokens have one, and what it adds to the first.
//
// In canonical order, so that the codes of 8 channels are one word, which a shift of its own in every lane takes apart.
// Instructions per vector of kLanes channels: load, shift, and, look up, 2 shifts that extend the sign, convert,
// multiply, store: 9 (with 16 lanes a load and a choice more), and 1 for the product with a query. At d = 128 on AVX2
// 144 and 16 R for R rows of queries, a page and refined key; the page's scores and values take 10 to 90 times 64.
#pragma once

#include "cpu/quads.inl"

namespace kv4::cpu::KV4_ISA {

alignas(64) inline constexpr std::int32_t kNibbleShift[16] = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};

// scale * level of every channel, to [pad_channels(d)]; padded ones are finite.
template <class Isa>
void widen_second(const PageSpec& spec, const std::uint8_t* slice, int row, float* to) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  constexpr int L = Isa::kLanes, kStep = L < 8 ? 8 : L;
  const kv4_second_layout& at = spec.second;
  const std::uint8_t* const codes = slice + at.codes + static_cast<std::uint32_t>(row) * at.row_bytes;
  const std::uint8_t* const scales = slice + at.scales + 2 * row * spec.key.groups;
  const I table = load_table16<Isa>(spec.second_levels.table.data()), low = lanes_between<Isa>(0, 8);
  const int padded = pad_channels(spec.key.dim), group = spec.key.groups == 1 ? padded : spec.key.group;
  for (int g = 0; g < spec.key.groups; ++g) {
    const F scale = Isa::set1(f16_to_f32(load_as<std::uint16_t>(scales + 2 * g)));
    const std::uint8_t* from = codes + g * group / 8 * 4;
    for (int c = g * group; c < (g + 1) * group; c += kStep, from += kStep / 8 * 4) {
      KV4_UNROLL
      for (int v = 0; v < kStep; v += L) {
        // Lane by lane GCC would compute sixteen addresses.
        I words = I{} + load_as<std::int32_t>(from + v / 8 * 4);
        if constexpr (L == 16) words = (words & low) | ((I{} + load_as<std::int32_t>(from + 4)) & ~low);
        const I level = SealOps::lookup16(table, words >> load_as<I>(kNibbleShift + v) & 15);
        Isa::store(to + c + v, Isa::to_float((level << 24) >> 24) * scale);
      }
    }
  }
}

// The tokens whose keys are refined; -1: there are not as many.
struct RefinedTokens {
  int rows = 0;
  int token[kMostRefined];
};

// Sum of n squares, in double: the tokens that a page refines follow from it.
template <class Isa, class Load>
double sum_of_squares(int n, Load load) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using D = SealOps::D;
  constexpr int L = Isa::kLanes;
  D sum[2] = {};
  for (int next = 0; next < n; next += L) {
    const int c = next + L <= n ? next : n - L;  // the last block overlaps rather than overruns
    D low, high;
    SealOps::widen((F)((I)load(c) & lanes_between<Isa>(next - c, L)), low, high);
    sum[0] += low * low;
    sum[1] += high * high;
  }
  double lanes[L / 2], total = 0;
  store_as(lanes, sum[0] + sum[1]);
  for (double lane : lanes) total += lane;
  return total;
}

// The `rows` of `count` tokens with the least sums, sum(j), among those that used(j) says; the earlier of equal ones.
template <class Used, class Sum>
RefinedTokens lightest(int rows, int count, Used used, Sum sum) {
  RefinedTokens found;
  found.rows = rows;
  double least[kMostRefined];
  for (int r = 0; r < rows; ++r) found.token[r] = -1;
  for (int j = 0; j < count; ++j) {
    if (!used(j)) continue;
    const double size = sum(j);
    int at = rows;
    while (at > 0 && (found.token[at - 1] < 0 || size < least[at - 1])) --at;
    for (int r = rows - 1; r > at; --r) {
      found.token[r] = found.token[r - 1];
      least[r] = least[r - 1];
    }
    if (at < rows) {
      found.token[at] = j;
      least[at] = size;
    }
  }
  return found;
}

}  // namespace kv4::cpu::KV4_ISA
