// patch_pool: one row for each patch, from the rows of its bytes.
//
//   out[p, r D + d] = reduce_r of x[t, d] over the bytes t of patch p, in [offsets[p], offsets[p+1]); 0 if there are none
//   grad_x[t, d]    = sum over r of what byte t gets of grad_out[p, r D + d]: all of it (sum), a share of 1 / length (mean),
//                     of 1 / ties where x[t, d] is the maximum or minimum, all of it at one byte (first, last)
//
// Tiling: a thread owns kPack columns of one patch, 16 bytes of a row where x is aligned to that, and streams the rows of
// the patch past its registers, kAhead loads in flight; neighbouring threads have neighbouring columns. All reductions of a
// tuple share the pass. No shared memory, no barriers: what a thread sums, it sums in the order of the rows.
//
// Bytes: forward reads x and writes out once. Backward writes grad_x and reads grad_out; for max and min it reads x and
// out too. The first kAhead rows of a patch stay in registers between counting ties and using them, later ones are read
// again. Roofline: a memory copy; about 8 instructions for a number.
#pragma once

#include "patch_rows.cuh"

namespace blt {

enum class Reduce : int { kMax, kMin, kMean, kSum, kFirst, kLast };

inline constexpr int kMaxReductions = 16;

// The reductions of a tuple in their order, four bits each.
struct Reductions {
  int count = 0;
  u64 list = 0;
  __host__ __device__ Reduce operator[](int r) const { return static_cast<Reduce>(list >> 4 * r & 15); }
  __host__ __device__ bool has(Reduce reduce) const {
    for (int r = 0; r < count; ++r)
      if ((*this)[r] == reduce) return true;
    return false;
  }
};

// What a kernel is compiled for, since registers for what is not asked for would cost occupancy.
enum class Kinds : int {
  kSums,  // sum, mean, first, last
  kMax,   // max, sum, mean
  kAll,
};

// The larger and the smaller of two, NaN if either is.
template <class A>
__device__ __forceinline__ A larger(A best, A x) {
  return x > best || x != x ? x : best;
}
template <class A>
__device__ __forceinline__ A smaller(A best, A x) {
  return x < best || x != x ? x : best;
}

template <class A, int kPack>
struct Folded {
  A max[kPack], min[kPack], sum[kPack];
};

template <class T, int kPack, Kinds kKinds>
__global__ void __launch_bounds__(kRowThreads, 2)
    patch_pool_fwd_kernel(const T* x, PatchRows rows, Reductions reductions, T* out) {
  using A = acc_t<T>;
  constexpr int kAhead = 4;
  constexpr bool kHasMax = kKinds != Kinds::kSums, kHasMin = kKinds == Kinds::kAll;
  const auto [patch, column] = owned_by_thread<kPack>(rows.width);
  if (patch >= rows.patches) return;
  const auto [begin, end] = patch_range(rows, patch);
  const T* const from = x + column;
  Folded<A, kPack> folded = {};
  for (i64 row = begin; row < end; row += kAhead) {
    Pack<T, kPack> ahead[kAhead];
    load_rows(ahead, from, rows.stride, row, end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i >= end) break;
      const bool first = row + i == begin;
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        const A value = widen(ahead[i][c]);
        if (kHasMax) folded.max[c] = first ? value : larger(folded.max[c], value);
        if (kHasMin) folded.min[c] = first ? value : smaller(folded.min[c], value);
        folded.sum[c] = first ? value : folded.sum[c] + value;
      }
    }
  }
  T* const to = out + patch * rows.width * reductions.count + column;
  for (int r = 0; r < reductions.count; ++r) {
    const Reduce reduce = reductions[r];
    Pack<T, kPack> result;
    if (begin == end || reduce == Reduce::kFirst || reduce == Reduce::kLast) {
      if (begin < end) result = load<kPack>(from + (reduce == Reduce::kFirst ? begin : end - 1) * rows.stride);
#pragma unroll
      for (int c = 0; c < kPack; ++c)
        if (begin == end) result[c] = narrow<T>(0);
    } else {
      const A length = static_cast<A>(end - begin);
#pragma unroll
      for (int c = 0; c < kPack; ++c)
        result[c] = narrow<T>(kHasMax && reduce == Reduce::kMax   ? folded.max[c]
                              : kHasMin && reduce == Reduce::kMin ? folded.min[c]
                              : reduce == Reduce::kMean           ? folded.sum[c] / length
                                                                  : folded.sum[c]);
    }
    store(to + r * rows.width, result);
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------

// The gradients of all reductions of one kind, added up; and the extreme that ties are counted for.
template <class T, class A, int kPack>
struct Shares {
  A all[kPack], first[kPack], last[kPack], max[kPack], min[kPack];
  Pack<T, kPack> highest = {}, lowest = {};
};

// What a byte with value x gets of `share` in a patch whose extreme is `best`; NaN where that is.
template <class A>
__device__ __forceinline__ A tie_share(A x, A best, A share) {
  return x == best ? share : (best == best ? A(0) : best);
}

template <class T, int kPack, class A>
__device__ __forceinline__ Shares<T, A, kPack> shares_of(const T* grad_out, const T* out, i64 grad_stride,
                                                         i64 out_stride, const Owned& at, i64 width, A length,
                                                         const Reductions& reductions) {
  Shares<T, A, kPack> shares;
#pragma unroll
  for (int c = 0; c < kPack; ++c) shares.all[c] = shares.first[c] = shares.last[c] = shares.max[c] = shares.min[c] = 0;
  for (int r = 0; r < reductions.count; ++r) {
    const Reduce reduce = reductions[r];
    const i64 column = r * width + at.column;
    const Pack<T, kPack> grad = load<kPack>(grad_out + at.group * grad_stride + column);
    if (reduce == Reduce::kMax) shares.highest = load<kPack>(out + at.group * out_stride + column);
    if (reduce == Reduce::kMin) shares.lowest = load<kPack>(out + at.group * out_stride + column);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const A g = widen(grad[c]);
      switch (reduce) {
        case Reduce::kMax: shares.max[c] += g; break;
        case Reduce::kMin: shares.min[c] += g; break;
        case Reduce::kMean: shares.all[c] += g / length; break;
        case Reduce::kSum: shares.all[c] += g; break;
        case Reduce::kFirst: shares.first[c] += g; break;
        case Reduce::kLast: shares.last[c] += g; break;
      }
    }
  }
  return shares;
}

