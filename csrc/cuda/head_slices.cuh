// Rows of heads over the lanes of a warp: a group of lanes shares the row of one head, each lane with a slice of it.
#pragma once

#include "device.cuh"

namespace blt {

// A [rows, heads, E] tensor with unit stride in E.
template <class T>
struct HeadRows {
  T* data;
  i64 row_stride, head_stride;
  __host__ __device__ T* at(i64 row, i64 head) const { return data + row * row_stride + head * head_stride; }
};

// Rows of up to kPacks * kPack * kLanes numbers in kPacks accesses of kPack numbers to a lane. A warp has kHeads
// groups.
template <class T_, int kPack_, int kPacks_, int kLanes_>
struct Split {
  using T = T_;
  using A = acc_t<T>;
  static constexpr int kPack = kPack_, kPacks = kPacks_, kLanes = kLanes_;
  static constexpr int kSize = kPack * kPacks, kHeads = kWarp / kLanes;
  static constexpr int kAhead = kPacks > 2 ? 1 : 2;  // rows under way at once
  static_assert(kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "groups must fill a warp, and fold by halves");
};

// A lane's slice of a row as it is in memory, and as it is computed with.
template <class S>
struct Raw {
  Bits<typename S::T, S::kPack> packs[S::kPacks];
};
template <class S>
struct Slice {
  typename S::A values[S::kSize] = {};
  __device__ __forceinline__ typename S::A& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const typename S::A& operator[](int i) const { return values[i]; }
};

// The lane's slice of the row, of which `width` numbers are there: a multiple of kPack. Others are 0.
template <class S>
__device__ __forceinline__ Raw<S> load_slice(const typename S::T* row, i64 width) {
  Raw<S> raw;
#pragma unroll
  for (int r = 0; r < S::kPacks; ++r) {
    const int column = (r * S::kLanes + static_cast<int>(threadIdx.x) % S::kLanes) * S::kPack;
    raw.packs[r] = {};
    if (column < width) raw.packs[r] = load_bits<S::kPack>(row + column);
  }
  return raw;
}

template <class S>
__device__ __forceinline__ void store_slice(typename S::T* row, i64 width, const Slice<S>& slice) {
#pragma unroll
  for (int r = 0; r < S::kPacks; ++r) {
    const int column = (r * S::kLanes + static_cast<int>(threadIdx.x) % S::kLanes) * S::kPack;
    Pack<typename S::T, S::kPack> pack;
#pragma unroll
    for (int c = 0; c < S::kPack; ++c) pack[c] = narrow<typename S::T>(slice[r * S::kPack + c]);
    if (column < width) store(row + column, pack);
  }
}

template <class S>
__device__ __forceinline__ Slice<S> widen(const Raw<S>& raw) {
  Slice<S> slice;
#pragma unroll
  for (int r = 0; r < S::kPacks; ++r) {
    const auto pack = unpack<typename S::T, S::kPack>(raw.packs[r]);
#pragma unroll
    for (int c = 0; c < S::kPack; ++c) slice[r * S::kPack + c] = widen(pack[c]);
  }
  return slice;
}

// What the lane adds to x . y.
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

// Each number summed over the lanes of its group, side by side: a shuffle takes long, but many can be under way. All
// lanes of the warp take part.
template <int kLanes, int kCount, class A>
__device__ __forceinline__ void sum_lanes(A (&x)[kCount]) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], distance);
}

}  // namespace blt
