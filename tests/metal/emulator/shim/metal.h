// Stand-in for <metal_stdlib>: what Metal Shading Language adds to C++14, on clang's own vector types. Compiled in two
// ways: to run (address-space words mean nothing), and with EMU_STATIC for a syntax pass in which they are real.
// What is missing here is missing on purpose or not yet needed: a kernel that uses it does not compile.
#pragma once

#pragma clang system_header

#ifdef EMU_STATIC
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#endif

#include "types.h"
#include "vector.h"
#include "math.h"
#include "matrix.h"
#ifdef EMU_STATIC
#include "static_only.h"
#else
#include "simd.h"
#include "simd_matrix.h"
#include "atomic.h"
#include "entry.h"
#endif

namespace metal {
using namespace emu::names;
}

#ifndef EMU_STATIC
#define device
#define constant const
#define threadgroup
#endif
#define thread
#define kernel
