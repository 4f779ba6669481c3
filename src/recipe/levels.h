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
struct Levels {
  int bits = 4;
  TableView<std::int8_t> table;             // [count()], and 0 up to 64
  TableView<std::uint8_t> magnitude;        // [half()]
  TableView<std::uint8_t> twice_threshold;  // [half() - 1] 2 * midpoint of neighbouring magnitudes: exact integers
  int spread = 0;         // twice_threshold[] * 2^spread stay below 256; to 4 bits no two are in one sixteenth of it
  int negative_base = 0;  // half() - 1: mid-rise (no zero level); half(): mid-tread (code 0 is never made)
  float gain = 0;         // levels per standard deviation of the Gaussian that they are made for
  TableView<float>
      reach;  // of least_squares, by groups of 16, 32, 64, 128, 256 and 512: gain * step / max|x|; 0: by rms

  constexpr int count() const { return 1 << bits; }
  constexpr int half() const { return count() / 2; }
  constexpr int top() const { return magnitude[static_cast<std::size_t>(half() - 1)]; }
};
// bits: of SideRecipe, valid; uniform levels have 4.
const Levels& levels(LevelKind kind, int bits = 4);
// Of a group of so many values, at least 1.
StepRule step_rule(const Levels& levels, ScaleRule scale, int group);

}  // namespace kv4
