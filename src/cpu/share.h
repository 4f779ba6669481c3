// How large the pieces are in which a call's work is split among threads. On a machine that other programs use, any
// thread may be put aside for milliseconds, and its piece with it; the others take what is left, so that what a call
// waits for is a piece.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kv4::cpu {

// Work is counted in products of one row, token and channel. A Zen 3 core does some 4 * 10^10 of them a second, so that
// this takes about 6 us and a call of less than about 8 us wakes no other thread. Measured at 64 to 1,024 tokens with
// one and six rows: half of either lost to the joining of splits, twice to the waiting thread. Items are cut to the
// nearest number of such pieces: one of 1.9 left a thread idle, 4 rows of d = 256 over 300 tokens took 14 and 22 us
// (AMX, AVX2) where two pieces take 12.6 and 17.
// Fetching a piece's first four pages before its queries are rotated: no difference at 256 tokens.
constexpr double kPieceWork = 1 << 18;
// Sealed tokens count less than exact ones (attend.cpp): at 1.5, 7 rows of d = 64 over 256 tokens stayed on one thread
// and took 27 ns a token, where two take 18 (Emerald Rapids).
constexpr double kSharedWork = 1.25 * kPieceWork;
// Pieces per thread: at least two, and up to eight of a long call. Each rotates its queries anew and is joined, some 5
// us: four per thread lost 10 to 20 % at 512 to 2,048 tokens of d = 256, and pieces of kLongPieceWork / 4 16 % at
// 8,192.
constexpr double kFewPieces = 2, kManyPieces = 8, kLongPieceWork = 32 * kPieceWork;

struct Share {
  int threads = 1;
  double piece = std::numeric_limits<double>::infinity();  // most work of a piece, or 1.5 kPieceWork where that is more
};

inline Share share(double total, int threads) {
  if (threads <= 1 || total < kSharedWork) return {};
  const double few = total / (threads * kFewPieces), many = total / (threads * kManyPieces);
  return {threads, std::max(kPieceWork, std::min(few, std::max(many, kLongPieceWork)))};
}

// Pieces of an item of `work`, at most `limit`, which is at least 1.
inline int pieces(double work, const Share& share, std::int64_t limit) {
  constexpr double kExact = 1 - 1e-9;  // a quotient that rounding has put above a whole number
  const double most =
      std::min(std::floor(work / kPieceWork + 0.5), static_cast<double>(std::min<std::int64_t>(limit, 1 << 20)));
  return static_cast<int>(std::max(1.0, std::min(std::ceil(work / share.piece * kExact), most)));
}

}  // namespace kv4::cpu
