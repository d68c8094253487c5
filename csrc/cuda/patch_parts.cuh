// A long patch is divided into parts, so that many threads share it.
//
// Parts lie at fixed places: part i of level 1 is bytes [64 i, 64 i + 64), part i of level 2 is the 64 parts of level 1
// from 64 i on. A part is whole if all of its bytes belong to one patch. The results of whole parts are computed before
// the owner of the patch starts, one launch per level. The owner combines the rows before the first whole part, the
// whole parts, and the rows after the last, always in this order.
//
// So the owner of a patch of n bytes visits at most 2 * 63 rows, 2 * 63 parts of level 1 and n / 4096 of level 2; a
// part visits 64 rows, or 64 parts. A launch over parts costs two loads per thread where no patch is long.
#pragma once

#include "patch_rows.cuh"

namespace blt {

inline constexpr int kLogPart = 6, kPart = 1 << kLogPart;

// A second level of parts is worth its launch from this many bytes on.
inline constexpr i64 kSecondLevelBytes = 4 * kPart * kPart;

// Returns the patch of all `size` bytes from `begin` on, or -1 if there is none. The ids ascend, except for -1.
__device__ __forceinline__ i64 patch_of_part(const i32* ids, i64 begin, i64 size) {
  const i32 first = ids[begin], last = ids[begin + size - 1];
  return first == last ? first : -1;
}

// Divides a range of rows or parts into whole parts of 2^log_size of them and the entries before and behind. Without a
// whole part, all of the range is `before`.
template <class I>
struct PartedOf {
  RangeOf<I> before, parts, behind;
};
using Parted = PartedOf<i64>;
template <class I>
__device__ __forceinline__ PartedOf<I> parted(const RangeOf<I>& range, int log_size = kLogPart) {
  const I first = (range.begin + (I{1} << log_size) - 1) >> log_size, last = range.end >> log_size;
  if (first >= last) return {range, {first, first}, {range.end, range.end}};
  return {{range.begin, first << log_size}, {first, last}, {last << log_size, range.end}};
}

}  // namespace blt
