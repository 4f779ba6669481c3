#define KV4_ISA portable
#include "cpu/kernels.inl"
#include "cpu/portable/dot.h"
#include "cpu/portable/primitives.h"
#include "cpu/standard_headers.h"
