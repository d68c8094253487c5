// Adds up the sums of units by slot (patch_readers.cuh) in a fixed order: for the vectors of a patch those of its own
// unit, then those of the parts of divided patches that its vectors meet, the nearest patch first. A block looks at 32
// parts in one head. For each first part of a divided patch it goes through the patches to which this one is the
// nearest. Every warp adds up a share of the units, then the block adds up the sums of its warps.
//
//   softmax   to = sum_u exp(m_u - m) sums_u / l,  lse = m + log l,  with m = max_u m_u and l = sum_u exp(m_u - m) l_u
//   else      to = sum_u sums_u
#pragma once

#include "patch_cross_attention.cuh"

namespace blt {

template <class A>
struct WarpSums {
  static constexpr int kWarps = kPartSumThreads / kWarp;
  A totals[kWarps], sums[kWarps][kMaxWidth];
};

// Calls f(slot, place of the patch in the slot) for units that have sums for the vectors of patch p: every `step`-th
// one from `first` on. `nearest` is the divided patch nearest to p.
template <class F>
__device__ __forceinline__ void for_each_slot(const PatchReaders& readers, int p, int nearest, const Range& document,
                                              int first, int step, F&& f) {
  int skipped = first;  // counts the units before the next one
  for (int n = -1; n < readers.window; ++n) {
    const int other = n < 0 ? nearest : readers.encode ? nearest - n : nearest + n;
    const int distance = readers.encode ? p - other : other - p;
    if (other < document.begin || document.end <= other || distance >= readers.window) return;
    const Parted own = readers.parted_patch(other);
    const int begin = static_cast<int>(own.parts.begin) + (n < 0 ? readers.parts : 0);
    const int count = n < 0 ? 1 : static_cast<int>(own.parts.end - own.parts.begin);
    const int place = p - readers.origin_of(other);
#pragma unroll 4
    for (; skipped < count; skipped += step) f(begin + skipped, place);
    skipped -= count;
  }
}

// to is [patches * vectors, heads, width], lse [patches * vectors, heads] for the sums of a softmax.
template <class T, bool kSoftmax>
__global__ void __launch_bounds__(kPartSumThreads, 1)
    patch_cross_attention_sum_kernel(PatchReaders readers, PartSums<acc_t<T>> parts, T* to, acc_t<T>* lse, int width) {
  using A = acc_t<T>;
  constexpr int kWarps = WarpSums<A>::kWarps, kColumns = kMaxWidth / kWarp;
  auto& shared = shared_memory<WarpSums<A>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, head = blockIdx.y;
  const int part = blockIdx.x * kWarp + lane;
  int divided = -1;
  if (part < readers.parts) {
    const int p = readers.patch_of(part << readers.log_part);
    const Parted own = readers.parted_patch(p);
    if (part == own.parts.begin && part < own.parts.end) divided = p;
  }
  for (u32 firsts = __ballot_sync(kAllLanes, divided >= 0); firsts; firsts &= firsts - 1) {
    const int nearest = __shfl_sync(kAllLanes, divided, __ffs(firsts) - 1);
    Range document = {nearest, nearest + 1};
    if (readers.window > 1) readers.document_of(nearest, document.begin, document.end);
    for (int n = 0; n < readers.window * parts.vectors; ++n) {
      const int distance = n / parts.vectors, row = n % parts.vectors;
      const int p = readers.encode ? nearest + distance : nearest - distance;
      if (p < document.begin || document.end <= p) break;
      if (distance > 0 && readers.is_divided(p)) break;
      const auto at_slot = [&](int slot, int place) { return parts.at(slot, place * parts.vectors + row, head); };
      A top = minus_infinity<A>(), total = 0, sums[kColumns] = {};
      if (kSoftmax) {
        for_each_slot(readers, p, nearest, document, lane, kWarp,
                      [&](int slot, int place) { top = max(top, parts.softmax[2 * at_slot(slot, place)]); });
        top = warp_fold(top, Max{});
      }
      const A shift = top == minus_infinity<A>() ? A(0) : top;
      for_each_slot(readers, p, nearest, document, warp, kWarps, [&](int slot, int place) {
        const i64 at = at_slot(slot, place);
        A weight = 1;
        if (kSoftmax) {
          const auto softmax = load<2>(parts.softmax + 2 * at);
          weight = exp(softmax[0] - shift);
          total += weight * softmax[1];
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (c * kWarp + lane < width) sums[c] += weight * parts.sums[at * width + c * kWarp + lane];
      });
      if (lane == 0) shared.totals[warp] = total;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) shared.sums[warp][c * kWarp + lane] = sums[c];
      __syncthreads();
      const i64 at = (static_cast<i64>(p) * parts.vectors + row) * parts.heads + head;
      A sum = 0, whole = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][threadIdx.x], whole += shared.totals[w];
      if (kSoftmax && threadIdx.x == 0) lse[at] = shift + log(whole);
      if (static_cast<int>(threadIdx.x) < width)
        to[at * width + threadIdx.x] = from_float<T>(!kSoftmax ? sum : whole == 0 ? A(0) : sum / whole);
      __syncthreads();
    }
  }
}

}  // namespace blt
