// patch_pool: one row for each patch, from the rows of its bytes.
//
//   out[p, r D + d] = reduce_r of x[t, d] over the bytes t of patch p, in [offsets[p], offsets[p+1]); 0 if there are none
//   grad_x[t, d]    = sum over r of what byte t gets of grad_out[p, r D + d]: all of it (sum), a share of 1 / length (mean),
//                     of 1 / ties where x[t, d] is the maximum or minimum, all of it at one byte (first, last)
//
// Tiling: a thread owns kPack columns of one patch, 16 bytes of a row where x is aligned to that, and streams the rows of
// the patch past its registers, kRowsAhead loads in flight; neighbouring threads have neighbouring columns. All reductions
// of a tuple share the pass. No shared memory, no barriers: what a thread sums, it sums in a fixed order.
//
// Long patches (patch_parts.cuh): forward, their parts are folded first. Backward, they are left to owners of their parts.
// The first part of a patch includes the rows before it, the last one those behind. One launch counts the ties of each part,
// the next adds the counts of its patch up, the same ones in the same order for every part, and writes its rows.
//
// Bytes: forward reads x and writes out once. Backward writes grad_x and reads grad_out; for max and min it reads x and
// out too. The first kKeptRows rows of a patch stay in registers between counting ties and using them, later ones are
// read again. Roofline: a memory copy.
#pragma once

#include "segment_fold.cuh"

