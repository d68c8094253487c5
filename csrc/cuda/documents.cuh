// Defines the documents of packed data.
#pragma once

#include "device.cuh"

namespace blt {

inline constexpr i32 kMaxPositions = 0x7fffffff - 4096;  // positions a little behind the last one fit into int32

// Document b has bytes [at(b), at(b+1)) of `bytes`, which are at most kMaxPositions.
struct Documents {
  const i32* offsets;  // [count + 1], or null for documents of `length` bytes each
  i64 count;
  i32 bytes, length;

  __device__ __forceinline__ i32 at(i64 b) const {
    return offsets != nullptr ? offsets[b] : static_cast<i32>(b) * length;
  }
  __device__ __forceinline__ i32 end() const { return max(0, min(at(count), bytes)); }
};

}  // namespace blt
