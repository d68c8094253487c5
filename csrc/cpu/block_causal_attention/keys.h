// Both backward passes of block_causal_attention use this tile of keys.
#pragma once

#include "backward.h"

namespace blt {

// Points to the keys of a tile, which lie across the lanes; T is the type of the factors.
template <class A, class T = A>
struct KeyBlock {
  T *keys, *values;  // [E][lane], is the keys times Scaling::power
  T* rows;           // [lane][pitch], is the keys as a right factor
  A *dk, *dv;        // [E][lane]
};

// Calls f(keys) for the ranges of a tile's keys that some query attends to: masked keys may hold NaN.
template <class F>
void for_each_unmasked(const KeyRanges& ranges, const Range& lanes, F f) {
  if (ranges.documents == 0) return;
  const int32_t *const cu_q = ranges.cu_seqlens_q, *const cu_k = ranges.cu_seqlens_k;
  for (int64_t b = std::upper_bound(cu_k, cu_k + ranges.documents, lanes.begin) - cu_k - 1;
       b < ranges.documents && cu_k[b] < lanes.end; ++b) {
    if (cu_q[b] == cu_q[b + 1]) continue;
    const Range keys = {ranges.keys(cu_q[b], b).begin, ranges.keys(cu_q[b + 1] - 1, b).end};
    if (const Range part = overlap(keys, lanes); part.size() > 0) f(part);
  }
}

// Writes dk and dv of a tile to the gradients.
template <class A, class T>
void finish(const Problem& problem, const OutputHeads& grad_k, const OutputHeads& grad_v, int64_t kv_head,
            const Range& keys, const KeyBlock<A, T>& block) {
  A scale[kWidth<A>], one[kWidth<A>];
  std::fill(scale, scale + kWidth<A>, static_cast<A>(problem.scale));
  std::fill(one, one + kWidth<A>, A(1));
  transpose_out(grad_k, kv_head, keys, problem.head_dim, block.dk, scale);
  transpose_out(grad_v, kv_head, keys, problem.head_dim, block.dv, one);
}

}  // namespace blt
