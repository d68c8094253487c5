// Computes the forward pass of block_causal_attention: a run of query tiles against the keys that its queries attend
// to.

#include "forward.h"

#include "amx_forward.h"
#include "softmax.h"

namespace blt {

template <class Results, class A>
void attend(const Problem& problem, const Results& results, int64_t head, Run tiles, Scratch<A> scratch) {
  const int64_t head_dim = problem.head_dim, kv_head = problem.kv_head_of(head);
  const int64_t acc_rows = Results::kValues ? head_dim : 1;
  const Range streamed = streamed_by(tiles);
  const auto [power, factor] = Scaling<A>(problem.scale);
  A* const scores = scratch.take(kStep * kWidth<A>);
  A* const keys = scratch.take(kStep * head_dim);
  A* const values = scratch.take(kStep * head_dim);
  A* const dp = Results::kValues ? nullptr : scratch.take(kStep * kWidth<A>);
  A* grads[kMaxTiles<A>];
  QueryBlock<A> blocks[kMaxTiles<A>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<A>& block = blocks[t];
    const auto take_transposed = [&](const Heads& x, A factor) {
      return transpose_in<A>(scratch.take(head_dim * kWidth<A>), x, head, tiles[t].lanes, head_dim, factor);
    };
    block.queries = take_transposed(problem.q, power);
    if constexpr (!Results::kValues) grads[t] = take_transposed(results.grad, 1);
    block.acc = scratch.zeros(acc_rows * kWidth<A>);
    block.keys.set(problem.ranges, tiles[t], streamed.begin);
    for (int c = 0; c < kColumns; ++c) block.max[c] = Vec<A>{} + kMaskedScore<A>, block.sum[c] = Vec<A>{};
  }

  for (int64_t begin = streamed.begin; begin < streamed.end; begin += kStep) {
    const Range step = {begin, std::min(begin + kStep, streamed.end)};
    gather_rows<A>(keys, problem.k, kv_head, step, head_dim, head_dim);
    gather_rows<A>(values, problem.v, kv_head, step, head_dim, head_dim);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range own = overlap(step, tiles[t].streamed);
      if (own.size() <= 0) continue;
      const int64_t skipped = (own.begin - begin) * head_dim;
      const Range relative = {own.begin - streamed.begin, own.end - streamed.begin};
      QueryBlock<A>& block = blocks[t];
      product<A>(scores, own.size(), keys + skipped, head_dim, 1, block.queries, head_dim, false);
      if (block.keys.all_unmasked(relative))
        exp_scores<false>(scores, relative, factor, block, acc_rows);
      else
        exp_scores<true>(scores, relative, factor, block, acc_rows);
      if constexpr (Results::kValues) {
        product<A>(block.acc, head_dim, values + skipped, 1, head_dim, scores, own.size(), true);
      } else {
        product<A>(dp, own.size(), values + skipped, head_dim, 1, grads[t], head_dim, false);
        add_products(block.acc, scores, dp, own.size());
      }
    }
  }

  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, results, head, tiles[t].lanes, blocks[t]);
}

template void attend(const Problem&, const Output<float>&, int64_t, Run, Scratch<float>);
template void attend(const Problem&, const Output<double>&, int64_t, Run, Scratch<double>);
template void attend(const Problem&, const RowSoftmax<float>&, int64_t, Run, Scratch<float>);
template void attend(const Problem&, const RowSoftmax<double>&, int64_t, Run, Scratch<double>);

#if BLT_AMX
template void attend_amx(const Problem&, const Output<float>&, int64_t, Run, Scratch<float>);
template void attend_amx(const Problem&, const RowSoftmax<float>&, int64_t, Run, Scratch<float>);
#endif

}  // namespace blt
