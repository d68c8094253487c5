// The backward passes of block_causal_attention for bf16 on processors with AMX: those of attention_backward.h, with
// all products in tile registers. Weights and slopes are rounded to bf16 before they meet the rows that they weigh.
#pragma once

#include "amx.h"
#include "attention_backward.h"

namespace blt {

#if BLT_AMX

// Of amx_scratch: queries, gradients, sums; keys twice, values.
inline constexpr int64_t kQueryGradBlocks = 2, kQueryGradGathered = 3;
// Keys, values, two sums; queries twice, gradients twice.
inline constexpr int64_t kKeyGradBlocks = 3, kKeyGradGathered = 4;

// The right factor of the rows of a tile, in place of what transpose_in makes.
inline BFloat16* pack_tile(Scratch<float>& scratch, BFloat16* rows, const Heads<const BFloat16>& x, int64_t head,
                           const Range& range, int64_t width) {
  BFloat16* const right = take_bf16(scratch, width * kWidth<float>);
  gather(rows, x, head, range, kWidth<float>, width);
  pack_transposed(right, rows, width);
  return right;
}

// scores and slopes [key][lane], which come in as q . k and grad . v, give ds in pairs: `rows` keys from `first` on.
template <bool kMasked>
void weigh_keys(BFloat16* pairs, const float* scores, const float* slopes, int64_t rows, int64_t first, float factor,
                const QueryGradBlock<float, BFloat16>& block) {
  for (int c = 0; c < kColumns; ++c) {
    const VecF lse = kLog2e * load(block.lse + c * kLanes), delta = load(block.delta + c * kLanes);
    const auto slope = [&](int64_t j) {
      const int64_t cell = j * kWidth<float> + c * kLanes;
      const VecF ds = exp2_or_zero(kLog2e * factor * load(scores + cell) - lse) * (load(slopes + cell) - delta);
      if constexpr (kMasked) return block.keys.sees(first + j, c) ? ds : VecF{};
      return ds;
    };
    for (int64_t j = 0; j < rows; j += 2) join(pairs + j * kWidth<float> + 2 * c * kLanes, slope(j), slope(j + 1));
  }
}

// As `query_grad`, for E a multiple of 32.
inline void query_grad_amx(const Problem<BFloat16>& problem, const Saved<BFloat16, float>& saved,
                           const Heads<BFloat16>& grad_q, int64_t head, std::span<const Tile> tiles,
                           Scratch<float> scratch) {
  const int64_t width = problem.width, group = problem.group_of(head);
  const Range streamed = keys_of(tiles);
  const float factor = static_cast<float>(problem.scale);
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  float* const slopes = scratch.take(kAmxStep * kWidth<float>);
  BFloat16* const pairs = take_bf16(scratch, kAmxStep * kWidth<float>);
  BFloat16* const keys = take_bf16(scratch, kColumnStride * width);
  BFloat16* const columns = take_bf16(scratch, kColumnStride * width);
  BFloat16* const values = take_bf16(scratch, kColumnStride * width);
  QueryGradBlock<float, BFloat16> blocks[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    blocks[t].queries = pack_tile(scratch, keys, problem.q, head, tiles[t].lanes, width);
    blocks[t].grads = pack_tile(scratch, keys, saved.grad, head, tiles[t].lanes, width);
    blocks[t].sums = scratch.zeros(width * kWidth<float>);
    blocks[t].set(problem, saved, head, tiles[t], streamed.begin);
  }

  const TileRegisters registers;
  for (int64_t first = streamed.begin; first < streamed.end; first += kGathered) {
    const Range gathered = {first, std::min(first + kGathered, streamed.end)};
    const int64_t padded = whole_squares(gathered.size());
    gather(keys, problem.k, group, gathered, padded, width);
    gather(values, problem.v, group, gathered, padded, width);
    gather_columns(columns, keys, padded, width);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Range seen = whole_registers(overlap(gathered, tiles[t].streamed), first);
      const QueryGradBlock<float, BFloat16>& block = blocks[t];
      for (int64_t begin = seen.begin; begin < seen.end; begin += kAmxStep) {
        const int64_t skipped = begin - first, rows = whole_squares(std::min(kAmxStep, seen.end - begin));
        const Range relative = {begin - streamed.begin, begin - streamed.begin + rows};
        amx_product(scores, rows, keys + skipped * width, width, block.queries, width, false);
        amx_product(slopes, rows, values + skipped * width, width, block.grads, width, false);
        if (block.keys.all_see(relative))
          weigh_keys<false>(pairs, scores, slopes, rows, relative.begin, factor, block);
        else
          weigh_keys<true>(pairs, scores, slopes, rows, relative.begin, factor, block);
        amx_product(block.sums, width, columns + skipped, kColumnStride, pairs, rows, true);
      }
    }
  }

  float share[kWidth<float>];
  std::fill(share, share + kWidth<float>, factor);
  for (size_t t = 0; t < tiles.size(); ++t) transpose_out(grad_q, head, tiles[t].lanes, width, blocks[t].sums, share);
}

// Of gathered queries: the keys that each sees, lse in units of log 2, and delta.
struct QueryRows {
  Range seen[kGathered];
  float lse[kGathered], delta[kGathered];
};

