// Defines the rule of boundary_patch: patches start and end at marks of bytes. patch_layout.cuh evaluates it.
//
// Bytes: 1 to 8 per mark beside the layout. With a threshold for each document, a byte also searches for its document:
// 4 bytes for each of log2(B) probes, which are in the cache.
#pragma once

#include "patch_layout.cuh"

namespace blt {

// Marks are bool (T = u8) or scores, which are compared with a threshold in fp32.
template <class T>
struct BoundaryRule {
  const T* marks;
  const float* thresholds;  // [documents], or null
  Documents documents;
  float threshold;
  i32 first;  // is 0 if the marks decide about the first patch, too
  bool at_start;

  __device__ __forceinline__ i64 document_of(i32 t) const {
    if (documents.offsets == nullptr) return t / documents.length;
    return partition_point(i64{0}, documents.count - 1, [&](i64 b) { return documents.offsets[b + 1] <= t; });
  }
  __device__ __forceinline__ bool marked(i32 t) const {
    if constexpr (sizeof(T) == 1)
      return marks[t] != 0;
    else
      return static_cast<float>(to_float(marks[t])) > (thresholds != nullptr ? thresholds[document_of(t)] : threshold);
  }
  __device__ __forceinline__ bool operator()(i32 t, i32 i, bool last) const {
    const i32 after = i + 1;
    if (after <= first) return after == first;
    if (!at_start) return marked(t);
    return !last && t + 1 < documents.bytes && marked(t + 1);  // with invalid offsets the last byte may not be `last`
  }
};

}  // namespace blt
