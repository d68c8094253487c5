// Computes maximum, minimum and sum of the rows of ragged segments, for pooling and for the gradient of unpooling.
//
// A thread owns kVec columns of a segment, 16 bytes of a row where rows are aligned to that, and streams the rows
// through its registers with a prefetch depth of kRowPrefetch. Two 16-bit numbers are one operand of a maximum
// (`max.NaN.bf16x2`); sums are in fp32, fp64 for fp64. segment_parts_kernel folds the parts of long segments
// (patch_parts.cuh) first. The owner then takes the rows before and after them, and the parts in order.
#pragma once

#include "patch_parts.cuh"

namespace blt {

inline constexpr int kRowPrefetch = 6, kPartPrefetch = 4;

// A kernel is compiled for the folds that it needs, since registers for others would cost occupancy.
enum class Kinds : int { kMax, kMin, kSum, kAll };

// --- operands: two numbers if they have 16 bits ----------------------------------------------------------------------

template <class T>
inline constexpr bool kIsPair = false;
template <>
inline constexpr bool kIsPair<__nv_bfloat162> = true;
template <>
inline constexpr bool kIsPair<__half2> = true;

template <class T, int kVec>
__device__ auto operand() {
  if constexpr (sizeof(T) == 2 && kVec % 2 == 0)
    return both(T(), T());
  else
    return T();
}
template <class T, int kVec>
using operand_t = decltype(operand<T, kVec>());
template <class T, int kVec>
using Operands = AlignedVector<operand_t<T, kVec>, kVec * sizeof(T) / sizeof(operand_t<T, kVec>)>;

template <class T, int kVec>
__device__ __forceinline__ Operands<T, kVec> load_operands(const T* from) {
  return bits_as<Operands<T, kVec>>(load_bits<kVec>(from));
}

// max_nan and min_nan return NaN if either operand is NaN.
__device__ __forceinline__ __nv_bfloat162 max_nan(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 min_nan(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ __half2 max_nan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __half2 min_nan(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ bf16 max_nan(bf16 a, bf16 b) { return __hmax_nan(a, b); }
__device__ __forceinline__ bf16 min_nan(bf16 a, bf16 b) { return __hmin_nan(a, b); }
__device__ __forceinline__ fp16 max_nan(fp16 a, fp16 b) { return __hmax_nan(a, b); }
__device__ __forceinline__ fp16 min_nan(fp16 a, fp16 b) { return __hmin_nan(a, b); }
__device__ __forceinline__ double max_nan(double a, double b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ double min_nan(double a, double b) { return b < a || b != b ? b : a; }
#ifdef __CUDACC__
__device__ __forceinline__ float max_nan(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
#else
inline float max_nan(float a, float b) { return b > a || b != b ? b : a; }
inline float min_nan(float a, float b) { return b < a || b != b ? b : a; }
#endif

template <class T, int kVec>
__device__ __forceinline__ Operands<T, kVec> operands_of(T x) {
  AlignedVector<T, kVec> all;
#pragma unroll
  for (int c = 0; c < kVec; ++c) all[c] = x;
  return bits_as<Operands<T, kVec>>(all);
}

// --- folds -----------------------------------------------------------------------------------------------------------

// Loads the first of `count` rows from `from` on, at most kPrefetch. `from` advances past them: one address per row
// would take twice as many registers.
template <class T, int kVec, int kPrefetch>
__device__ __forceinline__ void load_ahead(Operands<T, kVec> (&ahead)[kPrefetch], const T*& from, i32 stride,
                                           i32 count) {
#pragma unroll
  for (int i = 0; i < kPrefetch; ++i, from += stride)
    if (i < count) ahead[i] = load_operands<T, kVec>(from);
}

// Calls visit(i, row i) for the `count` rows from `from` on, in order.
template <class T, int kVec, int kPrefetch, class Visit>
__device__ __forceinline__ void stream_rows(const T* from, i32 stride, i32 count, const Visit& visit) {
#pragma unroll 1
  for (i32 row = 0; row < count; row += kPrefetch) {
    Operands<T, kVec> ahead[kPrefetch];
    load_ahead<T, kVec>(ahead, from, stride, count - row);
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i)
      if (row + i < count) visit(row + i, ahead[i]);
  }
}

// Points to the folds of all parts of a level, [parts][width] each, or is null for folds that are not needed.
template <class T>
struct PartFolds {
  T *max, *min;
  acc_t<T>* sum;
};
template <class T>
struct PartLevels {
  PartFolds<T> first, second;
  bool has_second;
};

// Returns a / b. For 16-bit numbers it multiplies by a reciprocal, with an error in the last bits of fp32.
template <class T>
__device__ __forceinline__ acc_t<T> quotient(acc_t<T> a, acc_t<T> b) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(a, b);
  else
    return a / b;
}

template <class T, int kVec, Kinds kKinds>
struct Fold {
  using A = acc_t<T>;
  static constexpr bool kHasMax = kKinds == Kinds::kMax || kKinds == Kinds::kAll;
  static constexpr bool kHasMin = kKinds == Kinds::kMin || kKinds == Kinds::kAll;
  static constexpr bool kHasSum = kKinds == Kinds::kSum || kKinds == Kinds::kAll;
  static constexpr int kOperands = kVec * sizeof(T) / sizeof(operand_t<T, kVec>);

  Operands<T, kVec> max = operands_of<T, kVec>(from_float<T>(minus_infinity<A>()));
  Operands<T, kVec> min = operands_of<T, kVec>(from_float<T>(-minus_infinity<A>()));
  A sum[kVec] = {};

  __device__ __forceinline__ void add_max(const Operands<T, kVec>& row) {
#pragma unroll
    for (int c = 0; c < kOperands; ++c) max[c] = max_nan(max[c], row[c]);
  }
  __device__ __forceinline__ void add_min(const Operands<T, kVec>& row) {
#pragma unroll
    for (int c = 0; c < kOperands; ++c) min[c] = min_nan(min[c], row[c]);
  }
  __device__ __forceinline__ void add(const Operands<T, kVec>& row) {
    if (kHasMax) add_max(row);
    if (kHasMin) add_min(row);
    if (kHasSum) {
      const auto numbers = bits_as<AlignedVector<T, kVec>>(row);
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[c] += to_float(numbers[c]);
    }
  }

  // Adds the parts of one level in `range`.
  __device__ __forceinline__ void add_parts(const PartFolds<T>& parts, const ByteRange& range, i32 column, i32 width) {
    const i64 at = static_cast<i64>(range.begin) * width + column;
    const i32 count = range.end - range.begin;
    if (kHasMax && parts.max)
      stream_rows<T, kVec, kPartPrefetch>(parts.max + at, width, count,
                                          [&](i32, const Operands<T, kVec>& part) { add_max(part); });
    if (kHasMin && parts.min)
      stream_rows<T, kVec, kPartPrefetch>(parts.min + at, width, count,
                                          [&](i32, const Operands<T, kVec>& part) { add_min(part); });
    constexpr int kOne = kAccess<A, kVec>;
    if (!kHasSum || !parts.sum) return;
#pragma unroll
    for (int c = 0; c < kVec; c += kOne)
      stream_rows<A, kOne, kPartPrefetch>(parts.sum + at + c, width, count, [&](i32, const Operands<A, kOne>& part) {
#pragma unroll
        for (int i = 0; i < kOne; ++i) sum[c + i] += part[i];
      });
  }

  // Adds the parts of level 1 in `range`, or those of level 2 where they are whole.
  __device__ __forceinline__ void add_levels(const PartLevels<T>& levels, const ByteRange& range, i32 column,
                                             i32 width) {
    PartedOf<i32> own = {range, {0, 0}, {0, 0}};
    if (levels.has_second) own = parted(range);
#pragma unroll 1
    for (int piece = 0; piece < 3; ++piece) {
      const bool second = piece == 1;
      const PartFolds<T> parts = {second ? levels.second.max : levels.first.max,
                                  second ? levels.second.min : levels.first.min,
                                  second ? levels.second.sum : levels.first.sum};
      add_parts(parts, piece == 0 ? own.before : second ? own.parts : own.behind, column, width);
    }
  }

  // Adds the rows of a segment. `x` points to row 0 of the tensor, at the thread's columns.
  __device__ __forceinline__ void add_segment(const T* x, i32 stride, const ByteRange& range,
                                              const PartLevels<T>& levels, i32 column, i32 width) {
    const auto own = parted(range);
    const auto add_row = [&](i32, const Operands<T, kVec>& row) { add(row); };
    const auto row_at = [&](i32 row) { return x + static_cast<i64>(row) * stride; };
    if (own.parts.begin == own.parts.end)
      return stream_rows<T, kVec, kRowPrefetch>(row_at(range.begin), stride, range.end - range.begin, add_row);
#pragma unroll 1
    for (int piece = 0; piece < 2; ++piece) {
      const ByteRange& rows = piece == 0 ? own.before : own.behind;
      stream_rows<T, kVec, kPartPrefetch>(row_at(rows.begin), stride, rows.end - rows.begin, add_row);
    }
    add_levels(levels, own.parts, column, width);
  }

  // Stores the folds as part `part` of a level.
  __device__ __forceinline__ void store_part(const PartFolds<T>& parts, i64 part, i32 column, i32 width) const {
    const i64 at = part * width + column;
    if (kHasMax && parts.max) store(parts.max + at, bits_as<AlignedVector<T, kVec>>(max));
    if (kHasMin && parts.min) store(parts.min + at, bits_as<AlignedVector<T, kVec>>(min));
    if (kHasSum && parts.sum) store_numbers(parts.sum + at, sum);
  }
};

// Folds the whole parts of level 1 from rows of x, or without x those of level 2 from levels.first.
template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads, 4)
    segment_parts_kernel(const T* x, const i32* ids, i64 parts, i32 width, i32 stride, RowTile tile,
                         __grid_constant__ const PartLevels<T> levels) {
  const auto [part, column] = owned_by_thread<kVec>(tile);
  if (part >= parts || column >= width) return;
  const i64 size = x ? kPart : kPart * kPart;
  if (patch_of_part(ids, part * size, size) < 0) return;
  Fold<T, kVec, Kinds::kAll> fold;
  if (x) {
    stream_rows<T, kVec, kPartPrefetch>(x + part * kPart * stride + column, stride, kPart,
                                        [&](i32, const Operands<T, kVec>& row) { fold.add(row); });
    return fold.store_part(levels.first, part, column, width);
  }
  const i32 begin = static_cast<i32>(part) * kPart;
  fold.add_parts(levels.first, {begin, begin + kPart}, column, width);
  fold.store_part(levels.second, part, column, width);
}

}  // namespace blt
