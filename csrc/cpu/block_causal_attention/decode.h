// The forward pass of block_causal_attention for a tile of few queries, as in decoding with a cache.
//
// Such a tile would leave most lanes empty with queries across them. So here E lies across the lanes, padded with zeros
// to chunks of kWidth, and keys lie across them in the softmax. All query heads of a key/value head share what is read
// of its keys and values: the rows of a matrix are (query head, query) pairs.
#pragma once

#include "blocks.h"

namespace blt {

// The cost of a streamed key for a row, in (lane, key) pairs: a single row cannot keep the multiply-adds busy.
inline constexpr int64_t kDecodeCost = 8;

// Elements of scratch for a tile of `rows` rows in each of `num_kv_heads` key/value heads.
template <class A>
int64_t decode_scratch(int64_t num_kv_heads, int64_t rows, int64_t head_dim);

// Computes out and lse [Tq, H] of the queries of a tile, for the key/value heads of a range. A row of keys holds all of
// these side by side, so keys are read a step at a time for all of them.
template <class A>
void decode(const Problem& problem, const OutputHeads& out, A* lse, const Range& kv_heads, const Tile& tile,
            Scratch<A> scratch);

}  // namespace blt
