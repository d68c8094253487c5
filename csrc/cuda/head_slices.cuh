// Distributes the row of a head over the lanes of a warp: a group of kLanes lanes shares it, each with a slice.
//
// A group holds kHeld rows in registers and streams others past them, kTile at a time. A tile has kCells dot products.
// The sum over the lanes leaves each of them in kLanes / kCells lanes of the group, its cell. So a lane has one score
// and takes one exponential; if every lane had all sums, it would take kCells.
#pragma once

#include "device.cuh"

namespace blt {

// The tensor is [rows, heads, E], with unit stride in E and fewer than 2^31 rows.
template <class T>
struct HeadTensor {
  T* data;
  i64 head_stride;
  u32 row_bytes;
};

// A lane moves its slice of a row in kVecs accesses of kVec numbers, so a row has at most kVecs * kVec * kLanes. A warp
// has kHeads groups.
template <class T_, int kVec_, int kVecs_, int kLanes_>
struct Split {
  using T = T_;
  using A = acc_t<T>;
  static constexpr int kVec = kVec_, kVecs = kVecs_, kLanes = kLanes_;
  static constexpr int kSize = kVec * kVecs, kHeads = kWarp / kLanes;
  static constexpr int kHeld = sizeof(A) == 8 ? 1 : 2, kTile = kHeld;
  static constexpr int kCells = kHeld * kTile, kCellLanes = kLanes / kCells;
  static_assert(kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "groups must fill a warp, and fold by halves");
  static_assert(kCellLanes >= 1, "a lane has at most one cell");
};

// --- slices ----------------------------------------------------------------------------------------------------------

// Raw holds a lane's slice of a row as it is in memory, Slice as accumulators.
template <class S>
struct Raw {
  Bits<typename S::T, S::kVec> vecs[S::kVecs];
};
template <class S>
struct Slice {
  typename S::A values[S::kSize] = {};
  __device__ __forceinline__ typename S::A& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const typename S::A& operator[](int i) const { return values[i]; }
};

template <class T>
__device__ __forceinline__ T* data_at(T* data, u64 bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(data) + bytes);
}
template <class T>
__device__ __forceinline__ const T* data_at(const T* data, u64 bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(data) + bytes);
}

// Reads and writes the slices of one lane in one head of a tensor. A row has `room` numbers from the lane's first on.
template <class S, class T>
struct Column {
  T* data;
  u32 row_bytes;
  int room;

  __device__ __forceinline__ T* at(u32 row) const { return data_at(data, static_cast<u64>(row) * row_bytes); }
  // Vec r begins offset(r) numbers behind the lane's first one. A lane has it if it lies in the row.
  __device__ __forceinline__ static constexpr int offset(int r) { return r * S::kLanes * S::kVec; }
  __device__ __forceinline__ bool has(int r) const { return offset(r) < room; }
  // Returns a slice with 0 for the numbers beyond the row.
  __device__ __forceinline__ Raw<S> load(u32 row) const {
    Raw<S> raw;
    const T* const from = at(row);
#pragma unroll
    for (int r = 0; r < S::kVecs; ++r) {
      raw.vecs[r] = {};
      if (has(r)) raw.vecs[r] = load_bits<S::kVec>(from + offset(r));
    }
    return raw;
  }
  __device__ __forceinline__ void store(u32 row, const Slice<S>& slice) const {
    T* const to = at(row);
#pragma unroll
    for (int r = 0; r < S::kVecs; ++r) {
      AlignedVector<T, S::kVec> vec;
#pragma unroll
      for (int c = 0; c < S::kVec; ++c) vec[c] = from_float<T>(slice[r * S::kVec + c]);
      if (has(r)) blt::store(to + offset(r), vec);
    }
  }
};
template <class S>
using InputColumn = Column<S, const typename S::T>;
template <class S>
using OutputColumn = Column<S, typename S::T>;

