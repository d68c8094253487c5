// The backward passes of block_causal_attention: dq with queries across the lanes, dk and dv with keys across them.
#pragma once

#include <span>

#include "attention_blocks.h"

namespace blt {

// What both passes read: the gradient of the output, and of each query lse and delta = grad . out.
template <class T, class A>
struct Saved {
  Heads<const T> grad;
  const A* lse;    // [Tq, H]
  const A* delta;  // [Tq, H]
};

// The queries of a Tile across the lanes; T is what the factors are kept in.
template <class A, class T = A>
struct QueryGradBlock {
  T *queries, *grads;  // [E][lane]
  A* sums;             // [E][lane]
  alignas(kVecBytes) A lse[kWidth<A>], delta[kWidth<A>];
  LaneKeys<A> keys;

  template <class U>
  void set(const Problem<U>& problem, const Saved<U, A>& saved, int64_t head, const Tile& tile, int64_t origin) {
    keys.set(problem.visible, tile, origin);
    for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
      const int64_t i = (tile.lanes.begin + lane) * problem.heads + head;
      lse[lane] = lane < tile.lanes.size() ? saved.lse[i] : 0;
      delta[lane] = lane < tile.lanes.size() ? saved.delta[i] : 0;
    }
  }
};

// dq of the queries of some tiles, whose keys overlap.
template <class T, class A>
void query_grad(const Problem<T>& problem, const Saved<T, A>& saved, const Heads<T>& grad_q, int64_t head,
                std::span<const Tile> tiles, Scratch<A> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head);
  const Range streamed = keys_of(tiles);
  const A factor = static_cast<A>(problem.scale);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const slopes = scratch.take(kStep * kWidth<A>);
  A* const keys = scratch.take(kStep * width);
  A* const values = scratch.take(kStep * width);
  QueryGradBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryGradBlock<A>& block = blocks[t];
    const Range& rows = tiles[t].lanes;
    block.queries = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.q, head, rows, width, 1);
    block.grads = transpose_in<T, A>(scratch.take(width * kWidth<A>), saved.grad, head, rows, width, 1);
    block.sums = scratch.zeros(width * kWidth<A>);
    block.set(problem, saved, head, tiles[t], streamed.begin);
  }

  for (int64_t begin = streamed.begin; begin < streamed.end; begin += kStep) {
    const Range step = {begin, std::min(begin + kStep, streamed.end)};
    gather_rows<T, A>(keys, problem.k, group, step, width);
    gather_rows<T, A>(values, problem.v, group, step, width);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range seen = overlap(step, tiles[t].streamed);
      if (seen.size() <= 0) continue;
      const QueryGradBlock<A>& block = blocks[t];
      const int64_t skipped = (seen.begin - begin) * width;
      const Range relative = {seen.begin - streamed.begin, seen.end - streamed.begin};
      const bool masked = !block.keys.all_see(relative);
      product(scores, seen.size(), keys + skipped, width, 1, block.queries, width, false);
      product(slopes, seen.size(), values + skipped, width, 1, block.grads, width, false);
      for (int64_t j = 0; j < seen.size(); ++j)
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          const int64_t cell = j * kWidth<A> + c * lanes<A>;
          const Vec<A> p = bounded_exp(factor * load(scores + cell) - load(block.lse + c * lanes<A>));
          Vec<A> slope = p * (load(slopes + cell) - load(block.delta + c * lanes<A>));
          if (masked) slope = block.keys.sees(relative.begin + j, c) ? slope : Vec<A>{};
          store(slopes + cell, slope);
        }
      product(block.sums, width, keys + skipped, 1, width, slopes, seen.size(), true);
    }
  }

  A share[kWidth<A>];
  std::fill(share, share + kWidth<A>, static_cast<A>(problem.scale));
  for (size_t t = 0; t < tiles.size(); ++t) transpose_out(grad_q, head, tiles[t].lanes, width, blocks[t].sums, share);
}

template <class A, class T = A>
struct KeyGradBlock {
  T *keys, *values;          // [E][lane]
  A *key_sums, *value_sums;  // [E][lane]
};

