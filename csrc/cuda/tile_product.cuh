// One tile of a matrix product, sum over k of a(m, k) b(n, k), for kernels that do something with it: by tensor cores for
// bf16 and fp16, by multiplying and adding for fp32 and fp64 (TF32 would lose digits).
//
// Tiling: a block of 4 warps owns kTileRows = 64 rows m and kTileColumns = 88 columns n, since 3 x 88 holds an alphabet of
// 260 with little waste. A warp owns 16 rows and all columns, in the registers of mma.cuh whatever computes them: lane
// 4 g + q has rows g and g + 8, and columns 2 q and 2 q + 1 of every 8. Slices of 32 k pass through shared memory; while a
// block waits for one, others on the SM compute. Rows of a slice are padded by 16 bytes, which keeps banks apart.
#pragma once

#include "mma.cuh"

namespace blt {

inline constexpr int kProductThreads = 128;
inline constexpr int kTileRows = 64, kTileColumns = 88, kSlice = 32;
inline constexpr int kColumnGroups = kTileColumns / 8;

// Element (row, k) is data[row * row_stride + k * k_stride]; elements outside of rows and depth count as zeros.
template <class T>
struct Matrix {
  const T* data;
  i64 rows, depth, row_stride, k_stride;
};

template <class T>
struct SharedTiles {
  static constexpr int kStride = kSlice + 16 / sizeof(T);
  alignas(16) T a[kTileRows * kStride];
  alignas(16) T b[kTileColumns * kStride];
};

// Copies kRows rows of a slice to shared memory, kPack numbers along k to an access. With 1 any strides are allowed, and
// neighbouring threads take whatever is adjacent in memory. kAhead accesses are in flight.
template <int kRows, int kPack, class T>
__device__ __forceinline__ void copy_slice(const Matrix<T>& from, i64 row0, i64 k0, T* to) {
  constexpr int kParts = kRows * kSlice / kPack, kShare = ceil_div(kParts, kProductThreads),
                kAhead = kShare < 4 ? kShare : 4;
  const bool by_row = kPack == 1 && from.k_stride != 1;
  const Pack<T, kPack> zeros = {};
#pragma unroll 1
  for (int first = threadIdx.x; first < kParts; first += kAhead * kProductThreads) {
    Pack<T, kPack> held[kAhead];
    int places[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int part = first + i * kProductThreads;
      const int row = by_row ? part % kRows : part / (kSlice / kPack);
      const int k = by_row ? part / kRows : part % (kSlice / kPack) * kPack;
      places[i] = part < kParts ? row * SharedTiles<T>::kStride + k : -1;
      const bool inside = part < kParts && row0 + row < from.rows && k0 + k < from.depth;
      held[i] = inside ? load<kPack>(from.data + (row0 + row) * from.row_stride + (k0 + k) * from.k_stride) : zeros;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (places[i] >= 0) store(to + places[i], held[i]);
  }
}

template <class T>
using TileSums = acc_t<T>[kColumnGroups][4];

__device__ __forceinline__ u32 two_of(const void* shared) { return *static_cast<const u32*>(shared); }

// sums += the product of a slice, for the 16 rows of the warp.
template <class T>
__device__ __forceinline__ void add_slice(TileSums<T>& sums, const SharedTiles<T>& tiles) {
  constexpr int kStride = SharedTiles<T>::kStride;
  const int lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  const T* const a = tiles.a + (static_cast<int>(threadIdx.x) / kWarp * 16 + group) * kStride;
  if constexpr (sizeof(T) == 2) {
    const T* const b = tiles.b + group * kStride + 2 * quad;
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      const T* const from = a + k + 2 * quad;
      const u32 left[4] = {two_of(from), two_of(from + 8 * kStride), two_of(from + 8), two_of(from + 8 * kStride + 8)};
#pragma unroll
      for (int j = 0; j < kColumnGroups; ++j) {
        const u32 right[2] = {two_of(b + j * 8 * kStride + k), two_of(b + j * 8 * kStride + k + 8)};
        Mma<T>::add(sums[j], left, right);
      }
    }
  } else {
    const T* const b = tiles.b + 2 * quad * kStride;
    // In fp32 a slice is summed on its own first: a sum of few sums keeps more digits.
    constexpr bool kApart = sizeof(T) == 4;
    TileSums<T> apart = {};
    TileSums<T>& into = kApart ? apart : sums;
#pragma unroll 4
    for (int k = 0; k < kSlice; ++k) {
      const T upper = a[k], lower = a[8 * kStride + k];
#pragma unroll
      for (int j = 0; j < kColumnGroups; ++j) {
        const T left = b[j * 8 * kStride + k], right = b[(j * 8 + 1) * kStride + k];
        into[j][0] += upper * left;
        into[j][1] += upper * right;
        into[j][2] += lower * left;
        into[j][3] += lower * right;
      }
    }
    if constexpr (kApart) {
#pragma unroll
      for (int j = 0; j < kColumnGroups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] += apart[j][i];
    }
  }
}

// The tile of rows from row0 and columns from column0, summed over k from k0 up to k1, or the depth. All threads take part.
template <class T, int kPackA, int kPackB>
__device__ __forceinline__ void tile_product(TileSums<T>& sums, SharedTiles<T>& tiles, const Matrix<T>& a,
                                             const Matrix<T>& b, i64 row0, i64 column0, i64 k0, i64 k1) {
#pragma unroll
  for (int j = 0; j < kColumnGroups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0;
  const i64 end = least(k1, a.depth);
  for (i64 k = k0; k < end; k += kSlice) {
    __syncthreads();
    copy_slice<kTileRows, kPackA>(a, row0, k, tiles.a);
    copy_slice<kTileColumns, kPackB>(b, column0, k, tiles.b);
    __syncthreads();
    add_slice<T>(sums, tiles);
  }
}

// f(half, column, value) for the lane's sums: half 0 is row g of the warp's 16, half 1 row g + 8; columns of the tile.
template <class T, class F>
__device__ __forceinline__ void for_each_sum(TileSums<T>& sums, F f) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kColumnGroups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) f(i / 2, j * 8 + 2 * quad + i % 2, sums[j][i]);
}

// The row within the tile that `half` of the lane's sums belongs to.
__device__ __forceinline__ int tile_row(int half) {
  return static_cast<int>(threadIdx.x) / kWarp * 16 + static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * half;
}

}  // namespace blt