// scores and slopes [query][lane], which come in as q . k and grad . v, give p and ds in pairs. The lanes begin at `key`.
template <bool kMasked>
void weigh_queries(BFloat16* weights, BFloat16* slope_pairs, const float* scores, const float* slopes, int64_t rows,
                   const QueryRows& queries, int64_t first, float factor, int64_t key) {
  for (int c = 0; c < kColumns; ++c) {
    const VecF number = lane_numbers<float>(c);
    const auto weigh = [&](int64_t i) -> std::pair<VecF, VecF> {
      const int64_t cell = i * kWidth<float> + c * kLanes;
      const VecF p = exp2_or_zero(kLog2e * factor * load(scores + cell) - queries.lse[first + i]);
      const VecF ds = p * (load(slopes + cell) - queries.delta[first + i]);
      if constexpr (kMasked) {
        const Range& seen = queries.seen[first + i];
        const VecI sees =
            (static_cast<float>(seen.begin - key) <= number) & (number < static_cast<float>(seen.end - key));
        return {sees ? p : VecF{}, sees ? ds : VecF{}};
      }
      return {p, ds};
    };
    for (int64_t i = 0; i < rows; i += 2) {
      const auto [p, ds] = weigh(i);
      const auto [next_p, next_ds] = weigh(i + 1);
      const int64_t cell = i * kWidth<float> + 2 * c * kLanes;
      join(weights + cell, p, next_p);
      join(slope_pairs + cell, ds, next_ds);
    }
  }
}

// As `key_grad`, for E a multiple of 32.
inline void key_grad_amx(const Problem<BFloat16>& problem, const Saved<BFloat16, float>& saved,
                         const Heads<BFloat16>& grad_k, const Heads<BFloat16>& grad_v, int64_t group,
                         std::span<const Tile> tiles, Scratch<float> scratch) {
  const int64_t width = problem.width, heads = problem.heads, shared = heads / problem.groups;
  const Range streamed = keys_of(tiles);
  const float factor = static_cast<float>(problem.scale);
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  float* const slopes = scratch.take(kAmxStep * kWidth<float>);
  BFloat16* const weights = take_bf16(scratch, kAmxStep * kWidth<float>);
  BFloat16* const slope_pairs = take_bf16(scratch, kAmxStep * kWidth<float>);
  BFloat16* const queries = take_bf16(scratch, kColumnStride * width);
  BFloat16* const query_columns = take_bf16(scratch, kColumnStride * width);
  BFloat16* const grads = take_bf16(scratch, kColumnStride * width);
  BFloat16* const grad_columns = take_bf16(scratch, kColumnStride * width);
  KeyGradBlock<float, BFloat16> blocks[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    blocks[t].keys = pack_tile(scratch, queries, problem.k, group, tiles[t].lanes, width);
    blocks[t].values = pack_tile(scratch, queries, problem.v, group, tiles[t].lanes, width);
    blocks[t].key_sums = scratch.zeros(width * kWidth<float>);
    blocks[t].value_sums = scratch.zeros(width * kWidth<float>);
  }

  const TileRegisters registers;
  for (int64_t head = group * shared; head < (group + 1) * shared; ++head)
    for (int64_t first = streamed.begin, b = problem.visible.document_of(first); first < streamed.end;
         first += kGathered) {
      const Range gathered = {first, std::min(first + kGathered, streamed.end)};
      const int64_t padded = whole_squares(gathered.size());
      gather(queries, problem.q, head, gathered, padded, width);
      gather(grads, saved.grad, head, gathered, padded, width);
      QueryRows rows = {};
      for (int64_t i = 0; i < gathered.size(); ++i) {
        while (problem.visible.cu_q[b + 1] <= first + i) ++b;
        rows.seen[i] = problem.visible.keys(first + i, b);
        rows.lse[i] = kLog2e * saved.lse[(first + i) * heads + head];
        rows.delta[i] = saved.delta[(first + i) * heads + head];
        if (rows.seen[i].size() > 0) continue;
        std::fill_n(queries + i * width, width, BFloat16(0.0f));  // may hold anything
        std::fill_n(grads + i * width, width, BFloat16(0.0f));
      }
      gather_columns(query_columns, queries, padded, width);
      gather_columns(grad_columns, grads, padded, width);
      for (size_t t = 0; t < tiles.size(); ++t) {
        const Range seeing = whole_registers(overlap(gathered, tiles[t].streamed), first), keys = tiles[t].lanes;
        const KeyGradBlock<float, BFloat16>& block = blocks[t];
        for (int64_t begin = seeing.begin; begin < seeing.end; begin += kAmxStep) {
          const int64_t skipped = begin - first, count = whole_squares(std::min(kAmxStep, seeing.end - begin));
          amx_product(scores, count, queries + skipped * width, width, block.keys, width, false);
          amx_product(slopes, count, grads + skipped * width, width, block.values, width, false);
          const bool all = std::all_of(rows.seen + skipped, rows.seen + skipped + count, [&](const Range& seen) {
            return seen.begin <= keys.begin && keys.end <= seen.end;
          });
          if (all)
            weigh_queries<false>(weights, slope_pairs, scores, slopes, count, rows, skipped, factor, keys.begin);
          else
            weigh_queries<true>(weights, slope_pairs, scores, slopes, count, rows, skipped, factor, keys.begin);
          amx_product(block.key_sums, width, query_columns + skipped, kColumnStride, slope_pairs, count, true);
          amx_product(block.value_sums, width, grad_columns + skipped, kColumnStride, weights, count, true);
        }
      }
    }

  float share[kWidth<float>], one[kWidth<float>];
  std::fill(share, share + kWidth<float>, factor);
  std::fill(one, one + kWidth<float>, 1.0f);
  for (size_t t = 0; t < tiles.size(); ++t) {
    transpose_out(grad_k, group, tiles[t].lanes, width, blocks[t].key_sums, share);
    transpose_out(grad_v, group, tiles[t].lanes, width, blocks[t].value_sums, one);
  }
}

#endif

}  // namespace blt