namespace blt {

enum class Reduce : int { kMax, kMin, kMean, kSum, kFirst, kLast };

inline constexpr int kMaxReductions = 16;
inline constexpr int kKeptRows = 5;  // of a patch, in registers from the count of ties on

// The reductions of a tuple in their order, four bits each.
struct Reductions {
  int count = 0;
  bool folds = false;  // whether one of them needs all rows
  u64 list = 0;
  __host__ __device__ Reduce operator[](int r) const { return static_cast<Reduce>(list >> 4 * r & 15); }
  __host__ __device__ bool has(Reduce reduce) const {
    for (int r = 0; r < count; ++r)
      if ((*this)[r] == reduce) return true;
    return false;
  }
};

template <class T, int kPack, Kinds kKinds>
__global__ void __launch_bounds__(kRowThreads, kKinds == Kinds::kAll   ? 2
                                               : kKinds == Kinds::kSum ? 4
                                                                       : 5)
    patch_pool_fwd_kernel(const T* x, PatchRows rows, RowTile tile, Reductions reductions,
                          __grid_constant__ const PartLevels<T> levels, T* out) {
  using Folded = Fold<T, kPack, kKinds>;
  const auto [patch, column] = owned_by_thread<kPack>(tile);
  if (patch >= rows.patches || column >= rows.width) return;
  const ByteRange range = patch_range(rows, patch);
  const bool empty = range.begin == range.end;
  x += column;
  Folded folded;
  if (reductions.folds) folded.add_segment(x, rows.stride, range, levels, column, rows.width);
  T* to = out + patch * rows.width * reductions.count + column;
#pragma unroll 1
  for (int r = 0; r < reductions.count; ++r, to += rows.width) {
    const Reduce reduce = reductions[r];
    Pack<T, kPack> result = {};
    if (empty) {
    } else if (reduce == Reduce::kFirst || reduce == Reduce::kLast) {
      result = load<kPack>(x + static_cast<i64>(reduce == Reduce::kFirst ? range.begin : range.end - 1) * rows.stride);
    } else if (Folded::kHasMax && reduce == Reduce::kMax) {
      result = bits_as<Pack<T, kPack>>(folded.max);
    } else if (Folded::kHasMin && reduce == Reduce::kMin) {
      result = bits_as<Pack<T, kPack>>(folded.min);
    } else if (Folded::kHasSum) {
      const acc_t<T> length = reduce == Reduce::kMean ? static_cast<acc_t<T>>(range.end - range.begin) : 1;
#pragma unroll
      for (int c = 0; c < kPack; ++c) result[c] = narrow<T>(quotient<T>(folded.sum[c], length));
    }
    store(to, result);
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------

// count += 1 where x is the extreme of its patch. In 16 bits that is exact up to 256.
__device__ __forceinline__ void count_tie(__nv_bfloat162& count, __nv_bfloat162 x, __nv_bfloat162 extreme) {
  count = __hadd2(count, __heq2(x, extreme));
}
__device__ __forceinline__ void count_tie(__half2& count, __half2 x, __half2 extreme) {
  count = __hadd2(count, __heq2(x, extreme));
}
template <class T>
__device__ __forceinline__ void count_tie(T& count, T x, T extreme) {
  count = narrow<T>(widen(count) + (widen(x) == widen(extreme) ? 1 : 0));
}

template <class T, int kPack>
__device__ __forceinline__ void count_ties(Units<T, kPack>& counts, const Units<T, kPack>& row,
                                           const Units<T, kPack>& extreme) {
#pragma unroll
  for (int c = 0; c < static_cast<int>(sizeof(row) / sizeof(row[0])); ++c) count_tie(counts[c], row[c], extreme[c]);
}

template <class T, int kPack>
__device__ __forceinline__ void widen_all(acc_t<T> (&to)[kPack], const Units<T, kPack>& from) {
  const auto numbers = bits_as<Pack<T, kPack>>(from);
#pragma unroll
  for (int c = 0; c < kPack; ++c) to[c] = widen(numbers[c]);
}

template <class T, int kPack>
__device__ __forceinline__ Units<T, kPack> narrow_all(const acc_t<T> (&from)[kPack]) {
  Pack<T, kPack> to;
#pragma unroll
  for (int c = 0; c < kPack; ++c) to[c] = narrow<T>(from[c]);
  return bits_as<Units<T, kPack>>(to);
}

// The rows of a patch that belong to one of its parts, those before the first and behind the last included.
__device__ __forceinline__ ByteRange rows_of_part(const ByteRange& patch, i32 part) {
  const ByteRange own = {part * kPart, (part + 1) * kPart};
  return {own.begin - patch.begin < kPart ? patch.begin : own.begin, patch.end - own.end < kPart ? patch.end : own.end};
}
static_assert(3 * kPart <= 256, "16-bit numbers count the ties of a part and of what is before and behind it");

// The ties of one extreme in each part.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    patch_pool_ties_kernel(const T* x, const T* extremes, PatchRows rows, const i32* ids, i64 parts, RowTile tile,
                           i64 out_stride, acc_t<T>* ties) {
  const auto [part, column] = owned_by_thread<kPack>(tile);
  if (part >= parts || column >= rows.width) return;
  const i64 patch = patch_of_part(ids, part * kPart, kPart);
  if (patch < 0 || patch >= rows.patches) return;
  const ByteRange own = rows_of_part(patch_range(rows, patch), static_cast<i32>(part));
  const auto extreme = load_units<T, kPack>(extremes + patch * out_stride + column);
  Units<T, kPack> counts = {};
  stream_rows<T, kPack, kRowsAhead>(
      x + static_cast<i64>(own.begin) * rows.stride + column, rows.stride, own.end - own.begin,
      [&](i32, const Units<T, kPack>& row) { count_ties<T, kPack>(counts, row, extreme); });
  acc_t<T> sums[kPack];
  widen_all<T, kPack>(sums, counts);
  store_sums<T, kPack>(ties + part * rows.width + column, sums);
}

// Ties of one extreme in the parts of long patches, by levels, if the tuple has it.
template <class T>
struct Ties {
  PartLevels<T> levels;
  bool asked;
};

// What a byte gets that attains the extreme of its patch, and any other: 0, or NaN where the patch has a NaN.
template <class T>
__device__ __forceinline__ T pick(T x, T extreme, T share, T other) {
  return widen(x) == widen(extreme) ? share : other;
}
__device__ __forceinline__ __nv_bfloat162 pick(__nv_bfloat162 x, __nv_bfloat162 extreme, __nv_bfloat162 share,
                                               __nv_bfloat162 other) {
  return bits_as<__nv_bfloat162>((__heq2_mask(x, extreme) & bits_as<u32>(share)) | bits_as<u32>(other));
}
__device__ __forceinline__ __half2 pick(__half2 x, __half2 extreme, __half2 share, __half2 other) {
  return bits_as<__half2>((__heq2_mask(x, extreme) & bits_as<u32>(share)) | bits_as<u32>(other));
}
template <class T>
__device__ __forceinline__ T nan_or_zero(T extreme) {
  return widen(extreme) == widen(extreme) ? T{} : extreme;
}
__device__ __forceinline__ __nv_bfloat162 nan_or_zero(__nv_bfloat162 extreme) {
  return bits_as<__nv_bfloat162>(bits_as<u32>(extreme) & ~__heq2_mask(extreme, extreme));
}
__device__ __forceinline__ __half2 nan_or_zero(__half2 extreme) {
  return bits_as<__half2>(bits_as<u32>(extreme) & ~__heq2_mask(extreme, extreme));
}

// The tensors of the backward; `at` a patch and a column, grad_out and out are of that patch. x and out are null without an
// extreme.
template <class T>
struct PoolGrad {
  const T *grad_out, *x, *out;
  T* grad_x;
  i32 stride, width;

  __device__ __forceinline__ PoolGrad at(i64 patch, i32 column, i64 grad_stride, i64 out_stride) const {
    return {grad_out + patch * grad_stride + column,
            x ? x + column : nullptr,
            out + patch * out_stride + column,
            grad_x + column,
            stride,
            width};
  }
  __device__ __forceinline__ const T* row(i32 t) const { return x + static_cast<i64>(t) * stride; }
  template <int kPack>
  __device__ __forceinline__ void send(i32 t, const Units<T, kPack>& grad) const {
    store(grad_x + static_cast<i64>(t) * width, bits_as<Pack<T, kPack>>(grad));
  }
};

// The gradient of a patch without parts from one extreme. All loads that wait for nothing but the offsets go out together,
// and the first rows stay in registers as they came.
template <class T, int kPack>
__device__ __forceinline__ void send_extreme(const PoolGrad<T>& tensors, const ByteRange& patch) {
  constexpr int kUnits = sizeof(Units<T, kPack>) / sizeof(unit_t<T, kPack>);
  const i32 count = patch.end - patch.begin;
  const T* from = tensors.row(patch.begin);
  Units<T, kPack> kept[kKeptRows];
  load_ahead<T, kPack>(kept, from, tensors.stride, count);  // `from` is behind them now
  const auto extreme = load_units<T, kPack>(tensors.out), grad = load_units<T, kPack>(tensors.grad_out);

  Units<T, kPack> ties = {};
#pragma unroll
  for (int i = 0; i < kKeptRows; ++i)
    if (i < count) count_ties<T, kPack>(ties, kept[i], extreme);
  stream_rows<T, kPack, 2>(from, tensors.stride, count - kKeptRows,
                           [&](i32, const Units<T, kPack>& row) { count_ties<T, kPack>(ties, row, extreme); });
  acc_t<T> share[kPack], divisor[kPack];
  widen_all<T, kPack>(share, grad);
  widen_all<T, kPack>(divisor, ties);
#pragma unroll
  for (int c = 0; c < kPack; ++c) share[c] = quotient<T>(share[c], divisor[c]);

  const auto tie = narrow_all<T, kPack>(share);
  const auto send = [&](i32 i, const Units<T, kPack>& row) {
    Units<T, kPack> result;
#pragma unroll
    for (int c = 0; c < kUnits; ++c) result[c] = pick(row[c], extreme[c], tie[c], nan_or_zero(extreme[c]));
    tensors.template send<kPack>(patch.begin + i, result);
  };
#pragma unroll
  for (int i = 0; i < kKeptRows; ++i)
    if (i < count) send(i, kept[i]);
  stream_rows<T, kPack, kPartsAhead>(from, tensors.stride, count - kKeptRows,
                                     [&](i32 i, const Units<T, kPack>& row) { send(kKeptRows + i, row); });
}

// What the bytes of a patch get from its maximum or minimum: first the gradients of all such reductions, added up, then what
// each tie gets of them.
template <class T, int kPack>
struct ExtremeGrad {
  Units<T, kPack> extreme = {};
  acc_t<T> share[kPack] = {};

  __device__ __forceinline__ void divide(const acc_t<T> (&ties)[kPack]) {
#pragma unroll
    for (int c = 0; c < kPack; ++c) share[c] = quotient<T>(share[c], ties[c]);
  }
  // By the ties of all parts of the patch.
  __device__ __forceinline__ void divide(const Ties<T>& ties, const ByteRange& patch, i32 column, i32 width) {
    Fold<T, kPack, Kinds::kSum> fold;
    fold.add_levels(ties.levels, parted(patch).parts, column, width);
    divide(fold.sum);
  }
  __device__ __forceinline__ void add_to(acc_t<T> (&sum)[kPack], const Units<T, kPack>& row) const {
    acc_t<T> x[kPack], best[kPack];
    widen_all<T, kPack>(x, row);
    widen_all<T, kPack>(best, extreme);
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] += pick(x[c], best[c], share[c], nan_or_zero(best[c]));
  }
};

// The gradient of the rows `own` of a patch from all reductions of a tuple: of all its rows, or of those of a part.
template <class T, int kPack, bool kHasExtremes, bool kOfPart>
__device__ __forceinline__ void send_all(const PoolGrad<T>& tensors, const ByteRange& patch, const ByteRange& own,
                                         const Reductions& reductions, const Ties<T>& max_ties, const Ties<T>& min_ties,
                                         i32 column) {
  using A = acc_t<T>;
  A all[kPack] = {}, first[kPack] = {}, last[kPack] = {};
  ExtremeGrad<T, kPack> max, min;
  const A length = static_cast<A>(patch.end - patch.begin);
  const T *grads = tensors.grad_out, *extremes = tensors.out;
#pragma unroll 1
  for (int r = 0; r < reductions.count; ++r, grads += tensors.width, extremes += tensors.width) {
    const Reduce reduce = reductions[r];
    const bool is_max = kHasExtremes && reduce == Reduce::kMax, is_min = kHasExtremes && reduce == Reduce::kMin;
    const Pack<T, kPack> grad = load<kPack>(grads);
    if (is_max) max.extreme = load_units<T, kPack>(extremes);
    if (is_min) min.extreme = load_units<T, kPack>(extremes);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const A g = widen(grad[c]);
      if (is_max)
        max.share[c] += g;
      else if (is_min)
        min.share[c] += g;
      else if (reduce == Reduce::kFirst)
        first[c] += g;
      else if (reduce == Reduce::kLast)
        last[c] += g;
      else
        all[c] += reduce == Reduce::kMean ? quotient<T>(g, length) : g;
    }
  }

