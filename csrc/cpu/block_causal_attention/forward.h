// The forward pass of block_causal_attention: a tile of queries against the keys that it sees.
#pragma once

#include <limits>
#include <type_traits>

#include "blocks.h"

namespace blt {

// A query's weights are exp(factor * (s - top)) for products s. `top` follows the largest of them only when its score has
// grown by more than this, which is rare after the first step, so that the sums are seldom rescaled. Small, since exp is
// most precise near 0.
inline constexpr int kGrowth = 1;

// The queries of a Tile across the lanes, and what is known of their softmax.
template <class A>
struct QueryBlock {
  A* queries;  // [E][lane]
  A* sums;     // [E][lane], of weights times values; without values [lane], of weights times grad . v
  Vec<A> top[kColumns], total[kColumns];
  LaneKeys<A> keys;
  Vec<A> shift(int c) const { return top[c] == kNone<A> ? Vec<A>{} : top[c]; }
};

// Before scores [keys][lane] become weights: those that are not seen become kNone, and tops follow the largest, with
// the `width` sums rescaled.
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
    const Vec<A> top = block.top[c];
    const Mask<A> grows = factor * (peak[c] - top) > Vec<A>{} + static_cast<A>(kGrowth);
    if (any(grows)) {
      block.top[c] = grows ? peak[c] : top;
      const Vec<A> decay = bounded_exp(grows ? top - peak[c] : Vec<A>{}, factor);
      block.total[c] *= decay;
      for (int64_t e = 0; e < width; ++e) {
        A* const cell = block.sums + e * kWidth<A> + c * lanes<A>;
        store(cell, load(cell) * decay);
      }
    }
  }
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
      const Vec<A> p = bounded_exp(load(cell) - shift[c], factor);  // 0 for kNone
      store(cell, p);
      total[c] += p;
    }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) block.total[c] = total[c];
}

// Where the results of `attend` go: out and lse.
template <class T, class A>
struct Output {
  static constexpr bool kValues = true;
  static constexpr int64_t kBlocks = 2;  // of a tile, [E][lane]: queries, sums
  Heads<T> out;
  A* lse;  // [Tq, H]

  void finish(const Problem<T>& problem, int64_t head, const Range& rows, const QueryBlock<A>& block) const {
    const A factor = Scaling<A>(problem.scale).factor;
    A share[kWidth<A>];
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
      const A total = block.total[lane / lanes<A>][lane % lanes<A>], top = block.top[lane / lanes<A>][lane % lanes<A>];
      share[lane] = top == kNone<A> ? 0 : 1 / total;
      if (lane < rows.size()) lse[(rows.begin + lane) * problem.heads + head] = factor * top + std::log(total);
    }
    transpose_out(out, head, rows, problem.width, block.sums, share);
  }
};

// Is lse so large that its rounding makes p wrong by more than 32 eps in the dtype of the accumulators, 256 eps where
// gradients have 16 bits?
template <class T, class A>
inline bool is_large(A lse) {
  constexpr A kLarge = std::is_same_v<T, A> ? 128 : 1024;
  return std::abs(lse) >= kLarge && std::abs(lse) <= std::numeric_limits<A>::max();
}

// Or what the backward needs to know of rows with a large lse, which is rounded: at 1e6 that makes p = exp(s - lse) wrong
// by 3%, at 1e9 by e^32. Here p = share * exp(factor * (s - top)). delta = grad . out is that of rounded outputs, so it is
// summed anew too: gradients of one key that has all of the weight are 0, not a rounding error times a large key.
template <class T, class A>
struct RowSoftmax {
  static constexpr bool kValues = false;
  static constexpr int64_t kBlocks = 3;  // queries, gradients, sums
  Heads<const T> grad;
  const A* lse;            // [Tq, H], as all of these
  A *delta, *top, *share;  // of rows with a large lse

  void finish(const Problem<T>& problem, int64_t head, const Range& rows, const QueryBlock<A>& block) const {
    for (int64_t lane = 0; lane < rows.size(); ++lane) {
      const int64_t i = (rows.begin + lane) * problem.heads + head;
      if (!is_large<T>(lse[i])) continue;
      top[i] = block.top[lane / lanes<A>][lane % lanes<A>];
      share[i] = 1 / block.total[lane / lanes<A>][lane % lanes<A>];
      delta[i] = share[i] * block.sums[lane];
    }
  }
};

// sums [lane] += weights * slopes, both [rows][lane]. A slope without a weight may be anything.
template <class A>
void add_products(A* sums, const A* weights, const A* slopes, int64_t rows) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t lane = 0; lane < kWidth<A>; lane += lanes<A>) {
      const Vec<A> p = load(weights + j * kWidth<A> + lane), slope = load(slopes + j * kWidth<A> + lane);
      store(sums + lane, load(sums + lane) + (p == 0 ? Vec<A>{} : p * slope));
    }
}

// The results of the queries of some tiles, whose keys overlap: each step of keys is gathered once for all of them.
template <class Results, class T, class A>
void attend(const Problem<T>& problem, const Results& results, int64_t head, Run tiles, Scratch<A> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head), sums = Results::kValues ? width : 1;
  const Range streamed = keys_of(tiles);
  const auto [power, factor] = Scaling<A>(problem.scale);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const keys = scratch.take(kStep * width);
  A* const values = scratch.take(kStep * width);
  A* const slopes = Results::kValues ? nullptr : scratch.take(kStep * kWidth<A>);
  A* grads[kMaxTiles<A>];
  QueryBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<A>& block = blocks[t];
    block.queries = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.q, head, tiles[t].lanes, width, power);
    if constexpr (!Results::kValues)
      grads[t] = transpose_in<T, A>(scratch.take(width * kWidth<A>), results.grad, head, tiles[t].lanes, width, 1);
    block.sums = scratch.zeros(sums * kWidth<A>);
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
        weigh<false>(scores, relative, factor, block, sums);
      else
        weigh<true>(scores, relative, factor, block, sums);
      if constexpr (Results::kValues) {
        product(block.sums, width, values + skipped, 1, width, scores, seen.size(), true);
      } else {
        product(slopes, seen.size(), values + skipped, width, 1, grads[t], width, false);
        add_products(block.sums, scores, slopes, seen.size());
      }
    }
  }

  for (size_t t = 0; t < tiles.size(); ++t) results.finish(problem, head, tiles[t].lanes, blocks[t]);
}

}  // namespace blt
