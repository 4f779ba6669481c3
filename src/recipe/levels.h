// The levels of a recipe's sides as kernels use them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv4/recipe.h"

namespace kv4 {

// Numbers in static memory.
template <class T>
class TableView {
 public:
  constexpr TableView() = default;
  explicit constexpr TableView(const T* numbers) : numbers_(numbers) {}
  constexpr const T* data() const { return numbers_; }
  constexpr const T& operator[](std::size_t i) const { return numbers_[i]; }

 private:
  const T* numbers_ = nullptr;
};

// Codes of a group of values x are the levels nearest to x / step, step = factor * max|x| or factor * rms(x).
struct StepRule {
  bool by_largest = false;
  float factor = 0;
};

// A table of 2^bits int8 levels in ascending order, in the form the kernels use it:
// magnitude[i] >= 0 ascending; with z = |2 y| the magnitude index is the number of
// twice_threshold[] <= z. code = half() + i for y >= 0, negative_base - i for y < 0.
//
// Of a trellis a level depends on two bits of the code before as well, and codes are found by chains: those of keys run
// through the channels of a group of a token, c, c + 4, c + 8, ..., those of values through the tokens of a page, t,
// t + 4, ..., of one channel. The first code of a chain has state 0. Of table[] the first alone means something there:
// the least level of all.
struct Levels {
  int bits = 4;
  TableView<std::int8_t> table;             // [count()], and 0 up to 64
  TableView<std::uint8_t> magnitude;        // [half()]
  TableView<std::uint8_t> twice_threshold;  // [half() - 1] 2 * midpoint of neighbouring magnitudes: exact integers
  int spread = 0;         // twice_threshold[] * 2^spread stay below 256; to 4 bits no two are in one sixteenth of it
  int negative_base = 0;  // half() - 1: mid-rise (no zero level); half(): mid-tread (code 0 is never made)
  float gain = 0;         // levels per standard deviation of the Gaussian that they are made for
  TableView<std::int8_t> trellis;  // [2][kStates][count()] by place in the chain modulo 2, state, code; else null
  TableView<float>
      reach;  // of least_squares, by groups of 16, 32, 64, 128, 256 and 512: gain * step / max|x|; 0: by rms

  constexpr int count() const { return 1 << bits; }
  constexpr int half() const { return count() / 2; }
  static constexpr int kStates = 4;
  constexpr bool is_trellis() const { return trellis.data() != nullptr; }
  // What the code at `place` in its chain leaves to the next one: its lower pair of bits, or, of 4 bits at even places,
  // the upper. Where the codes of two places share a byte, the state then lies beside the code it belongs to.
  static constexpr int next_state(int bits, int place, int code) {
    return bits == 4 && place % 2 == 0 ? code >> 2 : code & 3;
  }
  constexpr int next_state(int place, int code) const { return next_state(bits, place, code); }
  constexpr int level(int place, int state, int code) const {
    return trellis[static_cast<std::size_t>((place % 2 * kStates + state) * count() + code)];
  }
  constexpr int top() const { return magnitude[static_cast<std::size_t>(half() - 1)]; }
};
// bits: of SideRecipe, valid; uniform levels have 4.
const Levels& levels(LevelKind kind, int bits = 4);
// Of second rows of codes, beside first ones of a kind.
inline const Levels& second_levels(LevelKind kind) {
  return levels(kind == LevelKind::trellis ? LevelKind::lloyd_max : kind);
}
// Of a group of so many values, at least 1.
StepRule step_rule(const Levels& levels, ScaleRule scale, int group);

}  // namespace kv4
