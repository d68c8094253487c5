// Computes the backward pass of block_causal_attention: a run of key tiles against the queries that attend to its keys.

#include "backward.h"

#include "../../common/dispatch.h"
#include "amx_backward.h"
#include "keys.h"

namespace blt {
namespace {

// Turns q . k and grad . v, both [query][lane], into p and ds. `keys` has the range of each query. The first query has
// number `begin` in `saved`, and the next one's is `stride` higher.
template <class A>
void weigh_queries(A* scores, A* dp, const Range* keys, const RowSoftmax<A>& saved, int64_t begin, int64_t stride,
                   int64_t queries, A factor, const Range& lanes_keys) {
  Vec<A> number[kColumns];
  for (int c = 0; c < kColumns; ++c) number[c] = lane_numbers<A>(c);
  for (int64_t i = 0; i < queries; ++i) {
    const bool masked = lanes_keys.begin < keys[i].begin || keys[i].end < lanes_keys.end;
    const A first = static_cast<A>(keys[i].begin - lanes_keys.begin);
    const A last = static_cast<A>(keys[i].end - lanes_keys.begin);
    const int64_t at = begin + i * stride;
    const A lse = saved.lse[at], delta = saved.delta[at];
    const auto run = [&](auto weight) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const int64_t cell = i * kWidth<A> + c * lanes<A>;
        Vec<A> p = weight(load(scores + cell));
        Vec<A> ds = p * (load(dp + cell) - delta);
        if (masked) {
          const Mask<A> unmasked = (first <= number[c]) & (number[c] < last);
          p = unmasked ? p : Vec<A>{};
          ds = unmasked ? ds : Vec<A>{};
        }
        store(scores + cell, p);
        store(dp + cell, ds);
      }
    };
    if (saved.is_large(lse)) {
      const A max = saved.max[at], inverse_sum = saved.inverse_sum[at];
      run([&](Vec<A> s) { return inverse_sum * bounded_exp(s - max, factor); });
    } else {
      run([&](Vec<A> s) { return bounded_exp(factor * s - lse); });
    }
  }
}

}  // namespace

template <class A>
void propagate(const Problem& problem, const RowSoftmax<A>& saved, const OutputHeads& grad_k, const OutputHeads& grad_v,
               const QuerySums<A>& sums, int64_t kv_head, Run tiles, Scratch<A> scratch) {
  const int64_t head_dim = problem.head_dim, num_heads = problem.num_heads, shared = problem.heads_per_kv_head();
  const Range streamed = streamed_by(tiles);
  const auto [power, factor] = Scaling<A>(problem.scale);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const dp = scratch.take(kStep * kWidth<A>);
  A* const queries = scratch.take(kStep * head_dim);
  A* const grads = scratch.take(kStep * head_dim);
  KeyBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    KeyBlock<A>& block = blocks[t];
    const Range& keys = tiles[t].lanes;
    block.keys = transpose_in<A>(scratch.take(head_dim * kWidth<A>), problem.k, kv_head, keys, head_dim, power);
    block.values = transpose_in<A>(scratch.take(head_dim * kWidth<A>), problem.v, kv_head, keys, head_dim, 1);
    block.dk = scratch.zeros(head_dim * kWidth<A>);
    block.dv = scratch.zeros(head_dim * kWidth<A>);
    block.rows = scratch.zeros(sums.pitch * kWidth<A>);
    for_each_unmasked(problem.ranges, keys, [&](const Range& unmasked) {
      gather_rows<A>(block.rows + (unmasked.begin - keys.begin) * sums.pitch, problem.k, kv_head, unmasked, head_dim,
                     sums.pitch);
    });
  }

  for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
    for (int64_t begin = streamed.begin, b = problem.ranges.document_of(begin); begin < streamed.end; begin += kStep) {
      const Range step = {begin, std::min(begin + kStep, streamed.end)};
      gather_rows<A>(queries, problem.q, head, step, head_dim, head_dim);
      gather_rows<A>(grads, saved.grad, head, step, head_dim, head_dim);
      Range keys[kStep];
      for (int64_t query = begin; query < step.end; ++query) {
        while (problem.ranges.cu_seqlens_q[b + 1] <= query) ++b;
        keys[query - begin] = problem.ranges.keys(query, b);
        if (keys[query - begin].size() > 0) continue;
        std::fill_n(queries + (query - begin) * head_dim, head_dim, A(0));  // they may hold NaN
        std::fill_n(grads + (query - begin) * head_dim, head_dim, A(0));
      }
      for (size_t t = 0; t < tiles.size(); ++t) {
        const Range own = overlap(step, tiles[t].streamed);
        if (own.size() <= 0) continue;
        const KeyBlock<A>& block = blocks[t];
        const int64_t skipped = own.begin - begin;
        const A* const left = queries + skipped * head_dim;
        const A* const left_grads = grads + skipped * head_dim;
        product<A>(scores, own.size(), left, head_dim, 1, block.keys, head_dim, false);
        product<A>(dp, own.size(), left_grads, head_dim, 1, block.values, head_dim, false);
        weigh_queries(scores, dp, keys + skipped, saved, own.begin * num_heads + head, num_heads, own.size(), factor,
                      tiles[t].lanes);
        product<A>(block.dk, head_dim, left, 1, head_dim, dp, own.size(), true);
        product<A>(block.dv, head_dim, left_grads, 1, head_dim, scores, own.size(), true);
        wide_product<A>(sums.row(own.begin, head), own.size(), dp, kWidth<A>, 1, block.rows, tiles[t].lanes.size(),
                        true, sums.pitch);
      }
    }
  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, grad_k, grad_v, kv_head, tiles[t].lanes, blocks[t]);
}

template <class A>
void add_sums(const OutputHeads& grad_q, std::span<const Segment> segments, std::span<const QuerySums<A>> sums,
              const Range& queries, int64_t num_heads, int64_t head_dim, A factor) {
  dispatch_storage<A>(grad_q.dtype, [&]<class T>(Tag<T>) {
    for (int64_t i = queries.begin; i < queries.end; ++i) {
      size_t first = 0, last;
      while (first < segments.size() && segments[first].queries.end <= i) ++first;
      for (last = first; last < segments.size() && segments[last].queries.begin <= i;) ++last;
      for (int64_t head = 0; head < num_heads; ++head) {
        T* const out = grad_q.row<T>(i, head);
        for (int64_t e = 0; e < head_dim; e += lanes<A>) {
          Vec<A> sum = {};
          for (size_t s = first; s < last; ++s)
            if (segments[s].queries.size() > 0) sum += load(sums[s].row(i, head) + e);
          sum *= factor;
          if (e + lanes<A> <= head_dim)
            store_as<T, A>(out + e, sum);
          else
            for (int64_t l = 0; e + l < head_dim; ++l) out[e + l] = static_cast<T>(sum[l]);
        }
      }
    }
  });
}

#define BLT_FOR_ACCUMULATOR(A)                                                                                      \
  template void propagate(const Problem&, const RowSoftmax<A>&, const OutputHeads&, const OutputHeads&,             \
                          const QuerySums<A>&, int64_t, Run, Scratch<A>);                                           \
  template void add_sums(const OutputHeads&, std::span<const Segment>, std::span<const QuerySums<A>>, const Range&, \
                         int64_t, int64_t, A);
BLT_FOR_ACCUMULATOR(float)
BLT_FOR_ACCUMULATOR(double)
#undef BLT_FOR_ACCUMULATOR

}  // namespace blt
