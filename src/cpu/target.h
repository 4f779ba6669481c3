// Target regions: code between KV4_TARGET_BEGIN and KV4_TARGET_END is compiled for an
// instruction set that the rest of the file must not use. Standard headers are included before
// the region, so that their inline functions stay runnable everywhere.
#pragma once

#define KV4_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KV4_TARGET_BEGIN(features) \
  KV4_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define KV4_TARGET_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define KV4_TARGET_BEGIN(features) _Pragma("GCC push_options") KV4_PRAGMA(GCC target(features))
#define KV4_TARGET_END _Pragma("GCC pop_options")
#else
#error "kv4 needs GCC or Clang: its kernels use their vector extensions"
#endif

#define KV4_INLINE inline __attribute__((always_inline))
#define KV4_INLINE_LAMBDA __attribute__((always_inline))  // behind a lambda's parameters

// Before a loop of constant bounds over an array of vectors: the array lives in registers only where
// the loop is unrolled, at any optimisation level.
#define KV4_UNROLL _Pragma("GCC unroll 32")