// x may be null unless there is a maximum or a minimum. Bytes behind the last patch get zeros, spread over all patches.
template <class T, int kPack, Kinds kKinds>
__global__ void __launch_bounds__(kRowThreads, kPack == 1              ? 3
                                               : kKinds == Kinds::kAll ? 1
                                                                       : 2)
    patch_pool_bwd_kernel(const T* grad_out, const T* x, const T* out, PatchRows rows, i64 grad_stride, i64 out_stride,
                          Reductions reductions, T* grad_x) {
  using A = acc_t<T>;
  constexpr int kAhead = 4;
  constexpr bool kHasMax = kKinds != Kinds::kSums, kHasMin = kKinds == Kinds::kAll, kHasEnds = kKinds != Kinds::kMax;
  const Owned at = owned_by_thread<kPack>(rows.width);
  if (at.group >= most<i64>(rows.patches, 1)) return;
  T* const to = grad_x + at.column;
  const Pack<T, kPack> zeros = {};
  const i64 covered = rows.patches > 0 ? least(most<i64>(rows.offsets[rows.patches], 0), rows.bytes) : 0;
  for (i64 row = covered + at.group; row < rows.bytes; row += most<i64>(rows.patches, 1))
    store(to + row * rows.width, zeros);
  if (rows.patches == 0) return;
  const auto [begin, end] = patch_range(rows, at.group);
  if (begin == end) return;

  const T* const from = x + at.column;
  auto shares = shares_of<T, kPack, A>(grad_out, out, grad_stride, out_stride, at, rows.width,
                                       static_cast<A>(end - begin), reductions);
  Pack<T, kPack> kept[kAhead];
  const auto for_each_row = [&](const auto& visit) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (begin + i < end) visit(begin + i, kept[i]);
    for (i64 row = begin + kAhead; row < end; ++row)
      visit(row, kHasMax ? load<kPack>(from + row * rows.stride) : zeros);
  };
  if (kHasMax) {
    A highest[kPack] = {}, lowest[kPack] = {};
    load_rows(kept, from, rows.stride, begin, end);
    for_each_row([&](i64, const Pack<T, kPack>& values) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        if (widen(values[c]) == widen(shares.highest[c])) highest[c] += 1;
        if (kHasMin && widen(values[c]) == widen(shares.lowest[c])) lowest[c] += 1;
      }
    });
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      shares.max[c] /= highest[c];
      if (kHasMin) shares.min[c] /= lowest[c];
    }
  }
  for_each_row([&](i64 row, const Pack<T, kPack>& values) {
    Pack<T, kPack> grad;
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      A sum = shares.all[c];
      if (kHasEnds && row == begin) sum += shares.first[c];
      if (kHasEnds && row == end - 1) sum += shares.last[c];
      if (kHasMax) sum += tie_share<A>(widen(values[c]), widen(shares.highest[c]), shares.max[c]);
      if (kHasMin) sum += tie_share<A>(widen(values[c]), widen(shares.lowest[c]), shares.min[c]);
      grad[c] = narrow<T>(sum);
    }
    store(to + row * rows.width, grad);
  });
}

}  // namespace blt
