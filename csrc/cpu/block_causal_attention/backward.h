// Computes the backward pass of block_causal_attention over tiles of keys, past which queries that attend to them are
// streamed.
//
// dk and dv of a tile gather in its lanes. ds of a step is a left factor too: its product with the rows of the keys is
// added to dq, of which each segment of the tiles has sums of its own (tiles.h). Segments follow from the shapes alone,
// and the sums of a query are added in the order of segments, so results do not depend on the number of threads.
#pragma once

#include "forward.h"

namespace blt {

// Has what the keys of a segment add to dq, without the factor scale: [head][query][pitch].
template <class A>
struct QuerySums {
  A* data;
  int64_t first, rows, pitch;  // are the first query, queries with padding, and E in whole vectors
  A* row(int64_t query, int64_t head) const { return data + (head * rows + query - first) * pitch; }
};

// A tile has these blocks: keys in two layouts, values, dk and dv.
inline constexpr int64_t kBackwardBlocks = 5;

// amx_scratch holds keys twice and values in bf16, dk and dv; gathered are queries twice and gradients twice.
inline constexpr int64_t kAmxBackwardBlocks = 4, kAmxBackwardGathered = 4;
// QuerySums needs so many rows after the last query: products in tile registers write 32 rows at a time.
inline constexpr int64_t kAmxBackwardPadding = 32;

// Computes dk and dv of a run of key tiles, summed over the query heads of their key/value head, and adds to dq.
template <class A>
void propagate(const Problem& problem, const RowSoftmax<A>& saved, const OutputHeads& grad_k, const OutputHeads& grad_v,
               const QuerySums<A>& sums, int64_t kv_head, Run tiles, Scratch<A> scratch);

// Does so for bf16 on a processor with AMX, for E a multiple of 32 (amx_backward.h).
void propagate_amx(const Problem& problem, const RowSoftmax<float>& saved, const OutputHeads& grad_k,
                   const OutputHeads& grad_v, const QuerySums<float>& sums, int64_t kv_head, Run tiles,
                   Scratch<float> scratch);

// Writes dq of some queries: factor times the sums of all segments that stream them, in order.
template <class A>
void add_sums(const OutputHeads& grad_q, std::span<const Segment> segments, std::span<const QuerySums<A>> sums,
              const Range& queries, int64_t num_heads, int64_t head_dim, A factor);

}  // namespace blt
