// Where the tokens of one sequence are, as numbers, and the arithmetic of positions.
//
//   [ dropped padding: start ][ sinks ][ page 0 ][ page 1 ] ... [ window ]
//
// Positions count the sequence's tokens from 0. Page i covers positions body() + 64 i ... + 63, body() = start + S.
// Until the sequence is anchored (at its first seal or eviction) every token is in the window and start is not known.
// Exact rows of the newest sealed pages may still be held: then pages extend past the window's first row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "format/limits.h"
#include "kv4/recipe.h"

namespace kv4::ledger {

constexpr int kQueryStride = 8;  // learning lambda samples one query in so many (queries.h)

// Positions [begin, end).
struct Rows {
  std::int64_t begin = 0, end = 0;

  std::int64_t count() const { return end > begin ? end - begin : 0; }
  bool empty() const { return end <= begin; }
  bool operator==(const Rows&) const = default;
};

// Sealing and eviction rules of a layer, from its recipe and mask.
struct Policy {
  SealMode seal = SealMode::page;
  int sinks = 0;                    // S: first tokens of a sequence that stay exact; 0 unless whole pages are sealed
  int window = 0;                   // W: newest tokens that stay exact: W ... W + 63 between seals
  std::int64_t sliding_window = 0;  // newest tokens that queries see, their own included; 0 = all
  bool learns = false;              // lambda comes from the sequence's first queries and keys

  static Policy of(const Recipe& recipe, std::int64_t sliding_window) {
    const bool pages = recipe.seal == SealMode::page;
    return {recipe.seal, pages ? recipe.sinks : 0, pages ? recipe.window : 0, sliding_window,
            recipe.seal != SealMode::never && recipe.key.lambda == LambdaMode::automatic};
  }
  bool seals() const { return seal == SealMode::page; }
  bool arrival() const { return seal == SealMode::arrival; }
};

// Learnt lambda: not learnt yet; learnt, but a crop may still undo it; final.
enum class Lambda : std::uint8_t { open, learnt, fixed };

struct Extent {
  std::int64_t length = 0;  // tokens appended, minus cropped ones
  std::int64_t start = 0;   // first position after dropped padding
  bool anchored = false;
  Lambda lambda = Lambda::open;
  std::int64_t sinks = 0;              // exact rows from `start` on that are held
  std::int64_t first_page = 0;         // index of the first page held: earlier ones are evicted
  std::int64_t pages = 0;              // pages held
  int last_page_tokens = kPageTokens;  // sealing on arrival fills the last page token by token
  std::int64_t window_position = 0;    // of the window's first row
  std::int64_t evicted = 0;            // positions below were evicted by the sliding window

  bool operator==(const Extent&) const = default;

  std::int64_t body(const Policy& p) const { return start + p.sinks; }
  std::int64_t page_position(const Policy& p, std::int64_t index) const { return body(p) + index * kPageTokens; }
  std::int64_t page_end() const { return first_page + pages; }
  std::int64_t window_rows() const { return length - window_position; }
  std::int64_t sealed_tokens() const { return pages == 0 ? 0 : (pages - 1) * kPageTokens + last_page_tokens; }
  // Pages whose exact rows have been dropped.
  std::int64_t released_pages(const Policy& p) const {
    if (!anchored || pages == 0) return first_page;
    return std::clamp<std::int64_t>((window_position - body(p)) / kPageTokens, first_page, page_end());
  }
  // Smallest position still held.
  std::int64_t first_held(const Policy& p) const {
    if (sinks > 0) return start;
    return pages > 0 ? page_position(p, first_page) : window_position;
  }
};

}  // namespace kv4::ledger
