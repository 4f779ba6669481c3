// Recipe: how keys and values become codes, and which tokens stay exact.
#pragma once

#include <cstdint>

#include "kv4/export.h"
#include "kv4/rotation.h"
#include "kv4/status.h"

namespace kv4 {

constexpr int kPageTokens = 64;
constexpr int kMostRefined = 2;  // of Recipe::refined

enum class LevelKind : std::uint8_t {
  lloyd_max = 0,  // those of a Gaussian as int8, at 4 bits +-{6, 18, 31, 44, 58, 75, 96, 127}; at 8 even ones
  uniform = 1,    // -7 ... 7, of 4 bits
  trellis = 2     // of 2 to 4 bits, each with two bits of the code before it: 3/4 of lloyd_max's squared error at 2
                  // bits, 2/3 at 3 and 4. Whole pages alone (SealMode::page), scale least_squares; on the CPU
};
enum class ScaleRule : std::uint8_t {
  least_squares = 0,  // codes nearest to x / step, step by max|x| or rms(x); scale = sum x L / sum L^2
  abs_max = 1         // codes nearest to x * Lmax / max|x|; scale = max|x| / Lmax
};
enum class LambdaMode : std::uint8_t {
  none = 0,       // lambda = 1
  automatic = 1,  // keys: (E q^2 / E (k - mu)^2)^(0.9/4) of the sequence's tokens up to its first seal
  given = 2       // handed over with the cache's configuration
};
enum class SealMode : std::uint8_t {
  page = 0,     // whole pages of kPageTokens, once they leave the exact window
  arrival = 1,  // every vector as it arrives, before attention sees it
  never = 2     // nothing is ever sealed: an exact cache
};

struct SideRecipe {
  RotationKind rotation = RotationKind::srft;
  int reflectors = 0;             // householder only; 0 means d/2
  std::uint64_t seed = 0x6b7634;  // "kv4"
  int group = 0;                  // channels per scale: 0 = the whole vector, else 128, 64 or 32 dividing d
  int bits = 4;                   // of a code: 2, 3, 4, 6 or 8; 2 to 4 on CUDA, 4 on Metal
  LevelKind levels = LevelKind::lloyd_max;
  ScaleRule scale = ScaleRule::least_squares;
  bool mean = false;                     // keys only: subtract the page's mean
  LambdaMode lambda = LambdaMode::none;  // values: none or given
};

struct Recipe {
  SideRecipe key{.mean = true, .lambda = LambdaMode::automatic};
  SideRecipe value{};
  SealMode seal = SealMode::page;
  int sinks = 4;    // first tokens of a sequence, kept exact
  int window = 64;  // newest tokens kept exact: window ... window + kPageTokens - 1 between seals
  int refined = 0;  // keys of a page, 0 to 2: those of its tokens with the least |v|^2 have a second row of 4-bit
                    // codes, for what the first one left; other than 0 on the CPU

  static Recipe kv4() { return {}; }
  // kv4()'s with the levels of a trellis on both sides. On the CPU.
  KV4_API static Recipe trellis();
  KV4_API static Recipe exact();
  KV4_API static Recipe paper();
};

// invalid_argument naming the field for anything out of range or contradictory
// (arrival sealing with a mean, sinks, a window, refined keys or automatic lambda; a value mean; ...).
KV4_API Status validate(const Recipe& recipe);
// Also against the head dims: group must divide them, the rotation must exist there.
KV4_API Status validate(const Recipe& recipe, int head_dim_k, int head_dim_v);

}  // namespace kv4
