// Rows of bytes and of patches, for the ops that stream them: a thread owns kPack columns of a patch, or of some bytes.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kRowThreads = 256;

// Ragged rows: x[bytes][width] with `stride` elements from row to row, cut into patches.
struct PatchRows {
  const i32* offsets;  // [patches + 1]
  i64 bytes, patches, width, stride;
};

struct RowRange {
  i64 begin, end;
};

// The bytes of patch p and of the `more` patches behind it; inside x whatever the offsets are.
__device__ __forceinline__ RowRange patch_range(const PatchRows& rows, i64 p, int more = 0) {
  const i64 begin = least(most<i64>(rows.offsets[p], 0), rows.bytes);
  return {begin, least(most<i64>(rows.offsets[least(p + 1 + more, rows.patches)], begin), rows.bytes)};
}

// What a thread owns: kPack columns from `column` on, of a patch or of a group of bytes. Neighbouring threads own
// neighbouring columns.
struct Owned {
  i64 group, column;
};
template <int kPack>
__device__ __forceinline__ Owned owned_by_thread(i64 width) {
  const i64 thread = static_cast<i64>(blockIdx.x) * kRowThreads + threadIdx.x, packs = ceil_div<i64>(width, kPack);
  return {thread / packs, thread % packs * kPack};
}

template <class T, int kPack, int kAhead>
__device__ __forceinline__ void load_rows(Pack<T, kPack> (&ahead)[kAhead], const T* x, i64 stride, i64 row, i64 end) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (row + i < end) ahead[i] = load<kPack>(x + (row + i) * stride);
}

}  // namespace blt
