// SIMD-group operations and barriers. Every lane that has not returned must reach one together.
#pragma once

#include "../runtime/emu.h"

// Where the kernel calls, as defaults at the end of each parameter list.
#define EMU_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE(), int column_ = __builtin_COLUMN()
#define EMU_HERE emu::Site{file_, line_, column_}
#ifdef EMU_COUNT  // calls that count.py finds by name
#define EMU_OPERATION __attribute__((noinline))
#else
#define EMU_OPERATION inline
#endif

namespace emu {

struct LaneValue {
  const void* in;
  void* out;
  unsigned parameter;
};

template <class T, class F>
inline T exchange(const char* name, T value, unsigned parameter, Site site, F function) {
  T result;
  LaneValue lane{&value, &result, parameter};
  collective(name, site, &lane,
             [](void** lanes, unsigned active, void* extra) {
               (*static_cast<F*>(extra))(reinterpret_cast<LaneValue**>(lanes), active);
             },
             &function);
  return result;
}
template <class T>
inline T value_of(const LaneValue* lane) {
  return *static_cast<const T*>(lane->in);
}
template <class T>
inline void set_result(const LaneValue* lane, T value) {
  *static_cast<T*>(lane->out) = value;
}

// source(lane, parameter) -> lane to read. Reading a lane that is out of range or inactive is undefined in Metal and
// reported, unless `edge`: shuffle_up and shuffle_down leave such lanes their own value.
template <class T, class S>
inline T shuffle(const char* name, T value, unsigned parameter, Site site, bool edge, S source) {
  return exchange(name, value, parameter, site, [=](LaneValue** lanes, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes[lane]) continue;
      int from = source(lane, static_cast<int>(lanes[lane]->parameter));
      if (from < 0 || from > 31 || !lanes[from]) {
        if (!edge) report("undefined-lane", "%s (line %d): lane %d reads lane %d, which is inactive", name, site.line, lane, from);
        from = lane;
      }
      set_result<T>(lanes[lane], value_of<T>(lanes[from]));
    }
  });
}

// Combined pairwise, as a butterfly does: one order that hardware may use, not the order of the lanes.
template <class T, class F>
inline T reduce(const char* name, T value, Site site, F combine) {
  return exchange(name, value, 0, site, [=](LaneValue** lanes, unsigned) {
    T partial[32];
    bool active[32];
    for (int i = 0; i < 32; ++i) {
      active[i] = lanes[i] != nullptr;
      if (active[i]) partial[i] = value_of<T>(lanes[i]);
    }
    for (int step = 1; step < 32; step *= 2)
      for (int i = 0; i < 32; i += 2 * step) {
        if (active[i] && active[i + step]) partial[i] = combine(partial[i], partial[i + step]);
        else if (active[i + step]) partial[i] = partial[i + step], active[i] = true;
      }
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) set_result<T>(lanes[i], partial[0]);
  });
}

template <class T, class F>
inline T scan(const char* name, T value, Site site, bool inclusive, T start, F combine) {
  return exchange(name, value, 0, site, [=](LaneValue** lanes, unsigned) {
    T running = start;
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      const T with = static_cast<T>(combine(running, value_of<T>(lanes[i])));
      set_result<T>(lanes[i], inclusive ? with : running);
      running = with;
    }
  });
}

namespace names {

#define EMU_SHUFFLE(name, edge, expression)                                                                     \
  template <class T>                                                                                            \
  EMU_OPERATION T name(T value, ushort by, EMU_SITE) {                                                                 \
    return shuffle(#name, value, by, EMU_HERE, edge, [](int lane, int p) { (void)lane; return expression; });   \
  }
EMU_SHUFFLE(simd_shuffle, false, p)
EMU_SHUFFLE(simd_broadcast, false, p)
EMU_SHUFFLE(simd_shuffle_xor, false, lane ^ p)
EMU_SHUFFLE(simd_shuffle_down, true, lane + p)
EMU_SHUFFLE(simd_shuffle_up, true, lane - p)
EMU_SHUFFLE(simd_shuffle_rotate_down, false, (lane + p) & 31)
EMU_SHUFFLE(simd_shuffle_rotate_up, false, (lane - p) & 31)
EMU_SHUFFLE(quad_shuffle, false, (lane & ~3) + p)
EMU_SHUFFLE(quad_broadcast, false, (lane & ~3) + p)
EMU_SHUFFLE(quad_shuffle_xor, false, lane ^ (p & 3))
#undef EMU_SHUFFLE
template <class T>
EMU_OPERATION T simd_broadcast_first(T value, EMU_SITE) {
  return exchange("simd_broadcast_first", value, 0, EMU_HERE, [](LaneValue** lanes, unsigned active) {
    const T first = value_of<T>(lanes[__builtin_ctz(active)]);
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) set_result<T>(lanes[i], first);
  });
}

#define EMU_REDUCE(name, expression)                                                                \
  template <class T>                                                                                \
  EMU_OPERATION T name(T value, EMU_SITE) {                                                                \
    return reduce(#name, value, EMU_HERE, [](T x, T y) { return static_cast<T>(expression); });     \
  }
EMU_REDUCE(simd_sum, x + y)
EMU_REDUCE(simd_product, x * y)
EMU_REDUCE(simd_max, names::max(x, y))
EMU_REDUCE(simd_min, names::min(x, y))
EMU_REDUCE(simd_or, x | y)
EMU_REDUCE(simd_and, x & y)
EMU_REDUCE(simd_xor, x ^ y)
#undef EMU_REDUCE
template <class T>
EMU_OPERATION T simd_prefix_inclusive_sum(T value, EMU_SITE) {
  return scan("simd_prefix_inclusive_sum", value, EMU_HERE, true, T(0), [](T x, T y) { return x + y; });
}
template <class T>
EMU_OPERATION T simd_prefix_exclusive_sum(T value, EMU_SITE) {
  return scan("simd_prefix_exclusive_sum", value, EMU_HERE, false, T(0), [](T x, T y) { return x + y; });
}
EMU_OPERATION static bool simd_any(bool value, EMU_SITE) {
  return reduce("simd_any", value, EMU_HERE, [](bool x, bool y) { return x || y; });
}
EMU_OPERATION static bool simd_all(bool value, EMU_SITE) {
  return reduce("simd_all", value, EMU_HERE, [](bool x, bool y) { return x && y; });
}

enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}
inline void threadgroup_barrier(mem_flags flags, EMU_SITE) { emu::threadgroup_barrier(EMU_HERE, static_cast<unsigned>(flags)); }
inline void simdgroup_barrier(mem_flags flags, EMU_SITE) { emu::simdgroup_barrier(EMU_HERE, static_cast<unsigned>(flags)); }

}  // namespace names
}  // namespace emu
