// Maximum, minimum and sum of the rows of ragged segments: for the pooling of patches and for the gradient of its reverse.
//
// A thread owns kPack columns of a segment, 16 bytes of a row where rows are aligned to that, and streams the rows past its
// registers, kRowsAhead loads in flight. Two 16-bit numbers are one operand of a maximum (`max.NaN.bf16x2`); sums are in
// fp32, fp64 for fp64. Long segments come in parts (patch_parts.cuh), folded by segment_parts_kernel ahead of the owner,
// who takes the rows before and behind them first, then the parts in their order.
#pragma once

#include "patch_parts.cuh"

namespace blt {

inline constexpr int kRowsAhead = 6, kPartsAhead = 4;

// What a kernel folds, since registers for what is not asked for would cost occupancy.
enum class Kinds : int { kMax, kMin, kSum, kAll };

// --- numbers, two at a time where they have 16 bits -------------------------------------------------------------------

template <class T, bool kPaired>
struct Unit {
  using type = T;
};
template <>
struct Unit<bf16, true> {
  using type = __nv_bfloat162;
};
template <>
struct Unit<fp16, true> {
  using type = __half2;
};
template <class T, int kPack>
using unit_t = typename Unit<T, kPack % 2 == 0>::type;
template <class T, int kPack>
using Units = Pack<unit_t<T, kPack>, kPack * sizeof(T) / sizeof(unit_t<T, kPack>)>;

template <class T, int kPack>
__device__ __forceinline__ Units<T, kPack> load_units(const T* from) {
  return bits_as<Units<T, kPack>>(load_bits<kPack>(from));
}

// The larger and the smaller of two, NaN if either is.
__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 smaller(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ __half2 larger(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __half2 smaller(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ bf16 larger(bf16 a, bf16 b) { return __hmax_nan(a, b); }
__device__ __forceinline__ bf16 smaller(bf16 a, bf16 b) { return __hmin_nan(a, b); }
__device__ __forceinline__ fp16 larger(fp16 a, fp16 b) { return __hmax_nan(a, b); }
__device__ __forceinline__ fp16 smaller(fp16 a, fp16 b) { return __hmin_nan(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ double smaller(double a, double b) { return b < a || b != b ? b : a; }
#ifdef __CUDACC__
__device__ __forceinline__ float larger(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
__device__ __forceinline__ float smaller(float a, float b) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
#else
inline float larger(float a, float b) { return b > a || b != b ? b : a; }
inline float smaller(float a, float b) { return b < a || b != b ? b : a; }
#endif

__device__ __forceinline__ void set_infinity(float& x, u32 sign) { x = __uint_as_float(sign << 31 | 0x7f800000u); }
__device__ __forceinline__ void set_infinity(double& x, u32 sign) { x = __uint_as_float(sign << 31 | 0x7f800000u); }
__device__ __forceinline__ void set_infinity(bf16& x, u32 sign) {
  x = bits_as<bf16>(static_cast<u16>(sign << 15 | 0x7f80u));
}
__device__ __forceinline__ void set_infinity(fp16& x, u32 sign) {
  x = bits_as<fp16>(static_cast<u16>(sign << 15 | 0x7c00u));
}
__device__ __forceinline__ void set_infinity(__nv_bfloat162& x, u32 sign) {
  x = bits_as<__nv_bfloat162>((sign << 15 | 0x7f80u) * 0x10001u);
}
__device__ __forceinline__ void set_infinity(__half2& x, u32 sign) {
  x = bits_as<__half2>((sign << 15 | 0x7c00u) * 0x10001u);
}

// --- folds ------------------------------------------------------------------------------------------------------------

// Loads the `count` rows from `from` on, at most kAhead. `from` moves on by each, since addresses of their own for all of
// them would take twice as many registers.
template <class T, int kPack, int kAhead>
__device__ __forceinline__ void load_ahead(Units<T, kPack> (&ahead)[kAhead], const T*& from, i32 stride, i32 count) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i, from += stride)
    if (i < count) ahead[i] = load_units<T, kPack>(from);
}

// visit(i, row i) for the `count` rows from `from` on, one after the other.
template <class T, int kPack, int kAhead, class Visit>
__device__ __forceinline__ void stream_rows(const T* from, i32 stride, i32 count, const Visit& visit) {
#pragma unroll 1
  for (i32 row = 0; row < count; row += kAhead) {
    Units<T, kPack> ahead[kAhead];
    load_ahead<T, kPack>(ahead, from, stride, count - row);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (row + i < count) visit(row + i, ahead[i]);
  }
}

// The results of all parts of a level, [parts][width] each: null for what is not asked for.
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

// How many of kPack sums one access moves.
template <class A, int kPack>
inline constexpr int kSumPack = kPack * sizeof(A) <= 16 ? kPack : 16 / sizeof(A);

// kPack sums, in as many accesses as that takes.
template <class T, int kPack>
__device__ __forceinline__ void store_sums(acc_t<T>* to, const acc_t<T> (&sums)[kPack]) {
  constexpr int kOne = kSumPack<acc_t<T>, kPack>;
#pragma unroll
  for (int c = 0; c < kPack; c += kOne) {
    Pack<acc_t<T>, kOne> some;
#pragma unroll
    for (int i = 0; i < kOne; ++i) some[i] = sums[c + i];
    store(to + c, some);
  }
}
template <class T, int kPack>
__device__ __forceinline__ void load_sums(acc_t<T> (&sums)[kPack], const acc_t<T>* from) {
  constexpr int kOne = kSumPack<acc_t<T>, kPack>;
#pragma unroll
  for (int c = 0; c < kPack; c += kOne) {
    const auto some = load<kOne>(from + c);
#pragma unroll
    for (int i = 0; i < kOne; ++i) sums[c + i] = some[i];
  }
}

// a / b, in 16 bits by a reciprocal: an error in the last bits of fp32.
template <class T>
__device__ __forceinline__ acc_t<T> quotient(acc_t<T> a, acc_t<T> b) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(a, b);
  else
    return a / b;
}

template <class T, int kPack, Kinds kKinds>
struct Fold {
  using A = acc_t<T>;
  static constexpr bool kHasMax = kKinds == Kinds::kMax || kKinds == Kinds::kAll;
  static constexpr bool kHasMin = kKinds == Kinds::kMin || kKinds == Kinds::kAll;
  static constexpr bool kHasSum = kKinds == Kinds::kSum || kKinds == Kinds::kAll;
  static constexpr int kUnits = kPack * sizeof(T) / sizeof(unit_t<T, kPack>);

  Units<T, kPack> max, min;
  A sum[kPack] = {};

  __device__ __forceinline__ Fold() {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) set_infinity(max[c], 1), set_infinity(min[c], 0);
  }

  __device__ __forceinline__ void add_max(const Units<T, kPack>& row) {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) max[c] = larger(max[c], row[c]);
  }
  __device__ __forceinline__ void add_min(const Units<T, kPack>& row) {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) min[c] = smaller(min[c], row[c]);
  }
  __device__ __forceinline__ void add(const Units<T, kPack>& row) {
    if (kHasMax) add_max(row);
    if (kHasMin) add_min(row);
    if (kHasSum) {
      const auto numbers = bits_as<Pack<T, kPack>>(row);
#pragma unroll
      for (int c = 0; c < kPack; ++c) sum[c] += widen(numbers[c]);
    }
  }

  // The parts of one level.
  __device__ __forceinline__ void add_parts(const PartFolds<T>& parts, const ByteRange& range, i32 column, i32 width) {
    const i64 at = static_cast<i64>(range.begin) * width + column;
    const i32 count = range.end - range.begin;
    if (kHasMax && parts.max)
      stream_rows<T, kPack, kPartsAhead>(parts.max + at, width, count,
                                         [&](i32, const Units<T, kPack>& part) { add_max(part); });
    if (kHasMin && parts.min)
      stream_rows<T, kPack, kPartsAhead>(parts.min + at, width, count,
                                         [&](i32, const Units<T, kPack>& part) { add_min(part); });
    constexpr int kOne = kSumPack<A, kPack>;
    if (!kHasSum || !parts.sum) return;
#pragma unroll
    for (int c = 0; c < kPack; c += kOne)
      stream_rows<A, kOne, kPartsAhead>(parts.sum + at + c, width, count, [&](i32, const Units<A, kOne>& part) {
#pragma unroll
        for (int i = 0; i < kOne; ++i) sum[c + i] += part[i];
      });
  }

  // The parts of level 1 in `range`, with those of level 2 in their place where there are some.
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

  // The rows of a segment. `x` points to row 0 of the tensor, at the thread's columns.
  __device__ __forceinline__ void add_segment(const T* x, i32 stride, const ByteRange& range,
                                              const PartLevels<T>& levels, i32 column, i32 width) {
    const auto own = parted(range);
    const auto add_row = [&](i32, const Units<T, kPack>& row) { add(row); };
    const auto row_at = [&](i32 row) { return x + static_cast<i64>(row) * stride; };
    if (own.parts.begin == own.parts.end)
      return stream_rows<T, kPack, kRowsAhead>(row_at(range.begin), stride, range.end - range.begin, add_row);
#pragma unroll 1
    for (int piece = 0; piece < 2; ++piece) {
      const ByteRange& rows = piece == 0 ? own.before : own.behind;
      stream_rows<T, kPack, kPartsAhead>(row_at(rows.begin), stride, rows.end - rows.begin, add_row);
    }
    add_levels(levels, own.parts, column, width);
  }

  // As the result of part `part` of a level.
  __device__ __forceinline__ void store_part(const PartFolds<T>& parts, i64 part, i32 column, i32 width) const {
    const i64 at = part * width + column;
    if (kHasMax && parts.max) store(parts.max + at, bits_as<Pack<T, kPack>>(max));
    if (kHasMin && parts.min) store(parts.min + at, bits_as<Pack<T, kPack>>(min));
    if (kHasSum && parts.sum) store_sums<T, kPack>(parts.sum + at, sum);
  }
};

// The parts of one level that one segment has whole, by the ids of rows: of rows of x where there is an x (level 1), else of
// the parts of levels.first (level 2).
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads, 4)
    segment_parts_kernel(const T* x, const i32* ids, i64 parts, i32 width, i32 stride, RowTile tile,
                         __grid_constant__ const PartLevels<T> levels) {
  const auto [part, column] = owned_by_thread<kPack>(tile);
  if (part >= parts || column >= width) return;
  const i64 size = x ? kPart : kPart * kPart;
  if (patch_of_part(ids, part * size, size) < 0) return;
  Fold<T, kPack, Kinds::kAll> fold;
  if (x) {
    stream_rows<T, kPack, kPartsAhead>(x + part * kPart * stride + column, stride, kPart,
                                       [&](i32, const Units<T, kPack>& row) { fold.add(row); });
    return fold.store_part(levels.first, part, column, width);
  }
  const i32 begin = static_cast<i32>(part) * kPart;
  fold.add_parts(levels.first, {begin, begin + kPart}, column, width);
  fold.store_part(levels.second, part, column, width);
}

}  // namespace blt