template <class S>
__device__ __forceinline__ int lane_column() {
  return static_cast<int>(threadIdx.x) % S::kLanes * S::kVec;
}

// Lanes without a head read and write nothing.
template <class S, class T>
__device__ __forceinline__ Column<S, T> column_of(const HeadTensor<T>& rows, int head, int heads, int width) {
  const int column = lane_column<S>();
  const bool here = head < heads;
  return {rows.data + (here ? head * rows.head_stride + column : 0), rows.row_bytes, here ? width - column : 0};
}

template <class S>
__device__ __forceinline__ Slice<S> to_float(const Raw<S>& raw) {
  Slice<S> slice;
#pragma unroll
  for (int r = 0; r < S::kVecs; ++r) {
    const auto vec = unpack<typename S::T, S::kVec>(raw.vecs[r]);
#pragma unroll
    for (int c = 0; c < S::kVec; ++c) slice[r * S::kVec + c] = to_float(vec[c]);
  }
  return slice;
}

// Returns the lane's share of x . y.
template <class S>
__device__ __forceinline__ typename S::A dot(const Slice<S>& x, const Slice<S>& y) {
  typename S::A sum = 0;
#pragma unroll
  for (int c = 0; c < S::kSize; ++c) sum += x[c] * y[c];
  return sum;
}

template <class S>
__device__ __forceinline__ void add(Slice<S>& sum, typename S::A factor, const Slice<S>& x) {
#pragma unroll
  for (int c = 0; c < S::kSize; ++c) sum[c] += factor * x[c];
}

// --- cells -----------------------------------------------------------------------------------------------------------
// All lanes of the warp take part in the functions that shuffle.

// A cell belongs to held row `held` and to row `tile` of the tile.
struct Cell {
  int held, tile;
};
template <class S>
__device__ __forceinline__ Cell cell_of_lane() {
  const int cell = static_cast<int>(threadIdx.x) % S::kLanes / S::kCellLanes;
  return {cell / S::kTile, cell % S::kTile};
}

template <class S>
__device__ __forceinline__ bool first_of_cell() {
  return threadIdx.x % S::kCellLanes == 0;
}

// Returns held_i . x_a for the lane's cell (i, a). Each sum folds the lanes by halves, so its rounding depends on its
// own terms alone.
template <class S>
__device__ __forceinline__ typename S::A dots(const Slice<S> (&held)[S::kHeld], const Slice<S> (&x)[S::kTile]) {
  typename S::A sums[S::kCells];
#pragma unroll
  for (int i = 0; i < S::kHeld; ++i)
#pragma unroll
    for (int a = 0; a < S::kTile; ++a) sums[i * S::kTile + a] = dot(held[i], x[a]);
  int distance = S::kLanes / 2;
#pragma unroll
  for (int half = S::kCells / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int c = 0; c < half; ++c) {
      const auto sent = upper ? sums[c] : sums[c + half], kept = upper ? sums[c + half] : sums[c];
      sums[c] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], distance);
  return sums[0];
}

// Fold a number of each cell over the cells of a held row (fold_tile), or over those of a row of the tile (fold_held).
template <class S, class A, class Fold>
__device__ __forceinline__ A fold_tile(A x, Fold fold) {
#pragma unroll
  for (int distance = S::kCellLanes; distance < S::kCellLanes * S::kTile; distance *= 2)
    x = fold(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
template <class S, class A, class Fold>
__device__ __forceinline__ A fold_held(A x, Fold fold) {
#pragma unroll
  for (int distance = S::kCellLanes * S::kTile; distance < S::kLanes; distance *= 2)
    x = fold(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Returns the x of cell (held, tile) of the lane's group.
template <class S, class A>
__device__ __forceinline__ A of_cell(A x, int held, int tile) {
  return __shfl_sync(kAllLanes, x, (held * S::kTile + tile) * S::kCellLanes, S::kLanes);
}

}  // namespace blt