  const i32 count = own.end - own.begin;
  if (kHasExtremes && !kOfPart && tensors.x) {
    Units<T, kPack> max_counts = {}, min_counts = {};
    stream_rows<T, kPack, kPartsAhead>(tensors.row(own.begin), tensors.stride, count,
                                       [&](i32, const Units<T, kPack>& row) {
                                         count_ties<T, kPack>(max_counts, row, max.extreme);
                                         count_ties<T, kPack>(min_counts, row, min.extreme);
                                       });
    A ties[kPack];
    widen_all<T, kPack>(ties, max_counts);
    max.divide(ties);
    widen_all<T, kPack>(ties, min_counts);
    min.divide(ties);
  }
  if (kHasExtremes && kOfPart && max_ties.asked) max.divide(max_ties, patch, column, tensors.width);
  if (kHasExtremes && kOfPart && min_ties.asked) min.divide(min_ties, patch, column, tensors.width);

  const auto send = [&](i32 i, const Units<T, kPack>& row) {
    const i32 t = own.begin + i;
    A sum[kPack];
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      sum[c] = all[c];
      if (t == patch.begin) sum[c] += first[c];
      if (t == patch.end - 1) sum[c] += last[c];
    }
    if (kHasExtremes && max_ties.asked) max.add_to(sum, row);
    if (kHasExtremes && min_ties.asked) min.add_to(sum, row);
    tensors.template send<kPack>(t, narrow_all<T, kPack>(sum));
  };
  if (kHasExtremes && tensors.x)
    stream_rows<T, kPack, kPartsAhead>(tensors.row(own.begin), tensors.stride, count, send);
  else
    for (i32 i = 0; i < count; ++i) send(i, {});
}

