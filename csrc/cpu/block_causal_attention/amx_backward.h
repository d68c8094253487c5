// Computes the backward pass of block_causal_attention for bf16 with AMX, as backward.cpp does, with all products
// in tile registers. p and ds are rounded to bf16 before they multiply rows.
#pragma once

#include <functional>

#include "amx.h"
#include "keys.h"

namespace blt {

#if BLT_AMX

static_assert(kAmxBackwardPadding == 2 * kTileRows, "products write whole squares of rows");

// Has the softmax of gathered queries: lse and max in units of log 2, and what RowSoftmax has of them.
struct GatheredQueries {
  Range keys[kGathered];
  float lse[kGathered], delta[kGathered], max[kGathered], inverse_sum[kGathered];
  bool large[kGathered];
};

// Points to p and ds of a step as right factors, and to ds as a left factor too, [query][lane].
struct Weights {
  BFloat16 *p, *ds, *ds_rows;
};

// Computes the weights from q . k and grad . v, both [query][lane]. The lanes begin at `key`.
template <bool kMasked, bool kLarge>
void weigh_pairs(const Weights& weights, const float* scores, const float* dp, int64_t rows,
                 const GatheredQueries& queries, int64_t first, float factor, int64_t key) {
  const float to_base_2 = kLog2e * factor;
  for (int c = 0; c < kColumns; ++c) {
    const VecF number = lane_numbers<float>(c);
    const auto weigh = [&](int64_t i) -> std::pair<VecF, VecF> {
      const int64_t cell = i * kWidth<float> + c * kLanes;
      const VecF s = load(scores + cell);
      VecF p;
      if (kLarge && queries.large[first + i])
        p = queries.inverse_sum[first + i] * exp2_or_zero(to_base_2 * (s - queries.max[first + i]));
      else
        p = exp2_or_zero(to_base_2 * s - queries.lse[first + i]);
      const VecF ds = p * (load(dp + cell) - queries.delta[first + i]);
      if constexpr (kMasked) {
        const Range& keys = queries.keys[first + i];
        const VecI unmasked =
            (static_cast<float>(keys.begin - key) <= number) & (number < static_cast<float>(keys.end - key));
        return {unmasked ? p : VecF{}, unmasked ? ds : VecF{}};
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

void propagate_amx(const Problem& problem, const RowSoftmax<float>& saved, const OutputHeads& grad_k,
                   const OutputHeads& grad_v, const QuerySums<float>& sums, int64_t kv_head, Run tiles,
                   Scratch<float> scratch) {
  const int64_t head_dim = problem.head_dim, num_heads = problem.num_heads, shared = problem.heads_per_kv_head();
  const KeyRanges& ranges = problem.ranges;
  const Range streamed = streamed_by(tiles);
  const Scaling<float> scaling(problem.scale);
  float* const scores = scratch.take(kAmxStep * kWidth<float>);
  float* const dp = scratch.take(kAmxStep * kWidth<float>);
  const auto take_step = [&] { return take_bf16(scratch, kAmxStep * kWidth<float>); };
  const Weights weights = {take_step(), take_step(), take_step()};
  BFloat16* const queries = take_bf16(scratch, kColumnStride * head_dim);
  BFloat16* const query_columns = take_bf16(scratch, kColumnStride * head_dim);
  BFloat16* const grads = take_bf16(scratch, kColumnStride * head_dim);
  BFloat16* const grad_columns = take_bf16(scratch, kColumnStride * head_dim);
  KeyBlock<float, BFloat16> blocks[kMaxTiles<float>];
  for (size_t t = 0; t < tiles.size(); ++t) {
    KeyBlock<float, BFloat16>& block = blocks[t];
    const Range& keys = tiles[t].lanes;
    block.keys = pack_tile(scratch, queries, problem.k, kv_head, keys, head_dim, scaling.power);
    block.values = pack_tile(scratch, queries, problem.v, kv_head, keys, head_dim, 1);
    block.dk = scratch.zeros(head_dim * kWidth<float>);
    block.dv = scratch.zeros(head_dim * kWidth<float>);
    block.rows = take_bf16(scratch, head_dim * kWidth<float>);
    std::fill_n(queries, head_dim * kWidth<float>, BFloat16(0.0f));
    for_each_unmasked(ranges, keys, [&](const Range& unmasked) {
      gather(queries + (unmasked.begin - keys.begin) * head_dim, problem.k, kv_head, unmasked, unmasked.size(),
             head_dim);
    });
    pack_rows(block.rows, queries, kWidth<float>, head_dim);
  }

  const TileRegisters registers;
  for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
    for (int64_t first = streamed.begin, b = ranges.document_of(first); first < streamed.end; first += kGathered) {
      const Range gathered = {first, std::min(first + kGathered, streamed.end)};
      const int64_t padded = whole_squares(gathered.size());
      gather(queries, problem.q, head, gathered, padded, head_dim);
      gather(grads, saved.grad, head, gathered, padded, head_dim);
      GatheredQueries rows = {};
      for (int64_t i = 0; i < gathered.size(); ++i) {
        while (ranges.cu_seqlens_q[b + 1] <= first + i) ++b;
        rows.keys[i] = ranges.keys(first + i, b);
        const int64_t number = (first + i) * num_heads + head;
        rows.lse[i] = kLog2e * saved.lse[number];
        rows.delta[i] = saved.delta[number];
        rows.large[i] = saved.is_large(saved.lse[number]);
        if (rows.large[i]) rows.max[i] = saved.max[number], rows.inverse_sum[i] = saved.inverse_sum[number];
        if (rows.keys[i].size() > 0) continue;
        std::fill_n(queries + i * head_dim, head_dim, BFloat16(0.0f));  // they may hold NaN
        std::fill_n(grads + i * head_dim, head_dim, BFloat16(0.0f));
      }
      gather_columns(query_columns, queries, padded, head_dim);
      gather_columns(grad_columns, grads, padded, head_dim);
      for (size_t t = 0; t < tiles.size(); ++t) {
        const Range own = whole_registers(overlap(gathered, tiles[t].streamed), first), keys = tiles[t].lanes;
        const KeyBlock<float, BFloat16>& block = blocks[t];
        for (int64_t begin = own.begin; begin < own.end; begin += kAmxStep) {
          const int64_t skipped = begin - first, count = whole_squares(std::min(kAmxStep, own.end - begin));
          amx_product(scores, count, queries + skipped * head_dim, head_dim, block.keys, head_dim, false);
          amx_product(dp, count, grads + skipped * head_dim, head_dim, block.values, head_dim, false);
          const bool all = std::all_of(rows.keys + skipped, rows.keys + skipped + count, [&](const Range& range) {
            return range.begin <= keys.begin && keys.begin + kWidth<float> <= range.end;
          });
          const bool large = std::any_of(rows.large + skipped, rows.large + skipped + count, std::identity());
          const auto weigh = large ? all ? weigh_pairs<false, true> : weigh_pairs<true, true>
                             : all ? weigh_pairs<false, false>
                                   : weigh_pairs<true, false>;
          weigh(weights, scores, dp, count, rows, skipped, scaling.factor, keys.begin);
          amx_product(block.dk, head_dim, query_columns + skipped, kColumnStride, weights.ds, count, true);
          amx_product(block.dv, head_dim, grad_columns + skipped, kColumnStride, weights.p, count, true);
          amx_product(sums.row(begin, head), count, weights.ds_rows, kWidth<float>, block.rows, kWidth<float>, true,
                      sums.pitch);
        }
      }
    }
  for (size_t t = 0; t < tiles.size(); ++t) finish(problem, grad_k, grad_v, kv_head, tiles[t].lanes, blocks[t]);
}

#endif

}  // namespace blt
