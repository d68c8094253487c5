// Computes the streaming softmax of a tile of queries: scores become weights, while maximum and sum of each query
// follow.
#pragma once

#include "forward.h"

namespace blt {

// A query's weights are exp(factor * (s - max)) for products s. `max` follows the largest of them only when its score
// has grown by more than this, which is rare after the first step, so acc is seldom rescaled. It is small, because exp
// is most precise near 0.
inline constexpr int kGrowth = 1;

// Points to the queries of a tile, which lie across the lanes, and to the state of their softmax.
template <class A>
struct QueryBlock {
  A* queries;  // [E][lane]
  A* acc;      // [E][lane], sums of weights times values, or without values [lane], sums of weights times grad . v
  Vec<A> max[kColumns], sum[kColumns];
  LaneRanges<A> keys;
  Vec<A> shift(int c) const { return max[c] == kMaskedScore<A> ? Vec<A>{} : max[c]; }
};

// Does the first half of the softmax of scores [key][lane]: masked ones become kMaskedScore, and `max` follows the
// largest, with the first `acc_rows` rows of acc rescaled.
template <bool kMasked, class A>
void update_max(A* scores, const Range& keys, A factor, QueryBlock<A>& block, int64_t acc_rows) {
  Vec<A> peak[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) peak[c] = Vec<A>{} + kMaskedScore<A>;
  for (int64_t j = keys.begin; j < keys.end; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      A* const cell = scores + (j - keys.begin) * kWidth<A> + c * lanes<A>;
      Vec<A> s = load(cell);
      if constexpr (kMasked) {
        s = block.keys.unmasked(j, c) ? s : Vec<A>{} + kMaskedScore<A>;
        store(cell, s);
      }
      peak[c] = s > peak[c] ? s : peak[c];
    }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const Vec<A> before = block.max[c];
    const Mask<A> grows = factor * (peak[c] - before) > Vec<A>{} + static_cast<A>(kGrowth);
    if (any(grows)) {
      block.max[c] = grows ? peak[c] : before;
      const Vec<A> decay = bounded_exp(grows ? before - peak[c] : Vec<A>{}, factor);
      block.sum[c] *= decay;
      for (int64_t e = 0; e < acc_rows; ++e) {
        A* const cell = block.acc + e * kWidth<A> + c * lanes<A>;
        store(cell, load(cell) * decay);
      }
    }
  }
}

// Turns scores [key][lane] into weights.
template <bool kMasked, class A>
void exp_scores(A* scores, const Range& keys, A factor, QueryBlock<A>& block, int64_t acc_rows) {
  update_max<kMasked>(scores, keys, factor, block, acc_rows);
  Vec<A> sum[kColumns], shift[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) shift[c] = block.shift(c), sum[c] = block.sum[c];
  for (int64_t j = 0; j < keys.size(); ++j)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      A* const cell = scores + j * kWidth<A> + c * lanes<A>;
      const Vec<A> p = bounded_exp(load(cell) - shift[c], factor);  // is 0 for kMaskedScore
      store(cell, p);
      sum[c] += p;
    }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) block.sum[c] = sum[c];
}

// Adds to acc[lane] the sum over rows of weights[row][lane] * dp[row][lane]. dp may be NaN where the weight is 0.
template <class A>
void add_products(A* acc, const A* weights, const A* dp, int64_t rows) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t lane = 0; lane < kWidth<A>; lane += lanes<A>) {
      const Vec<A> p = load(weights + j * kWidth<A> + lane), x = load(dp + j * kWidth<A> + lane);
      store(acc + lane, load(acc + lane) + (p == 0 ? Vec<A>{} : p * x));
    }
}

// --- results ---------------------------------------------------------------------------------------------------------

template <class A>
void finish(const Problem& problem, const Output<A>& results, int64_t head, const Range& queries,
            const QueryBlock<A>& block) {
  const A factor = Scaling<A>(problem.scale).factor;
  A inverse_sum[kWidth<A>];
  for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
    const A sum = block.sum[lane / lanes<A>][lane % lanes<A>], max = block.max[lane / lanes<A>][lane % lanes<A>];
    inverse_sum[lane] = max == kMaskedScore<A> ? 0 : 1 / sum;
    if (lane < queries.size())
      results.lse[(queries.begin + lane) * problem.num_heads + head] = factor * max + std::log(sum);
  }
  transpose_out(results.out, head, queries, problem.head_dim, block.acc, inverse_sum);
}

template <class A>
void finish(const Problem& problem, const RowSoftmax<A>& results, int64_t head, const Range& queries,
            const QueryBlock<A>& block) {
  for (int64_t lane = 0; lane < queries.size(); ++lane) {
    const int64_t i = (queries.begin + lane) * problem.num_heads + head;
    if (!results.is_large(results.lse[i])) continue;
    results.max[i] = block.max[lane / lanes<A>][lane % lanes<A>];
    results.inverse_sum[i] = 1 / block.sum[lane / lanes<A>][lane % lanes<A>];
    results.delta[i] = results.inverse_sum[i] * block.acc[lane];
  }
}

}  // namespace blt
