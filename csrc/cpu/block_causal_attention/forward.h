// Computes the forward pass of block_causal_attention over tiles of queries, with one of two results: out and lse, or
// what backward pass needs to know of rows with a large lse.
#pragma once

#include "blocks.h"

namespace blt {

// Points to the results of the forward operator.
template <class A>
struct Output {
  static constexpr bool kValues = true;
  static constexpr int64_t kBlocks = 2;  // blocks [E][lane] of a tile: queries, acc
  OutputHeads out;
  A* lse;  // [Tq, H]
};

// lse is rounded: at 1e6 that makes p = exp(s - lse) wrong by 3%, at 1e9 by e^32. So the backward pass sums the softmax
// of rows with a large lse anew, without values: p = inverse_sum * exp(factor * (s - max)). It sums delta = grad . out
// anew too, because out is rounded: where one key has all of the weight, gradients are 0, not a rounding error times a
// large key.
template <class A>
struct RowSoftmax {
  static constexpr bool kValues = false;
  static constexpr int64_t kBlocks = 3;  // blocks [E][lane] of a tile: queries, gradients, acc
  Heads grad;
  const A* lse;                  // [Tq, H], as are all of these
  A *delta, *max, *inverse_sum;  // max and inverse_sum are set where lse is large
  A large_lse;

  bool is_large(A lse) const { return std::abs(lse) >= large_lse && std::abs(lse) <= std::numeric_limits<A>::max(); }
};

// This is the smallest |lse| whose rounding makes p wrong by more than 32 eps of the accumulators, or 256 eps where
// gradients have 16 bits.
template <class A>
A large_lse(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? A(1024) : A(128);
}

// Computes the results of a run of query tiles for one head: each step of keys is gathered once for all of them.
// Results are Output<A> or RowSoftmax<A>.
template <class Results, class A>
void attend(const Problem& problem, const Results& results, int64_t head, Run tiles, Scratch<A> scratch);

inline constexpr int64_t kForwardGathered = 3;  // amx_scratch holds gathered keys, and values twice

// Does so for bf16 on a processor with AMX, for E a multiple of 32 (amx_forward.h).
template <class Results>
void attend_amx(const Problem& problem, const Results& results, int64_t head, Run tiles, Scratch<float> scratch);

}  // namespace blt
