// The forward pass of block_causal_attention for bf16 on processors with AMX: the tiles and the softmax of
// attention_forward.h, with both products in tile registers. The weights are rounded to bf16 before they meet the
// values, as in every flash attention on tensor cores.
#pragma once

#include "amx.h"
#include "attention_forward.h"

namespace blt {

#if BLT_AMX

inline constexpr int64_t kForwardBlocks = 2, kForwardGathered = 3;  // of amx_scratch: queries, sums; keys, values twice

// scores [rows][lane] become weights in pairs, after raise_tops; an even number of rows.
template <bool kMasked>
void weigh_pairs(BFloat16* weights, const float* scores, int64_t rows, float factor, QueryBlock<float>& block) {
  for (int c = 0; c < kColumns; ++c) {
    const VecF shift = kLog2e * block.shift(c);
    const auto weigh = [&](int64_t j) {
      const VecF s = load(scores + j * kWidth<float> + c * kLanes), p = exp2_or_zero(kLog2e * factor * s - shift);
      if constexpr (kMasked) return s == kNone<float> ? VecF{} : p;
      return p;
    };
    VecF even = {}, odd = {};
    for (int64_t j = 0; j < rows; j += 2) {
      const VecF p = weigh(j), q = weigh(j + 1);
      even += p;
      odd += q;
      join(weights + j * kWidth<float> + 2 * c * kLanes, p, q);
    }
    block.total[c] += even + odd;
  }
}

// As `attend`, for E a multiple of 32.
inline void attend_amx(const Problem<BFloat16>& problem, const Heads<BFloat16>& out, float* lse, int64_t head,
                       std::span<const Tile> tiles, Scratch<float> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head);
  const Range streamed = keys_of(tiles);
  const float factor = static_cast<float>(std::abs(problem.scale));
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  BFloat16* const weights = take_bf16(scratch, kAmxStep * kWidth<float>);
  BFloat16* const keys = take_bf16(scratch, kColumnStride * width);
  BFloat16* const values = take_bf16(scratch, kColumnStride * width);
  BFloat16* const rows = take_bf16(scratch, kColumnStride * width);
  QueryBlock<float> blocks[kMaxTiles<float>];
  BFloat16* queries[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    QueryBlock<float>& block = blocks[t];
    gather(rows, problem.q, head, tiles[t].lanes, kWidth<float>, width);
    if (problem.scale < 0) std::transform(rows, rows + kWidth<float> * width, rows, std::negate<>());
    queries[t] = take_bf16(scratch, width * kWidth<float>);
    pack_transposed(queries[t], rows, width);
    block.sums = scratch.zeros(width * kWidth<float>);
    block.keys.set(problem.visible, tiles[t], streamed.begin);
    for (int c = 0; c < kColumns; ++c) block.top[c] = broadcast(kNone<float>), block.total[c] = VecF{};
  }

  const TileRegisters registers;
  for (int64_t first = streamed.begin; first < streamed.end; first += kGathered) {
    const Range gathered = {first, std::min(first + kGathered, streamed.end)};
    const int64_t padded = whole_squares(gathered.size());
    gather(keys, problem.k, group, gathered, padded, width);
    gather(rows, problem.v, group, gathered, padded, width);
    gather_columns(values, rows, padded, width);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range seen = whole_registers(overlap(gathered, tiles[t].streamed), first);
      QueryBlock<float>& block = blocks[t];
      for (int64_t begin = seen.begin; begin < seen.end; begin += kAmxStep) {
        const int64_t skipped = begin - first, count = whole_squares(std::min(kAmxStep, seen.end - begin));
        const Range relative = {begin - streamed.begin, begin - streamed.begin + count};
        amx_product(scores, count, keys + skipped * width, width, queries[t], width, false);
        if (block.keys.all_see(relative)) {
          raise_tops<false>(scores, relative, factor, block, width);
          weigh_pairs<false>(weights, scores, count, factor, block);
        } else {
          raise_tops<true>(scores, relative, factor, block, width);
          weigh_pairs<true>(weights, scores, count, factor, block);
        }
        amx_product(block.sums, width, values + skipped, kColumnStride, weights, count, true);
      }
    }
  }
  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, out, lse, head, tiles[t], blocks[t]);
}

#endif

}  // namespace blt
