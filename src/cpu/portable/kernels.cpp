#define KV4_ISA portable
#include "cpu/standard_headers.h"
#include "cpu/portable/primitives.h"
#include "cpu/portable/dot.h"
#include "cpu/kernels.inl"
