// Every header with inline functions that the kernels use, included before any target region opens
// (target.h says why).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "backend/backend.h"
#include "cpu/attend.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "cpu/level_table.h"
#include "cpu/rotate.h"
#include "cpu/rotate_f64.h"
#include "cpu/steps.h"
#include "cpu/vec.h"
