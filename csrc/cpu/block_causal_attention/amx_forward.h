// Computes the forward pass of block_causal_attention for bf16 with AMX: the tiles and the softmax of forward.cpp,
// with both products in tile registers. Weights are rounded to bf16 before they multiply values, as in every flash
// attention on tensor cores.
#pragma once

#include "amx.h"
#include "softmax.h"

namespace blt {

#if BLT_AMX

// Below this exponent of 2, factor * score - shift is precise enough for weights in bf16: it errs by the rounding of
// shift, at most 2^-14. It takes a single multiply-add.
inline constexpr float kFusedExponent = 1024;

// Does the second half of the softmax, after update_max: scores [rows][lane] become weights in pairs. `rows` is even.
inline void exp_score_pairs(BFloat16* weights, const float* scores, int64_t rows, float factor,
                            QueryBlock<float>& block) {
  const float to_base_2 = kLog2e * factor;
  for (int c = 0; c < kColumns; ++c) {
    const VecF max = block.shift(c), shift = to_base_2 * max;
    const auto exp_rows = [&](auto exponent) {
      VecF even = {}, odd = {};
      for (int64_t j = 0; j < rows; j += 2) {
        const float* const cell = scores + j * kWidth<float> + c * kLanes;
        const VecF p = exp2_or_zero(exponent(load(cell))), q = exp2_or_zero(exponent(load(cell + kWidth<float>)));
        even += p;
        odd += q;
        join(weights + j * kWidth<float> + 2 * c * kLanes, p, q);
      }
      block.sum[c] += even + odd;
    };
    if (any((shift > broadcast(kFusedExponent)) | (shift < broadcast(-kFusedExponent))))
      exp_rows([&](VecF s) { return to_base_2 * (s - max); });
    else
      exp_rows([&](VecF s) { return to_base_2 * s - shift; });
  }
}

template <class Results>
void attend_amx(const Problem& problem, const Results& results, int64_t head, Run tiles, Scratch<float> scratch) {
  const int64_t head_dim = problem.head_dim, kv_head = problem.kv_head_of(head);
  const int64_t acc_rows = Results::kValues ? head_dim : 1;
  const Range streamed = streamed_by(tiles);
  const auto [power, factor] = Scaling<float>(problem.scale);
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  BFloat16* const weights = take_bf16(scratch, kAmxStep * kWidth<float>);
  BFloat16* const keys = take_bf16(scratch, kColumnStride * head_dim);
  BFloat16* const values = take_bf16(scratch, kColumnStride * head_dim);
  BFloat16* const rows = take_bf16(scratch, kColumnStride * head_dim);
  float* const dp = Results::kValues ? nullptr : scratch.take(kAmxStep * kWidth<float>);
  QueryBlock<float> blocks[kMaxTiles<float>];
  BFloat16 *queries[kMaxTiles<float>], *grads[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<float>& block = blocks[t];
    queries[t] = pack_tile(scratch, rows, problem.q, head, tiles[t].lanes, head_dim, power);
    if constexpr (!Results::kValues)
      grads[t] = pack_tile(scratch, rows, results.grad, head, tiles[t].lanes, head_dim, 1);
    block.acc = scratch.zeros(acc_rows * kWidth<float>);
    block.keys.set(problem.ranges, tiles[t], streamed.begin);
    for (int c = 0; c < kColumns; ++c) block.max[c] = broadcast(kMaskedScore<float>), block.sum[c] = VecF{};
  }

  const TileRegisters registers;
  for (int64_t first = streamed.begin; first < streamed.end; first += kGathered) {
    const Range gathered = {first, std::min(first + kGathered, streamed.end)};
    const int64_t padded = whole_squares(gathered.size());
    gather(keys, problem.k, kv_head, gathered, padded, head_dim);
    gather(rows, problem.v, kv_head, gathered, padded, head_dim);
    if constexpr (Results::kValues) gather_columns(values, rows, padded, head_dim);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range own = whole_registers(overlap(gathered, tiles[t].streamed), first);
      QueryBlock<float>& block = blocks[t];
      for (int64_t begin = own.begin; begin < own.end; begin += kAmxStep) {
        const int64_t skipped = begin - first, count = whole_squares(std::min(kAmxStep, own.end - begin));
        const Range relative = {begin - streamed.begin, begin - streamed.begin + count};
        amx_product(scores, count, keys + skipped * head_dim, head_dim, queries[t], head_dim, false);
        const bool all = block.keys.all_unmasked(relative);
        if constexpr (Results::kValues) {
          (all ? update_max<false, float> : update_max<true, float>)(scores, relative, factor, block, acc_rows);
          exp_score_pairs(weights, scores, count, factor, block);
          amx_product(block.acc, head_dim, values + skipped, kColumnStride, weights, count, true);
        } else {
          (all ? exp_scores<false, float> : exp_scores<true, float>)(scores, relative, factor, block, acc_rows);
          amx_product(dp, count, rows + skipped * head_dim, head_dim, grads[t], head_dim, false);
          add_products(block.acc, scores, dp, count);
        }
      }
    }
  }
  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, results, head, tiles[t].lanes, blocks[t]);
}

#endif

}  // namespace blt
