// Few rows are multiplied as AVX-512 does it. Included in a target region.
#pragma once

#include "cpu/amx/unpack.h"
#include "cpu/avx512/dot.h"

namespace kv4::cpu::amx {

struct Dot : avx512::Dot {
  template <int R, int B>
  [[gnu::noinline]] static void block(const std::uint8_t* codes, const std::uint8_t* more, int octets,
                                      const std::uint8_t* operands, const std::int32_t* start, std::size_t start_stride,
                                      const Table& table, const std::uint8_t* next, std::int32_t* sums) {
    products<R, B, Unpack<B>>(codes, more, octets, operands, start, start_stride, table, next, sums);
  }
};

}  // namespace kv4::cpu::amx
