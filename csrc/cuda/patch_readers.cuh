// Who reads whom in patch_cross_attention: blocks of consecutive queries that all read the same consecutive keys.
//
// Encoding, the K queries of patch p read the bytes of patches (p - window, p]. Decoding, the bytes with decode id d
// read the K vectors of patches (d - window, d]; these bytes lie next to each other. Either way the queries of a patch
// make one block with the keys they read, and the keys of a patch another one with the queries that read them; without
// a window the two are the same. csrc/cpu/patch_readers.h says the same of checked arguments; here whatever offsets and
// ids hold, rows are rows of the tensors, and what no patch owns may be left unwritten.
//
// All lanes of a warp ask about the same patch, and search together.
#pragma once

#include "patch_rows.cuh"

namespace blt {

// The first index from begin to end whose value is at least `bound`, end if there is none, for values that never fall:
// 32 probes at once, so one round for up to 32 values.
__device__ __forceinline__ i64 warp_lower_bound(const i32* values, i64 begin, i64 end, i64 bound) {
  const int lane = threadIdx.x % kWarp;
  while (begin < end) {
    const i64 step = ceil_div<i64>(end - begin, kWarp), last = begin + (lane + 1) * step - 1;
    const u32 below = __ballot_sync(kAllLanes, last < end && values[last] < bound);
    begin += __popc(below) * step;
    end = least(end, begin + step - 1);  // the last of a run is no longer looked for, only what lies before it
  }
  return begin;
}

struct Block {
  RowRange queries, keys;
};

// The patches of one document: [first, last).
struct Document {
  i64 first, last;
};

struct PatchReaders {
  const i32* offsets;     // of patches, [capacity + 1]
  const i32* cu_patches;  // of documents, [documents + 1]
  const i32* ids;         // [num_bytes]
  i64 capacity, documents, num_bytes, queries_per_patch, window;
  bool encode;

  __device__ __forceinline__ RowRange vectors(i64 begin, i64 end) const {
    return {begin * queries_per_patch, end * queries_per_patch};
  }
  __device__ __forceinline__ i64 offset(i64 p) const { return least(most<i64>(offsets[p], 0), num_bytes); }
  __device__ __forceinline__ RowRange bytes(i64 begin, i64 end) const { return {offset(begin), offset(end)}; }

  // A patch beyond the documents has one of its own; so has any patch where that makes no difference.
  __device__ __forceinline__ Document document_of(i64 p) const {
    if (encode && window == 1) return {p, p + 1};
    const i64 b = warp_lower_bound(cu_patches + 1, 0, documents, p + 1);
    if (b == documents) return {p, p + 1};
    return {least(most<i64>(cu_patches[b], 0), p), least(most<i64>(cu_patches[b + 1], p + 1), capacity)};
  }

  // The first byte of a document that may read patch p or a later one: one of the patch's own bytes, if any.
  __device__ __forceinline__ i64 first_reader(i64 p, const Document& document) const {
    const i64 begin = offset(p);
    return p == document.last ? begin : warp_lower_bound(ids, begin, offset(p + 1), p);
  }
  __device__ __forceinline__ RowRange readers(i64 begin, i64 end, const Document& document) const {
    return {first_reader(begin, document), first_reader(end, document)};
  }

  // The queries of patch p and all the keys that they read.
  __device__ __forceinline__ Block of_queries(i64 p, const Document& document) const {
    const i64 begin = most(document.first, p - window + 1);
    if (encode) return {vectors(p, p + 1), bytes(begin, p + 1)};
    return {readers(p, p + 1, document), vectors(begin, p + 1)};
  }

  // The keys of patch p and all the queries that read them.
  __device__ __forceinline__ Block of_keys(i64 p, const Document& document) const {
    const i64 end = least(document.last, p + window);
    if (encode) return {vectors(p, end), bytes(p, p + 1)};
    return {readers(p, end, document), vectors(p, p + 1)};
  }

  // Bytes before the first patch of a document is complete: decoding, they read nothing.
  __device__ __forceinline__ RowRange waiting(i64 p, const Document& document) const {
    if (encode || p != document.first) return {0, 0};
    return {offset(p), first_reader(p, document)};
  }

  // Bytes beyond the last patch.
  __device__ __forceinline__ RowRange beyond() const { return {offset(capacity), num_bytes}; }
};

}  // namespace blt
