// Products of a group of four warps, wgmma.mma_async (PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions"):
// code for compute capability 9.0 alone, compiled as sm_90a.
//
// Operands lie in shared memory as blocks of 8 rows of 16 bytes, 8 consecutive channels of 8 rows; no swizzle. A block
// is 128 contiguous bytes, blocks of consecutive channels follow each other: any 8 lanes that hold a block's rows write
// it, and ldmatrix reads it, without bank conflicts.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/seal_digits.h"

namespace kv4::cuda {

// An operand's lower half: where it begins, and the distance of blocks of consecutive channels, in 16 bytes.
__device__ __forceinline__ uint32_t operand(uint32_t shared) {
  return (shared >> 4 & 0x3fff) | (kBlockBytes / 16) << 16;
}
constexpr uint32_t kStepBlocks = 2 * kBlockBytes / 16;  // from an operand of 16 channels to that of the next

// Registers and operands in shared memory that were written before are the products' from here on; theirs are complete.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define KV4_TILE(n) "+f"(y[n][0]), "+f"(y[n][1]), "+f"(y[n][2]), "+f"(y[n][3])
#define KV4_TILES_8(n)                                                                                               \
  KV4_TILE(n), KV4_TILE(n + 1), KV4_TILE(n + 2), KV4_TILE(n + 3), KV4_TILE(n + 4), KV4_TILE(n + 5), KV4_TILE(n + 6), \
      KV4_TILE(n + 7)
// Registers of so many columns.
#define KV4_REGISTERS_64                                                                       \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31"
#define KV4_REGISTERS_80 KV4_REGISTERS_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define KV4_REGISTERS_96 KV4_REGISTERS_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define KV4_REGISTERS_128 KV4_REGISTERS_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KV4_PRODUCT(n, registers, a, b, add, ...)                                              \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32.f16.f16 {" registers "}, " a ", " b ", p, 1, 1, 0, 0;}"                \
               : __VA_ARGS__                                                                   \
               : "l"(rows), "l"(columns), "r"(add_to ? 1 : 0))

// y (64 x kColumns, tiles as mma_halves has them, a warp 16 rows) = or += rows (64 x 16) times columns (16 x kColumns).
// kChannels: of a row, which gives the distance of blocks of consecutive rows.
template <int kColumns, int kChannels, int kTiles>
__device__ __forceinline__ void product(float (&y)[kTiles][4], uint32_t rows_at, uint32_t columns_at, bool add_to) {
  constexpr uint64_t kRest = static_cast<uint64_t>(kChannels / 8 * kBlockBytes / 16) << 32;
  const uint64_t rows = kRest | rows_at, columns = kRest | columns_at;
  if constexpr (kColumns == 64) KV4_PRODUCT("64", KV4_REGISTERS_64, "%32", "%33", "%34", KV4_TILES_8(0));
  else if constexpr (kColumns == 80)
    KV4_PRODUCT("80", KV4_REGISTERS_80, "%40", "%41", "%42", KV4_TILES_8(0), KV4_TILE(8), KV4_TILE(9));
  else if constexpr (kColumns == 96)
    KV4_PRODUCT("96", KV4_REGISTERS_96, "%48", "%49", "%50", KV4_TILES_8(0), KV4_TILE(8), KV4_TILE(9), KV4_TILE(10),
                KV4_TILE(11));
  else if constexpr (kColumns == 128)
    KV4_PRODUCT("128", KV4_REGISTERS_128, "%64", "%65", "%66", KV4_TILES_8(0), KV4_TILES_8(8));
}
#undef KV4_PRODUCT

// Operands in shared memory as rows of 128 bytes, 64 channels or tokens, whose 16-byte pieces are exchanged within
// eight rows: piece c of row r lies at c ^ r % 8. Rows of more channels are several such blocks; each begins at a
// multiple of 1,024 bytes.
constexpr int kSwizzledRow = 128;
__device__ __forceinline__ int swizzled(int row, int piece) { return row * kSwizzledRow + ((piece ^ row % 8) << 4); }
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t shared) {
  constexpr uint64_t kKind = uint64_t{1} << 62 | static_cast<uint64_t>(8 * kSwizzledRow / 16) << 32 | 1 << 16;
  return kKind | (shared >> 4 & 0x3fff);
}
constexpr uint64_t kSwizzledStep = 2;  // from an operand of 16 channels to that of the next within a block

#define KV4_PRODUCT(n, registers, a0, a1, a2, a3, b, add, ...)                                       \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" n       \
               "k16.f32.f16.f16 {" registers "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", p, 1, 1, 0;}" \
               : __VA_ARGS__                                                                         \
               : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(columns), "r"(add_to ? 1 : 0))

// The same with rows in registers, as mma_halves has A, and swizzled columns (16 x kColumns).
template <int kColumns, int kTiles>
__device__ __forceinline__ void product(float (&y)[kTiles][4], const uint32_t (&rows)[4], uint64_t columns,
                                        bool add_to) {
  static_assert(kColumns == kTiles * 8);
  if constexpr (kColumns == 8) KV4_PRODUCT("8", "%0,%1,%2,%3", "%4", "%5", "%6", "%7", "%8", "%9", KV4_TILE(0));
  else if constexpr (kColumns == 64)
    KV4_PRODUCT("64", KV4_REGISTERS_64, "%32", "%33", "%34", "%35", "%36", "%37", KV4_TILES_8(0));
  else if constexpr (kColumns == 80)
    KV4_PRODUCT("80", KV4_REGISTERS_80, "%40", "%41", "%42", "%43", "%44", "%45", KV4_TILES_8(0), KV4_TILE(8),
                KV4_TILE(9));
  else if constexpr (kColumns == 96)
    KV4_PRODUCT("96", KV4_REGISTERS_96, "%48", "%49", "%50", "%51", "%52", "%53", KV4_TILES_8(0), KV4_TILE(8),
                KV4_TILE(9), KV4_TILE(10), KV4_TILE(11));
  else if constexpr (kColumns == 128)
    KV4_PRODUCT("128", KV4_REGISTERS_128, "%64", "%65", "%66", "%67", "%68", "%69", KV4_TILES_8(0), KV4_TILES_8(8));
}
#undef KV4_PRODUCT

// y (64 x 8) += rows (64 x 16) times columns (16 x 8), both swizzled.
__device__ __forceinline__ void add_product_8(float (&y)[1][4], uint64_t rows, uint64_t columns) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
               : KV4_TILE(0)
               : "l"(rows), "l"(columns));
}

// Until at most kLeft groups of products are not complete; then those that y holds are.
template <int kLeft, int kTiles>
__device__ __forceinline__ void products_wait(float (&y)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int n = 0; n < kTiles; ++n) asm volatile("" : KV4_TILE(n)::"memory");
}

// Until the group's products are complete.
template <int kColumns, int kTiles>
__device__ __forceinline__ void products_end(float (&y)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) asm volatile("" : KV4_TILE(n)::"memory");
}
#undef KV4_REGISTERS_128
#undef KV4_REGISTERS_96
#undef KV4_REGISTERS_80
#undef KV4_REGISTERS_64
#undef KV4_TILES_8
#undef KV4_TILE

}  // namespace kv4::cuda
