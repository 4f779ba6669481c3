// How attend_fused assigns items to readers, and which partial states that leaves to merge.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attend_items.cuh"

namespace kv4::cuda {

// How a segment's items are divided among the readers of its CTAs, kCount each.
//
// Where there are pages for every reader and few exact items, the two are divided separately (kApart), and the first
// reader of each CTA takes the exact items: every warp that reads exact rows waits for instructions that are not in the
// cache yet, 6 us when all eight did so at once.
template <int kCount, bool kApart>
struct FusedShares : Shares {
  int exact_items, items, ctas;
  bool apart;
  int holders = 0;  // readers with exact items where these are apart, each in a CTA of its own

  __device__ __forceinline__ FusedShares(int exact, int pages)
      : Shares(exact + pages, static_cast<int>(gridDim.x) * kCount), exact_items(exact), items(exact + pages),
        ctas(max(1, (readers + kCount - 1) / kCount)) {
    const int all = static_cast<int>(gridDim.x) * kCount;
    apart = kApart && pages >= all && exact <= 2 * static_cast<int>(gridDim.x);
    if (!apart) return;
    holders = min(exact, ctas);
    each = pages / all;
    more = pages - each * all;
  }
  __device__ __forceinline__ ItemRange of(int cta, int reader) const {
    const int w = cta * kCount + reader;
    if (w >= readers) return {};
    if (!apart) {
      const int begin = first(w), behind = first(w + 1), pages = max(begin, exact_items);
      return {begin, max(0, min(behind, exact_items) - begin), pages - exact_items, max(0, behind - pages)};
    }
    const int rank = reader * ctas + cta, fewer = readers - more, page = rank * each + max(0, rank - fewer);
    const int page_count = each + (rank >= fewer ? 1 : 0);
    if (rank >= holders) return {0, 0, page, page_count};
    const int begin = rank * exact_items / holders;
    return {begin, (rank + 1) * exact_items / holders - begin, page, page_count};
  }
};

// What merging needs to know, computed by the filling warp, which has time for divisions. A segment's partial states in
// device memory are in the order of its CTAs: [0, exact) over exact rows, from CTA 0 on; [exact, all) over pages, from
// CTA first_paged on.
struct FusedEnd {
  int ctas, exact, all, first_paged;
  int first_pages, readers;  // readers [first_pages, readers) of this CTA end with a state over pages, those before
                             // with one over exact rows
  int carried;               // 1: one reader that ends with a state over pages has one over exact rows too
};
template <int kCount, bool kApart>
__device__ __forceinline__ FusedEnd fused_end(const FusedShares<kCount, kApart>& shares, int cta) {
  if (shares.apart)
    return {shares.ctas, shares.holders, shares.holders + shares.ctas, 0, 0, kCount, cta < shares.holders ? 1 : 0};
  const bool any_pages = shares.exact_items < shares.items;
  const int paged_reader = any_pages ? shares.owner(shares.exact_items) : shares.readers;
  FusedEnd end;
  end.ctas = shares.ctas;
  end.exact = shares.exact_items > 0 ? shares.owner(shares.exact_items - 1) / kCount + 1 : 0;
  end.first_paged = any_pages ? paged_reader / kCount : shares.ctas;
  end.all = end.exact + end.ctas - end.first_paged;
  end.readers = max(0, min(kCount, shares.readers - cta * kCount));
  end.first_pages = min(max(paged_reader - cta * kCount, 0), end.readers);
  end.carried = any_pages && paged_reader / kCount == cta && shares.first(paged_reader) < shares.exact_items ? 1 : 0;
  return end;
}

}  // namespace kv4::cuda
