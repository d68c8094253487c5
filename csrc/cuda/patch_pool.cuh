// patch_pool reduces the rows of the bytes of a patch to one row.
//
//   out[p, r D + d] = reduce_r of x[t, d] over the bytes t of patch p, in [offsets[p], offsets[p+1]); 0 if it is empty
//   grad_x[t, d]    = sum over r of the share of byte t in grad_out[p, r D + d]: all of it (sum), 1 / length (mean),
//                     1 / ties where x[t, d] is the maximum or minimum, all of it at one byte (first, last)
//
// Tiling: a thread owns kVec columns of one patch, 16 bytes of a row where x is aligned to that, and streams the rows
// of the patch through its registers with a prefetch depth of kRowPrefetch; neighbouring threads own neighbouring
// columns. All reductions of a tuple share the pass. There is no shared memory and no barrier, and every sum has a
// fixed order.
//
// Long patches (patch_parts.cuh): forward, their parts are folded first. Backward, each part has owners of its own; the
// first part of a patch includes the rows before it, the last one those after it. One launch counts the ties of each
// part. In the next, every part adds up the counts of the patch in the same order, and writes its rows.
//
// Bytes: forward reads x and writes out once. Backward writes grad_x and reads grad_out; for max and min it also reads
// x and out. The first kKeptRows rows of a patch stay in registers between counting ties and using them; later ones are
// read again. Roofline: a memory copy.
#pragma once

#include "segment_fold.cuh"

