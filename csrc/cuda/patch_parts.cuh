// Parts of long patches, so that no thread walks a long patch alone.
//
// Parts lie at fixed places: part i of level 1 is bytes [64 i, 64 i + 64), part i of level 2 is the 64 parts of level 1 from
// 64 i on. A part is whole if one patch has all of its bytes. The results of whole parts are computed ahead of the owner
// of the patch, one launch a level. The owner combines what lies before the first whole part, the whole parts, and what
// lies behind the last, always in this order.
//
// The owner of a patch of n bytes so visits at most 2 * 63 rows, 2 * 63 parts of level 1 and n / 4096 of level 2; a part is
// 64 rows, or 64 parts. A launch over parts costs two loads a thread where no patch is long, and moves nothing.
#pragma once

#include "patch_rows.cuh"

namespace blt {

inline constexpr int kPart = 64;

// From this many bytes on, patches may have so many parts that a second level pays for its launch.
inline constexpr i64 kSecondLevelBytes = 4 * kPart * kPart;

// The patch that has all of the `size` bytes from `begin` on, by ids that are in ascending order except for -1; -1 if
// there is none.
__device__ __forceinline__ i64 patch_of_part(const i32* ids, i64 begin, i64 size) {
  const i32 first = ids[begin], last = ids[begin + size - 1];
  return first == last ? first : -1;
}

// A range of rows, or of parts, as the whole parts of the next level in it and what is before and behind them. Without any,
// all of the range is before.
template <class I>
struct PartedOf {
  RangeOf<I> before, parts, behind;
};
using Parted = PartedOf<i64>;
template <class I>
__device__ __forceinline__ PartedOf<I> parted(const RangeOf<I>& range) {
  const I first = range.begin / kPart + (range.begin % kPart > 0), last = range.end / kPart;
  if (first >= last) return {range, {first, first}, {range.end, range.end}};
  return {{range.begin, first * kPart}, {first, last}, {last * kPart, range.end}};
}

}  // namespace blt
