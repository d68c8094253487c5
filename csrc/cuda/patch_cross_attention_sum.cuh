// The sums of units of divided patches (patch_readers.cuh), added up in a fixed order: those of the patch's own unit, which
// has both ends of its bytes, then those of its parts. A block looks at 32 parts in one head. For each that is the first of
// a patch every warp adds up a share of the units, then the block the sums of its warps.
//
//   softmax   to = sum_u exp(m_u - m) sums_u / l,  lse = m + log l,  with m = max_u m_u and l = sum_u exp(m_u - m) l_u
//   else      to = sum_u sums_u
#pragma once

#include "patch_cross_attention.cuh"

namespace blt {

template <class T>
struct Summed {
  T* to;          // [patches * rows, heads, width]
  acc_t<T>* lse;  // of a softmax
  int width;
};

template <class A>
struct WarpSums {
  static constexpr int kWarps = kPartSumThreads / kWarp;
  A totals[kWarps], sums[kWarps][kMaxWidth];
};

template <class T, bool kSoftmax>
__global__ void __launch_bounds__(kPartSumThreads, 1)
    patch_cross_attention_sum_kernel(PatchReaders readers, PartSums<acc_t<T>> parts, Summed<T> summed) {
  using A = acc_t<T>;
  constexpr int kWarps = WarpSums<A>::kWarps, kColumns = kMaxWidth / kWarp;
  auto& shared = shared_memory<WarpSums<A>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, head = blockIdx.y;
  const int first = blockIdx.x * kWarp, part = first + lane;
  int patch = -1, end = 0;
  if (part < readers.parts) {
    const int p = readers.patch_of(part * kPart), begin = readers.offset(p);
    const Parted bytes = readers.parts_of(begin, most(readers.offset(p + 1), begin));
    if (part == bytes.parts.begin && part < bytes.parts.end) patch = p, end = static_cast<int>(bytes.parts.end);
  }
  for (u32 firsts = __ballot_sync(kAllLanes, patch >= 0); firsts; firsts &= firsts - 1) {
    const int source = __ffs(firsts) - 1, begin = first + source;
    const i64 p = __shfl_sync(kAllLanes, patch, source);
    const int count = 1 + __shfl_sync(kAllLanes, end, source) - begin;
    const auto slot = [&](int n) { return n == 0 ? readers.parts + begin : begin + n - 1; };
    for (int row = 0; row < parts.rows; ++row) {
      A top = no_score<A>(), total = 0, sums[kColumns] = {};
      if (kSoftmax) {
        for (int n = lane; n < count; n += kWarp) top = most(top, parts.softmax[2 * parts.at(slot(n), row, head)]);
        top = warp_fold(top, Most{});
      }
      const A shift = top == no_score<A>() ? A(0) : top;
#pragma unroll 4
      for (int n = warp; n < count; n += kWarps) {
        const i64 at = parts.at(slot(n), row, head);
        A weight = 1;
        if (kSoftmax) {
          const auto softmax = load<2>(parts.softmax + 2 * at);
          weight = power_of_e(softmax[0] - shift);
          total += weight * softmax[1];
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (c * kWarp + lane < summed.width) sums[c] += weight * parts.sums[at * summed.width + c * kWarp + lane];
      }
      if (lane == 0) shared.totals[warp] = total;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) shared.sums[warp][c * kWarp + lane] = sums[c];
      __syncthreads();
      const i64 at = (p * parts.rows + row) * parts.heads + head;
      A sum = 0, whole = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][threadIdx.x], whole += shared.totals[w];
      if (kSoftmax && threadIdx.x == 0) summed.lse[at] = shift + log_to_e(whole);
      if (static_cast<int>(threadIdx.x) < summed.width)
        summed.to[at * summed.width + threadIdx.x] = narrow<T>(!kSoftmax ? sum : whole == 0 ? A(0) : sum / whole);
      __syncthreads();
    }
  }
}

}  // namespace blt