// scores and slopes [rows][lane], which come in as q . k and grad . v, become p and ds. seen: the keys of each row.
template <class A>
void weigh_rows(A* scores, A* slopes, const Range* seen, const A* lse, const A* delta, int64_t stride, int64_t rows,
                A factor, const Range& keys) {
  Vec<A> number[kColumns];
  for (int c = 0; c < kColumns; ++c) number[c] = lane_numbers<A>(c);
  for (int64_t i = 0; i < rows; ++i) {
    const bool masked = keys.begin < seen[i].begin || seen[i].end < keys.end;
    const A first = static_cast<A>(seen[i].begin - keys.begin), last = static_cast<A>(seen[i].end - keys.begin);
    const A row_lse = lse[i * stride], row_delta = delta[i * stride];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const int64_t cell = i * kWidth<A> + c * lanes<A>;
      Vec<A> p = bounded_exp(factor * load(scores + cell) - row_lse);
      Vec<A> slope = p * (load(slopes + cell) - row_delta);
      if (masked) {
        const Mask<A> sees = (first <= number[c]) & (number[c] < last);
        p = sees ? p : Vec<A>{};
        slope = sees ? slope : Vec<A>{};
      }
      store(scores + cell, p);
      store(slopes + cell, slope);
    }
  }
}

// dk and dv of the keys of some tiles, whose queries overlap, summed over the query heads of their group.
template <class T, class A>
void key_grad(const Problem<T>& problem, const Saved<T, A>& saved, const Heads<T>& grad_k, const Heads<T>& grad_v,
              int64_t group, std::span<const Tile> tiles, Scratch<A> scratch) {
  const int64_t width = problem.width, heads = problem.heads, shared = heads / problem.groups;
  const Range streamed = keys_of(tiles);
  const A factor = static_cast<A>(problem.scale);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const slopes = scratch.take(kStep * kWidth<A>);
  A* const queries = scratch.take(kStep * width);
  A* const grads = scratch.take(kStep * width);
  KeyGradBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    const Range& rows = tiles[t].lanes;
    blocks[t].keys = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.k, group, rows, width, 1);
    blocks[t].values = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.v, group, rows, width, 1);
    blocks[t].key_sums = scratch.zeros(width * kWidth<A>);
    blocks[t].value_sums = scratch.zeros(width * kWidth<A>);
  }

  for (int64_t head = group * shared; head < (group + 1) * shared; ++head)
    for (int64_t begin = streamed.begin, b = problem.visible.document_of(begin); begin < streamed.end; begin += kStep) {
      const Range step = {begin, std::min(begin + kStep, streamed.end)};
      gather_rows<T, A>(queries, problem.q, head, step, width);
      gather_rows<T, A>(grads, saved.grad, head, step, width);
      Range seen[kStep];
      for (int64_t row = begin; row < step.end; ++row) {
        while (problem.visible.cu_q[b + 1] <= row) ++b;
        seen[row - begin] = problem.visible.keys(row, b);
        if (seen[row - begin].size() > 0) continue;
        std::fill_n(queries + (row - begin) * width, width, A(0));  // may hold anything
        std::fill_n(grads + (row - begin) * width, width, A(0));
      }
      for (size_t t = 0; t < tiles.size(); ++t) {
        const Range rows = overlap(step, tiles[t].streamed);
        if (rows.size() <= 0) continue;
        const KeyGradBlock<A>& block = blocks[t];
        const int64_t skipped = rows.begin - begin, i = rows.begin * heads + head;
        const A* const row_queries = queries + skipped * width;
        const A* const row_grads = grads + skipped * width;
        product(scores, rows.size(), row_queries, width, 1, block.keys, width, false);
        product(slopes, rows.size(), row_grads, width, 1, block.values, width, false);
        weigh_rows(scores, slopes, seen + skipped, saved.lse + i, saved.delta + i, heads, rows.size(), factor,
                   tiles[t].lanes);
        product(block.key_sums, width, row_queries, 1, width, slopes, rows.size(), true);
        product(block.value_sums, width, row_grads, 1, width, scores, rows.size(), true);
      }
    }

  A share[kWidth<A>], one[kWidth<A>];
  std::fill(share, share + kWidth<A>, static_cast<A>(problem.scale));
  std::fill(one, one + kWidth<A>, A(1));
  for (size_t t = 0; t < tiles.size(); ++t) {
    transpose_out(grad_k, group, tiles[t].lanes, width, blocks[t].key_sums, share);
    transpose_out(grad_v, group, tiles[t].lanes, width, blocks[t].value_sums, one);
  }
}

}  // namespace blt