// Patches without parts. Of kinds, kMax is one extreme alone, whichever it is.
template <class T, int kPack, Kinds kKinds>
__global__ void __launch_bounds__(kRowThreads, kKinds == Kinds::kAll ? 2 : 4)
    patch_pool_bwd_kernel(PoolGrad<T> tensors, PatchRows rows, RowTile tile, i64 grad_stride, i64 out_stride,
                          Reductions reductions, __grid_constant__ const Ties<T> max_ties,
                          __grid_constant__ const Ties<T> min_ties) {
  const auto [patch, column] = owned_by_thread<kPack>(tile);
  if (patch >= rows.patches || column >= rows.width) return;
  const ByteRange range = patch_range(rows, patch);
  const auto parts = parted(range).parts;
  if (range.begin == range.end || parts.begin < parts.end) return;
  tensors = tensors.at(patch, column, grad_stride, out_stride);
  if constexpr (kKinds == Kinds::kMax)
    send_extreme<T, kPack>(tensors, range);
  else
    send_all<T, kPack, kKinds == Kinds::kAll, false>(tensors, range, range, reductions, max_ties, min_ties, column);
}

// The parts of all others, and zeros behind the last patch.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads, 2)
    patch_pool_parts_bwd_kernel(PoolGrad<T> tensors, PatchRows rows, const i32* ids, RowTile tile, i64 grad_stride,
                                i64 out_stride, Reductions reductions, __grid_constant__ const Ties<T> max_ties,
                                __grid_constant__ const Ties<T> min_ties) {
  const auto [part, column] = owned_by_thread<kPack>(tile);
  if (column >= rows.width) return;
  const i64 begin = part * kPart, end = least<i64>(begin + kPart, rows.bytes);
  const i64 covered = rows.patches > 0 ? least(most(rows.offsets[rows.patches], 0), rows.bytes) : 0;
#pragma unroll 1
  for (i64 t = most(begin, covered); t < end; ++t) store(tensors.grad_x + t * rows.width + column, Pack<T, kPack>{});
  if (begin + kPart != end) return;
  const i64 patch = patch_of_part(ids, begin, kPart);
  if (patch < 0 || patch >= rows.patches) return;
  const ByteRange range = patch_range(rows, patch), own = rows_of_part(range, static_cast<i32>(part));
  send_all<T, kPack, true, true>(tensors.at(patch, column, grad_stride, out_stride), range, own, reductions, max_ties,
                                 min_ties, column);
}

}  // namespace blt
