// patch_unpool: every byte gets the row of a patch.
//
//   out[t]    = y[ids[t]], 0 where the id is -1
//   grad_y[p] = sum of grad_out[t] over the bytes t with ids[t] = p
//
// Tiling: forward, a thread owns kPack columns (16 bytes where rows are aligned to that) of kUnpoolRows bytes one behind
// the other, and loads the row of a patch once for the bytes that share it. Backward, it owns kPack columns of a patch. The
// bytes that read patch p are the first of [offsets[p], offsets[p+1]), and any behind them there have an id of -1, so the
// gradient is the sum over a ragged segment, long ones in parts (segment_fold.cuh). No shared memory, no barriers.
//
// Bytes: forward reads y, about once, and the ids, and writes out. Backward reads grad_out and writes grad_y.
// Roofline: a memory copy.
#pragma once

#include "segment_fold.cuh"

namespace blt {

inline constexpr int kUnpoolRows = 16;

template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    patch_unpool_fwd_kernel(const T* y, const i32* ids, i64 bytes, i64 patches, i32 width, i64 stride, RowTile tile,
                            T* out) {
  constexpr int kAhead = 4;
  const auto [group, column] = owned_by_thread<kPack>(tile);
  if (column >= width) return;
  const i64 begin = group * kUnpoolRows, end = least(begin + kUnpoolRows, bytes);
  i64 held = -1;  // the patch of `row`
  Pack<T, kPack> row = {};
  for (i64 t = begin; t < end; t += kAhead) {
    i64 id[kAhead];
    Pack<T, kPack> ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      id[i] = t + i < end ? ids[t + i] : -1;
      if (id[i] >= patches) id[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (id[i] >= 0 && id[i] != (i == 0 ? held : id[i - 1])) ahead[i] = load<kPack>(y + id[i] * stride + column);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (id[i] >= 0 && id[i] != held) row = ahead[i];
      if (id[i] < 0) row = {};
      held = id[i];
      if (t + i < end) store(out + (t + i) * width + column, row);
    }
  }
}

// The bytes of a segment that read `patch`: all, or the first of it.
__device__ __forceinline__ ByteRange readers_of(const i32* ids, const ByteRange& segment, i64 patch) {
  i32 low = segment.begin, high = segment.end;
  if (low == high || ids[high - 1] == patch) return segment;
  while (low < high) {
    const i32 middle = low + (high - low) / 2;
    if (ids[middle] == patch)
      low = middle + 1;
    else
      high = middle;
  }
  return {segment.begin, low};
}

template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads, 4)
    patch_unpool_bwd_kernel(const T* grad_out, const i32* ids, PatchRows rows, RowTile tile,
                            __grid_constant__ const PartLevels<T> levels, T* grad_y) {
  const auto [patch, column] = owned_by_thread<kPack>(tile);
  if (patch >= rows.patches || column >= rows.width) return;
  const ByteRange readers = readers_of(ids, patch_range(rows, patch), patch);
  Fold<T, kPack, Kinds::kSum> fold;
  fold.add_segment(grad_out + column, rows.stride, readers, levels, column, rows.width);
  Pack<T, kPack> result;
#pragma unroll
  for (int c = 0; c < kPack; ++c) result[c] = narrow<T>(fold.sum[c]);
  store(grad_y + patch * rows.width + column, result);
}

}  // namespace blt
