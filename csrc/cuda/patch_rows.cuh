// Defines rows of bytes and of patches, for the ops that stream them, and what a thread owns of them: kVec columns of a
// patch or of some bytes.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kRowThreads = 256;

// Rows x[bytes][width] lie `stride` elements apart and are divided into patches. Launchers ensure that eight strides in
// bytes fit into 31 bits, so an address within a patch is a pointer and an offset of 32 bits.
struct PatchRows {
  const i32* offsets;  // [patches + 1]
  i64 patches;
  i32 bytes, width, stride;
};

template <class I>
struct RangeOf {
  I begin, end;
  __device__ __forceinline__ I size() const { return begin < end ? end - begin : 0; }
};
using ByteRange = RangeOf<i32>;

// Returns the bytes of patch p, which lie inside x for any offsets.
__device__ __forceinline__ ByteRange patch_range(const PatchRows& rows, i64 p) {
  const i32 begin = min(max<i32>(rows.offsets[p], 0), rows.bytes);
  return {begin, min(max<i32>(rows.offsets[p + 1], begin), rows.bytes)};
}

// A block owns `groups` neighbouring groups of rows (patches, parts or runs of bytes) and `vecs` aligned vectors of
// their columns; blockIdx.y is the panel of columns. For every thread x of a block, x / vecs is x * inverse >> 16.
struct RowTile {
  i32 groups, vecs;
  u32 inverse;
};

// A thread owns kVec columns from `column` on, of one group. Neighbouring threads own neighbouring columns. Both may
// lie beyond the end.
struct Owned {
  i64 group;
  i32 column;
};
template <int kVec>
__device__ __forceinline__ Owned owned_by_thread(const RowTile& tile) {
  const u32 group = threadIdx.x * tile.inverse >> 16, vec = threadIdx.x - group * tile.vecs;
  return {static_cast<i64>(blockIdx.x) * tile.groups + group, static_cast<i32>(blockIdx.y * tile.vecs + vec) * kVec};
}

}  // namespace blt
