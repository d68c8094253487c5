// The backward pass of block_causal_attention: tiles of keys, past which the queries that see them are streamed.
//
// dk and dv of a tile gather in its lanes. ds of a step is a left factor too: its product with the rows of the keys
// is added to dq, of which each segment of the tiles has sums of its own (tiles.h). Segments follow from the
// shapes alone, and the sums of a query are added in their order, so threads change no bit.
//
// p = exp(s - lse) is as precise as lse, which is rounded: rows with a large lse have their softmax summed once more
// before the pass, by that of forward without values.
#pragma once

#include <span>

#include "forward.h"

namespace blt {

// What the pass reads: the gradient of the output, and of each query lse and delta = grad . out, with more of those whose
// lse is large.
template <class T, class A>
using Saved = RowSoftmax<T, A>;

// dq without the factor `scale`, as far as the keys of a segment add to it: [head][row][pitch].
template <class A>
struct QuerySums {
  A* data;
  int64_t first, rows, pitch;  // first is the row that they begin with, pitch is E in whole vectors
  A* row(int64_t i, int64_t head) const { return data + (head * rows + i - first) * pitch; }
};

// The keys of a Tile across the lanes; T is what the factors are kept in.
template <class A, class T = A>
struct KeyBlock {
  T *keys, *values;          // [E][lane], the keys times Scaling::power
  T* rows;                   // the keys again, as a right factor: [lane][pitch]
  A *key_sums, *value_sums;  // [E][lane]
};
inline constexpr int64_t kBackwardBlocks = 5;

// Calls f(keys) for the ranges of a tile's keys that some query sees: the others may hold anything.
template <class F>
void for_each_seen(const Visibility& visible, const Range& lanes, F f) {
  if (visible.documents == 0) return;
  const int32_t* const end = visible.cu_k + visible.documents;
  for (int64_t b = std::upper_bound(visible.cu_k, end, lanes.begin) - visible.cu_k - 1;
       b < visible.documents && visible.cu_k[b] < lanes.end; ++b) {
    if (visible.cu_q[b] == visible.cu_q[b + 1]) continue;
    const Range seen = {visible.keys(visible.cu_q[b], b).begin, visible.keys(visible.cu_q[b + 1] - 1, b).end};
    if (const Range part = overlap(seen, lanes); part.size() > 0) f(part);
  }
}

// scores and slopes [rows][lane], which come in as q . k and grad . v, become p and ds. seen: the keys of each row, the
// first of which is number `row` of what is saved, and the next `stride` further on.
template <class T, class A>
void weigh_rows(A* scores, A* slopes, const Range* seen, const Saved<T, A>& saved, int64_t row, int64_t stride,
                int64_t rows, A factor, const Range& keys) {
  Vec<A> number[kColumns];
  for (int c = 0; c < kColumns; ++c) number[c] = lane_numbers<A>(c);
  for (int64_t i = 0; i < rows; ++i) {
    const bool masked = keys.begin < seen[i].begin || seen[i].end < keys.end;
    const A first = static_cast<A>(seen[i].begin - keys.begin), last = static_cast<A>(seen[i].end - keys.begin);
    const int64_t at = row + i * stride;
    const A lse = saved.lse[at], delta = saved.delta[at];
    const auto weigh = [&](auto weight) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const int64_t cell = i * kWidth<A> + c * lanes<A>;
        Vec<A> p = weight(load(scores + cell));
        Vec<A> slope = p * (load(slopes + cell) - delta);
        if (masked) {
          const Mask<A> sees = (first <= number[c]) & (number[c] < last);
          p = sees ? p : Vec<A>{};
          slope = sees ? slope : Vec<A>{};
        }
        store(scores + cell, p);
        store(slopes + cell, slope);
      }
    };
    if (is_large<T>(lse)) {
      const A top = saved.top[at], share = saved.share[at];
      weigh([&](Vec<A> s) { return share * bounded_exp(s - top, factor); });
    } else {
      weigh([&](Vec<A> s) { return bounded_exp(factor * s - lse); });
    }
  }
}

// dk and dv of the keys of some tiles, whose queries overlap, summed over the query heads of their group; what they
// add to dq.
template <class T, class A>
void propagate(const Problem<T>& problem, const Saved<T, A>& saved, const Heads<T>& grad_k, const Heads<T>& grad_v,
               const QuerySums<A>& sums, int64_t group, Run tiles, Scratch<A> scratch) {
  const int64_t width = problem.width, heads = problem.heads, shared = heads / problem.groups;
  const Range streamed = keys_of(tiles);
  const auto [power, factor] = Scaling<A>(problem.scale);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const slopes = scratch.take(kStep * kWidth<A>);
  A* const queries = scratch.take(kStep * width);
  A* const grads = scratch.take(kStep * width);
  KeyBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    const Range& keys = tiles[t].lanes;
    blocks[t].keys = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.k, group, keys, width, power);
    blocks[t].values = transpose_in<T, A>(scratch.take(width * kWidth<A>), problem.v, group, keys, width, 1);
    blocks[t].key_sums = scratch.zeros(width * kWidth<A>);
    blocks[t].value_sums = scratch.zeros(width * kWidth<A>);
    blocks[t].rows = scratch.zeros(sums.pitch * kWidth<A>);
    for_each_seen(problem.visible, keys, [&](const Range& seen) {
      for (int64_t j = seen.begin; j < seen.end; ++j)
        gather_rows<T, A>(blocks[t].rows + (j - keys.begin) * sums.pitch, problem.k, group, {j, j + 1}, width);
    });
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
        const KeyBlock<A>& block = blocks[t];
        const int64_t skipped = rows.begin - begin;
        const A* const left = queries + skipped * width;
        const A* const left_grads = grads + skipped * width;
        product(scores, rows.size(), left, width, 1, block.keys, width, false);
        product(slopes, rows.size(), left_grads, width, 1, block.values, width, false);
        weigh_rows(scores, slopes, seen + skipped, saved, rows.begin * heads + head, heads, rows.size(), factor,
                   tiles[t].lanes);
        product(block.key_sums, width, left, 1, width, slopes, rows.size(), true);
        product(block.value_sums, width, left_grads, 1, width, scores, rows.size(), true);
        wide_product(sums.row(rows.begin, head), rows.size(), slopes, kWidth<A>, 1, block.rows, tiles[t].lanes.size(),
                     true, sums.pitch);
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

// Rows of dq: the sums of all segments that stream them, in order.
template <class T, class A>
void add_sums(const Heads<T>& grad_q, std::span<const Segment> segments, std::span<const QuerySums<A>> sums,
              const Range& rows, int64_t heads, int64_t width, A factor) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    size_t first = 0, last;
    while (first < segments.size() && segments[first].rows.end <= i) ++first;
    for (last = first; last < segments.size() && segments[last].rows.begin <= i;) ++last;
    for (int64_t head = 0; head < heads; ++head) {
      T* const out = grad_q.row(i, head);
      for (int64_t e = 0; e < width; e += lanes<A>) {
        Vec<A> sum = {};
        for (size_t s = first; s < last; ++s)
          if (segments[s].rows.size() > 0) sum += load(sums[s].row(i, head) + e);
        sum *= factor;
        if (e + lanes<A> <= width)
          store_as<T, A>(out + e, sum);
        else
          for (int64_t l = 0; e + l < width; ++l) out[e + l] = static_cast<T>(sum[l]);
      }
    }
  }
}

}  // namespace blt
