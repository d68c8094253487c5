// Computes the forward pass of block_causal_attention for tiles of few queries, as in decoding with a cache. Documents
// that also have few keys are short ones (short.h).
//
// Such a tile would leave most lanes empty with kWidth queries across them. So here the lanes are divided among a few
// rows, which are the queries of all heads that share a key/value head, and what is left is E, or keys (decode_rows.h).
// Keys and values are not packed: products read them as they are stored, in fp32, or with a single row. Otherwise a few
// keys are copied first, converted to the accumulator or padded to whole vectors.
//
// Tiling. A tile's keys are divided into parts of kPartKeys. Threads take equal shares of the parts, and of the heads
// where there are few parts. The results of several parts are combined in the order of the keys, so they are the same
// for any number of threads. Bytes: those of K and V. Flops: 4 E for each (query, key) pair.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "blocks.h"

namespace blt {

// Computes out and lse [Tq, H] of the queries of these tiles. Scratch is allocated like the tensor `like`.
template <class A>
void decode(const torch::stable::Tensor& like, const Problem& problem, const OutputHeads& out, A* lse,
            const std::vector<Tile>& tiles);

}  // namespace blt
