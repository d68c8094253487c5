// patch_unpool: every byte gets the row of a patch.
//
//   out[t]    = y[ids[t]], 0 where the id is -1
//   grad_y[p] = sum of grad_out[t] over the bytes t with ids[t] = p
//
// Tiling: forward, a thread owns kPack columns (16 bytes where rows are aligned to that) of kUnpoolRows bytes one behind
// the other, and loads the row of a patch once for the bytes that share it. Backward, it owns kPack columns of a patch;
// the bytes that read patch p lie within [offsets[p], offsets[p+2]) by either kind of ids, and their rows are added in
// order. No shared memory, no barriers.
//
// Bytes: forward reads y, about once, and the ids, and writes out. Backward reads grad_out and the ids and writes grad_y.
// Roofline: a memory copy.
#pragma once

#include "patch_rows.cuh"

namespace blt {

inline constexpr int kUnpoolRows = 16;

template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    patch_unpool_fwd_kernel(const T* y, const i32* ids, i64 bytes, i64 patches, i64 width, i64 stride, T* out) {
  constexpr int kAhead = 4;
  const auto [group, column] = owned_by_thread<kPack>(width);
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

template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    patch_unpool_bwd_kernel(const T* grad_out, const i32* ids, PatchRows rows, T* grad_y) {
  constexpr int kAhead = 4;
  const auto [patch, column] = owned_by_thread<kPack>(rows.width);
  if (patch >= rows.patches) return;
  const auto [begin, end] = patch_range(rows, patch, 1);
  acc_t<T> sum[kPack] = {};
  for (i64 t = begin; t < end; t += kAhead) {
    bool reads[kAhead];
    Pack<T, kPack> ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) reads[i] = t + i < end && ids[t + i] == patch;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (reads[i]) ahead[i] = load<kPack>(grad_out + (t + i) * rows.stride + column);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int c = 0; c < kPack; ++c)
        if (reads[i]) sum[c] += widen(ahead[i][c]);
  }
  Pack<T, kPack> result;
#pragma unroll
  for (int c = 0; c < kPack; ++c) result[c] = narrow<T>(sum[c]);
  store(grad_y + patch * rows.width + column, result);
}

}  // namespace blt