namespace blt {

// The order is that of kReductions in common/args/patch_pool.h.
enum class Reduce : int { kMax, kMin, kMean, kSum, kFirst, kLast };

inline constexpr int kMaxReductions = 16;
inline constexpr int kKeptRows = 5;  // rows of a patch that stay in registers

// Lists the reductions of a tuple in order, four bits each.
struct PackedReductions {
  int count = 0;
  bool folds = false;  // is set if one of them needs all rows
  u64 list = 0;
  __device__ __forceinline__ Reduce operator[](int r) const { return static_cast<Reduce>(list >> 4 * r & 15); }
};

template <class T, int kVec, Kinds kKinds>
__global__ void __launch_bounds__(kRowThreads, kKinds == Kinds::kAll   ? 2
                                               : kKinds == Kinds::kSum ? 4
                                                                       : 5)
    patch_pool_fwd_kernel(const T* x, PatchRows rows, RowTile tile, PackedReductions reductions,
                          __grid_constant__ const PartLevels<T> levels, T* out) {
  using Folded = Fold<T, kVec, kKinds>;
  const auto [patch, column] = owned_by_thread<kVec>(tile);
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
    AlignedVector<T, kVec> result = {};
    if (empty) {
    } else if (reduce == Reduce::kFirst || reduce == Reduce::kLast) {
      result = load<kVec>(x + static_cast<i64>(reduce == Reduce::kFirst ? range.begin : range.end - 1) * rows.stride);
    } else if (Folded::kHasMax && reduce == Reduce::kMax) {
      result = bits_as<AlignedVector<T, kVec>>(folded.max);
    } else if (Folded::kHasMin && reduce == Reduce::kMin) {
      result = bits_as<AlignedVector<T, kVec>>(folded.min);
    } else if (Folded::kHasSum) {
      const acc_t<T> length = reduce == Reduce::kMean ? static_cast<acc_t<T>>(range.end - range.begin) : 1;
#pragma unroll
      for (int c = 0; c < kVec; ++c) result[c] = from_float<T>(quotient<T>(folded.sum[c], length));
    }
    store(to, result);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// Adds 1 to count if x equals the extreme of its patch. In 16 bits counts are exact up to 256.
template <class T>
__device__ __forceinline__ void count_tie(T& count, T x, T extreme) {
  if constexpr (kIsPair<T>)
    count = __hadd2(count, __heq2(x, extreme));
  else
    count = from_float<T>(to_float(count) + (to_float(x) == to_float(extreme) ? 1 : 0));
}

template <class T, int kVec>
__device__ __forceinline__ void count_ties(Operands<T, kVec>& counts, const Operands<T, kVec>& row,
                                           const Operands<T, kVec>& extreme) {
#pragma unroll
  for (int c = 0; c < static_cast<int>(sizeof(row) / sizeof(row[0])); ++c) count_tie(counts[c], row[c], extreme[c]);
}

// Returns the rows of a patch that one of its parts owns: the first and the last part include the rows outside parts.
__device__ __forceinline__ ByteRange rows_of_part(const ByteRange& patch, i32 part) {
  const ByteRange own = {part * kPart, (part + 1) * kPart};
  return {own.begin - patch.begin < kPart ? patch.begin : own.begin, patch.end - own.end < kPart ? patch.end : own.end};
}
static_assert(3 * kPart <= 256, "16-bit numbers count the ties of a part and of the rows before and after it");

// Counts the ties of one extreme in each part.
template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads)
    patch_pool_ties_kernel(const T* x, const T* extremes, PatchRows rows, const i32* ids, i64 parts, RowTile tile,
                           i64 out_stride, acc_t<T>* ties) {
  const auto [part, column] = owned_by_thread<kVec>(tile);
  if (part >= parts || column >= rows.width) return;
  const i64 patch = patch_of_part(ids, part * kPart, kPart);
  if (patch < 0 || patch >= rows.patches) return;
  const ByteRange own = rows_of_part(patch_range(rows, patch), static_cast<i32>(part));
  const auto extreme = load_operands<T, kVec>(extremes + patch * out_stride + column);
  Operands<T, kVec> counts = {};
  stream_rows<T, kVec, kRowPrefetch>(
      x + static_cast<i64>(own.begin) * rows.stride + column, rows.stride, own.end - own.begin,
      [&](i32, const Operands<T, kVec>& row) { count_ties<T, kVec>(counts, row, extreme); });
  acc_t<T> sums[kVec];
  to_floats<T>(sums, counts);
  store_numbers(ties + part * rows.width + column, sums);
}

// Has the ties of one extreme in the parts of long patches, by levels. `asked` is set if the tuple has this extreme.
template <class T>
struct Ties {
  PartLevels<T> levels;
  bool asked;
};

// Returns the gradient of a byte: `share` if x equals the extreme of its patch, else `other`, which is 0, or NaN if the
// patch has one.
template <class T>
__device__ __forceinline__ T pick(T x, T extreme, T share, T other) {
  if constexpr (kIsPair<T>)
    return bits_as<T>((__heq2_mask(x, extreme) & bits_as<u32>(share)) | bits_as<u32>(other));
  else
    return to_float(x) == to_float(extreme) ? share : other;
}
template <class T>
__device__ __forceinline__ T nan_or_zero(T extreme) {
  if constexpr (kIsPair<T>)
    return bits_as<T>(bits_as<u32>(extreme) & ~__heq2_mask(extreme, extreme));
  else
    return to_float(extreme) == to_float(extreme) ? T{} : extreme;
}

// Points to the tensors of the backward; x and out are null without an extreme. at() moves grad_out and out to a patch,
// and all pointers to the thread's columns.
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
  template <int kVec, class Grad>
  __device__ __forceinline__ void send(i32 t, const Grad& grad) const {
    store(grad_x + static_cast<i64>(t) * width, bits_as<AlignedVector<T, kVec>>(grad));
  }
};

