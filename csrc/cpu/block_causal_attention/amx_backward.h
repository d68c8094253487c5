// The backward pass of block_causal_attention for bf16 on processors with AMX: that of backward.h, with all
// products in tile registers. Weights and slopes are rounded to bf16 before they meet the rows that they weigh.
#pragma once

#include <functional>

#include "amx_forward.h"
#include "backward.h"

namespace blt {

#if BLT_AMX

// Of amx_scratch: keys twice, values, two sums; queries twice, gradients twice.
inline constexpr int64_t kAmxBackwardBlocks = 4, kAmxBackwardGathered = 4;
// Rows of the sums that are written behind the last: products have whole registers of them.
inline constexpr int64_t kAmxBackwardPadding = 2 * kTileRows;

// The right factor of the rows of a tile times `power`, in place of what transpose_in makes.
inline BFloat16* pack_tile(Scratch<float>& scratch, BFloat16* rows, const Heads<const BFloat16>& x, int64_t head,
                           const Range& range, int64_t width, float power) {
  BFloat16* const right = take_bf16(scratch, width * kWidth<float>);
  gather(rows, x, head, range, kWidth<float>, width);
  multiply(rows, kWidth<float> * width, power);
  pack_transposed(right, rows, width);
  return right;
}

// Of gathered queries: the keys that each sees, lse in units of log 2, and delta; top and share of those that are large.
struct QueryRows {
  Range seen[kGathered];
  float lse[kGathered], delta[kGathered], top[kGathered], share[kGathered];
  bool large[kGathered];
};

// p and ds of a step as right factors; ds as a left one too, [query][lane].
struct Weights {
  BFloat16 *p, *ds, *ds_rows;
};

// From scores and slopes [query][lane], which are q . k and grad . v. The lanes begin at `key`.
template <bool kMasked, bool kLarge>
void weigh_queries(const Weights& weights, const float* scores, const float* slopes, int64_t rows,
                   const QueryRows& queries, int64_t first, float factor, int64_t key) {
  const float to_base_2 = kLog2e * factor;
  for (int c = 0; c < kColumns; ++c) {
    const VecF number = lane_numbers<float>(c);
    const auto weigh = [&](int64_t i) -> std::pair<VecF, VecF> {
      const int64_t cell = i * kWidth<float> + c * kLanes;
      const VecF s = load(scores + cell);
      VecF p;
      if (kLarge && queries.large[first + i])
        p = queries.share[first + i] * exp2_or_zero(to_base_2 * (s - queries.top[first + i]));
      else
        p = exp2_or_zero(to_base_2 * s - queries.lse[first + i]);
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
      join(weights.p + cell, p, next_p);
      join(weights.ds + cell, ds, next_ds);
      store_as<BFloat16, float>(weights.ds_rows + i * kWidth<float> + c * kLanes, ds);
      store_as<BFloat16, float>(weights.ds_rows + (i + 1) * kWidth<float> + c * kLanes, next_ds);
    }
  }
}

// As `propagate`, for E a multiple of 32.
inline void propagate_amx(const Problem<BFloat16>& problem, const Saved<BFloat16, float>& saved,
                          const Heads<BFloat16>& grad_k, const Heads<BFloat16>& grad_v, const QuerySums<float>& sums,
                          int64_t group, Run tiles, Scratch<float> scratch) {
  const int64_t width = problem.width, heads = problem.heads, shared = heads / problem.groups;
  const Range streamed = keys_of(tiles);
  const auto [power, factor] = Scaling<float>(problem.scale);
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  float* const slopes = scratch.take(kAmxStep * kWidth<float>);
  const auto take_step = [&] { return take_bf16(scratch, kAmxStep * kWidth<float>); };
  const Weights weights = {take_step(), take_step(), take_step()};
  BFloat16* const queries = take_bf16(scratch, kColumnStride * width);
  BFloat16* const query_columns = take_bf16(scratch, kColumnStride * width);
  BFloat16* const grads = take_bf16(scratch, kColumnStride * width);
  BFloat16* const grad_columns = take_bf16(scratch, kColumnStride * width);
  KeyBlock<float, BFloat16> blocks[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    const Range& keys = tiles[t].lanes;
    blocks[t].keys = pack_tile(scratch, queries, problem.k, group, keys, width, power);
    blocks[t].values = pack_tile(scratch, queries, problem.v, group, keys, width, 1);
    blocks[t].key_sums = scratch.zeros(width * kWidth<float>);
    blocks[t].value_sums = scratch.zeros(width * kWidth<float>);
    blocks[t].rows = take_bf16(scratch, width * kWidth<float>);
    std::fill_n(queries, width * kWidth<float>, BFloat16(0.0f));
    for_each_seen(problem.visible, keys, [&](const Range& seen) {
      gather(queries + (seen.begin - keys.begin) * width, problem.k, group, seen, seen.size(), width);
    });
    pack_rows(blocks[t].rows, queries, kWidth<float>, width);
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
        const int64_t number = (first + i) * heads + head;
        rows.lse[i] = kLog2e * saved.lse[number];
        rows.delta[i] = saved.delta[number];
        rows.large[i] = is_large<BFloat16>(saved.lse[number]);
        if (rows.large[i]) rows.top[i] = saved.top[number], rows.share[i] = saved.share[number];
        if (rows.seen[i].size() > 0) continue;
        std::fill_n(queries + i * width, width, BFloat16(0.0f));  // may hold anything
        std::fill_n(grads + i * width, width, BFloat16(0.0f));
      }
      gather_columns(query_columns, queries, padded, width);
      gather_columns(grad_columns, grads, padded, width);
      for (size_t t = 0; t < tiles.size(); ++t) {
        const Range seeing = whole_registers(overlap(gathered, tiles[t].streamed), first), keys = tiles[t].lanes;
        const KeyBlock<float, BFloat16>& block = blocks[t];
        for (int64_t begin = seeing.begin; begin < seeing.end; begin += kAmxStep) {
          const int64_t skipped = begin - first, count = whole_squares(std::min(kAmxStep, seeing.end - begin));
          amx_product(scores, count, queries + skipped * width, width, block.keys, width, false);
          amx_product(slopes, count, grads + skipped * width, width, block.values, width, false);
          const bool all = std::all_of(rows.seen + skipped, rows.seen + skipped + count, [&](const Range& seen) {
            return seen.begin <= keys.begin && keys.begin + kWidth<float> <= seen.end;
          });
          const bool large = std::any_of(rows.large + skipped, rows.large + skipped + count, std::identity());
          const auto weigh = large ? all ? weigh_queries<false, true> : weigh_queries<true, true>
                             : all ? weigh_queries<false, false>
                                   : weigh_queries<true, false>;
          weigh(weights, scores, slopes, count, rows, skipped, factor, keys.begin);
          amx_product(block.key_sums, width, query_columns + skipped, kColumnStride, weights.ds, count, true);
          amx_product(block.value_sums, width, grad_columns + skipped, kColumnStride, weights.p, count, true);
          amx_product(sums.row(begin, head), count, weights.ds_rows, kWidth<float>, block.rows, kWidth<float>, true,
                      sums.pitch);
        }
      }
    }

  float share[kWidth<float>], one[kWidth<float>];
  std::fill(share, share + kWidth<float>, static_cast<float>(problem.scale));
  std::fill(one, one + kWidth<float>, 1.0f);
  for (size_t t = 0; t < tiles.size(); ++t) {
    transpose_out(grad_k, group, tiles[t].lanes, width, blocks[t].key_sums, share);
    transpose_out(grad_v, group, tiles[t].lanes, width, blocks[t].value_sums, one);
  }
}

#endif

}  // namespace blt
