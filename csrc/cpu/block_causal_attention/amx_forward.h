// The forward pass of block_causal_attention for bf16 on processors with AMX: the tiles and the softmax of
// forward.h, with both products in tile registers. The weights are rounded to bf16 before they meet the
// values, as in every flash attention on tensor cores.
#pragma once

#include "amx.h"
#include "forward.h"

namespace blt {

#if BLT_AMX

inline constexpr int64_t kForwardGathered = 3;  // of amx_scratch: keys, values twice

// Up to this size of an exponent of 2, factor * score - shift is precise enough for weights in bf16: its rounding is that
// of the shift, at most 2^-14. One multiply-add is all that it takes.
inline constexpr float kFusedExponent = 1024;

// scores [rows][lane] become weights in pairs, after raise_tops; an even number of rows.
inline void weigh_pairs(BFloat16* weights, const float* scores, int64_t rows, float factor, QueryBlock<float>& block) {
  const float to_base_2 = kLog2e * factor;
  for (int c = 0; c < kColumns; ++c) {
    const VecF top = block.shift(c), shift = to_base_2 * top;
    const auto weigh = [&](auto exponent) {
      VecF even = {}, odd = {};
      for (int64_t j = 0; j < rows; j += 2) {
        const float* const cell = scores + j * kWidth<float> + c * kLanes;
        const VecF p = exp2_or_zero(exponent(load(cell))), q = exp2_or_zero(exponent(load(cell + kWidth<float>)));
        even += p;
        odd += q;
        join(weights + j * kWidth<float> + 2 * c * kLanes, p, q);
      }
      block.total[c] += even + odd;
    };
    if (any((shift > broadcast(kFusedExponent)) | (shift < broadcast(-kFusedExponent))))
      weigh([&](VecF s) { return to_base_2 * (s - top); });
    else
      weigh([&](VecF s) { return to_base_2 * s - shift; });
  }
}

// As `attend`, for E a multiple of 32.
template <class Results>
void attend_amx(const Problem<BFloat16>& problem, const Results& results, int64_t head, Run tiles,
                Scratch<float> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head), sums = Results::kValues ? width : 1;
  const Range streamed = keys_of(tiles);
  const auto [power, factor] = Scaling<float>(problem.scale);
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  BFloat16* const weights = take_bf16(scratch, kAmxStep * kWidth<float>);
  BFloat16* const keys = take_bf16(scratch, kColumnStride * width);
  BFloat16* const values = take_bf16(scratch, kColumnStride * width);
  BFloat16* const rows = take_bf16(scratch, kColumnStride * width);
  float* const slopes = Results::kValues ? nullptr : scratch.take(kAmxStep * kWidth<float>);
  QueryBlock<float> blocks[kMaxTiles<float>];
  BFloat16 *queries[kMaxTiles<float>], *grads[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<float>& block = blocks[t];
    gather(rows, problem.q, head, tiles[t].lanes, kWidth<float>, width);
    multiply(rows, kWidth<float> * width, power);
    queries[t] = take_bf16(scratch, width * kWidth<float>);
    pack_transposed(queries[t], rows, width);
    if constexpr (!Results::kValues) {
      gather(rows, results.grad, head, tiles[t].lanes, kWidth<float>, width);
      grads[t] = take_bf16(scratch, width * kWidth<float>);
      pack_transposed(grads[t], rows, width);
    }
    block.sums = scratch.zeros(sums * kWidth<float>);
    block.keys.set(problem.visible, tiles[t], streamed.begin);
    for (int c = 0; c < kColumns; ++c) block.top[c] = broadcast(kNone<float>), block.total[c] = VecF{};
  }

  const TileRegisters registers;
  for (int64_t first = streamed.begin; first < streamed.end; first += kGathered) {
    const Range gathered = {first, std::min(first + kGathered, streamed.end)};
    const int64_t padded = whole_squares(gathered.size());
    gather(keys, problem.k, group, gathered, padded, width);
    gather(rows, problem.v, group, gathered, padded, width);
    if constexpr (Results::kValues) gather_columns(values, rows, padded, width);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range seen = whole_registers(overlap(gathered, tiles[t].streamed), first);
      QueryBlock<float>& block = blocks[t];
      for (int64_t begin = seen.begin; begin < seen.end; begin += kAmxStep) {
        const int64_t skipped = begin - first, count = whole_squares(std::min(kAmxStep, seen.end - begin));
        const Range relative = {begin - streamed.begin, begin - streamed.begin + count};
        amx_product(scores, count, keys + skipped * width, width, queries[t], width, false);
        const bool all = block.keys.all_see(relative);
        if constexpr (Results::kValues) {
          (all ? raise_tops<false, float> : raise_tops<true, float>)(scores, relative, factor, block, sums);
          weigh_pairs(weights, scores, count, factor, block);
          amx_product(block.sums, width, values + skipped, kColumnStride, weights, count, true);
        } else {
          (all ? weigh<false, float> : weigh<true, float>)(scores, relative, factor, block, sums);
          amx_product(slopes, count, rows + skipped * width, width, grads[t], width, false);
          add_products(block.sums, scores, slopes, count);
        }
      }
    }
  }
  for (size_t t = 0; t < tiles.size(); ++t) results.finish(problem, head, tiles[t].lanes, blocks[t]);
}

#endif

}  // namespace blt