// Writes the gradient of a patch without parts from one extreme. All loads that depend only on the offsets are issued
// together, and the first rows stay in registers.
template <class T, int kVec>
__device__ __forceinline__ void send_extreme(const PoolGrad<T>& tensors, const ByteRange& patch) {
  constexpr int kOperands = sizeof(Operands<T, kVec>) / sizeof(operand_t<T, kVec>);
  const i32 count = patch.end - patch.begin;
  const T* from = tensors.row(patch.begin);
  Operands<T, kVec> kept[kKeptRows];
  load_ahead<T, kVec>(kept, from, tensors.stride, count);  // `from` is past them now
  const auto extreme = load_operands<T, kVec>(tensors.out), grad = load_operands<T, kVec>(tensors.grad_out);

  Operands<T, kVec> ties = {};
#pragma unroll
  for (int i = 0; i < kKeptRows; ++i)
    if (i < count) count_ties<T, kVec>(ties, kept[i], extreme);
  stream_rows<T, kVec, 2>(from, tensors.stride, count - kKeptRows,
                          [&](i32, const Operands<T, kVec>& row) { count_ties<T, kVec>(ties, row, extreme); });
  acc_t<T> share[kVec], divisor[kVec];
  to_floats<T>(share, grad);
  to_floats<T>(divisor, ties);
#pragma unroll
  for (int c = 0; c < kVec; ++c) share[c] = quotient<T>(share[c], divisor[c]);

  const auto tie = bits_as<Operands<T, kVec>>(from_floats<T>(share));
  const auto send = [&](i32 i, const Operands<T, kVec>& row) {
    Operands<T, kVec> result;
#pragma unroll
    for (int c = 0; c < kOperands; ++c) result[c] = pick(row[c], extreme[c], tie[c], nan_or_zero(extreme[c]));
    tensors.template send<kVec>(patch.begin + i, result);
  };
#pragma unroll
  for (int i = 0; i < kKeptRows; ++i)
    if (i < count) send(i, kept[i]);
  stream_rows<T, kVec, kPartPrefetch>(from, tensors.stride, count - kKeptRows,
                                      [&](i32 i, const Operands<T, kVec>& row) { send(kKeptRows + i, row); });
}

// Computes the gradient of the bytes of a patch from its maximum or minimum: `share` is first the sum of the gradients
// of all such reductions, then what each tie gets.
template <class T, int kVec>
struct ExtremeGrad {
  Operands<T, kVec> extreme = {};
  acc_t<T> share[kVec] = {};

  __device__ __forceinline__ void divide(const acc_t<T> (&ties)[kVec]) {
#pragma unroll
    for (int c = 0; c < kVec; ++c) share[c] = quotient<T>(share[c], ties[c]);
  }
  // Divides by the ties of all parts of the patch.
  __device__ __forceinline__ void divide(const Ties<T>& ties, const ByteRange& patch, i32 column, i32 width) {
    Fold<T, kVec, Kinds::kSum> fold;
    fold.add_levels(ties.levels, parted(patch).parts, column, width);
    divide(fold.sum);
  }
  __device__ __forceinline__ void add_to(acc_t<T> (&sum)[kVec], const Operands<T, kVec>& row) const {
    acc_t<T> x[kVec], best[kVec];
    to_floats<T>(x, row);
    to_floats<T>(best, extreme);
#pragma unroll
    for (int c = 0; c < kVec; ++c) sum[c] += pick(x[c], best[c], share[c], nan_or_zero(best[c]));
  }
};

