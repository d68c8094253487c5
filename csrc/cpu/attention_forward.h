// The forward pass of block_causal_attention: a tile of queries against the keys that it sees.
#pragma once

#include <span>

#include "attention_blocks.h"

namespace blt {

// A query's weights are exp(scale s - top). `top` follows the largest score only when that has grown by more than this,
// which is rare after the first step, so that the sums are seldom rescaled. Small, since exp is most precise near 0.
inline constexpr int kGrowth = 1;

// The queries of a Tile across the lanes, and what is known of their softmax.
template <class A>
struct QueryBlock {
  A* queries;  // [E][lane]
  A* sums;     // [E][lane], of weights times values
  Vec<A> top[kColumns], total[kColumns];
  LaneKeys<A> keys;
  Vec<A> shift(int c) const { return top[c] == kNone<A> ? Vec<A>{} : top[c]; }
};

// Before scores [keys][lane] become weights: those that are not seen become kNone, and tops follow the largest, with
// the sums rescaled.
template <bool kMasked, class A>
void raise_tops(A* scores, const Range& keys, A factor, QueryBlock<A>& block, int64_t width) {
  Vec<A> peak[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) peak[c] = Vec<A>{} + kNone<A>;
  for (int64_t j = keys.begin; j < keys.end; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      A* const cell = scores + (j - keys.begin) * kWidth<A> + c * lanes<A>;
      Vec<A> s = load(cell);
      if constexpr (kMasked) {
        s = block.keys.sees(j, c) ? s : Vec<A>{} + kNone<A>;
        store(cell, s);
      }
      peak[c] = s > peak[c] ? s : peak[c];
    }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const Vec<A> top = block.top[c], grown = factor * peak[c];
    const Mask<A> grows = grown > top + static_cast<A>(kGrowth);
    if (any(grows)) {
      block.top[c] = grows ? grown : top;
      const Vec<A> decay = bounded_exp(grows ? top - grown : Vec<A>{});
      block.total[c] *= decay;
      for (int64_t e = 0; e < width; ++e) {
        A* const cell = block.sums + e * kWidth<A> + c * lanes<A>;
        store(cell, load(cell) * decay);
      }
    }
  }
}

// exp(factor * score - shift), and 0 for kNone.
template <bool kMasked, class V, class A>
inline V weight(V score, A factor, V shift) {
  const V p = bounded_exp(factor * score - shift);
  if constexpr (kMasked) return score == kNone<A> ? V{} : p;
  return p;
}

// scores [keys][lane] become weights; the sums are rescaled where the top has changed.
template <bool kMasked, class A>
void weigh(A* scores, const Range& keys, A factor, QueryBlock<A>& block, int64_t width) {
  raise_tops<kMasked>(scores, keys, factor, block, width);
  Vec<A> total[kColumns], shift[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) shift[c] = block.shift(c), total[c] = block.total[c];
  for (int64_t j = 0; j < keys.end - keys.begin; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      A* const cell = scores + j * kWidth<A> + c * lanes<A>;
      const Vec<A> p = weight<kMasked>(load(cell), factor, shift[c]);
      store(cell, p);
      total[c] += p;
    }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) block.total[c] = total[c];
}

// out and lse of the queries of a tile.
template <class T, class A>
void finish(const Problem<T>& problem, const Heads<T>& out, A* lse, int64_t head, const Tile& tile,
            const QueryBlock<A>& block) {
  const Range& rows = tile.lanes;
  A share[kWidth<A>];
  for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
    const A total = block.total[lane / lanes<A>][lane % lanes<A>], top = block.top[lane / lanes<A>][lane % lanes<A>];
    share[lane] = top == kNone<A> ? 0 : 1 / total;
    if (lane < rows.size()) lse[(rows.begin + lane) * problem.heads + head] = top + std::log(total);
  }
  transpose_out(out, head, rows, problem.width, block.sums, share);
}

// out and lse of the queries of some tiles, whose keys overlap: each step of keys is gathered once for all of them.
template <class T, class A>
void attend(const Problem<T>& problem, const Heads<T>& out, A* lse, int64_t head, std::span<const Tile> tiles,
            Scratch<A> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head);
  const Range streamed = keys_of(tiles);
  const A factor = static_cast<A>(std::abs(problem.scale));
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const keys = scratch.take(kStep * width);
  A* const values = scratch.take(kStep * width);
  QueryBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<A>& block = blocks[t];
    block.queries = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.q, head, tiles[t].lanes, width,
                                       problem.scale < 0 ? -1 : 1);
    block.sums = scratch.zeros(width * kWidth<A>);
    block.keys.set(problem.visible, tiles[t], streamed.begin);
    for (int c = 0; c < kColumns; ++c) block.top[c] = Vec<A>{} + kNone<A>, block.total[c] = Vec<A>{};
  }

  for (int64_t begin = streamed.begin; begin < streamed.end; begin += kStep) {
    const Range step = {begin, std::min(begin + kStep, streamed.end)};
    gather_rows<T, A>(keys, problem.k, group, step, width);
    gather_rows<T, A>(values, problem.v, group, step, width);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range seen = overlap(step, tiles[t].streamed);
      if (seen.size() <= 0) continue;
      const int64_t skipped = (seen.begin - begin) * width;
      const Range relative = {seen.begin - streamed.begin, seen.end - streamed.begin};
      QueryBlock<A>& block = blocks[t];
      product(scores, seen.size(), keys + skipped, width, 1, block.queries, width, false);
      if (block.keys.all_see(relative))
        weigh<false>(scores, relative, factor, block, width);
      else
        weigh<true>(scores, relative, factor, block, width);
      product(block.sums, width, values + skipped, 1, width, scores, seen.size(), true);
    }
  }

  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, out, lse, head, tiles[t], blocks[t]);
}

}  // namespace blt
