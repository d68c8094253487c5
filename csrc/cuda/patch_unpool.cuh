// patch_unpool copies to every byte the row of a patch.
//
//   out[t]    = y[ids[t]], 0 where the id is -1
//   grad_y[p] = sum of grad_out[t] over the bytes t with ids[t] = p
//
// Tiling: forward, a thread owns kVec columns (16 bytes where rows are aligned to that) of kUnpoolRows consecutive
// bytes, and loads the row of a patch once for the bytes that share it. Backward, it owns kVec columns of a patch. The
// bytes that read patch p are the first of [offsets[p], offsets[p+1]); later ones there have id -1. So the gradient is
// the sum over a ragged segment, long ones in parts (segment_fold.cuh). There is no shared memory and no barrier.
//
// Bytes: forward reads the ids and, about once, y, and writes out. Backward reads grad_out and writes grad_y.
// Roofline: a memory copy.
#pragma once

#include "segment_fold.cuh"

namespace blt {

inline constexpr int kUnpoolRows = 16;

template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads)
    patch_unpool_fwd_kernel(const T* y, const i32* ids, i64 bytes, i64 patches, i32 width, i64 stride, RowTile tile,
                            T* out) {
  constexpr int kPrefetch = 4;
  const auto [group, column] = owned_by_thread<kVec>(tile);
  if (column >= width) return;
  const i64 begin = group * kUnpoolRows, end = min(begin + kUnpoolRows, bytes);
  i64 held = -1;  // is the patch of `row`
  AlignedVector<T, kVec> row = {};
  for (i64 t = begin; t < end; t += kPrefetch) {
    i64 id[kPrefetch];
    AlignedVector<T, kVec> ahead[kPrefetch];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      id[i] = t + i < end ? ids[t + i] : -1;
      if (id[i] >= patches) id[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i)
      if (id[i] >= 0 && id[i] != (i == 0 ? held : id[i - 1])) ahead[i] = load<kVec>(y + id[i] * stride + column);
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      if (id[i] >= 0 && id[i] != held) row = ahead[i];
      if (id[i] < 0) row = {};
      held = id[i];
      if (t + i < end) store(out + (t + i) * width + column, row);
    }
  }
}

// Returns the bytes of a segment that read `patch`: all, or the first ones.
__device__ __forceinline__ ByteRange readers_of(const i32* ids, const ByteRange& segment, i64 patch) {
  if (segment.begin == segment.end || ids[segment.end - 1] == patch) return segment;
  return {segment.begin, partition_point(segment.begin, segment.end, [&](i32 t) { return ids[t] == patch; })};
}

template <class T, int kVec>
__global__ void __launch_bounds__(kRowThreads, 4)
    patch_unpool_bwd_kernel(const T* grad_out, const i32* ids, PatchRows rows, RowTile tile,
                            __grid_constant__ const PartLevels<T> levels, T* grad_y) {
  const auto [patch, column] = owned_by_thread<kVec>(tile);
  if (patch >= rows.patches || column >= rows.width) return;
  const ByteRange readers = readers_of(ids, patch_range(rows, patch), patch);
  Fold<T, kVec, Kinds::kSum> fold;
  fold.add_segment(grad_out + column, rows.stride, readers, levels, column, rows.width);
  store(grad_y + patch * rows.width + column, from_floats<T>(fold.sum));
}

}  // namespace blt
