// Rows of bytes and of patches, for the ops that stream them: a thread owns kPack columns of a patch, or of some bytes.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr int kRowThreads = 256;

// Ragged rows: x[bytes][width] with `stride` elements from row to row, cut into patches. Launchers see to it that eight
// strides, in bytes, fit into 31 bits: within a patch, addresses are a pointer and an offset of 32 bits.
struct PatchRows {
  const i32* offsets;  // [patches + 1]
  i64 patches;
  i32 bytes, width, stride;
};

template <class I>
struct RangeOf {
  I begin, end;
};
using RowRange = RangeOf<i64>;
using ByteRange = RangeOf<i32>;

// The bytes of patch p; inside x whatever the offsets are.
__device__ __forceinline__ ByteRange patch_range(const PatchRows& rows, i64 p) {
  const i32 begin = least(most<i32>(rows.offsets[p], 0), rows.bytes);
  return {begin, least(most<i32>(rows.offsets[p + 1], begin), rows.bytes)};
}

// What a block owns: `groups` neighbouring groups of rows (patches, parts or runs of bytes), and `packs` packs of their
// columns; blockIdx.y counts panels of columns. x / packs is x * inverse >> 16 for every thread x of a block.
struct RowTile {
  i32 groups, packs;
  u32 inverse;
};

// What a thread owns: kPack columns from `column` on, of a patch or of a group of bytes. Neighbouring threads own
// neighbouring columns. Either may lie beyond the last.
struct Owned {
  i64 group;
  i32 column;
};
template <int kPack>
__device__ __forceinline__ Owned owned_by_thread(const RowTile& tile) {
  const u32 group = threadIdx.x * tile.inverse >> 16, pack = threadIdx.x - group * tile.packs;
  return {static_cast<i64>(blockIdx.x) * tile.groups + group, static_cast<i32>(blockIdx.y * tile.packs + pack) * kPack};
}

}  // namespace blt