// Writes the gradient of the rows `own` of a patch, all of them or those of a part, from all reductions of a tuple.
template <class T, int kVec, bool kHasExtremes, bool kOfPart>
__device__ __forceinline__ void send_all(const PoolGrad<T>& tensors, const ByteRange& patch, const ByteRange& own,
                                         const PackedReductions& reductions, const Ties<T>& max_ties,
                                         const Ties<T>& min_ties, i32 column) {
  using A = acc_t<T>;
  A all[kVec] = {}, first[kVec] = {}, last[kVec] = {};
  ExtremeGrad<T, kVec> max, min;
  const A length = static_cast<A>(patch.end - patch.begin);
  const T *grads = tensors.grad_out, *extremes = tensors.out;
#pragma unroll 1
  for (int r = 0; r < reductions.count; ++r, grads += tensors.width, extremes += tensors.width) {
    const Reduce reduce = reductions[r];
    const bool is_max = kHasExtremes && reduce == Reduce::kMax, is_min = kHasExtremes && reduce == Reduce::kMin;
    const AlignedVector<T, kVec> grad = load<kVec>(grads);
    if (is_max) max.extreme = load_operands<T, kVec>(extremes);
    if (is_min) min.extreme = load_operands<T, kVec>(extremes);
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      const A g = to_float(grad[c]);
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
    Operands<T, kVec> max_counts = {}, min_counts = {};
    stream_rows<T, kVec, kPartPrefetch>(tensors.row(own.begin), tensors.stride, count,
                                        [&](i32, const Operands<T, kVec>& row) {
                                          count_ties<T, kVec>(max_counts, row, max.extreme);
                                          count_ties<T, kVec>(min_counts, row, min.extreme);
                                        });
    A ties[kVec];
    to_floats<T>(ties, max_counts);
    max.divide(ties);
    to_floats<T>(ties, min_counts);
    min.divide(ties);
  }
  if (kHasExtremes && kOfPart && max_ties.asked) max.divide(max_ties, patch, column, tensors.width);
  if (kHasExtremes && kOfPart && min_ties.asked) min.divide(min_ties, patch, column, tensors.width);

  const auto send = [&](i32 i, const Operands<T, kVec>& row) {
    const i32 t = own.begin + i;
    A sum[kVec];
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      sum[c] = all[c];
      if (t == patch.begin) sum[c] += first[c];
      if (t == patch.end - 1) sum[c] += last[c];
    }
    if (kHasExtremes && max_ties.asked) max.add_to(sum, row);
    if (kHasExtremes && min_ties.asked) min.add_to(sum, row);
    tensors.template send<kVec>(t, from_floats<T>(sum));
  };
  if (kHasExtremes && tensors.x)
    stream_rows<T, kVec, kPartPrefetch>(tensors.row(own.begin), tensors.stride, count, send);
  else
    for (i32 i = 0; i < count; ++i) send(i, {});
}

// Writes the rows of patches without parts. kMax stands for a single extreme, maximum or minimum.
template <class T, int kVec, Kinds kKinds>
__global__ void __launch_bounds__(kRowThreads, kKinds == Kinds::kAll ? 2 : 4)
    patch_pool_bwd_kernel(PoolGrad<T> tensors, PatchRows rows, RowTile tile, i64 grad_stride, i64 out_stride,
                          PackedReductions reductions, __grid_constant__ const Ties<T> max_ties,
                          __grid_constant__ const Ties<T> min_ties) {
  const auto [patch, column] = owned_by_thread<kVec>(tile);
  if (patch >= rows.patches || column >= rows.width) return;
  const ByteRange range = patch_range(rows, patch);
  const auto parts = parted(range).parts;
  if (range.begin == range.end || parts.begin < parts.end) return;
  tensors = tensors.at(patch, column, grad_stride, out_stride);
  if constexpr (kKinds == Kinds::kMax)
    send_extreme<T, kVec>(tensors, range);
  else
    send_all<T, kVec, kKinds == Kinds::kAll, false>(tensors, range, range, reductions, max_ties, min_ties, column);
}

// Writes the rows of the parts of all other patches, and zeros after the last patch.
template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads, 2)
    patch_pool_parts_bwd_kernel(PoolGrad<T> tensors, PatchRows rows, const i32* ids, RowTile tile, i64 grad_stride,
                                i64 out_stride, PackedReductions reductions, __grid_constant__ const Ties<T> max_ties,
                                __grid_constant__ const Ties<T> min_ties) {
  const auto [part, column] = owned_by_thread<kVec>(tile);
  if (column >= rows.width) return;
  const i64 begin = part * kPart, end = min<i64>(begin + kPart, rows.bytes);
  const i64 covered = rows.patches > 0 ? min(max(rows.offsets[rows.patches], 0), rows.bytes) : 0;
#pragma unroll 1
  for (i64 t = max(begin, covered); t < end; ++t)
    store(tensors.grad_x + t * rows.width + column, AlignedVector<T, kVec>{});
  if (begin + kPart != end) return;
  const i64 patch = patch_of_part(ids, begin, kPart);
  if (patch < 0 || patch >= rows.patches) return;
  const ByteRange range = patch_range(rows, patch), own = rows_of_part(range, static_cast<i32>(part));
  send_all<T, kVec, true, true>(tensors.at(patch, column, grad_stride, out_stride), range, own, reductions, max_ties,
                                min_ties, column);
}

}  // namespace blt
